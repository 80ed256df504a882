"""Sweeps on a tiny model: what they run, that they go on, and that bad input writes nothing."""

import json
import re
from pathlib import Path

import pytest
import yaml

from das_lm.cli import main
from das_lm.errors import UserError
from das_lm.measure.results import Results
from das_lm.run.sweep import parse_entry
from das_lm.training.trainer import ContinualTrainer
from tests.helpers import Interrupted

ENTRIES = ("--sweep", "naive: learning_rate=1e-3,1e-2", "--sweep", "das: learning_rate=1e-3,1e-2 contrast_weight=0")
RUNS = [
    "das-learning_rate=0.001-contrast_weight=0.0",
    "das-learning_rate=0.01-contrast_weight=0.0",
    "naive-learning_rate=0.001",
    "naive-learning_rate=0.01",
]


def run(world: Path, output: Path, *options: str, entries: tuple[str, ...] = ENTRIES) -> int:
    fixed = ("--recipe", str(world / "recipe.yaml"), "--output_dir", str(output), "--max_steps", "2", "--seeds", "5")
    return main(["sweep", *fixed, *entries, *options])


def matrices(output: Path) -> dict[str, list]:
    """Run -> its result matrix."""
    paths = sorted(output.glob("*/seed-*/forgetting.json"))
    return {str(path.parent.relative_to(output)): Results.load(path.parent).matrix().tolist() for path in paths}


@pytest.fixture(scope="module", autouse=True)
def reports():
    """What was asked for; drawing a report would take longer than training."""
    calls = []

    def write_report(runs: list[Path], output: Path) -> Path:
        calls.append((runs, output))
        return output / "report.html"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("das_lm.report.page.write_report", write_report)
        yield calls


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory) -> Path:
    """The output directory of an uninterrupted sweep."""
    output = tmp_path_factory.mktemp("finished") / "sweep"
    assert run(world, output) == 0
    return output


def test_every_combination_is_run_and_compared(finished, reports):
    assert sorted(matrices(finished)) == [f"{name}/seed-5" for name in RUNS]
    directory = finished / RUNS[1] / "seed-5"
    training = yaml.safe_load((directory / "recipe.yaml").read_text())["training"]
    assert {"learning_rate": 0.01, "contrast_weight": 0.0, "max_steps": 2, "seed": 5}.items() <= training.items()
    assert not list(finished.rglob("model*.safetensors"))  # models are not kept
    comparison = json.loads((finished / "comparison.json").read_text())
    assert {curve["name"]: curve["x_label"] for curve in comparison["frontier"]} == {
        "naive": "learning_rate",
        "das contrast_weight=0": "learning_rate",
    }
    matrix = Results.load(directory).matrix()
    (point,) = [point for point in comparison["frontier"][1]["points"] if point["value"] == 0.01]
    assert point["drift"] == pytest.approx(matrix[2, 0] - matrix[0, 0])
    assert (finished / "table.md").is_file()
    assert ([finished], finished) in reports


def test_a_run_is_that_of_pretrain(world, finished, tmp_path):
    options = ["--method", "naive", "--learning_rate", "0.01", "--max_steps", "2", "--seed", "5"]
    command = ["pretrain", "--recipe", str(world / "recipe.yaml"), "--output_dir", str(tmp_path / "run"), *options]
    assert main(command) == 0
    assert Results.load(tmp_path / "run").matrix().tolist() == matrices(finished)["naive-learning_rate=0.01/seed-5"]


def test_the_same_command_goes_on_where_it_was_interrupted(world, finished, tmp_path, monkeypatch):
    """Interrupted in the second domain of the third run; the finished ones are not touched."""
    trained = []
    step = ContinualTrainer.training_step

    def interrupted(self, *args, **kwargs):
        trained.append(self.domain)
        if len(trained) == 2 * 4 + 2 + 2:  # two runs of two domains with two steps, a domain, a step
            raise Interrupted
        return step(self, *args, **kwargs)

    monkeypatch.setattr(ContinualTrainer, "training_step", interrupted)
    with pytest.raises(Interrupted):
        run(world, tmp_path)
    first = {path: path.stat().st_mtime_ns for path in tmp_path.glob("naive-*/seed-*/forgetting.json")}
    assert len(first) == 2
    monkeypatch.setattr(ContinualTrainer, "training_step", step)
    assert run(world, tmp_path) == 0
    assert matrices(tmp_path) == matrices(finished)
    assert first == {path: path.stat().st_mtime_ns for path in first}


