"""The trainer: equal to plain training where it should be, resumable bit for bit, and no knob that nothing reads."""

import dataclasses
import json
import logging
import math
import os
import shutil
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    RobertaForMaskedLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from das_lm import ContinualTrainer, DASConfig, DASTrainer, Importance
from das_lm.data.blocks import TrainingBlocks
from das_lm.data.collating import PaddingCollator
from das_lm.data.masking import MLMMasking
from das_lm.errors import UserError
from das_lm.files import newest_checkpoint, seal
from das_lm.units import Units, gated
from das_lm.units.importance import FILE_NAME
from tests.conftest import VOCABULARY, WORDS, build_tokenizer, random_blocks, tiny_roberta
from tests.helpers import rewrite_importance
from tests.methods.test_every_method import METHOD_KNOBS

TOKENIZER = build_tokenizer()


def config(output_dir, **options):
    """Few steps, on the CPU, silent; everything that a test is about is in `options`."""
    defaults = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "max_length": 12,
        "importance_samples": 8,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
        "save_strategy": "no",
    }
    return DASConfig(output_dir=str(output_dir), **{**defaults, **options})


def trainer_of(output_dir, model=None, trainer_class=DASTrainer, domain="bio", train=None, held_out=None, **options):
    more = {name: options.pop(name) for name in ("method", "callbacks", "architecture") if name in options}
    return trainer_class(
        model=tiny_roberta() if model is None else model,
        args=config(output_dir, **options),
        train_dataset=random_blocks(40) if train is None else train,
        eval_dataset=held_out,
        processing_class=TOKENIZER,
        domain=domain,
        **more,
    )


def run_of(*args, **options):
    """A trainer that has trained. Training starts from the random state that the trainer set when it was made."""
    run = trainer_of(*args, **options)
    run.train()
    return run


def parameters(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_equal(ours, theirs):
    """Bit for bit."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def assert_close(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=tolerance, msg=lambda t, n=name: f"{n}: {t}")


def importance_of(trainer):
    return trainer.methods[0].importance


def losses(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.fixture
def quiet_importance(monkeypatch):
    """Leaves the importance passes out, for tests that set importance themselves or need none."""

    def give(value=0.0):
        def known(self):
            return Importance("paper", {k: torch.full((n,), value) for k, n in self.units.sizes.items()})

        monkeypatch.setattr("das_lm.methods.das.DAS._known_importance", known)
        monkeypatch.setattr("das_lm.methods.das.DAS.end_domain", lambda self: None)

    return give


# ---- equivalences --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("optim", "smoothing"), [("adamw_torch", 0.0), ("sgd", 0.0), ("sgd", 0.3)])
def test_without_mask_and_contrast_it_is_the_plain_trainer(optim, smoothing, tmp_path):
    """Strength 0 and λ = 0: the parameters of transformers' own Trainer on the same blocks, over two epochs."""
    options = {
        "max_steps": 8,
        "optim": optim,
        "label_smoothing_factor": smoothing,
        "weight_decay": 0.1,
        "lr_scheduler_type": "linear",
        "learning_rate": 1e-2 if optim == "adamw_torch" else 0.3,
        "adam_epsilon": 1e-4,  # the key biases have no gradient but rounding errors, which Adam would blow up
    }
    das = trainer_of(
        tmp_path, train=random_blocks(16), soft_mask_strength=0.0, contrast_weight=0.0, mlm_probability=0.3, **options
    )
    das.train()

    collate = PaddingCollator(TOKENIZER)
    model = tiny_roberta()
    plain = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            logging_steps=1,
            use_cpu=True,
            disable_tqdm=True,
            report_to=[],
            save_strategy="no",
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            **options,
        ),
        data_collator=lambda rows: {name: value for name, value in collate(rows).items() if name != "example_id"},
        train_dataset=TrainingBlocks({"bio": random_blocks(16)}, MLMMasking(TOKENIZER, 0.3), seed=42),
    )
    plain.train()
    assert_close(parameters(das.model), parameters(model), 2e-5)
    np.testing.assert_allclose(losses(das), losses(plain), rtol=1e-5)
    start = parameters(tiny_roberta())
    assert max((value - start[name]).abs().max() for name, value in parameters(model).items()) > 1e-2


def test_naive_method_is_the_das_trainer_without_mask_and_contrast(tmp_path):
    naive = trainer_of(tmp_path, trainer_class=ContinualTrainer, model=tiny_roberta(0.1))
    naive.train()
    das = trainer_of(tmp_path, model=tiny_roberta(0.1), soft_mask_strength=0.0, contrast_weight=0.0)
    das.train()
    assert_equal(parameters(naive.model), parameters(das.model))


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_accumulation_equals_a_large_batch(optim, tmp_path):
    """16 = 4 × 4, without dropout and contrast, with masks: same steps, same logged losses."""
    options = {"contrast_weight": 0.0, "optim": optim, "importance_batch_size": 8, "adam_epsilon": 1e-4}
    runs = [
        trainer_of(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps, **options)
        for size, steps in ((16, 1), (4, 4))
    ]
    for run in runs:
        run.train()
    assert_close(*(parameters(run.model) for run in runs), 1e-5)
    for name in ("loss", "loss_mlm", "grad_norm"):
        np.testing.assert_allclose(losses(runs[0], name), losses(runs[1], name), rtol=1e-4)


class OwnModel(RobertaForMaskedLM):
    """Takes no `**kwargs`, as a user's own model may; the Trainer treats the losses of such models otherwise."""

    def forward(self, input_ids, attention_mask):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask)


