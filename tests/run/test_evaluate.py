"""Measuring runs and checkpoints: cached equals fresh, and what is refused."""

import errno
import json
import os
import resource
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM

from das_lm.cli import main
from das_lm.measure.results import FILE_NAME, Results
from das_lm.run import evaluate as module
from das_lm.training.trainer import ContinualTrainer
from tests.helpers import BOS, EOS, MASK, build_tokenizer


@pytest.fixture
def run(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def _read(directory: Path) -> dict:
    return json.loads((directory / FILE_NAME).read_text())


def _never(*args, **kwargs):
    raise AssertionError("measured again")


def test_what_the_walk_measured_is_not_measured_again(run, monkeypatch):
    """The cache is that of the walk, and the results stay what they were."""
    before = _read(run)
    recipe = (run / "recipe.yaml").read_text()
    with_curves = recipe.replace("\ntraining:\n", "\ntraining:\n  eval_strategy: steps\n  eval_steps: 2\n")
    assert with_curves != recipe
    (run / "recipe.yaml").write_text(with_curves)  # what is for training does not disturb
    monkeypatch.setattr(ContinualTrainer, "measure", _never)
    assert main(["evaluate", "--run", str(run)]) == 0
    assert _read(run) == before


def test_all_measures_and_cached_equals_fresh(run, probes, monkeypatch, capsys):
    options = ["evaluate", "--run", str(run), *probes, "--pseudo_perplexity", "3"]
    assert main(options) == 0
    printed = capsys.readouterr().out
    assert "Cloze accuracy" in printed and "End-task macro F1" in printed
    fresh, results = _read(run), Results.load(run)
    assert results.measures == ["loss", "accuracy", "cloze", "end_task"]
    assert results.columns("cloze") == {"bio": 1} and results.columns("end_task") == {"bio.first": 1}
    for stage in fresh["stages"]:
        asked = stage["cloze"]["bio"]
        assert asked["asked"] == 12 and asked["skipped"] == {"no blank": 1} and len(asked["interval"]) == 2
        assert len(stage["end_tasks"]["bio.first"]["macro_f1"]) == 2
        assert stage["pseudo"]["cs"]["documents"] == 3
    assert fresh["summary"]["cloze"]["gain"] is not None and set(fresh["intervals"]) == set(results.measures)
    assert {"history", "importance", "step"} <= set(fresh["stages"][1])  # what the walk knew is still there

    with monkeypatch.context() as patch:
        patch.setattr(ContinualTrainer, "measure", _never)
        for name in ("cloze_accuracy", "fine_tune"):
            patch.setattr(module, name, _never)
        assert main(options) == 0
        assert _read(run) == fresh

    shutil.rmtree(run / "measured")
    assert main(options) == 0
    assert _read(run) == fresh


def test_further_text_and_another_directory(run, world, tmp_path):
    before = _read(run)
    options = ["--domain", f"law={world}/old.txt", "--output_dir", str(tmp_path / "other")]
    assert main(["evaluate", "--run", str(run), *options]) == 0
    assert _read(run) == before
    after = _read(tmp_path / "other")
    assert after["domains"] == {"old": None, "bio": 1, "cs": 2, "law": None}
    for old, new in zip(before["stages"], after["stages"], strict=True):
        assert {name: new["scores"][name] for name in old["scores"]} == old["scores"]
        assert new["scores"]["law"] == new["scores"]["old"]  # the same text by another name


def test_the_page_shows_what_is_measured_now(run, world):
    law = ["evaluate", "--run", str(run), "--domain", f"law={world}/old.txt"]
    assert main(law) == 0
    assert not (run / "report.html").exists()  # none was wanted
    (run / "report.html").write_text("stale")
    assert main(law) == 0
    assert (
        "law (never learned)" in (run / "report.html").read_text() and (run / "figures" / "matrix-loss.svg").is_file()
    )


def test_a_name_is_no_markup(run, world, tmp_path, capsys):
    """Rich knows no tag of such a name, and a terminal would obey it."""
    output, name = tmp_path / "a[/b]", "a[/b]\x1b[2J"
    options = ["--checkpoint", f"base={world}/model", "--checkpoint", f"{name}={run}/1-bio", "--max_length", "24"]
    assert main(["evaluate", *options, "--domain", f"old={world}/old.txt", "--output_dir", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "a[/b]?[2J" in printed and f"Results: {output}/forgetting.json" in printed


def test_any_checkpoints(run, world, tmp_path):
    output = tmp_path / "measured"
    checkpoints = {"base": world / "model", "bio": run / "1-bio", "cs": run / "2-cs"}
    options = [part for name, path in checkpoints.items() for part in ("--checkpoint", f"{name}={path}")]
    options += [part for name in ("old", "bio") for part in ("--domain", f"{name}={world}/{name}.txt")]
    options += ["--max_length", "24", "--output_dir", str(output)]
    assert main(["evaluate", *options]) == 0
    measured, walked = _read(output), _read(run)
    assert measured["domains"] == {"old": None, "bio": 1}
    for ours, theirs in zip(measured["stages"], walked["stages"], strict=True):
        assert ours["name"] == theirs["name"] and ours["scores"]["old"] == theirs["scores"]["old"]
        assert ours["scores"]["bio"]["documents"] > theirs["scores"]["bio"]["documents"]  # all of it is held out


def test_pseudo_perplexity_is_one_mask_at_a_time(run, world):
    assert main(["evaluate", "--run", str(run), "--pseudo_perplexity", "1000"]) == 0
    model = AutoModelForMaskedLM.from_pretrained(run / "2-cs").eval()
    nats, tokens = 0.0, 0
    for line in (world / "old.txt").read_text().splitlines():
        ids = [BOS, *build_tokenizer()(line, add_special_tokens=False)["input_ids"], EOS]
        for position in range(1, len(ids) - 1):
            masked = torch.tensor([[*ids[:position], MASK, *ids[position + 1 :]]])
            with torch.no_grad():
                nats -= model(masked).logits[0, position].log_softmax(-1)[ids[position]].item()
            tokens += 1
    found = _read(run)["stages"][2]["pseudo"]["old"]
    assert found["tokens"] == tokens and found["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert found["bytes"] == sum(len(line.encode()) for line in (world / "old.txt").read_text().splitlines())


def test_evaluating_changes_nothing_of_the_run(run, probes):
    def weights() -> list[bytes]:
        return [path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file() and path.name != FILE_NAME]

    before, global_state = weights(), torch.get_rng_state()
    kept = len(before)
    assert main(["evaluate", "--run", str(run), *probes[:2]]) == 0
    assert len(weights()) == kept + 3  # the answers of three stages
    assert all(content in weights() for content in before)
    assert torch.equal(torch.get_rng_state(), global_state)


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either --run"),
        (["--run", "nowhere"], "holds no run"),
        (["--checkpoint", "base=x", "--domain", "bio"], "--output_dir is missing"),
        (["--checkpoint", "base", "--output_dir", "out"], "write --checkpoint NAME=PATH"),
        (["--checkpoint", "base=a", "--checkpoint", "base=b", "--output_dir", "out"], "'base' is given twice"),
        (["--checkpoint", "base=built-in", "--output_dir", "out"], "--domain"),
        (["--checkpoint", "base=nowhere", "--domain", "bio", "--output_dir", "out"], "'nowhere' cannot be loaded"),
        (["--checkpoint", "base=built-in", "--domain", "bio", "--cloze", "law", "--output_dir", "out"], "questions"),
        (["--checkpoint", "base=built-in", "--domain", "x=no.txt", "--output_dir", "out"], "no.txt"),
        (["--run", "{run}", "--max_length", "12"], "a run is measured as it was"),
        (["--run", "{run}", "--end_task", "bio=nowhere"], "nowhere"),
        (["--run", "{run}", "--end_task_epochs", "0"], "epochs: 0 must be above 0"),
    ],
)
def test_bad_input_is_one_message_and_nothing_is_written(options, message, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = _read(run)
    assert main(["evaluate", *(option.format(run=run) for option in options)]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists() and _read(run) == before


def test_a_run_that_is_not_finished_is_refused(run, capsys):
    results = Results.load(run)
    results.stages.pop()
    results.save(run)
    assert main(["evaluate", "--run", str(run)]) == 2
    assert "not finished, 'cs' is missing" in capsys.readouterr().err


def test_a_checkpoint_that_is_gone_or_has_no_tokenizer_is_named(run, world, tmp_path, capsys):
    (run / "2-cs" / "tokenizer.json").unlink()
    assert main(["evaluate", "--run", str(run)]) == 2
    assert "2-cs is not there or not whole" in capsys.readouterr().err
    options = ["--domain", f"old={world}/old.txt", "--output_dir", str(tmp_path / "out")]
    assert main(["evaluate", "--checkpoint", f"base={run}/2-cs", *options]) == 2
    assert "tokenizer" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_results_of_another_run_stay(run, world, tmp_path, capsys):
    """Also where they are all that is left of it."""
    other = tmp_path / "other"
    other.mkdir()
    data = _read(run)
    data["run"]["recipe"]["method"] = ["ewc"]
    (other / FILE_NAME).write_text(json.dumps(data))
    options = [["--run", str(run)], ["--checkpoint", f"base={run}/2-cs", "--domain", f"old={world}/old.txt"]]
    for given in options:
        assert main(["evaluate", *given, "--output_dir", str(other)]) == 2
        assert f"{other} holds the results of another run" in capsys.readouterr().err
    assert _read(other) == data and len(list(other.iterdir())) == 1


def test_results_of_a_newer_release_are_refused(run, capsys):
    data = _read(run)
    (run / FILE_NAME).write_text(json.dumps({**data, "version": 99}))
    assert main(["evaluate", "--run", str(run)]) == 2
    assert "has version 99" in capsys.readouterr().err


def test_a_killed_worker_is_one_message(run, monkeypatch, capsys):
    def killed(*_):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr(ContinualTrainer, "measure", killed)
    shutil.rmtree(run / "measured")
    assert main(["evaluate", "--run", str(run)]) == 2
    assert "dataloader_num_workers: a worker of the data loader was killed" in capsys.readouterr().err


@pytest.mark.parametrize("limit", [200, 3_000])
def test_a_full_disk_is_one_message(run, world, capsys, limit):
    """No file may grow past the limit: one of the cache, or the results."""
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    shutil.rmtree(run / "measured")  # all is measured again
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        assert main(["evaluate", "--run", str(run)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert error.count("das-lm: error: ") == 1 and os.strerror(errno.EFBIG) in error and "free some space" in error
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert set(after) <= set(before)  # nothing half-written
    assert all(content == before[path] for path, content in after.items() if path.parent.name != "measured")


@pytest.mark.parametrize("command", ["evaluate --run", "pretrain --output_dir"])
def test_no_temporary_directory_is_one_message(run, world, monkeypatch, capsys, command):
    def none():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    if command.startswith("pretrain"):
        command = f"{command} {run}/new --recipe {world}/recipe.yaml"
    else:
        command = f"{command} {run}"
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_get_default_tempdir", none)
    assert main(command.split()) == 2
    assert "No usable temporary directory found in ['/tmp']; free some space" in capsys.readouterr().err


def _rewrite(path, change=lambda values: values, facts=None):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {name: change(values) for name, values in load_file(path).items()}
    save_file(tensors, path, metadata | ({"facts": facts} if facts else {}))


BROKEN = {
    "cut": lambda path, _: path.write_bytes(path.read_bytes()[:50]),
    "halved": lambda path, _: _rewrite(path, lambda values: values[: len(values) // 2].clone()),
    "wrong": lambda path, _: _rewrite(path, lambda values: values * 2),
    "deep": lambda path, _: _rewrite(path, facts="[" * 100_000),
    "of another": lambda path, other: path.write_bytes(other),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_file_of_the_cache_is_measured_again(run, damage):
    before, paths = _read(run), sorted((run / "measured").iterdir())
    others = [path.read_bytes() for path in (*paths[1:], paths[0])]
    for path, other in zip(paths, others, strict=True):
        BROKEN[damage](path, other)
    assert main(["evaluate", "--run", str(run)]) == 0
    assert _read(run) == before


def test_numbers_that_an_interval_is_of(run):
    """Scores lie in their intervals, and those of the figures are paired: narrower than the sum of their parts."""
    data = _read(run)
    for stage in data["stages"]:
        for domain, score in stage["scores"].items():
            low, high = stage["intervals"][domain]["loss"]
            assert low < score["loss"] < high
    drift, (low, high) = data["summary"]["loss"]["drift"], data["intervals"]["loss"]["drift"]
    assert low < drift < high
    widths = [np.diff(data["stages"][index]["intervals"]["old"]["loss"])[0] for index in (0, 2)]
    assert high - low < sum(widths)
