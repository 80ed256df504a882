"""Methods side by side: reproducible, resumable, a search that never sees test data, and figures against numpy."""

import dataclasses
import importlib.util
import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from das_lm.classic import Examples
from das_lm.classic import benchmark as module
from das_lm.classic.benchmark import benchmark, choose, grid, learn_all
from das_lm.classic.models import MLP
from das_lm.classic.runs import BenchmarkRun, learn
from das_lm.classic.tasks import EXPERIMENTS, Experiment, Task
from das_lm.cli import main
from das_lm.errors import UserError
from das_lm.measure.intervals import Estimate
from das_lm.measure.results import FILE_NAME, Results
from das_lm.methods import METHODS
from das_lm.report import benchmark_plots as plots
from das_lm.report.benchmark import SUMMARY_NAME, TABLE_NAME, Choice, Report
from das_lm.signals import Interrupted
from das_lm.training.config import DASConfig
from das_lm.training.trainer import ContinualTrainer


def tiny(seed: int = 0, measure: str = "accuracy", poison: bool = False) -> Experiment:
    """Two tasks of 48 rows that contradict each other: the sign of the second task's labels is turned."""
    generator = torch.Generator().manual_seed(seed)

    def part(rows: int, number: int) -> Examples:
        inputs = torch.randn(rows, 4, generator=generator)
        labels = inputs[:, 0] * (-1) ** number
        return Examples({"inputs": inputs, "labels": (labels > 0).long() if measure == "accuracy" else labels})

    def task(number: int) -> Task:
        train, development, test = part(48, number), part(24, number), part(24, number)
        if poison:
            test = Examples({"inputs": test.columns["inputs"] * torch.nan, "labels": test.columns["labels"] * 0})
        return Task(f"task-{number}", train, development, test)

    return Experiment(
        name="tiny",
        tasks=(task(0), task(1)),
        build_model=lambda seed: MLP([4, 8], 2 if measure == "accuracy" else 1, seed),
        measure=measure,
        scenario="domain",
        epochs=2,
        batch_size=8,
        description="two tasks",
    )


#: Two points each: what a search does shows with these.
FEW = {name: (METHODS[name].search_grid[0], METHODS[name].search_grid[1][1:4:2]) for name in ("l2", "ewc", "ema")}

#: As they are declared: method, argument, values.
GRIDS = [(name, *kind.search_grid) for name, kind in METHODS.items() if kind.search_grid]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "tiny", tiny)
    few = {**FEW, "replay": ("replay_ratio", (0.3, 0.9))}
    for name, kind in METHODS.items():
        monkeypatch.setattr(kind, "search_grid", few.get(name))


def go(directory, methods=("naive", "l2"), seeds=(0, 1), **options):
    return benchmark("tiny", methods, seeds, output_dir=directory / "out", workers=1, **options)


@pytest.fixture
def no_plots(monkeypatch):
    monkeypatch.setattr(plots, "plot_all", lambda report, directory: [])


@pytest.fixture
def learned(monkeypatch, no_plots):
    """The runs that are really made."""
    made = []
    monkeypatch.setattr(module, "learn", lambda run: made.append(run) or learn(run))
    return made


# ---- one run -------------------------------------------------------------------------------------------------------


def without_seconds(results: Results) -> dict:
    data = dataclasses.asdict(results)
    for stage in data["stages"]:
        stage.pop("seconds", None)
    return data


@pytest.mark.parametrize("method", [name for name, kind in METHODS.items() if not kind.language_models_only])
def test_a_run_is_reproducible(method):
    run = BenchmarkRun("tiny", method, seed=3, options={"scp_projections": 2})
    first = learn(run)
    torch.rand(7)  # the global random state plays no part
    assert without_seconds(learn(run)) == without_seconds(first)


def test_a_seed_changes_the_run():
    first, second = (learn(BenchmarkRun("tiny", "naive", seed=seed)) for seed in (3, 4))
    assert without_seconds(first)["stages"] != without_seconds(second)["stages"]