def test_accumulation_with_a_model_that_takes_no_further_arguments(tmp_path):
    runs = []
    for size, steps in ((16, 1), (4, 4)):
        model = OwnModel(tiny_roberta().config)
        model.load_state_dict(tiny_roberta().state_dict())
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "contrast_weight": 0.0}
        runs.append(run_of(tmp_path, model=model, method="naive", optim="sgd", **options))
    assert_close(*(parameters(run.model) for run in runs), 1e-5)
    np.testing.assert_allclose(losses(runs[0]), losses(runs[1]), rtol=1e-4)


def test_accumulated_contrast_is_a_mean_over_the_batches(tmp_path, quiet_importance):
    """The contrast of four batches of 4 counts as much as one of 16 would: it is divided by the steps (trap 9)."""
    quiet_importance(0.5)
    run = trainer_of(tmp_path, gradient_accumulation_steps=4, max_steps=1)
    parts = []
    original = run.methods[0].loss
    run.methods[0].loss = lambda *args: parts.append(original(*args)) or parts[-1]
    run.train()
    assert len(parts) == 4
    (logged,) = losses(run, "loss_contrast")
    assert logged == pytest.approx(sum(part["contrast"].item() for part in parts) / 4, rel=1e-5)


def test_checkpointing_changes_no_loss(tmp_path):
    """With contrast, dropout and importance from the passes."""
    runs = [run_of(tmp_path, model=tiny_roberta(0.1), max_steps=6, gradient_checkpointing=on) for on in (False, True)]
    assert runs[1].model.is_gradient_checkpointing and not runs[0].model.is_gradient_checkpointing
    np.testing.assert_allclose(losses(runs[0]), losses(runs[1]), atol=1e-5)
    assert_close(parameters(runs[0].model), parameters(runs[1].model), 1e-4)


def test_same_seed_same_run_and_other_seed_other_run(tmp_path):
    """Two equal runs are equal bit for bit, which the tests below stand on."""
    runs = [run_of(tmp_path, model=tiny_roberta(0.1), seed=seed) for seed in (42, 42, 43)]
    assert_equal(parameters(runs[0].model), parameters(runs[1].model))
    assert_equal(importance_of(runs[0]).values, importance_of(runs[1]).values)
    assert any(not torch.equal(v, parameters(runs[2].model)[n]) for n, v in parameters(runs[0].model).items())


def test_data_seed_is_of_order_and_masks(tmp_path):
    """It replaces `seed` there, and only there."""
    rows = []
    for options in ({}, {"data_seed": 42}, {"data_seed": 7}):
        run = trainer_of(tmp_path, held_out=random_blocks(4, seed=9), **options)
        blocks = (run.train_dataset, run.eval_dataset)
        rows.append([[some[index]["labels"].tolist() for index in range(len(some))] for some in blocks])
    assert rows[0] == rows[1] and rows[0][0] != rows[2][0] and rows[0][1] != rows[2][1]


@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, 0), (torch.bfloat16, 1)])
def test_half_precision_parameters_are_warned_of(dtype, count, tmp_path, caplog):
    """METHODS §1, trap 10."""
    with caplog.at_level(logging.WARNING, logger="das_lm"):
        trainer_of(tmp_path, model=tiny_roberta().to(dtype))
    assert sum("half-precision parameters" in record.getMessage() for record in caplog.records) == count


# ---- no knob that nothing reads ------------------------------------------------------------------------------------

DOCUMENTS = Dataset.from_dict({"text": [" ".join(WORDS[i % 50 : i % 50 + 8]) for i in range(60)]})


def after_run(directory, model_options=None, text=False, **options):
    """Final parameters, importance, held-out loss and size of the importance batches of a short run."""
    held_out = {"bio": DOCUMENTS.select(range(8))} if text else {"bio": random_blocks(6, seed=9)}
    run = trainer_of(
        directory,
        model=tiny_roberta(**(model_options or {})),
        train=DOCUMENTS if text else None,
        held_out=held_out,
        **options,
    )
    run.train()
    return types.SimpleNamespace(
        parameters=parameters(run.model),
        importance=importance_of(run).values,
        known=importance_of(run).domains,
        held_out=run.evaluate()["eval_bio_loss"],
        importance_batch=len(next(run.importance_batches(-1))["input_ids"]),
        blocks=len(run.train_dataset),
    )


#: Field -> its other value, what must change, and options that both runs share.
KNOBS = {
    "max_length": (10, ("blocks", "parameters", "held_out"), {"text": True}),
    "mlm_probability": (0.4, ("parameters", "importance", "held_out"), {}),
    "importance": ("file", ("parameters", "known", "importance"), {"importance": "proxy"}),
    "importance_samples": (16, ("parameters", "importance"), {}),
    "importance_batch_size": (2, ("importance_batch",), {}),
    "importance_normalization": ("rank", ("parameters", "importance"), {}),
    "importance_accumulation": ("signed", ("parameters", "importance"), {}),
    "proxy": ("logits", ("parameters", "importance"), {}),
    "gate_dropout": (0.4, ("parameters", "importance"), {}),
    "soft_mask_target": ("gradient", ("parameters",), {}),
    "soft_mask_units": (["head"], ("parameters",), {}),
    "soft_mask_strength": (0.5, ("parameters",), {}),
    "non_unit_lr_scale": (0.5, ("parameters",), {}),
    "contrast_weight": (0.1, ("parameters",), {}),
    "contrast_temperature": (0.5, ("parameters",), {}),
    "contrast_prior_gradient": (False, ("parameters",), {}),
}


