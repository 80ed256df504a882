"""No knob that nothing reads."""

import dataclasses
import json
import types

import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

from das_lm import DASConfig, Importance
from das_lm.units import Units
from das_lm.units.importance import FILE_NAME
from tests.helpers import WORDS, random_blocks, tiny_roberta
from tests.methods.helpers import METHOD_KNOBS
from tests.training.helpers import config, importance_of, parameters, trainer_of

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