def test_matrix_and_curve_are_those_of_the_trainer(monkeypatch):
    """Against the same two tasks by hand, one trainer after the other."""
    experiment = tiny(0)
    run = BenchmarkRun("tiny", "ewc", options={"penalty_weight": 30.0})
    results = learn(run)
    model, method = experiment.build_model(0), METHODS["ewc"]()
    rows = []
    for number, task in enumerate(experiment.tasks):
        trainer = module.make_trainer(run, experiment, model, [method], number, "unused")
        assert list(trainer.train_dataset.domains) == [task.name]
        trainer.train()
        with torch.no_grad():
            logits = [model(task.test.columns["inputs"])["logits"] for task in experiment.tasks]
        correct = [
            (one.argmax(1) == task.test.columns["labels"]).double().mean()
            for one, task in zip(logits, experiment.tasks, strict=True)
        ]
        rows.append([float(one) for one in correct])
    np.testing.assert_allclose(results.matrix("accuracy")[1:], rows)
    assert list(results.domains.items()) == [("task-0", 1), ("task-1", 2)]
    assert [stage["name"] for stage in results.stages] == ["base", "task-0", "task-1"]
    for stage, row in zip(results.stages[1:], rows, strict=True):
        assert len(stage["curve"]) == 2 and list(stage["curve"][-1].values()) == pytest.approx(row)


def test_the_curve_ends_with_what_the_method_made_of_the_weights():
    """α = 0 goes back to the weights before: every stage ends where it began, whatever its epochs brought."""
    results = learn(BenchmarkRun("tiny", "interpolate", options={"interpolation_alpha": "0", "learning_rate": 0.05}))
    base = [score["accuracy"] for score in results.stages[0]["scores"].values()]
    for stage in results.stages[1:]:
        assert list(stage["curve"][-1].values()) == base != list(stage["curve"][0].values())


def trainings(monkeypatch, run: BenchmarkRun) -> list[tuple[list[str], str]]:
    """(tasks, schedule) that every trainer of a run is given."""
    seen = []
    train = ContinualTrainer.train

    def spy(self):
        seen.append((list(self.train_dataset.domains), self.train_dataset.schedule))
        return train(self)

    with monkeypatch.context() as patch:
        patch.setattr(ContinualTrainer, "train", spy)
        learn(run)
    return seen


def test_joint_learns_all_tasks_so_far(monkeypatch):
    assert trainings(monkeypatch, BenchmarkRun("tiny", "joint")) == [
        (["task-0"], "interleaved"),
        (["task-0", "task-1"], "interleaved"),
    ]


@pytest.mark.parametrize("schedule", ["alternating", "interleaved"])
def test_schedules_learn_all_tasks_in_one_stage(schedule, monkeypatch):
    run = BenchmarkRun("tiny", "naive", schedule=schedule)
    assert trainings(monkeypatch, run) == [(["task-0", "task-1"], schedule)]
    results = learn(run)
    assert results.domains == {"task-0": 1, "task-1": 1}
    assert [stage["name"] for stage in results.stages] == ["base", "task-0+task-1"]


def test_name_changes_with_every_field():
    """A run is found again by its configuration, and by nothing else."""
    run = BenchmarkRun("tiny", "ewc+replay", options={"penalty_weight": 1.0})
    assert run.name == BenchmarkRun("tiny", "ewc+replay", options={"penalty_weight": 1.0}).name
    assert run.name.startswith("ewc+replay-seed0-")
    others = {
        "experiment": "odd_even",
        "method": "ewc",
        "seed": 1,
        "parameters": {"tasks": 2},
        "options": {"penalty_weight": 2.0},
        "schedule": "interleaved",
        "epochs": 1,
        "split": "development",
    }
    assert set(others) == {field.name for field in dataclasses.fields(BenchmarkRun)}
    names = [dataclasses.replace(run, **{key: value}).name for key, value in others.items()]
    assert len({run.name, *names}) == len(others) + 1


# ---- many runs -----------------------------------------------------------------------------------------------------


def test_finished_runs_are_not_repeated(tmp_path, learned):
    first = go(tmp_path)
    points = len(FEW["l2"][1])
    assert len(learned) == points + 4
    assert [run.split for run in learned] == ["development"] * points + ["test"] * 4
    again = go(tmp_path)
    assert len(learned) == points + 4  # nothing new
    assert again.rows() == first.rows() and again.choices == first.choices
    go(tmp_path, seeds=(0, 1, 2))
    assert [(run.method, run.seed) for run in learned[points + 4 :]] == [("naive", 2), ("l2", 2)]