def test_every_added_field_is_covered():
    added = {field.name for field in dataclasses.fields(DASConfig)} - {
        field.name for field in dataclasses.fields(TrainingArguments)
    }
    elsewhere = {"separate_documents", "chunked_cross_entropy"}  # tests/model/test_causal.py
    elsewhere |= {"interpolation_domains"}  # tests/run/test_walk_methods.py
    assert added == set(KNOBS) | set(METHOD_KNOBS) | elsewhere


@pytest.fixture(scope="module")
def baselines(tmp_path_factory):
    """Runs with the defaults, made once: without dropout, so that nothing differs by chance."""
    known = {}

    def run(**options):
        key = json.dumps(options, sort_keys=True)
        if key not in known:
            known[key] = after_run(tmp_path_factory.mktemp("baseline"), **options)
        return known[key]

    return run


@pytest.mark.parametrize("field", KNOBS)
def test_every_field_changes_something(field, baselines, tmp_path):
    value, observables, shared = KNOBS[field]
    if field == "importance":
        units = Units(tiny_roberta())
        Importance("paper", {k: torch.full((n,), 0.3) for k, n in units.sizes.items()}, domains=["elsewhere"]).save(
            tmp_path / FILE_NAME, units
        )
        value = str(tmp_path / FILE_NAME)
    before, after = baselines(**shared), after_run(tmp_path, **{**shared, field: value})
    for name in observables:
        ours, theirs = getattr(before, name), getattr(after, name)
        if isinstance(ours, dict):
            distance = max((ours[key] - theirs[key]).abs().max().item() for key in ours)
            assert distance > 1e-4, name
        else:
            assert ours != theirs, name
    if field in ("contrast_prior_gradient", "soft_mask_units", "contrast_weight"):
        # What was known before is measured before the first step, and none of these may change that.
        assert before.importance_batch == after.importance_batch and before.known == after.known


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"importance_normalization": "max"}, "importance_normalization: 'max' is none of paper, rank, positive"),
        ({"importance_accumulation": "sum"}, "importance_accumulation: 'sum' is none of absolute, signed"),
        ({"proxy": "loss"}, "proxy: 'loss' is none of hidden, logits"),
        ({"soft_mask_target": "step"}, "soft_mask_target: 'step' is none of update, gradient"),
        ({"soft_mask_units": ["head", "neuron"]}, "soft_mask_units: 'neuron' is none of"),
        ({"soft_mask_strength": 1.5}, "soft_mask_strength: 1.5 must be between 0 and 1"),
        ({"mlm_probability": 0.0}, "mlm_probability: 0.0 must be between 0.01 and 1"),
        ({"contrast_temperature": 0.0}, "contrast_temperature: 0.0 must be at least 0.0001"),
        ({"contrast_weight": float("nan")}, "contrast_weight: nan must be at least 0"),
        ({"importance_samples": 0}, "importance_samples: 0 must be at least 1"),
        ({"non_unit_lr_scale": -1.0}, "non_unit_lr_scale: -1.0 must be at least 0"),
        ({"remove_unused_columns": True}, "remove_unused_columns: must be false"),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "use_reentrant must be false",
        ),
    ],
)
def test_wrong_values_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


# ---- resume --------------------------------------------------------------------------------------------------------

RESUMABLE = {
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 3,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "linear",
    "gradient_accumulation_steps": 2,
}


