"""LoRA adapters: what they and their merging compute, what masks hold, what is refused, and the walk in three ways."""

import copy
import importlib.util
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForMaskedLM

from das_lm import ContinualTrainer, DASConfig, Importance
from das_lm.cli import main
from das_lm.errors import UserError
from das_lm.files import newest_checkpoint
from das_lm.methods import METHODS
from das_lm.model.objective import has_active_dropout, run_language_model
from das_lm.units import Units, gated
from das_lm.units.importance import measure_importance
from tests.helpers import random_blocks, refused, save_model, tiny_roberta
from tests.model.helpers import (
    ADAPTED_METHODS,
    ROWS,
    TOKENIZER,
    assert_close,
    assert_equal,
    batch_of,
    tiny_gpt2,
    tiny_llama,
    weights_of,
)
from tests.training.helpers import config

BUILDERS = {"roberta": tiny_roberta, "gpt2": tiny_gpt2, "llama": tiny_llama}


def trainer_of(directory, model, method="naive", peft_config=None, domain="bio", **options) -> ContinualTrainer:
    args = config(directory, **options)
    blocks = random_blocks(40)
    return ContinualTrainer(
        model, args, method, blocks, processing_class=TOKENIZER, domain=domain, peft_config=peft_config
    )


def adapter_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def merged(model: PeftModel):
    return copy.deepcopy(model).merge_and_unload()


def randomly_adapted(kind: str, **options) -> PeftModel:
    """With an adapter that has been trained: nothing of it is 0."""
    model = get_peft_model(BUILDERS[kind](), LoraConfig(r=3, target_modules="all-linear", **options))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


# ---- what is computed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BUILDERS)
def test_gates_and_importance_are_those_of_the_merged_network(kind):
    """The adapter on every projection, the one that reads the heads too: it is gated with what it adapts."""
    adapted = randomly_adapted(kind).double().eval()
    plain = merged(adapted)
    batch = batch_of(plain)
    values = []
    for model in (adapted, plain):
        units = Units(model)

        def losses(batch, model=model, units=units):
            inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
            return run_language_model(model, units, inputs, batch["labels"]).row_means(len(batch["input_ids"]))

        generator = torch.Generator().manual_seed(2)
        gates = {key: torch.rand(6, size, generator=generator) for key, size in units.sizes.items()}
        with gated(units, gates), torch.no_grad():
            values.append({"losses": losses(batch).float()})
        values[-1] |= measure_importance(units, [batch], losses)
    assert_close(*values, 1e-6)
    assert values[0]["layers.1.head"].min() > 1e-5 and values[0]["layers.0.output"].max() > 1e-3


@pytest.mark.parametrize("kind", BUILDERS)
def test_units_are_where_they_are_without_an_adapter(kind):
    """The same slices of the same weights; and of every projection but the one that reads the heads, the rows of B."""
    adapted = randomly_adapted(kind)
    units, plain = Units(adapted), Units(merged(adapted))
    own = {(piece.parameter, piece.group): piece for piece in plain.slices}
    ours = {(piece.parameter.replace(".base_layer.", "."), piece.group): piece for piece in units.slices}
    assert units.model is adapted.get_base_model() and units.sizes == plain.sizes
    assert own.keys() == {key for key in ours if ".lora_" not in key[0]}
    reading = {f"{name}.weight" for name, module in plain.model.named_modules() if module in _readers(plain)}
    for (name, group), piece in own.items():
        same, up = ours[name, group], ours.get((name.replace(".weight", ".lora_B.default.weight"), group))
        assert same.axis == piece.axis and torch.equal(same.owners, piece.owners)
        if name in reading and group.endswith("head"):
            assert up is None
        elif name.endswith(".weight"):
            assert up.axis == 0 and torch.equal(up.owners, piece.owners)


