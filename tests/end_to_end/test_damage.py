"""Full disks, damaged files and another number of processes cost nothing that was learned."""

import errno
import os
import resource
import shutil
from pathlib import Path

import pytest

from das_lm import ContinualTrainer, DASConfig
from das_lm.errors import UserError
from das_lm.measure.results import Results
from das_lm.training.resuming import check_order
from tests.end_to_end.helpers import finish, stop_at
from tests.helpers import build_tokenizer, random_blocks, run_recipe, tiny_roberta

# ---- disks that take nothing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fails", ["1-bio/config.json", "1-bio/importance.safetensors", "1-bio/model.safetensors", "optimizer"]
)
def test_a_full_disk_is_a_message_and_the_run_goes_on_later(world, finished, tmp_path, capsys, fails):
    """No file may grow past the limit, as on a full disk; nothing half-written stays under the name of a domain."""
    weights = (finished / "1-bio" / "model.safetensors").stat().st_size
    limit = weights + 1000 if fails == "optimizer" else (finished / fails).stat().st_size - 1
    output = tmp_path / "run"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        assert run_recipe(world, output) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert error.count("das-lm: error: output_dir: cannot write to ") == 1 and "--resume" in error
    assert str(tmp_path) in error and "Traceback" not in error
    assert not (output / "1-bio").exists()
    finish(world, output, finished)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_disk_that_takes_nothing_any_more_is_named(world, finished, tmp_path, monkeypatch, capsys, number):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    (output / "forgetting.json").unlink()  # all is measured again
    before = {path: path.stat().st_mtime_ns for path in output.glob("[0-9]*/*")}
    with monkeypatch.context() as patch:

        def replace(source, target):
            raise OSError(number, os.strerror(number), str(target))

        patch.setattr(os, "replace", replace)
        assert run_recipe(world, output, "--resume") == 2
    error = capsys.readouterr().err
    assert f"cannot write to {output}/measured" in error and os.strerror(number) in error and "--resume" in error
    assert before == {path: path.stat().st_mtime_ns for path in output.glob("[0-9]*/*")}
    finish(world, output, finished)


# ---- damaged files -----------------------------------------------------------------------------------------------


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [_flip, _cut, Path.unlink])
@pytest.mark.parametrize("steps", [[4], [2, 4]])
def test_the_last_whole_checkpoint_is_used(world, finished, tmp_path, monkeypatch, caplog, damage, steps):
    output = tmp_path / "run"
    stop_at(world, output, monkeypatch, (ContinualTrainer, "training_step", 6, "before"))
    for step in steps:
        damage(output / "1-bio.training" / f"checkpoint-{step}" / "optimizer.pt")
    begun = []
    original = ContinualTrainer.train
    monkeypatch.setattr(
        ContinualTrainer,
        "train",
        lambda self, resume_from_checkpoint: (
            begun.append(resume_from_checkpoint) or original(self, resume_from_checkpoint)
        ),
    )
    finish(world, output, finished)
    named = [record.getMessage() for record in caplog.records if record.name == "das_lm.files"]
    assert len(named) == len(steps) and all(
        f"checkpoint-{step} is passed over: optimizer.pt is damaged" in line
        for step, line in zip(sorted(steps, reverse=True), named, strict=True)
    )
    whole = None if 2 in steps else output / "1-bio.training" / "checkpoint-2"
    assert begun[0] == whole


def test_a_damaged_domain_is_refused_and_can_be_learned_again(world, finished, tmp_path, capsys):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    _flip(output / "1-bio" / "model.safetensors")
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert run_recipe(world, output, "--resume") == 2
    error = capsys.readouterr().err
    assert f"{output / '1-bio'} is damaged: model.safetensors" in error and "delete it" in error
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    shutil.rmtree(output / "1-bio")
    finish(world, output, finished)


# ---- another number of processes ---------------------------------------------------------------------------------


def test_the_same_rows_in_every_step_or_a_refusal(tmp_path):
    args = DASConfig(
        tmp_path, max_length=12, max_steps=5, per_device_train_batch_size=8, use_cpu=True, report_to="none"
    )
    data = random_blocks(40)
    one = ContinualTrainer(tiny_roberta(), args, train_dataset=data, processing_class=build_tokenizer(), domain="bio")

    def before(processes, size, accumulation):
        keys = ("processes", "per_device_train_batch_size", "gradient_accumulation_steps")
        return dict(zip(keys, (processes, size, accumulation), strict=True))

    for same in ((1, 8, 1), (2, 4, 1), (1, 2, 4), (2, 2, 2), (8, 1, 1)):
        check_order(one, before(*same))
    for rows, other in ((16, (2, 8, 1)), (4, (1, 4, 1))):
        with pytest.raises(UserError, match=f"began with {rows} rows per update step .* product is {rows} again"):
            check_order(one, before(*other))
    # 41 rows do not fill steps of 8: five steps do not come to the end, six do.
    one.train_dataset = random_blocks(41)
    check_order(one, before(2, 4, 1))
    one.args.max_steps = 6
    check_order(one, before(1, 4, 2))  # one process fills nothing up
    with pytest.raises(UserError, match="41 rows of domain 'bio' do not fill 8 rows per update step"):
        check_order(one, before(2, 4, 1))


def test_another_batch_is_refused_before_anything_is_learned(world, finished, tmp_path, capsys):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    shutil.rmtree(output / "2-cs")
    assert run_recipe(world, output, "--resume", "--per_device_train_batch_size", "2") == 2
    assert "began with 4 rows per update step (1 processes × 4 per_device" in capsys.readouterr().err
    accumulated = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    assert run_recipe(world, output, "--resume", *accumulated) == 0
    assert len(Results.load(output).stages) == 3