def resumable(directory, **options):
    """Ten batches of four to the epoch, two to the step: the epoch ends between checkpoints."""
    return trainer_of(
        directory,
        model=tiny_roberta(0.1),
        held_out={"bio": random_blocks(6, seed=9), "general": random_blocks(5, seed=8)},
        **{**RESUMABLE, **options},
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Output directory with checkpoints 3, 6 and 8, and the trainer that wrote it. Tests copy what they change."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    run = resumable(directory)
    run.train()
    return directory, run


@pytest.mark.parametrize("step", [3, 6])
def test_resumed_equals_uninterrupted(step, uninterrupted, tmp_path):
    """Bit for bit: parameters, accumulated importance, and the losses from there on."""
    directory, whole = uninterrupted
    rest = resumable(tmp_path)
    with torch.no_grad():  # whatever the model was, it is the checkpoint's now
        rest.model.lm_head.bias.add_(1)
    rest.train(resume_from_checkpoint=directory / f"checkpoint-{step}")
    assert_equal(parameters(rest.model), parameters(whole.model))
    assert_equal(importance_of(rest).values, importance_of(whole).values)
    for ours, theirs in zip(importance_of(rest).by_domain, importance_of(whole).by_domain, strict=True):
        assert_equal(ours, theirs)
    assert importance_of(rest).domains == importance_of(whole).domains == ["general", "bio"]
    for name in ("loss", "loss_mlm", "loss_contrast", "eval_bio_loss", "eval_general_accuracy"):
        assert losses(rest, name)[-2:] == losses(whole, name)[-2:], name


def test_resume_from_the_newest(uninterrupted, tmp_path):
    """`resume_from_checkpoint=True`, the Trainer's own word for the newest checkpoint of the output directory."""
    directory, whole = uninterrupted
    shutil.copytree(directory / "checkpoint-3", tmp_path / "checkpoint-3")
    rest = resumable(tmp_path)
    rest.train(resume_from_checkpoint=True)
    assert_equal(parameters(rest.model), parameters(whole.model))
    assert_equal(importance_of(rest).values, importance_of(whole).values)


def test_nothing_to_resume_from(uninterrupted, tmp_path):
    """No checkpoint, or none that is whole, is an error: not a new start."""
    with pytest.raises(UserError, match=f"no whole checkpoint in {tmp_path} to resume from"):
        resumable(tmp_path).train(resume_from_checkpoint=True)
    shutil.copytree(uninterrupted[0] / "checkpoint-3", tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / "manifest.json").unlink()
    with pytest.raises(UserError, match="no whole checkpoint in"):
        resumable(tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "options",
    [
        {},  # drops through the gates are addressed by step
        {"non_unit_lr_scale": 0.5, "dataloader_num_workers": 1},
        {"soft_mask_target": "gradient", "optim": "sgd", "non_unit_lr_scale": 0.0},
    ],
)
def test_resume_without_dropout(options, tmp_path):
    """With a learning rate apart, frozen parameters, workers that prefetch, and gate drops."""
    options = {**RESUMABLE, "eval_strategy": "no", **options}
    whole = run_of(tmp_path / "a", **options)
    rest = trainer_of(tmp_path / "b", **options)
    rest.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert_equal(parameters(rest.model), parameters(whole.model))


def test_truncated_checkpoint(uninterrupted, tmp_path):
    """Is refused by name, and passed over when the newest whole one is looked for."""
    directory = tmp_path / "run"
    shutil.copytree(uninterrupted[0], directory)
    assert newest_checkpoint(directory) == directory / "checkpoint-8"
    weights = directory / "checkpoint-8" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (directory / "checkpoint-6" / "manifest.json").unlink()
    assert newest_checkpoint(directory) == directory / "checkpoint-3"
    for step, culprit in ((8, "model.safetensors"), (6, "manifest.json")):
        with pytest.raises(UserError, match=f"checkpoint-{step} is not whole: {culprit}; resume from an older one"):
            resumable(tmp_path).train(resume_from_checkpoint=str(directory / f"checkpoint-{step}"))


@pytest.mark.parametrize("name", ["optimizer.pt", "importance.safetensors", "trainer_state.json", "rng_state.pth"])
def test_changed_file_in_a_checkpoint(name, uninterrupted, tmp_path):
    """The same size, one byte other: the checksum tells."""
    shutil.copytree(uninterrupted[0] / "checkpoint-3", tmp_path / "checkpoint-3")
    path = tmp_path / "checkpoint-3" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert newest_checkpoint(tmp_path) is None
    with pytest.raises(UserError, match=name):
        resumable(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_rotation_keeps_the_newest_whole_ones(tmp_path):
    trainer_of(tmp_path, max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=2).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    assert newest_checkpoint(tmp_path).name == "checkpoint-4"


def test_rotation_does_not_ask_the_clock(tmp_path, monkeypatch):
    """It is set back an hour before every checkpoint; and one of a later step, which is broken, was passed over."""
    (tmp_path / "checkpoint-9").mkdir()

    def sealed(directory):
        seal(directory)
        step = int(directory.name.partition("-")[2])
        os.utime(directory, (10**9 - 3600 * step,) * 2)

    monkeypatch.setattr("das_lm.training.checkpoints.seal", sealed)
    trainer_of(tmp_path, max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=2).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in (3, 4, 9)]


# ---- evaluation ----------------------------------------------------------------------------------------------------


def test_evaluation_changes_nothing_of_training(tmp_path):
    """With dropout: neither before the first step nor in between. (A data loader would advance the random state.)"""
    held_out = {"bio": random_blocks(6, seed=9)}
    runs = []
    for options in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        run = trainer_of(tmp_path, model=tiny_roberta(0.1), held_out=held_out, max_steps=5, **options)
        if options:
            run.evaluate()
        run.train()
        runs.append(run)
    assert len(losses(runs[1], "eval_bio_loss")) == 5
    assert_equal(parameters(runs[0].model), parameters(runs[1].model))
    assert_equal(importance_of(runs[0]).values, importance_of(runs[1]).values)


def test_evaluate_equals_a_loop_over_documents(tmp_path):
    """Exact sums over the predicted tokens of documents of several windows, dropout off, in batches of any size."""
    words = np.random.default_rng(0).choice(WORDS, size=200).tolist()
    lengths = (30, 4, 11, 1, 25, 7)
    starts = np.cumsum((0, *lengths))
    documents = Dataset.from_dict(
        {"text": [" ".join(words[s : s + n]) for s, n in zip(starts, lengths, strict=False)]}
    )
    measured = []
    for size in (1, 4, 64):
        run = trainer_of(
            tmp_path,
            model=tiny_roberta(0.3),
            held_out={"bio": documents},
            per_device_eval_batch_size=size,
            mlm_probability=0.4,
            dataloader_drop_last=True,  # of training
        )
        measured.append(run.evaluate())
        assert run.model.training
    held_out = run.eval_dataset["bio"]
    assert len(held_out) == 3 + 1 + 2 + 1 + 3 + 1

    run.model.eval()
    nats, tokens, correct = np.zeros(6), np.zeros(6), np.zeros(6)
    for index in range(len(held_out)):
        window = held_out[index]
        with torch.no_grad():
            logits = run.model(input_ids=torch.tensor(window["input_ids"])[None]).logits[0]
        for position, label in enumerate(window["labels"]):
            if label != -100:
                nats[window["document"]] += F.cross_entropy(logits[position], torch.tensor(label)).item()
                tokens[window["document"]] += 1
                correct[window["document"]] += logits[position].argmax().item() == label
    assert (tokens > 0).all()
    for metrics in measured:
        assert metrics["eval_bio_loss"] == pytest.approx(nats.sum() / tokens.sum(), rel=1e-5)
        assert metrics["eval_bio_accuracy"] == pytest.approx(correct.sum() / tokens.sum(), abs=1e-9)
        assert metrics["eval_bio_tokens"] == tokens.sum() and metrics["eval_bio_documents"] == 6


def test_two_models_see_the_same_held_out_masks(tmp_path):
    """Trained or not: the masks are of the seed and the text alone."""
    seen = []
    for seed in (0, 1):
        run = trainer_of(tmp_path, model=tiny_roberta(seed=seed), held_out=random_blocks(5, seed=9))
        run.train()
        seen.append([run.eval_dataset[index]["labels"].tolist() for index in range(5)])
    assert seen[0] == seen[1]


# ---- importance from dropout ---------------------------------------------------------------------------------------


def proxy_of(run):
    return run.methods[0]._proxy_importance()


@pytest.mark.parametrize("proxy", ["hidden", "logits"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_proxy_importance_is_not_zero(dropout, proxy, tmp_path):
    """From dropout, or where the model has none, from drops through the gates."""
    run = trainer_of(tmp_path, model=tiny_roberta(dropout), proxy=proxy)
    assert run.methods[0].drops_units == (dropout == 0)
    for key, value in proxy_of(run).items():
        assert value.min() >= 0 and (value > 0).float().mean() > 0.9, key
    assert run.model.training


def test_proxy_of_a_model_without_dropout_under_checkpointing(tmp_path):
    """The drops are still there when the forward pass runs again."""
    expected = proxy_of(trainer_of(tmp_path))
    run = trainer_of(tmp_path)
    run.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for key, value in proxy_of(run).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-7)


def test_without_drops_the_proxy_of_a_model_without_dropout_is_zero(tmp_path):
    """METHODS §1, trap 5: why the gates have to drop units."""
    run = trainer_of(tmp_path, gate_dropout=0.0)
    assert all(value.abs().max() < 1e-5 for value in proxy_of(run).values())


def test_proxy_leaves_the_random_state_alone(tmp_path):
    """And does not depend on it."""
    run = trainer_of(tmp_path, model=tiny_roberta(0.1))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = proxy_of(run)
    assert torch.equal(torch.rand(3), expected)
    assert_equal(proxy_of(run), first)


def test_proxy_equals_a_loop_over_examples(tmp_path):
    """Without dropout, one example at a time and with the gates written out: |∂ KL(p₁ ‖ p₂)/∂g| with the gate shared
    by both views, mean over the tokens."""
    run = trainer_of(tmp_path, importance_samples=5)
    units, method = run.units, run.methods[0]
    blocks = run.train_dataset.at(-1)
    total = {key: torch.zeros(size) for key, size in units.sizes.items()}
    for index in range(5):
        row = blocks[index]
        ids = torch.tensor(np.where(row["labels"] == -100, row["input_ids"], row["labels"]))[None]
        drops = method._drops(torch.tensor([row["example_id"]]), views=2)
        gates = {key: torch.ones(1, size, requires_grad=True) for key, size in units.sizes.items()}
        hidden = []
        for view in range(2):
            with gated(units, {key: gates[key] * drops[key][view] for key in gates}):
                hidden.append(run.model.roberta(ids).last_hidden_state)
        p, q = (F.log_softmax(h, dim=-1) for h in hidden)
        kl = (p.exp() * (p - q)).sum(dim=-1).mean()
        for key, gradient in zip(gates, torch.autograd.grad(kl, list(gates.values())), strict=True):
            total[key] += gradient[0].abs() / 5
    for key, value in proxy_of(run).items():
        torch.testing.assert_close(value, total[key], rtol=1e-3, atol=1e-6)


def test_domain_importance_is_of_the_domains_loss_without_dropout(tmp_path):
    """|∂ MLM loss/∂g|, mean over examples, on a model with dropout: dropout is off, whatever the random state."""
    run = trainer_of(tmp_path, model=tiny_roberta(0.3), importance_samples=5)
    units, blocks = run.units, run.train_dataset.at(-2)
    total = {key: torch.zeros(size) for key, size in units.sizes.items()}
    run.model.eval()
    for index in range(5):
        row = blocks[index]
        gates = {key: torch.ones(1, size, requires_grad=True) for key, size in units.sizes.items()}
        with gated(units, gates):
            loss = run.model(torch.tensor(row["input_ids"])[None], labels=torch.tensor(row["labels"])[None]).loss
        for key, gradient in zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True):
            total[key] += gradient[0].abs() / 5
    run.model.train()
    for key, value in run.methods[0]._domain_importance().items():
        torch.testing.assert_close(value, total[key], rtol=1e-3, atol=1e-6)
    assert run.model.training


def test_drops_depend_on_seed_step_and_example_alone(tmp_path):
    method = trainer_of(tmp_path).methods[0]
    ids = torch.tensor([11, 22, 33])
    drops = method._drops(ids, views=2)  # [views × examples, units]
    other = method._drops(torch.tensor([33, 7]), views=2)
    method.trainer.state.global_step = 1
    later = method._drops(ids, views=2)
    reseeded = trainer_of(tmp_path, seed=7).methods[0]._drops(ids, views=2)
    for key, value in drops.items():
        assert torch.equal(other[key][0], value[2]) and torch.equal(other[key][2], value[5])
        torch.testing.assert_close(value.unique(), torch.tensor([0.0, 1 / 0.9])[-len(value.unique()) :])
    together = torch.cat(list(drops.values()), dim=1)
    assert (torch.pdist(together) > 1).all()  # no two views or examples alike
    assert (together == 0).float().mean() == pytest.approx(0.1, abs=0.03)
    for changed in (later, reseeded):
        assert (together - torch.cat(list(changed.values()), dim=1)).norm(dim=1).min() > 1


@pytest.fixture
def views_of_one_step(tmp_path, quiet_importance, monkeypatch):
    """Trains one step on known importance and gives the trainer, its batch and the contrast's three views."""
    quiet_importance(0.5)
    views, batches = [], []

    def loss(*representations):
        views.append(representations[:3])
        return sum(view.mean() for view in views[-1])

    def give(dropout, prior_gradient):
        options = {"contrast_prior_gradient": prior_gradient, "max_steps": 1, "learning_rate": 1e-12}
        run = trainer_of(tmp_path, model=tiny_roberta(dropout), **options)
        add_rows = run.methods[0].add_rows
        run.methods[0].add_rows = lambda batch, stack: batches.append(batch) or add_rows(batch, stack)
        run.train()
        return run, batches[0], views[0]

    monkeypatch.setattr("das_lm.methods.das.contrastive_loss", loss)
    return give


def pooled(run, batch, gates):
    """Mean last hidden state of the text without masks, one example and one set of gates at a time."""
    rows = []
    ids = torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])
    for row in range(len(ids)):
        with torch.no_grad(), gated(run.units, {key: gate[row : row + 1] for key, gate in gates.items()}):
            rows.append(run.model.roberta(ids[row : row + 1]).last_hidden_state[0].mean(dim=0))
    return torch.stack(rows)