def _readers(units: Units) -> set[torch.nn.Module]:
    """The projections that read the heads."""
    return {group.module for group in units.groups.values() if group.kind == "head"}


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize(("target", "optim"), [("update", "adamw_torch"), ("gradient", "sgd")])
def test_importance_1_keeps_exactly_the_rows_of_a_unit_and_0_none(kind, target, optim, tmp_path, monkeypatch):
    """Bit for bit, of the merged weights; a shared key/value head is held if one of its readers is."""

    def pattern(size):  # of four heads, of which two share a key/value head, one is held
        return torch.arange(size).remainder(4).eq(1).float()

    def known(self):
        return Importance("paper", {key: pattern(size) for key, size in self.units.sizes.items()})

    monkeypatch.setattr("das_lm.methods.das.DAS._known_importance", known)
    monkeypatch.setattr("das_lm.methods.das.DAS.end_domain", lambda self: None)
    start = BUILDERS[kind]()
    config = LoraConfig(r=4, target_modules=ROWS[kind], lora_bias=kind != "llama")
    options = {"soft_mask_target": target, "optim": optim, "weight_decay": 0.1, "max_steps": 4}
    options["learning_rate"] = 1e-2 if optim == "adamw_torch" else 1.0
    trainer = trainer_of(tmp_path, copy.deepcopy(start), "das", config, contrast_weight=0.0, **options)
    trainer.train()
    assert_equal(weights_of(trainer.model), weights_of(start))  # the frozen model, before it is merged
    before, after = weights_of(start), weights_of(trainer.model.merge_and_unload())
    units = Units(start)
    columns = {f"{name}.weight" for name, module in start.named_modules() if module in _readers(units)}
    adapted = {piece.parameter: piece for piece in units.slices if piece.parameter not in columns}
    for name, piece in adapted.items():
        ours, theirs = before[name], after[name]
        held = piece.spread(pattern(units.groups[piece.group].size), ours.ndim).expand_as(ours) == 1
        assert held.any() and torch.equal(ours[held], theirs[held]), name
        assert (ours != theirs)[~held].float().mean() > 0.9, name  # a step can be below one ulp of a bias
    for name in before.keys() - adapted.keys():
        assert torch.equal(before[name], after[name]), name


def test_importance_0_is_plain_training_of_the_adapter(tmp_path, monkeypatch):
    def known(self):
        return Importance("paper", {key: torch.zeros(size) for key, size in self.units.sizes.items()})

    monkeypatch.setattr("das_lm.methods.das.DAS._known_importance", known)
    runs = []
    for method in ("naive", "das"):
        trainer = trainer_of(tmp_path, tiny_roberta(0.1), method, LoraConfig(lora_dropout=0.1), contrast_weight=0.0)
        trainer.train()
        runs.append(adapter_of(trainer.model))
    assert_equal(*runs)
    assert all(tensor.any() for tensor in runs[0].values())


def test_the_random_half_depends_on_seed_and_domain_alone(tmp_path):
    def fresh(noise: int, **options):
        model = tiny_roberta()
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        trainer = trainer_of(tmp_path, model, peft_config=LoraConfig(), **options)
        return adapter_of(trainer.model), before

    first, _ = fresh(1)
    assert_equal(first, fresh(2)[0])
    for other in (fresh(1, seed=7)[0], fresh(1, domain="cs")[0]):
        assert not torch.equal(*(next(iter(one.values())) for one in (first, other)))


def test_the_dropout_of_an_adapter_makes_no_two_views(tmp_path):
    """A fresh adapter adds nothing, whatever is dropped: the proxy of a decoder without dropout must not be 0."""
    trainer = trainer_of(tmp_path, tiny_llama(), "das", LoraConfig(target_modules=ROWS["llama"], lora_dropout=0.1))
    assert not has_active_dropout(trainer.units.model)
    importance = trainer.methods[0]._known_importance()
    assert all(value.max() > 0.1 for value in importance.values.values())
    assert has_active_dropout(tiny_roberta(0.1)) and not has_active_dropout(tiny_roberta())


@pytest.mark.parametrize("kind", BUILDERS)
def test_activation_checkpointing_changes_nothing(kind, tmp_path):
    runs = []
    for on in (False, True):
        config = LoraConfig(r=4, target_modules=ROWS[kind])
        trainer = trainer_of(tmp_path, BUILDERS[kind](), "das", config, activation_checkpointing=on, max_steps=4)
        trainer.train()
        assert trainer.model.is_activation_checkpointing == on
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < losses[0]
        runs.append(adapter_of(trainer.model))
    assert_close(*runs, 2e-5)


def test_interpolation_is_that_of_the_merged_weights(tmp_path):
    """α B A with A as it was learned; half-way between A as it was and as it is would be another."""
    merge = {}
    for method, options in (("naive", {}), ("interpolate", {"interpolation_alpha": "0.3"})):
        trainer = trainer_of(tmp_path, tiny_roberta(), method, LoraConfig(r=4), max_steps=6, **options)
        trainer.train()
        merge[method] = weights_of(trainer.model.merge_and_unload())
    start = weights_of(tiny_roberta())
    expected = {name: torch.lerp(start[name], weight, 0.3) for name, weight in merge["naive"].items()}
    assert_close(merge["interpolate"], expected, 1e-6)
    assert max((merge["naive"][name] - start[name]).abs().max() for name in start) > 1e-2


