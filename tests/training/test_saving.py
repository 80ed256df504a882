"""What is saved, and what the learning rate of parameters that are no units does."""

import json

import pytest
import torch
from transformers import AutoModelForMaskedLM, TrainerCallback

from das_lm import Importance
from das_lm.errors import UserError
from das_lm.units.importance import FILE_NAME
from tests.helpers import rewrite_importance, tiny_roberta
from tests.training.helpers import assert_equal, importance_of, parameters, run_of, trainer_of

# ---- what is no unit ------------------------------------------------------------------------------------------------


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


# ---- saved models and importance ------------------------------------------------------------------------------------


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