def test_an_interrupted_benchmark_goes_on(tmp_path, monkeypatch, no_plots):
    calls = []

    def interrupted(run):
        calls.append(run)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return learn(run)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "learn", interrupted)
        go(tmp_path, search=False)
    out = tmp_path / "out"
    assert len(list(out.glob("runs/*/forgetting.json"))) == 2 and not (out / TABLE_NAME).exists()
    with monkeypatch.context() as patch:
        patch.setattr(module, "learn", lambda run: calls.append(run) or learn(run))
        report = go(tmp_path, search=False)
    assert len(calls) == 3 + 2
    assert report.rows() == go(tmp_path / "other", search=False).rows()


def test_two_processes_give_what_one_does(tmp_path):
    runs = [BenchmarkRun("odd_even", method, epochs=1) for method in ("naive", "l2")]
    seen = []
    apart = learn_all(runs, tmp_path / "two", 2, seen.append)
    assert sorted(run.method for run in seen) == ["l2", "naive"]
    together = learn_all(runs, tmp_path / "one", 1, seen.append)
    assert [without_seconds(one) for one in apart] == [without_seconds(one) for one in together]
    assert [without_seconds(Results.load(tmp_path / "two" / run.name)) for run in runs] == [
        without_seconds(one) for one in together
    ]


def test_sigterm_leaves_no_workers(tmp_path):
    runs = [BenchmarkRun("odd_even", method, epochs=epochs) for method, epochs in (("naive", 1), ("l2", 1000))]
    before = set(multiprocessing.active_children())
    with pytest.raises(Interrupted):
        learn_all(runs, tmp_path, 2, lambda run: os.kill(os.getpid(), signal.SIGTERM))
    assert set(multiprocessing.active_children()) == before
    assert [path.name for path in tmp_path.iterdir()] == [runs[0].name]


# ---- search --------------------------------------------------------------------------------------------------------


def test_search_never_sees_test_data(tmp_path, monkeypatch, no_plots):
    """With a test split of NaN and false labels, the search scores and chooses the same; the reported run fails."""
    report = go(tmp_path, ["ewc+replay"], seeds=[0])
    tried = report.choices["ewc+replay"].tried
    assert len(tried) == 4
    assert len({one["score"] for one in tried}) > 2
    chosen = []
    monkeypatch.setitem(EXPERIMENTS, "tiny", lambda seed=0: tiny(seed, poison=True))
    monkeypatch.setattr(module, "choose", lambda *args: chosen.append(choose(*args)) or chosen[-1])
    with pytest.raises(UserError, match="method 'ewc[+]replay', seed 0: the loss of 'task-0' is nan after 'base'"):
        go(tmp_path / "poisoned", ["ewc+replay"], seeds=[0])
    assert chosen == [report.choices["ewc+replay"]]


def test_search_takes_the_best_score_and_the_options_that_are_given(tmp_path, no_plots):
    report = go(tmp_path, ["naive", "l2", "ema"], seeds=[0], options={"ema_decay": 0.9})
    assert report.choices["naive"] == report.choices["ema"] == Choice()
    choice = report.choices["l2"]
    assert [one["options"] for one in choice.tried] == [{"penalty_weight": value} for value in FEW["l2"][1]]
    scores = [
        learn(BenchmarkRun("tiny", "l2", 1000, options={"ema_decay": 0.9, **one["options"]}, split="development"))
        for one in choice.tried
    ]
    finals = [one.matrix("accuracy")[-1].mean() for one in scores]
    assert [one["score"] for one in choice.tried] == pytest.approx(finals)
    assert choice.chosen == choice.tried[int(np.argmax(finals))]["options"]
    assert report.results["l2"][0].run["options"] == {"ema_decay": 0.9, **choice.chosen}


def test_choose():
    points = [{"a": 1}, {"a": 2}, {"a": 3}, {"a": 4}]
    assert choose(points, [0.1, 0.5, None, 0.5], "m").chosen == {"a": 2}  # of equal ones the first
    assert choose(points, [0.1, 0.5, None, 0.5], "m").at_edge == []
    assert choose(points, [0.1, 0.5, None, 0.6], "m").at_edge == ["a"]
    with pytest.raises(UserError, match="method 'm': no run of the search could be finished"):
        choose(points, [None] * 4, "m")