def test_a_resumed_adapter_equals_an_uninterrupted_one(tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "linear"}
    config = LoraConfig(r=4, lora_dropout=0.1, target_modules=ROWS["roberta"])
    whole = trainer_of(tmp_path / "whole", tiny_roberta(0.1), "das", config, **options)
    whole.train()
    for name in ("3", "6"):
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{name}", tmp_path / "part" / f"checkpoint-{name}")
    shutil.rmtree(tmp_path / "part" / "checkpoint-6")
    checkpoint = newest_checkpoint(tmp_path / "part")
    files = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "importance.safetensors"} <= files
    assert not files & {"README.md", "training_args.bin", "model.safetensors"}
    resumed = trainer_of(tmp_path / "part", tiny_roberta(0.1), "das", config, **options)
    resumed.train(resume_from_checkpoint=True)
    assert_equal(adapter_of(resumed.model), adapter_of(whole.model))
    assert_equal(resumed.methods[0].importance.values, whole.methods[0].importance.values)


def test_saving_and_loading_as_peft_does(tmp_path):
    """By the trainer, into a directory of PEFT; the state of the methods goes on from there with a merged model."""
    start = save_model(tiny_roberta(), tmp_path / "base")
    model = AutoModelForMaskedLM.from_pretrained(start)
    trainer = trainer_of(tmp_path, model, "das", LoraConfig(r=4, bias="all"))
    trainer.train()
    trainer.save_model(str(tmp_path / "bio"))
    loaded = PeftModel.from_pretrained(AutoModelForMaskedLM.from_pretrained(start), tmp_path / "bio").eval()
    batch = batch_of(loaded)
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, trainer.model.eval()(**batch).logits, rtol=0, atol=0)
        plain = trainer.model.merge_and_unload()
        torch.testing.assert_close(plain(**batch).logits, loaded(**batch).logits, rtol=0, atol=1e-5)
    following = trainer_of(tmp_path, plain, trainer.methods, LoraConfig(r=2), domain="cs")
    following.train()
    assert following.methods[0].importance.domains == ["general", "bio", "cs"]
    with pytest.raises(UserError, match="an adapter already"):
        trainer_of(tmp_path, following.model, "naive", LoraConfig())
    card = tmp_path / "bio" / "README.md"
    assert not card.exists()
    card.write_text("mine")
    following.save_model(str(tmp_path / "bio"))
    assert "mine" in card.read_text()  # PEFT adds to it what it knows


def test_a_model_that_has_an_adapter_goes_on_with_it(tmp_path):
    model = randomly_adapted("roberta")
    before, frozen = adapter_of(model), weights_of(model)
    trainer = trainer_of(tmp_path, model, "lwf")
    trainer.train()
    assert_equal(weights_of(model), frozen)
    assert all(not torch.equal(before[name], tensor) for name, tensor in adapter_of(model).items())


# ---- what is refused ------------------------------------------------------------------------------------------------


