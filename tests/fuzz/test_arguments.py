"""Every field of the training arguments, with wrong values: one message that names it, before anything loads."""

import dataclasses
import json
import typing

import pytest
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from das_lm.data.domains import Domain
from das_lm.errors import UserError
from das_lm.run.recipe import Recipe
from das_lm.run.recipe_file import load_recipe
from das_lm.training.config import BOUNDS, CHOICES, DASConfig
from das_lm.training.trainer import ContinualTrainer
from tests.fuzz.mutations import ODD_VALUES
from tests.helpers import build_tokenizer, random_blocks, tiny_roberta

FIELDS = {field.name: field for field in dataclasses.fields(DASConfig)}
SOUND = {
    "max_steps": 2, "per_device_train_batch_size": 4, "report_to": "none", "importance_samples": 4, "max_length": 12,
    "memory_size": 4, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1,
}  # fmt: skip


def arguments(**training) -> DASConfig:
    recipe = Recipe("built-in", [Domain("bio")], "out", training={**SOUND, **training})
    return recipe.training_arguments(recipe.domains[0], "out")


def wrong_values(name: str) -> list:
    """What is wrong for sure: of another type, out of bounds, no choice."""
    values = [{"x": [1]}, [[1]]] if "dict" not in str(FIELDS[name].type) else [3, [1], "x"]
    low, high = BOUNDS.get(name, (None, None))
    values += [low - 1e-3, low - 1, float("nan"), -float("inf")] if low is not None else []
    values += [high * 2 + 1, 10**30, float("inf")] if high is not None else []
    return values + (["x", ""] if name in CHOICES or FIELDS[name].metadata.get("choices") else [])


@pytest.mark.parametrize("name", FIELDS)
def test_a_wrong_value_of_every_field(name):
    for value in wrong_values(name):
        with pytest.raises(UserError, match=name):
            arguments(**{name: value})