def test_what_another_benchmark_chose(tmp_path, learned):
    """Its parameters, and no search."""
    chosen = {name: choice.chosen for name, choice in go(tmp_path, ["naive", "l2", "ema"], seeds=[0]).choices.items()}
    learned.clear()
    there = tmp_path / "there"
    report = go(there, ["l2", "naive", "ema"], seeds=[5], chosen_from=tmp_path / "out", options={"ema_decay": 0.5})
    assert [run.options for run in learned] == [{"ema_decay": 0.5, **chosen[name]} for name in ("l2", "naive")] + [
        {"ema_decay": 0.5}
    ]
    assert report.choices["l2"] == Choice(chosen=chosen["l2"]) and report.choices["l2"].at_edge == []
    assert f"as chosen in {tmp_path / 'out'}" in (there / "out" / TABLE_NAME).read_text()
    with pytest.raises(UserError, match="has no 'ewc'; run it there, or search here"):
        go(there, ["ewc"], chosen_from=tmp_path / "out")
    with pytest.raises(UserError, match="holds no finished benchmark"):
        go(there, ["l2"], chosen_from=tmp_path)


def test_grid_of_a_combination_is_the_product():
    points = grid("ewc+replay", {})
    assert len(points) == 4
    assert len({tuple(point.items()) for point in points}) == len(points)
    assert grid("ewc+replay", {"replay_ratio": 0.5}) == [{"penalty_weight": value} for value in FEW["ewc"][1]]
    assert grid("naive", {}) == grid("ewc", {"penalty_weight": 1.0}) == []


@pytest.mark.parametrize("name, knob, values", GRIDS)
def test_every_grid_is_of_an_argument_of_its_method(name, knob, values):
    assert knob in METHODS[name].options()
    for value in values:
        DASConfig(output_dir="out", use_cpu=True, report_to=[], **{knob: value, **METHODS[name].needs})


def test_a_diverged_point_of_the_search_is_not_chosen(tmp_path, monkeypatch, no_plots):
    def diverging(run):
        if run.options.get("penalty_weight") == FEW["l2"][1][0]:
            raise UserError("the loss of domain 'task-0' is nan at step 1")
        return learn(run)

    monkeypatch.setattr(module, "learn", diverging)
    choice = go(tmp_path, ["l2"], seeds=[0]).choices["l2"]
    assert choice.tried[0]["score"] is None and choice.chosen != choice.tried[0]["options"]


# ---- figures, tables, plots ----------------------------------------------------------------------------------------


def report_of(scores: dict[str, list[list[list[float]]]]) -> Report:
    """From matrices R[seed][stage][task], two tasks."""

    def results(matrix: list[list[float]]) -> Results:
        stages = [
            {
                "name": name,
                "scores": {f"t{j}": {"loss": 1 - value, "accuracy": value} for j, value in enumerate(row)},
                "curve": [{f"t{j}": value for j, value in enumerate(row)}],
            }
            for name, row in zip(("base", "t0", "t1"), matrix, strict=True)
        ]
        return Results({"t0": 1, "t1": 2}, stages)

    results_of = {method: [results(matrix) for matrix in matrices] for method, matrices in scores.items()}
    seeds = list(range(len(next(iter(scores.values())))))
    return Report("tiny", "two tasks", "accuracy", seeds, results_of, {method: Choice() for method in scores})


SCORES = {
    "joint": [[[0, 0], [0.9, 0.1], [0.9, 0.9]], [[0, 0], [0.8, 0.1], [0.9, 1.0]]],
    "naive": [[[0, 0], [0.9, 0.1], [0.2, 0.8]], [[0, 0], [0.8, 0.2], [0.4, 0.8]]],
    "ewc": [[[0, 0], [0.9, 0.1], [0.4, 0.8]], [[0, 0], [0.8, 0.2], [0.6, 0.796]]],
    "si": [[[0, 0], [0.9, 0.1], [0.2, 0.8]], [[0, 0], [0.8, 0.2], [0.8, 0.9]]],
    "mas": [[[0, 0], [0.9, 0.1], [0.0, 0.8]], [[0, 0], [0.8, 0.2], [0.2, 0.799]]],
}


def test_figures_by_hand():
    report = report_of(SCORES)
    assert report.order() == ["naive", "si", "ewc", "mas", "joint"]
    difference = report.difference("ewc")
    expected = np.array([0.6 - 0.5, 0.698 - 0.6])
    assert difference.mean == pytest.approx(expected.mean())
    assert difference.half == pytest.approx(12.7062 * expected.std(ddof=1) / 2**0.5, rel=1e-4)
    verdicts = {method: report.verdict(method) for method in SCORES}
    assert verdicts == {"naive": "–", "ewc": "yes", "si": "no", "mas": "no, worse", "joint": "yes"}
    assert report.forgetting("naive").mean == pytest.approx((0.7 + 0.4) / 2)
    np.testing.assert_allclose(report.averages("ewc"), [[0.9, 0.6], [0.8, 0.698]])
    assert report.curves("ewc").shape == (2, 3, 2)
    text = report.markdown()
    assert "| ewc | – | 64.9 ± 62.3 | +9.9 ± 1.3 | yes | 35.0 ± 190.6 |" in text
    assert "| naive | 30.0 ± 127.1 | 80.0 ± 0.0 |" in text and "| naive | 85.0 ± 63.5 | 55.0 ± 63.5 |" in text