REFUSED = {
    "columns of heads": ("das", LoraConfig(target_modules=["query", "attention.output.dense"]), "leave 'head' out"),
    "no unit": ("das", LoraConfig(target_modules=["lm_head.dense"]), "query"),
    "no unit that is masked": ("das", LoraConfig(), "no unit of the kinds that are masked (output)"),
    "trained before": ("das", None, "merge_and_unload"),
    "interpolation of one trained before": ("interpolate", None, "α B A"),
    "not at 0": ("naive", LoraConfig(init_lora_weights=False), "init_lora_weights=False"),
    "other weights of the model": ("naive", LoraConfig(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    "DoRA": ("naive", LoraConfig(use_dora=True), "of the kind Dora"),
    "an embedding": ("naive", LoraConfig(target_modules=["query", "position_embeddings"]), "is an embedding"),
    "tied weights": ("naive", LoraConfig(target_modules=["decoder"]), "shares its weights"),
    "copy of tied weights": ("naive", LoraConfig(modules_to_save=["lm_head"]), "shares its weights"),
    "copy of units": ("das", LoraConfig(modules_to_save=["intermediate.dense"]), "in target_modules instead"),
    "fused parameters": ("naive", LoraConfig(target_parameters=["x"]), "target_parameters"),
    "no such module": ("naive", LoraConfig(target_modules=["q_proj"]), "q_proj"),
    "rank 0": ("naive", LoraConfig(r=0), "positive"),
    "no LoRA": ("naive", PrefixTuningConfig(num_virtual_tokens=2), "PrefixTuningConfig"),
    "units apart": ("naive", LoraConfig(), "non_unit_lr_scale"),
}
OPTIONS = {"units apart": {"non_unit_lr_scale": 0.5}, "no unit that is masked": {"soft_mask_units": ["output"]}}


@pytest.mark.parametrize("case", REFUSED)
def test_what_an_adapter_cannot_do_is_said(case, tmp_path):
    method, config, phrase = REFUSED[case]
    model = tiny_roberta() if config else randomly_adapted("roberta", exclude_modules=["attention.output.dense"])
    with pytest.raises(UserError) as error:
        trainer_of(tmp_path, model, method, config, **OPTIONS.get(case, {}))
    assert phrase in str(error.value)


@pytest.mark.parametrize("options", [{"soft_mask_units": ["intermediate", "output"]}, {"soft_mask_strength": 0.0}])
def test_the_projection_that_reads_the_heads_may_learn_where_heads_are_not_masked(options, tmp_path):
    config = LoraConfig(target_modules=["attention.output.dense", "intermediate.dense"])
    trainer = trainer_of(tmp_path, tiny_roberta(), "das", config, **options)
    trainer.train()
    assert all(tensor.any() for tensor in adapter_of(trainer.model).values())


@pytest.mark.parametrize("method", sorted(set(METHODS) - set(ADAPTED_METHODS)))
def test_methods_that_remember_single_parameters_are_refused(method, tmp_path):
    options = {"optim": "sgd", "max_grad_norm": 0.0} if method == "ncl" else {}
    with pytest.raises(UserError, match=f"'{method}' remembers single parameters"):
        trainer_of(tmp_path, tiny_roberta(), method, LoraConfig(), **options)


def test_a_quantized_model_learns_adapters_alone(tmp_path):
    model = tiny_roberta()
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(UserError, match="quantized.*peft_config"):
        trainer_of(tmp_path, model)


def test_another_module_takes_no_adapter(tmp_path):
    args = DASConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(UserError, match="only a language model"):
        ContinualTrainer(torch.nn.Linear(2, 2), args, peft_config=LoraConfig(target_modules=["x"]))


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peft", "options", "phrase"),
    [
        ('{"rank": 8}', [], "peft: rank: unknown key. Valid"),
        ('{"lora_aplha": 8}', [], "Did you mean 'lora_alpha'"),
        ('{"r": "eight"}', [], "r: expected a whole number, not the text 'eight'"),
        ('{"use_dora": true}', [], "use_dora: unknown key"),
        ('{"adapters": "merged"}', [], "'merge', 'stack', 'apart'"),
        ('{"r": 0}', [], "positive"),
        ('{"r": 8', [], "--peft"),
        ('{"load_in_4bit": true}', [], "write adapters: apart, not merge"),
        ('{"load_in_4bit": true, "adapters": "stack"}', [], "write adapters: apart, not stack"),
        ('{"target_modules": ["lm_head.dense"]}', [], "hold no unit"),
        ('{"target_modules": ["query", "attention.output.dense"]}', [], "leave 'head' out of soft_mask_units"),
        ("{}", ["--method", "ewc"], "'ewc' remembers single parameters"),
        ("{}", ["--non_unit_lr_scale", "0"], "non_unit_lr_scale"),
    ],
)
def test_bad_adapters_are_one_message_and_status_2(world, tmp_path, capsys, peft, options, phrase):
    assert phrase in refused(world, tmp_path / "run", capsys, "--peft", peft, *options)


def test_embeddings_of_new_tokens_belong_to_no_adapter(world, tmp_path, capsys):
    recipe = (world / "recipe.yaml").read_text().replace("cs.txt}", "cs.txt, add_tokens: 3}")
    (tmp_path / "recipe.yaml").write_text(recipe)
    options = ["--recipe", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "run")]
    assert main(["pretrain", *options, "--peft", '{"adapters": "stack"}']) == 2
    assert "'cs': add_tokens" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_4_bits_need_bitsandbytes(world, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    absent = lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    peft = '{"load_in_4bit": true, "adapters": "apart"}'
    assert "pip install bitsandbytes" in refused(world, tmp_path / "run", capsys, "--peft", peft)


def test_a_quantized_base_at_full_weights(world, tmp_path, capsys):
    shutil.copytree(world / "model", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    model = ["--model_name_or_path", str(tmp_path / "base")]
    assert "adapters: apart" in refused(world, tmp_path / "run", capsys, *model)
    assert "without loss" in refused(world, tmp_path / "run", capsys, *model, "--peft", '{"adapters": "stack"}')