@pytest.mark.parametrize("name", FIELDS)
def test_odd_values_of_every_field(name, tmp_path, monkeypatch):
    """They fit, or the message names the field: no other error, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    for value in ODD_VALUES[:60]:
        try:
            arguments(**{name: value})
        except UserError as error:
            assert name in str(error), value
    assert not list(tmp_path.iterdir())


WRONG = [
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: 0 must be at least 1"),
    ({"learning_rate": -1}, "learning_rate: -1.0 must be at least 0"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: 0 must be at least 1"),
    ({"adam_beta1": 2}, "adam_beta1: 2.0 must be between 0 and 0.999999"),
    ({"adam_epsilon": 0}, "adam_epsilon: 0.0 must be at least 1e-30"),
    ({"save_steps": 10**30}, "save_steps: 1e+30 must be at most 4294967295"),
    ({"max_steps": 0}, "max_steps: 0 would be no limit"),
    ({"report_to": "x"}, "report_to: 'x' is none of none, all, azure_ml"),
    ({"optim": "lomo"}, "optim: 'lomo' steps inside of the backward pass"),
    ({"optim": "galore_adamw_layerwise"}, "steps inside of the backward pass"),
    ({"optim_args": "x"}, "optim: 'adamw_torch_fused' with optim_args 'x'"),
    ({"optim": "sgd", "optim_args": "momentum=-1"}, "with optim_args 'momentum=-1': Invalid momentum value"),
    ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_kwargs: None does not go with lr_scheduler_type"),
    ({"lr_scheduler_kwargs": {"x": 1}}, "lr_scheduler_kwargs: {'x': 1} does not go with lr_scheduler_type 'linear'"),
    ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": "x"}}, "lr_scheduler_kwargs: {'power'"),
    ({"lr_scheduler_kwargs": "num_cycles"}, "lr_scheduler_kwargs: 'num_cycles' is no mapping"),
    ({"activation_checkpointing_kwargs": "x"}, "activation_checkpointing_kwargs: 'x' is no mapping"),
    ({"accelerator_config": "nowhere.json"}, "accelerator_config: 'nowhere.json' is no mapping, and no file of one"),
    ({"accelerator_config": {"even_batch": 1}}, "accelerator_config: there is no 'even_batch'. Did you mean 'even_"),
    ({"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}}, "write gradient_accumulation_steps"),
    ({"torch_compile_backend": "x"}, "torch_compile_backend: 'x' is none of eager"),
    ({"torch_compile_mode": "x"}, "torch_compile_mode: 'x' is none of default"),
    ({"log_level": "loud"}, "log_level: 'loud' is none of"),
    ({"dataloader_persistent_workers": True}, "dataloader_persistent_workers: there are no workers"),
    ({"dataloader_multiprocessing_context": "fork"}, "dataloader_multiprocessing_context: there are no workers"),
    ({"ddp_backend": "gloo"}, "ddp_backend: there is one process"),
    ({"parallelism_config": {}}, "parallelism_config: not supported"),
    ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy: 'group_by_length' does nothing here"),
    ({"do_train": False}, "do_train: false has no effect: training is what this does"),
    ({"do_eval": True}, "do_eval: true has no effect: eval_strategy decides"),
    ({"do_eval": False, "eval_strategy": "epoch"}, "do_eval: false has no effect"),
    ({"do_predict": True}, "do_predict: true has no effect"),
    ({"save_strategy": "best"}, "save_strategy: 'best' needs metric_for_best_model"),
    ({"metric_for_best_model": "bio_loss"}, "metric_for_best_model: nothing is measured while training"),
    ({"metric_for_best_model": "f1", "eval_strategy": "epoch"}, "'f1' is not measured; write the loss or accuracy of"),
    (
        {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"},
        "metric_for_best_model: 'loss' is not measured; write the loss or accuracy of a domain, such as bio_loss",
    ),
    ({"lr_scheduler_type": "greedy", "eval_strategy": "epoch"}, "metric_for_best_model: 'loss' is not measured"),
]


@pytest.mark.parametrize("training, message", WRONG)
def test_found(training, message):
    with pytest.raises(UserError) as error:
        arguments(**training)
    assert message in str(error.value)


def test_packages_that_this_machine_lacks(tmp_path, monkeypatch):
    """They are told before anything loads, and are no mistake of a recipe for another machine."""

    def lacks(*_):
        raise ImportError("pip install it")

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "wandb", lacks)
    monkeypatch.setattr("transformers.Trainer.get_optimizer_cls_and_kwargs", lacks)
    monkeypatch.setattr("das_lm.training.config.is_liger_kernel_available", lambda: False)
    for training, message in (
        ({"report_to": ["wandb"]}, "report_to: 'wandb' is not installed, or not whole: pip install it"),
        ({"optim": "adamw_8bit", "optim_target_modules": "x"}, "optim: 'adamw_8bit': pip install it"),
        ({"use_liger_kernel": True}, "use_liger_kernel: liger-kernel is not installed"),
    ):
        with pytest.raises(UserError, match=message):
            arguments(**training)
        recipe = {"model_name_or_path": "m", "output_dir": "o", "domains": [{"name": "bio"}], "training": training}
        (tmp_path / "r.yaml").write_text(json.dumps(recipe))
        assert load_recipe(tmp_path / "r.yaml", check_device=False).training == training


FITTING = [
    {
        "dataloader_num_workers": 1,
        "max_steps": 2,
        "eval_strategy": "steps",
        **{name: low for name, (low, _) in BOUNDS.items() if name not in ("dataloader_num_workers", "max_steps")},
    },
    *({"report_to": value} for value in ("all", [], None)),
    *({"lr_scheduler_type": name} for name in ("constant", "inverse_sqrt")),
    {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": '{"num_decay_steps": 1}'},
    {"lr_scheduler_type": "greedy", "metric_for_best_model": "eval_bio_loss", "eval_strategy": "epoch"},
    *({"optim": name} for name in ("adafactor", "rmsprop", "adagrad")),
    {"optim": "sgd", "optim_args": "momentum=0.5"},
    {"do_train": True, "do_eval": True, "eval_strategy": "epoch", "metric_for_best_model": "bio_loss"},
    {"accelerator_config": {"even_batches": True}},
]


@pytest.mark.parametrize("training", FITTING)
def test_what_is_let_through_trains(training, tmp_path, monkeypatch):
    """At the least of every number: whatever the Trainer or torch would refuse has been refused before."""
    monkeypatch.chdir(tmp_path)
    trainer = ContinualTrainer(
        tiny_roberta(),
        arguments(**training),
        train_dataset=random_blocks(8),
        eval_dataset={"bio": random_blocks(4)},
        processing_class=build_tokenizer(),
    )
    trainer.train()
    assert trainer.state.global_step > 0


def test_the_table_of_bounds_names_every_number():
    hints = typing.get_type_hints(DASConfig)
    numbers = {name for name in FIELDS if {int, float} & {hints[name], *typing.get_args(hints[name])}}
    assert set(BOUNDS) == numbers - {"local_rank"}