def test_one_seed_has_no_interval_and_no_verdict():
    report = report_of({method: matrices[:1] for method, matrices in SCORES.items()})
    assert report.verdict("ewc") == "–" and "| ewc | – | 60.0 | +10.0 | – | 50.0 |" in report.markdown()
    assert "one seed" in report.notes()


def test_estimate_is_students_interval():
    values = [0.3, 0.5, 0.4, 0.9]
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    mean, half = Estimate.of(values)
    assert (mean - half, mean + half) == pytest.approx((low, high))


def test_what_is_written(tmp_path):
    report = go(tmp_path, ["naive", "l2", "joint"])
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        SUMMARY_NAME,
        TABLE_NAME,
        "tasks.png",
        "final.png",
        "runs",
        "search",
    }
    for name in ("tasks.png", "final.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG") and (out / name).stat().st_size > 10_000
    summary = json.loads((out / SUMMARY_NAME).read_text())
    assert summary["experiment"] == "tiny" and summary["seeds"] == [0, 1] and summary["search_seeds"] == [1000]
    l2 = summary["methods"]["l2"]
    assert len(l2["tried"]) == len(FEW["l2"][1]) and l2["chosen"] in [one["options"] for one in l2["tried"]]
    assert l2["final_average"]["mean"] == pytest.approx(report.final("l2").mean())
    for place in summary["runs"]:
        data = json.loads((out / place / FILE_NAME).read_text())
        results = Results.load(out / place)
        assert data["format"] == "das_lm.forgetting" and set(data["summary"]) == {"loss", "accuracy"}
        assert results.matrix("accuracy").shape == (3, 2) and results.unit == "nats"
    np.testing.assert_allclose(
        report.final("naive"),
        [Results.load(out / place).matrix("accuracy")[-1] for place in summary["runs"] if "naive" in place],
    )


def test_regression(tmp_path, monkeypatch):
    """R² is what counts; predictions stand beside the targets, in the order of the inputs."""
    monkeypatch.setitem(EXPERIMENTS, "tiny", lambda seed=0: tiny(seed, "r2"))
    report = go(tmp_path, ["naive", "joint"], search=False)
    assert (tmp_path / "out" / "predictions.png").stat().st_size > 10_000
    results = report.results["naive"][0]
    assert results.measures == ["loss", "r2"] and "squared error (R²)" in results.table().title
    targets = np.array(results.run["targets"])
    assert results.run["inputs"] == sorted(results.run["inputs"]) and len(targets) == 2 * (48 + 24 + 24)
    assert all(len(stage["predictions"]) == len(targets) for stage in results.stages)
    assert "R²" in report.markdown()


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experiment": "permutted"}, "there is no experiment 'permutted'. Did you mean 'permuted'?"),
        ({"parameters": {"task": 3}}, "experiment 'tiny': unknown parameter 'task'."),
        ({"methods": ["ewx"]}, "method: there is no method 'ewx'. Did you mean 'ewc'?"),
        ({"methods": ["ewc+das"]}, "method: 'das' acts on language models, not on small ones; leave it out"),
        ({"methods": []}, "method: is empty; for training without a method write naive"),
        ({"methods": ["ewc+replay", "replay+ewc"]}, "a method stands there twice"),
        ({"methods": ["ewc+ewc"]}, "a method stands there twice"),
        (
            {"methods": ["replay"], "schedule": "interleaved"},
            "schedule: 'interleaved' does not go with the method 'replay', which consolidates when a domain ends; "
            "write sequential, or another method",
        ),
        ({"schedule": "interleave"}, "schedule: there is no 'interleave'. Did you mean 'interleaved'?"),
        ({"seeds": []}, "seeds: : write different whole numbers from 0 on"),
        ({"seeds": [1, 1]}, "seeds: 1 1: write different"),
        ({"seeds": [0, 1000]}, "search_seeds: 1000 is among the seeds that are reported; search with others"),
        ({"epochs": 0}, "epochs: 0 must be 1 or more"),
        ({"workers": 0}, "workers: 0 must be 1 or more"),
        ({"options": {"penalty_wait": 1}}, "penalty_wait: unknown key. Did you mean 'penalty_weight'?"),
        ({"options": {"penalty_weight": "much"}}, "penalty_weight: expected a number, not the text 'much'"),
        ({"options": {"penalty_weight": -1.0}}, "method 'naive': penalty_weight: -1.0 must be at least 0"),
        ({"options": {"seed": 1}}, "seed: is set by --seeds"),
        ({"options": {"num_train_epochs": 3}}, "num_train_epochs: is set by --epochs"),
        ({"options": {"save_strategy": "steps"}}, "save_strategy: is set by the benchmark"),
        ({"methods": ["ncl"], "options": {"optim": "adamw_torch"}}, "method: 'ncl' makes the step itself"),
    ],
)
def test_bad_input_leaves_nothing_behind(changes, message, tmp_path):
    arguments = {"experiment": "tiny", "methods": ["naive", "ewc"], "output_dir": tmp_path / "a" / "b", "workers": 1}
    with pytest.raises(UserError) as error:
        benchmark(**{**arguments, **changes})
    assert message in str(error.value)
    assert not (tmp_path / "a").exists()