@pytest.mark.parametrize("prior_gradient", [True, False])
def test_views_of_a_model_without_dropout(prior_gradient, views_of_one_step):
    """Anchor and positive are the text without masks under two draws of the gates, the prior is seen through the
    importance, all of the same examples."""
    run, batch, views = views_of_one_step(0.0, prior_gradient)
    run.state.global_step = 0
    drops = run.methods[0]._drops(batch["example_id"], views=2)
    halves = {key: torch.full((4, size), 0.5) for key, size in run.units.sizes.items()}
    draws = ({key: drop[:4] for key, drop in drops.items()}, {key: drop[4:] for key, drop in drops.items()}, halves)
    for view, gates in zip(views, draws, strict=True):
        torch.testing.assert_close(view, pooled(run, batch, gates), rtol=1e-4, atol=1e-4)
    assert (views[0] - views[1]).norm(dim=1).min() > 0.1
    assert [view.requires_grad for view in views] == [True, True, prior_gradient]


@pytest.mark.parametrize("prior_gradient", [True, False])
def test_views_of_a_model_with_dropout(prior_gradient, views_of_one_step):
    """Two dropout draws of the text without masks: near what the model says without, but not equal."""
    run, batch, views = views_of_one_step(0.01, prior_gradient)
    run.model.eval()
    open_gates = {key: torch.ones(4, size) for key, size in run.units.sizes.items()}
    halves = {key: gate / 2 for key, gate in open_gates.items()}
    for view, gates in zip(views, (open_gates, open_gates, halves), strict=True):
        distances = torch.cdist(view, pooled(run, batch, gates))
        assert distances.argmin(dim=1).tolist() == [0, 1, 2, 3] and distances.diagonal().min() > 1e-3
    assert (views[0] - views[1]).norm(dim=1).min() > 1e-3
    assert [view.requires_grad for view in views] == [True, True, prior_gradient]


