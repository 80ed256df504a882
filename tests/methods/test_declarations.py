"""What methods say of themselves is what they do: the options that they read, whether they act in a first domain."""

import dataclasses
import logging
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

import das_lm.methods
from das_lm import ContinualTrainer, DASConfig
from das_lm.methods import METHODS, unread_options
from tests.helpers import build_tokenizer, load_script, random_blocks, tiny_roberta

OWN = {one.name for one in dataclasses.fields(DASConfig)} - {one.name for one in dataclasses.fields(TrainingArguments)}
#: With which a method reads all of its options.
OPTIONS = {
    "anchor": {"anchor_teacher": "cached", "self_replay_sweeps": 1},
    "ewc": {"ewc_mode": "online"},
    "pull_back": {"pull_back_every": 1},
    "gate": {"token_weighting": "stm"},
    "interpolate": {"interpolation_alpha": "auto"},
    "ncl": {"optim": "sgd", "max_grad_norm": 0.0},
    "rwalk": {"rwalk_interval": 4},
    "self_replay": {"self_replay_target": "distributions"},
}


class Recorded(DASConfig):
    """Training arguments that know which of them have been read."""

    def __getattribute__(self, name):
        vars(type(self)).get("reads", set()).add(name)
        return super().__getattribute__(name)


def learn(directory, method, model, domain: int, kind: type[DASConfig] = DASConfig, **options) -> ContinualTrainer:
    defaults = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_length": 12,
        "memory_size": 4,
        "replay_ratio": 0.5,
        "scp_projections": 2,
        "rwalk_interval": 1,
        "importance_samples": 4,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
    }
    args = kind(output_dir=str(directory), **{**defaults, **options})
    if kind is Recorded:
        Recorded.reads = set()
    trainer = ContinualTrainer(
        model,
        args,
        method,
        train_dataset=random_blocks(16, seed=domain),
        processing_class=build_tokenizer(),
        development_dataset={"d": random_blocks(4, seed=9)},
        domain=f"domain {domain}",
    )
    trainer.train()
    return trainer


def options_read(directory, name: str, **options) -> set[str]:
    method, model, read = METHODS[name](), tiny_roberta(), set()
    for domain in range(2):
        learn(directory, method, model, domain, Recorded, **options)
        read |= Recorded.reads & OWN
        del Recorded.reads
    return read


@pytest.fixture(scope="module")
def read_by_all(tmp_path_factory) -> set[str]:
    return options_read(tmp_path_factory.mktemp("naive"), "naive")


@pytest.mark.parametrize("name", METHODS)
def test_a_method_declares_the_options_that_it_reads(name, read_by_all, tmp_path):
    read = options_read(tmp_path, name, **OPTIONS.get(name, {})) - read_by_all
    assert read == set(METHODS[name].options())


def test_options_that_no_chosen_method_reads():
    given = ["learning_rate", "replay_ratio", "max_length", "fisher", "contrast_weight", "replay_ratio"]
    assert unread_options(given, ["das"]) == ["replay_ratio", "fisher"]
    assert unread_options(given, ["naive"]) == ["replay_ratio", "fisher", "contrast_weight"]
    assert unread_options(given, ["das", "ewc", "self_replay"]) == []


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("naive", "joint")])
def test_a_method_without_effect_in_the_first_domain_says_so(name, tmp_path, caplog):
    """What says so is plain training bit for bit there, and all else is not; in the second domain nothing says so."""
    options = OPTIONS.get(name, {}) if name in ("ncl", "pull_back") else {}
    method, model, naive = METHODS[name](), tiny_roberta(), tiny_roberta()
    with caplog.at_level(logging.WARNING):
        learn(tmp_path, method, model, 0, **options)
        said = caplog.text
        caplog.clear()
        learn(tmp_path, "naive", naive, 0, **options)
        is_plain = all(torch.equal(*pair) for pair in zip(model.parameters(), naive.parameters(), strict=True))
        assert ("no effect" in said) == is_plain == (not method.protects_base)
        assert f"domain 'domain 0': {name}: no effect" in said or method.protects_base
        assert (
            "without: anchor, das, ema, gate, interpolate, lwf, ncl, pull_back, self_replay" in said
            or method.protects_base
        )
        learn(tmp_path, method, model, 1, **options)
    assert "no effect" not in caplog.text


def test_methods_know_the_trainer_by_its_protocol_alone():
    """Not even for their types do they import it."""
    for path in Path(das_lm.methods.__file__).parent.glob("*.py"):
        assert "das_lm.training" not in path.read_text(encoding="utf-8"), path.name


def test_the_readme_has_the_table_that_the_declarations_make():
    """`python scripts/method_table.py` writes it."""
    method_table = load_script("method_table")
    readme = method_table.README.read_text(encoding="utf-8")
    assert method_table.replaced(readme) == readme