def test_output_directory(tmp_path, no_plots):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file; name a directory"):
        benchmark("tiny", ["naive"], [0], output_dir=tmp_path / "file")
    with pytest.raises(UserError, match="is not empty and holds no benchmark; name another directory"):
        benchmark("tiny", ["naive"], [0], output_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    go(tmp_path, ["naive"], [0])
    with pytest.raises(UserError, match=r"holds another experiment, tiny \{\}; name another directory"):
        benchmark("odd_even", ["naive"], [0], output_dir=tmp_path / "out")
    (tmp_path / "out" / SUMMARY_NAME).write_text("{")
    with pytest.raises(UserError, match=f"{SUMMARY_NAME} cannot be read"):
        go(tmp_path, ["naive"], [0])


# ---- command line --------------------------------------------------------------------------------------------------


def test_command_line(tmp_path, capsys):
    command = "classic --experiment odd_even --method naive ewc --seeds 0 --epochs 1 --penalty_weight 5 --workers 1"
    assert main([*command.split(), "--output_dir", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and "odd_even, after the last task" in captured.out
    runs = [Results.load(path.parent) for path in sorted((tmp_path / "out" / "runs").glob("*/forgetting.json"))]
    assert [run.run["method"] for run in runs] == ["ewc", "naive"]
    assert runs[0].run["options"] == {"penalty_weight": 5.0} and runs[0].run["epochs"] == 1
    assert not (tmp_path / "out" / "search").exists()


def test_options_reach_the_benchmark(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "benchmark", lambda *args, **kwargs: calls.append(kwargs))
    command = (
        "classic --experiment split --groups 0,1 2,3 --scenario task --data a b --no-search --search_seeds 7 8 "
        "--workers 2 --epochs 3 --schedule interleaved --learning_rate 0.01 --method naive joint --output_dir out"
    )
    assert main(command.split()) == 0
    assert calls == [
        {
            "experiment": "split",
            "methods": ["naive", "joint"],
            "parameters": {"groups": [[0, 1], [2, 3]], "scenario": "task", "data": ["a", "b"]},
            "options": {"learning_rate": 0.01},
            "search": False,
            "search_seeds": [7, 8],
            "workers": 2,
            "epochs": 3,
            "schedule": "interleaved",
            "output_dir": "out",
        }
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "--experiment is missing; give one of permuted, split, odd_even, seasons"),
        ("--experiment nothing", "there is no experiment 'nothing'"),
        ("--experiment split --groups 0-1", "--groups 0-1: write the classes of every task with commas"),
        ("--experiment seasons --tasks 3", "experiment 'seasons': unknown parameter 'tasks'"),
        ("--experiment odd_even --data nowhere", "data: there is no directory 'nowhere'"),
        ("--experiment odd_even --epoch 3", "unknown option '--epoch'. Did you mean '--epochs'?"),
        ("--experiment odd_even --max_steps 3", "max_steps: is set by --epochs"),
    ],
)
def test_wrong_command_lines(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["classic", *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err and captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_script(capsys):
    path = Path(__file__).parents[2] / "scripts" / "classic_benchmark.py"
    spec = importlib.util.spec_from_file_location("classic_benchmark", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.main is main