def test_a_finished_sweep_trains_nothing_and_grows(world, tmp_path, monkeypatch, capsys):
    entries = ("--sweep", "naive: learning_rate=1e-3")
    assert run(world, tmp_path, "--keep_models", entries=entries) == 0
    directory = tmp_path / RUNS[2] / "seed-5"
    assert (directory / "2-cs" / "model.safetensors").is_file()
    train = ContinualTrainer.train
    monkeypatch.setattr(ContinualTrainer, "train", lambda *_, **__: pytest.fail("trained again"))
    assert run(world, tmp_path, entries=entries) == 0
    assert (directory / "2-cs" / "model.safetensors").is_file()  # what was kept stays
    monkeypatch.setattr(ContinualTrainer, "train", train)
    capsys.readouterr()
    assert run(world, tmp_path, "--seeds", "5", "6", entries=(*entries, "naive: learning_rate=0.001,3e-3")) == 0
    assert "1 of 4 runs are finished already" in capsys.readouterr().out
    assert sorted(matrices(tmp_path)) == [
        f"naive-learning_rate={rate}/seed-{seed}" for rate in (0.001, 0.003) for seed in (5, 6)
    ]


def test_a_run_that_fails_is_named_and_does_not_stop_the_others(world, tmp_path, capsys):
    entries = ("--sweep", "naive: learning_rate=1e30,1e-3")
    assert run(world, tmp_path, entries=entries) == 0
    matrix, failed = (len(matrices(tmp_path)[f"naive-learning_rate={rate}/seed-5"]) for rate in (0.001, "1e+30"))
    assert (matrix, failed) == (3, 1)  # stages measured
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search(r"Failed: \S*naive-learning_rate=1e\+30/seed-5: ", printed)
    (note,) = [note for note in json.loads((tmp_path / "comparison.json").read_text())["notes"] if "Failed" in note]
    assert "1e+30" in note
    assert run(world, tmp_path / "all", entries=("--sweep", "naive: learning_rate=1e30")) == 2
    assert "no run could be finished" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("entries", "options", "message"),
    [
        (["naive: learning_rat=1e-3"], [], "--learning_rat: unknown key. Did you mean 'learning_rate'?"),
        (["naive", "das: learning_rate=fast"], [], '--sweep "das: learning_rate=fast": --learning_rate: expected'),
        (["nave"], [], "there is no method 'nave'. Did you mean 'naive'?"),
        (["naive: learning_rate"], [], "'learning_rate' is no setting"),
        (["naive: learning_rate=1e-3, 1e-4"], [], "without spaces around = and commas"),
        ([": learning_rate=1e-3"], [], "there is no method before the colon"),
        (["das: soft_mask_strength=2"], [], "soft_mask_strength: 2.0 must be between 0 and 1"),
        (["naive: seed=1,2"], [], "the seed is given by --seeds"),
        (["naive"], ["--seed", "3"], "give them by --seeds"),
        (["naive"], ["--seeds", "3", "3"], "each seed once"),
        (["naive", "interpolate: interpolation_alpha=auto"], [], "chooses on one half of the held-out text"),
        (["naive"], ["--model_name_or_path", "nowhere/such-model"], "'nowhere/such-model' cannot be loaded"),
        (["naive"], ["--recipe", "nowhere"], "recipe 'nowhere': no such file"),
        ([], [], "--sweep is missing"),
    ],
)
def test_bad_input_is_one_message_and_nothing_is_written(world, tmp_path, capsys, entries, options, message):
    written = [word for entry in entries for word in ("--sweep", entry)]
    assert run(world, tmp_path / "sweep", *options, entries=tuple(written)) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "sweep").exists()


def test_the_run_of_another_recipe_is_refused_before_anything_is_trained(world, finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert run(world, finished, "--max_steps", "3", entries=("--sweep", "l2", *ENTRIES)) == 2
    assert "is learned, with max_steps" in capsys.readouterr().err
    assert run(world, finished / RUNS[0] / "seed-5") == 2
    assert "is the directory of a run" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def test_an_entry_is_a_product():
    assert parse_entry("naive, das+replay: learning_rate=1e-4,3e-4 max_steps=5") == [
        (["naive"], {"learning_rate": "1e-4", "max_steps": "5"}),
        (["naive"], {"learning_rate": "3e-4", "max_steps": "5"}),
        (["das", "replay"], {"learning_rate": "1e-4", "max_steps": "5"}),
        (["das", "replay"], {"learning_rate": "3e-4", "max_steps": "5"}),
    ]
    assert parse_entry("naive") == [(["naive"], {})]
    with pytest.raises(UserError, match="no setting"):
        parse_entry("naive: learning_rate=1e-4,")