def test_rows_of_the_domain_are_not_gated(tmp_path, quiet_importance):
    """The views change nothing of the domain's own loss: without dropout, the loss with and without contrast agree."""
    quiet_importance(0.5)
    runs = [trainer_of(tmp_path, max_steps=1, contrast_weight=weight) for weight in (0.0, 1.0)]
    for run in runs:
        run.train()
    assert losses(runs[0], "loss_mlm")[0] == pytest.approx(losses(runs[1], "loss_mlm")[0], rel=1e-6)


# ---- loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logging_steps", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_parts_of_the_loss_are_logged(accumulation, logging_steps, tmp_path):
    """They sum to the loss, per step."""
    run = trainer_of(
        tmp_path,
        model=tiny_roberta(0.1),
        max_steps=4,
        gradient_accumulation_steps=accumulation,
        logging_steps=logging_steps,
    )
    run.train()
    assert len(losses(run)) == 4 // logging_steps
    for whole, mlm, contrast in zip(losses(run), losses(run, "loss_mlm"), losses(run, "loss_contrast"), strict=True):
        assert whole == pytest.approx(mlm + contrast, rel=1e-5)
        assert mlm > 1 and contrast > 0.01


def test_loss_is_not_a_number(tmp_path):
    """The message names domain and step, and no checkpoint is written."""

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.roberta.encoder.layer[1].output.dense.weight.data[0, 0] = math.nan

    run = trainer_of(tmp_path, max_steps=5, callbacks=[Spoil()], save_strategy="steps", save_steps=3)
    with pytest.raises(UserError, match="loss of domain 'bio' is nan at step 3; try a smaller learning_rate"):
        run.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_model_that_is_not_a_number_from_the_start(tmp_path):
    model = tiny_roberta()
    model.lm_head.dense.weight.data[0, 0] = math.nan
    with pytest.raises(UserError, match="loss of domain 'cs' is nan at step 1"):
        trainer_of(tmp_path, model=model, domain="cs").train()


