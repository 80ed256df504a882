"""A run that goes on from a checkpoint ends as one that was not interrupted."""

import os
import shutil

import pytest
import torch

from das_lm.errors import UserError
from das_lm.files import newest_checkpoint, seal
from tests.helpers import random_blocks, tiny_roberta
from tests.training.helpers import assert_equal, importance_of, losses, parameters, run_of, trainer_of

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