def test_bf16_runs_under_autocast(tmp_path):
    """Parameters and importance stay fp32; the forward pass does not."""
    run = trainer_of(tmp_path, bf16=True, held_out=random_blocks(4, seed=9))
    seen = set()
    hook = run.model.roberta.encoder.layer[0].intermediate.dense.register_forward_hook(
        lambda module, args, output: seen.add(output.dtype)
    )
    run.train()
    metrics = run.evaluate()
    hook.remove()
    assert seen == {torch.bfloat16}
    assert math.isfinite(metrics["eval_loss"])
    assert {p.dtype for p in run.model.parameters()} == {v.dtype for v in importance_of(run).values.values()}
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    plain = trainer_of(tmp_path)
    plain.train()
    np.testing.assert_allclose(losses(run, "loss_mlm"), losses(plain, "loss_mlm"), rtol=0.05)


# ---- what is no unit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_scale_zero_freezes_what_is_no_unit(optim, tmp_path, quiet_importance):
    """Embeddings, norms and LM head stay bit for bit, under weight decay; all units' parameters move."""
    quiet_importance(0.0)
    run = trainer_of(tmp_path, model=tiny_roberta(0.1), non_unit_lr_scale=0.0, weight_decay=0.1, optim=optim)
    run.train()
    owned, start = run.units.owned_parameters(), parameters(tiny_roberta())
    assert {n.split(".")[1] for n in start if n not in owned} >= {"embeddings", "encoder", "layer_norm", "dense"}
    for name, value in parameters(run.model).items():
        assert torch.equal(value, start[name]) == (name not in owned), name


def test_scale_is_a_learning_rate_factor(tmp_path, quiet_importance):
    """One SGD step: half of it for what is no unit, all of it for units."""
    quiet_importance(0.0)
    options = {"optim": "sgd", "max_steps": 1, "contrast_weight": 0.0, "learning_rate": 0.1, "max_grad_norm": 0.0}
    runs = [trainer_of(tmp_path, non_unit_lr_scale=scale, **options) for scale in (1.0, 0.5)]
    for run in runs:
        run.train()
    start, whole, half = parameters(tiny_roberta()), parameters(runs[0].model), parameters(runs[1].model)
    owned = runs[0].units.owned_parameters()
    for name in start:
        factor = 1.0 if name in owned else 0.5
        torch.testing.assert_close(half[name] - start[name], factor * (whole[name] - start[name]), rtol=0, atol=1e-6)
    assert (whole["lm_head.dense.weight"] - start["lm_head.dense.weight"]).abs().max() > 1e-3


def test_scaled_rate_follows_the_schedule(tmp_path, quiet_importance):
    """Under a linear schedule both learning rates fall together."""
    quiet_importance(0.0)
    rates = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            rates.append({group["lr"] for group in optimizer.param_groups if group["params"]})

    options = {"lr_scheduler_type": "linear", "learning_rate": 0.4, "max_steps": 4, "callbacks": [Watch()]}
    trainer_of(tmp_path, non_unit_lr_scale=0.25, **options).train()
    expected = [{0.4 * (1 - step / 4), 0.1 * (1 - step / 4)} for step in range(4)]
    for ours, theirs in zip(rates, expected, strict=True):
        assert sorted(ours) == pytest.approx(sorted(theirs))


# ---- saved models and importance -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model that learned a domain, saved, and its trainer."""
    directory = tmp_path_factory.mktemp("saved") / "final"
    run = trainer_of(directory.parent)
    run.train()
    run.save_model(str(directory))
    return directory, run


def test_saved_model(saved):
    """A plain transformers directory, importance and state beside it, nothing to unpickle."""
    directory, run = saved
    model, info = AutoModelForMaskedLM.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_equal(parameters(model), parameters(run.model))
    names = {path.name for path in directory.rglob("*")}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", FILE_NAME, "continual_state.json"}
    assert {name.rsplit(".", 1)[-1] for name in names} <= {"json", "safetensors", "txt"}
    assert not [name for name in names if name.startswith(".")]
    state = json.loads((directory / "continual_state.json").read_text())
    assert state["domain"] == "bio" and state["methods"] == ["DAS"] and state["step"] == 3
    assert state["importance_of"] == ["general", "bio"]
    assert state["mean_importance"] == importance_of(run).saturation()
    loaded = Importance.load(directory, run.units)
    assert_equal(loaded.values, importance_of(run).values)


@pytest.mark.parametrize(
    "options", [{"importance_normalization": "rank"}, {"importance_accumulation": "signed"}], ids=lambda one: [*one][0]
)
def test_importance_that_was_measured_in_another_way_is_refused(options, saved, tmp_path):
    """From a path, beside the model, of the same object's last domain, and in a checkpoint."""
    directory, run = saved
    ((key, value),) = options.items()
    known = {"importance_normalization": "paper", "importance_accumulation": "absolute"}[key]
    message = rf"measured with {key} '{known}', and '{value}' is asked for: write {key}: {known}, or importance: proxy"
    model = AutoModelForMaskedLM.from_pretrained(directory)
    for given in ({"importance": str(directory)}, {"model": model}, {"method": run.methods}):
        with pytest.raises(UserError, match=message):
            trainer_of(tmp_path, **given, **options)
    fresh = trainer_of(tmp_path, **options)
    with pytest.raises(UserError, match=message):
        fresh.methods[0].load(directory)
    fresh = trainer_of(tmp_path, model=model, importance="proxy", **options)
    assert fresh.methods[0].importance is None
    fresh.train()
    assert getattr(importance_of(fresh), key.removeprefix("importance_")) == value


def test_a_das_that_knows_more_is_not_measured_anew(tmp_path):
    """Of one that serves domain after domain, `proxy` says how it began: what to write is something else."""
    run = run_of(tmp_path, max_steps=1, importance="proxy")
    with pytest.raises(UserError, match="write importance_normalization: paper, or take a new DAS to measure it"):
        trainer_of(tmp_path, method=run.methods, importance="proxy", importance_normalization="rank")


def test_importance_of_an_old_file_is_taken_as_the_run_says(saved, tmp_path, caplog):
    directory, run = saved
    rewrite_importance(directory / FILE_NAME, tmp_path / "old.safetensors", accumulation=None)
    options = {"importance": str(tmp_path / "old.safetensors"), "importance_accumulation": "signed"}
    for _ in range(2):
        assert importance_of(trainer_of(tmp_path, **options)).accumulation == "signed"
    assert caplog.text.count("does not say its importance_accumulation: 'signed' is taken") == 1


def test_importance_beside_the_model_is_found(saved, tmp_path):
    """`auto`: the next domain starts from it and adds its own."""
    directory, run = saved
    model = AutoModelForMaskedLM.from_pretrained(directory)
    following = trainer_of(tmp_path, model=model, domain="cs")
    following.train()
    assert importance_of(following).domains == ["general", "bio", "cs"]
    for key, value in importance_of(following).values.items():
        before = importance_of(run).values[key]
        torch.testing.assert_close(value, torch.maximum(before, importance_of(following).by_domain[-1][key]))


def test_proxy_ignores_the_importance_beside_the_model(saved, tmp_path):
    model = AutoModelForMaskedLM.from_pretrained(saved[0])
    following = trainer_of(tmp_path, model=model, domain="cs", importance="proxy")
    following.train()
    assert importance_of(following).domains == ["general", "cs"]


def test_importance_of_another_model_is_refused(saved, tmp_path):
    with pytest.raises(UserError, match=r"layers\.0\.head has 4 units there and 8 in this model"):
        trainer_of(tmp_path, model=tiny_roberta(num_attention_heads=8), importance=str(saved[0]))


def test_importance_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="there is no file .*nowhere"):
        trainer_of(tmp_path, importance=str(tmp_path / "nowhere"))


def test_what_was_learned_before_is_held_back(saved, tmp_path):
    """The mask of the second domain is 1 − accumulated importance: after one SGD step by hand."""
    directory, run = saved
    options = {"max_steps": 1, "optim": "sgd", "contrast_weight": 0.0, "learning_rate": 0.1, "domain": "cs"}
    runs = [
        trainer_of(tmp_path, model=AutoModelForMaskedLM.from_pretrained(directory), soft_mask_strength=s, **options)
        for s in (1.0, 0.0)
    ]
    for one in runs:
        one.train()
    start, masked, plain = parameters(run.model), parameters(runs[0].model), parameters(runs[1].model)
    for piece in run.units.slices:
        name = piece.parameter
        held_back = piece.spread(importance_of(run).values[piece.group], start[name].ndim)
        expected = (1 - held_back) * (plain[name] - start[name])
        torch.testing.assert_close(masked[name] - start[name], expected, rtol=0, atol=1e-6)


# ---- refused -------------------------------------------------------------------------------------------------------


def test_max_length_beyond_the_model(tmp_path):
    """RoBERTa has 40 position embeddings, of which the first two are for padding."""
    trainer_of(tmp_path, max_length=38)
    with pytest.raises(UserError, match="max_length: 39 is beyond what the model reads, 38 tokens"):
        trainer_of(tmp_path, max_length=39)
    bert = BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            max_position_embeddings=40,
        )
    )
    trainer_of(tmp_path, model=bert, max_length=40)
    with pytest.raises(UserError, match="max_length: 41 is beyond what the model reads, 40 tokens"):
        trainer_of(tmp_path, model=bert, max_length=41)


def test_max_length_beyond_the_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setattr(TOKENIZER, "model_max_length", 20)
    with pytest.raises(UserError, match="max_length: 21 is beyond what the model reads, 20 tokens"):
        trainer_of(tmp_path, max_length=21)


def test_the_tokenizer_of_another_model(tmp_path):
    with pytest.raises(UserError, match="processing_class: the tokenizer has 64 tokens, the model 63; give its own"):
        trainer_of(tmp_path, model=tiny_roberta(vocab_size=VOCABULARY - 1))


def test_unknown_method(tmp_path):
    with pytest.raises(UserError, match="method: 'dass' is unknown. Did you mean 'das'"):
        trainer_of(tmp_path, method="dass")


def test_nothing_to_train_on(tmp_path):
    run = trainer_of(tmp_path, held_out=random_blocks(3))
    run.train_dataset = None
    with pytest.raises(UserError, match="domain 'bio' has no text to train on"):
        run.train()


def test_several_gpus_in_one_process(tmp_path):
    args = config(tmp_path)
    args._n_gpu = 2
    with pytest.raises(UserError, match="one process sees 2 GPUs.*accelerate launch"):
        DASTrainer(model=tiny_roberta(), args=args, train_dataset=random_blocks(4), processing_class=TOKENIZER)


def test_what_is_no_unit_is_frozen_only_while_its_trainer_trains(tmp_path):
    """The same model in a second trainer, with the default learning rate everywhere, learns with all of it."""
    model = tiny_roberta()
    trainer_of(tmp_path / "first", model=model, non_unit_lr_scale=0.0).train()
    assert all(parameter.requires_grad for parameter in model.parameters())
    before = model.lm_head.dense.weight.detach().clone()
    trainer_of(tmp_path / "second", model=model).train()
    assert not torch.equal(before, model.lm_head.dense.weight)
