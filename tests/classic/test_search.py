"""The search for λ: the bracket, the file of runs, what stands out of the noise, and a small search for real."""

import json
import math
import os
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from das_lm.classic import search as lambda_search
from das_lm.classic.search import (
    EVALUATIONS_NAME,
    LEVEL,
    PLOT_NAME,
    RESULT_NAME,
    Curve,
    Search,
    bracket_search,
    check_method,
    compare,
    experiment_objective,
    integrated_loss,
    optuna_study,
    recipe_objective,
    search_lambda,
    verdict,
)
from das_lm.cli import main
from das_lm.errors import UserError
from das_lm.run.directory import locked
from das_lm.run.recipe_file import load_recipe
from tests.helpers import build_tokenizer, tiny_roberta

QUIET = Console(quiet=True)
SMALL = Search(low=0, high=100, trials=2, confirm=5, max_evaluations=9, seed=3)


def objective(f, noise=0.0, seed=0, calls=None):
    """A stand-in for training: f(λ), a level of the trial, and noise that a function of (trial, λ) draws."""

    def start(trial_seed):
        level = np.random.default_rng([seed, trial_seed]).normal(0, 5)

        def run(weight):
            if calls is not None:
                calls.append((trial_seed, weight))
            draw = np.random.default_rng([seed, trial_seed, int(weight * 1e6)]).normal()
            return {"measure": level + f(weight) + noise * draw}

        return run

    return start


def bowl(weight):
    return ((weight - 40) / 20) ** 2


# ---- the bracket ---------------------------------------------------------------------------------------------------


def measured(f, low, high, search):
    values = {}

    def measure(weight):
        assert weight not in values
        values[weight] = f(weight)
        return values[weight]

    reason = bracket_search(measure, low, high, search)
    return values, reason


@pytest.mark.parametrize("num_steps", [4, 5, 8])
def test_the_bracket_closes_on_the_minimum(num_steps):
    """Of a convex function, it always contains the minimum; no value is measured twice."""
    search = Search(low=0, high=100, num_steps=num_steps, threshold=0.5)
    values, reason = measured(lambda weight: (weight - 37.3) ** 2, 0.0, 100.0, search)
    assert abs(min(values, key=values.get) - 37.3) < 0.5
    assert "threshold" in reason
    places = np.sort(list(values))
    assert np.diff(places).min() > 1e-3  # nor one that differs by rounding


def test_the_bracket_by_hand():
    search = Search(low=0, high=16, num_steps=5, threshold=3)
    values, _ = measured(lambda weight: abs(weight - 11), 0.0, 16.0, search)
    # 0 4 8 12 16, best 12; 8 to 16: 10 and 14 are new, best 10 or 12 (the first); 8 to 12: 9 and 11; 10 to 12.
    assert list(values) == [0, 4, 8, 12, 16, 10, 14, 9, 11]


@pytest.mark.parametrize("at", [0.0, 100.0])
def test_a_minimum_at_the_end_is_found(at):
    values, _ = measured(lambda weight: abs(weight - at), 0.0, 100.0, Search(threshold=1))
    assert min(values, key=values.get) == at


def test_a_logarithmic_scale():
    search = Search(low=1e-3, high=1e5, log=True, threshold=1.2)
    values, _ = measured(lambda weight: math.log(weight / 7) ** 2, 1e-3, 1e5, search)
    assert list(values)[:5] == [1e-3, 0.1, 10, 1e3, 1e5]
    assert min(values, key=values.get) == pytest.approx(7, rel=0.2)


def test_a_noisy_minimum_is_found_within_the_budget(tmp_path):
    calls = []
    search = Search(low=0, high=100, trials=6, confirm=8, max_evaluations=12, threshold=1e-6)
    result = search_lambda(search, objective(bowl, 0.3, calls=calls), tmp_path, console=QUIET)
    assert result["chosen"] == pytest.approx(40, abs=8)
    low, high = result["chosen_interval"]
    assert low <= result["chosen"] <= high
    assert result["stands_out"] and "stands out" in result["finding"]
    assert len(calls) == len(set(calls))
    assert all(trial["evaluations"] == 12 and "budget" in trial["stopped"] for trial in result["trials"])


def test_every_trial_draws_its_bracket():
    search = Search(low=(0.1, 10), high=(50, 1000), log=True)
    brackets = [search.bracket(trial) for trial in range(50)]
    assert all(0.1 <= low <= 10 and 50 <= high <= 1000 for low, high in brackets)
    assert len(set(brackets)) == 50
    assert search.bracket(3) == brackets[3] != replace(search, seed=1).bracket(3)
    assert np.median([low for low, _ in brackets]) == pytest.approx(1, rel=1.0)  # logarithmic


# ---- the file of runs ----------------------------------------------------------------------------------------------


def test_interrupted_at_every_run_and_resumed_it_is_the_same(tmp_path, monkeypatch):
    calls = []
    search_lambda(SMALL, objective(bowl, 0.5, calls=calls), tmp_path / "whole", console=QUIET)
    assert (tmp_path / "whole" / PLOT_NAME).read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setattr(lambda_search.report, "plot", lambda *_: None)  # at every interruption, it would take long
    whole = (tmp_path / "whole" / RESULT_NAME).read_text()

    again, attempts = [], 0
    plain = objective(bowl, 0.5, calls=again)

    def breaks(seed):
        run = plain(seed)

        def once(weight):
            if started:
                raise KeyboardInterrupt
            started.append(weight)
            return run(weight)

        return once

    while True:
        started = []
        try:
            search_lambda(SMALL, breaks, tmp_path / "parts", resume=attempts > 0, console=QUIET)
            break
        except KeyboardInterrupt:
            attempts += 1
    assert attempts == len(calls) - 1 and again == calls
    assert (tmp_path / "parts" / RESULT_NAME).read_text() == whole


def test_a_torn_line_is_measured_again(tmp_path):
    result = search_lambda(SMALL, objective(bowl), tmp_path, console=QUIET)
    path = tmp_path / EVALUATIONS_NAME
    path.write_text(path.read_text()[:-20])
    calls = []
    assert search_lambda(SMALL, objective(bowl, calls=calls), tmp_path, resume=True, console=QUIET) == result
    assert len(calls) == 1
    path.write_text("{\n" + path.read_text())
    with pytest.raises(UserError, match=r"evaluations.jsonl:1: cannot be read"):
        search_lambda(SMALL, objective(bowl), tmp_path, resume=True, console=QUIET)


def test_more_trials_go_on_where_fewer_ended(tmp_path):
    search_lambda(SMALL, objective(bowl, 0.5), tmp_path, console=QUIET)
    calls, more = [], replace(SMALL, trials=3)
    search_lambda(more, objective(bowl, 0.5, calls=calls), tmp_path, resume=True, console=QUIET)
    choosing = [seed for seed, _ in calls if seed in {SMALL.trial_seed(n) for n in range(3)}]
    assert set(choosing) == {SMALL.trial_seed(2)}


def test_other_searches_are_refused(tmp_path):
    def start(search=SMALL, about=None, directory=tmp_path / "a", **options):
        return search_lambda(search, objective(bowl), directory, about, console=QUIET, **options)

    with pytest.raises(UserError, match="holds no search to go on with"):
        start(resume=True)
    start(about={"method": "ewc"})
    with pytest.raises(UserError, match="holds another search; give --resume"):
        start(about={"method": "ewc"})
    with pytest.raises(UserError, match="has another 'method': 'ewc', not 'mas'"):
        start(about={"method": "mas"}, resume=True)
    with pytest.raises(UserError, match=r"another 'high': \[100.0, 100.0\], not \[50.0, 50.0\]"):
        start(replace(SMALL, high=50), {"method": "ewc"}, resume=True)
    with pytest.raises(UserError, match="give one of them"):
        start(resume=True, overwrite=True)
    start(about={"method": "mas"}, overwrite=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").touch()
    with pytest.raises(UserError, match="not empty and holds no search"):
        start(directory=tmp_path / "b", overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        start(directory=tmp_path / "b" / "thesis.txt")


def test_what_is_overwritten_comes_back_if_nothing_is_measured(tmp_path):
    def broken(seed):
        raise UserError("no model")

    search_lambda(SMALL, objective(bowl), tmp_path, console=QUIET)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*")}
    with pytest.raises(UserError, match="no model"):
        search_lambda(SMALL, broken, tmp_path, overwrite=True, console=QUIET)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*")} == before
    mine = tmp_path / "runs" / "seed-1" / "notes.md"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(UserError, match="no search wrote runs/seed-1/notes.md"):
        search_lambda(SMALL, objective(bowl), tmp_path, overwrite=True, console=QUIET)
    mine.unlink()
    search_lambda(replace(SMALL, trials=3), objective(bowl), tmp_path, overwrite=True, console=QUIET)
    assert not (tmp_path / "runs").exists() and not (tmp_path / ".overwritten").exists()


def test_one_search_at_a_time(tmp_path):
    with locked(tmp_path), pytest.raises(UserError, match=f"in use by process {os.getpid()} on "):
        search_lambda(SMALL, objective(bowl), tmp_path, console=QUIET)
    search_lambda(SMALL, objective(bowl), tmp_path, console=QUIET)


def test_a_run_that_diverges_is_the_worst(tmp_path):
    def start(seed):
        return lambda weight: {"measure": None if weight > 60 else bowl(weight)}

    result = search_lambda(SMALL, start, tmp_path, console=QUIET)
    assert result["chosen"] == pytest.approx(40, abs=10)
    assert all(set(trial["diverged"]) >= {75.0, 100.0} for trial in result["trials"])
    at_end = next(figures for figures in result["comparisons"] if figures["lambda"] == 100)
    assert at_end["difference"] is None and at_end["p"] == pytest.approx(1 / 32)
    assert result["stands_out"]


# ---- what the trials say -------------------------------------------------------------------------------------------


def test_the_curve_is_that_of_the_differences():
    """Levels of trials play no part, wherever a trial looked."""
    search = Search(low=0, high=100)
    generator = np.random.default_rng(0)
    places = [np.round(generator.uniform(0, 100, 20), 3).tolist() for _ in range(4)]
    trials = [{weight: bowl(weight) + 100 * n for weight in [0.0, *row]} for n, row in enumerate(places)]
    curve = Curve(search, trials)
    assert np.abs(curve.values - (bowl(curve.weights) - bowl(0))).max() < 0.05
    assert curve.chosen == 40
    assert all(value == pytest.approx(bowl(weight) - bowl(0), abs=0.05) for weight, value in curve.points())
    low, high = curve.interval
    assert (low <= curve.values + 1e-9).all() and (curve.values <= high + 1e-9).all()


def test_zero_outside_of_the_range_has_a_value_of_its_own():
    search = Search(low=1, high=1e4, log=True)
    trial = {0.0: 7.0, **{weight: math.log10(weight) for weight in search.grid(1, 1e4, 9)}}
    curve = Curve(search, [trial])
    assert curve.values == pytest.approx(np.log10(curve.weights) - 7, abs=0.01)
    assert curve.interval is None and curve.chosen_interval is None  # from one trial


def test_compare():
    assert compare([1, 2, 3, 4, 5], [2, 3, 4, 5, 6])["p"] == 1 / 32  # 2^-5, the least there can be
    assert compare([1.0] * 5, [1.0] * 5) == {"difference": 0.0, "p": 1.0}
    assert compare([2, 3, 4, 5, 6], [1, 2, 3, 4, 5])["p"] == 1
    assert compare([None, 1, 1], [1, 2, 4]) == {"difference": -2.0, "p": pytest.approx(5 / 8)}  # ranks -1, -2, +3


def test_a_comparison_errs_as_often_as_stated():
    draws = np.random.default_rng(0).standard_t(3, size=(2, 1500, 10))
    errors = [compare(ours, theirs)["p"] < LEVEL for ours, theirs in zip(*draws, strict=True)]
    assert 0.03 <= np.mean(errors) <= 0.055  # 43 of the 1024 signs: 4.2 %


def finding(search, start):
    """A search without its files."""
    known = {}

    def measure(trial, weight):
        return known.setdefault((trial, weight), runs[trial](weight)["measure"])

    runs = {n: start(search.trial_seed(n)) for n in [*range(search.trials), *search.confirming]}
    for trial in range(search.trials):
        measure(trial, 0.0)
        bracket_search(lambda weight, trial=trial: measure(trial, weight), *search.bracket(trial), search)
    trials = [{w: value for (n, w), value in known.items() if n == trial} for trial in range(search.trials)]
    chosen = Curve(search, trials).chosen
    confirmed = {weight: [measure(n, weight) for n in search.confirming] for weight in {*search.references, chosen}}
    return verdict(chosen, confirmed, search)


@pytest.mark.parametrize(
    ("f", "least", "most"),
    [
        (lambda weight: 0.0, 0.0, 0.03),  # pure noise: all comparisons would have to err
        (lambda weight: -10 * min(weight, 5) / 5, 0.0, 0.09),  # all from 5 on alike: one has to err, 5 %
        (lambda weight: -weight / 10, 0.0, 0.02),  # falls to the end
        (lambda weight: 2 * ((weight - 40) / 40) ** 2, 0.9, 1.0),  # a minimum two standard deviations deep
    ],
    ids=["noise", "plateau", "slope", "bowl"],
)
def test_how_often_a_minimum_is_said_to_stand_out(f, least, most):
    count = 120
    search = Search(low=0, high=100, trials=4, confirm=10, threshold=15)
    found = [
        finding(replace(search, seed=seed), objective(f, noise=1.0, seed=seed))["stands_out"] for seed in range(count)
    ]
    assert least <= np.mean(found) <= most


def test_findings_in_words():
    search, apart = Search(low=0, high=100), Search(low=1, high=100)
    better, same = list(range(10)), [x + (-1) ** x * (1 + x / 10) for x in range(10)]
    worse = [x + 1 + x / 10 for x in range(10)]

    def words(chosen, confirmed, search=search):
        judged = verdict(chosen, confirmed, search)
        return judged["stands_out"], judged["finding"]

    assert words(40.0, {}) == (None, "not tested: the curve is lowest at λ = 40")
    assert words(40.0, {40.0: better, 0.0: worse, 100.0: worse}) == (
        True,
        "a minimum stands out: λ = 40 is better than λ = 0 and λ = 100",
    )
    assert words(40.0, {40.0: better, 0.0: worse, 100.0: same}) == (
        False,
        "no minimum stands out of the noise: λ = 40 is not better than λ = 100, though than λ = 0",
    )
    assert "search with a greater high" in words(100.0, {0.0: worse, 100.0: better})[1]
    assert "the less penalty, the better" in words(0.0, {0.0: better, 100.0: worse})[1]
    stands_out, told = words(1.0, {0.0: worse, 1.0: better, 100.0: worse}, apart)
    assert not stands_out and "search with a smaller low" in told


def test_integrated_loss():
    assert integrated_loss([[4, 2, 1, 1], [3, 1]]) == 2 + 2
    assert integrated_loss([[1, math.nan], [1]]) is None


# ---- training ------------------------------------------------------------------------------------------------------


def test_the_runs_of_a_trial_share_all_but_the_weight():
    """λ = 0 twice is one and the same; with it, the whole walk is that of plain training."""
    from das_lm.classic.runs import BenchmarkRun, learn

    start = experiment_objective("odd_even", "ewc", epochs=1)
    run = start(5)
    nothing, some = run(0.0), run(100.0)
    assert run(0.0) == nothing == start(5)(0.0) != start(6)(0.0)
    assert run(100.0) == some
    first, second = (figures["curves"]["even"] for figures in (nothing, some))
    assert first[0] == second[0] and first[1] != second[1]  # the first task has no penalty yet
    assert [len(curve) for curve in nothing["curves"].values()] == [2, 1]
    for method, weight, figures in (("naive", 1.0, nothing), ("ewc", 100.0, some)):
        results = learn(BenchmarkRun("odd_even", method, 5, options={"penalty_weight": weight}, epochs=1))
        final = results.stages[-1]["scores"]
        assert {name: score["loss"] for name, score in final.items()} == {
            name: pytest.approx(score["loss"]) for name, score in figures["test"].items()
        }


@pytest.mark.parametrize("method", ["l2", "mas", "si", "rwalk", "scp"])
def test_every_penalty_goes_from_the_first_task_on_as_a_whole_run_does(method):
    from das_lm.classic.runs import BenchmarkRun, learn

    parameters = {"groups": [[0, 1], [2, 3], [4, 5]], "scenario": "task"}
    options = {"scp_projections": 3, "per_device_train_batch_size": 64}
    figures = experiment_objective("split", method, parameters, options, epochs=1)(2)(10.0)
    whole = learn(BenchmarkRun("split", method, 2, parameters, {**options, "penalty_weight": 10.0}, epochs=1)).stages[
        -1
    ]
    assert {name: test["loss"] for name, test in figures["test"].items()} == pytest.approx(
        {name: score["loss"] for name, score in whole["scores"].items()}
    )


def test_a_search_for_real(tmp_path):
    search = Search(low=1, high=1e5, log=True, trials=2, confirm=0, num_steps=4, max_evaluations=5)
    start = experiment_objective("odd_even", "ewc", epochs=1)
    result = search_lambda(search, start, tmp_path, console=QUIET)
    assert {path.name for path in tmp_path.iterdir()} == {"search.json", EVALUATIONS_NAME, RESULT_NAME, PLOT_NAME}
    assert 1 <= result["chosen"] <= 1e5 and result["stands_out"] is None
    assert min(result["curve"]["difference_to_0"]) < 0  # holding on to the even digits is worth something
    lines = [json.loads(line) for line in (tmp_path / EVALUATIONS_NAME).read_text().splitlines()]
    assert len(lines) == 2 * 5 and all(math.isfinite(line["measure"]) for line in lines)


def test_divergence_is_a_figure_and_other_errors_are_not(monkeypatch):
    from das_lm.training.trainer import ContinualTrainer

    run = experiment_objective("odd_even", "l2", options={"optim": "sgd", "learning_rate": 0.1}, epochs=1)(0)
    assert run(1e6) == {"measure": None}

    def full(*args, **kwargs):
        raise UserError("the disk is full")

    monkeypatch.setattr(ContinualTrainer, "train", full)
    with pytest.raises(UserError, match="the disk is full"):
        run(1.0)


def test_a_recipe(tmp_path):
    """Two λ of a trial share the first domain; its loss counts until the end."""
    tiny_roberta().save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    for start, name in ((0, "bio"), (30, "cs"), (15, "old")):
        lines = (" ".join(f"w{start + (place * step) % 29}" for place in range(1, 12)) for step in range(1, 29))
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    (tmp_path / "recipe.yaml").write_text(
        f"{{model_name_or_path: {tmp_path}/model, output_dir: unused, "
        f"domains: [{{name: bio, data: {tmp_path}/bio.txt}}, {{name: cs, data: {tmp_path}/cs.txt}}], "
        f"measure: [{{name: old, data: {tmp_path}/old.txt}}], "
        "training: {max_length: 24, max_steps: 5, per_device_train_batch_size: 4, importance_samples: 8}}"
    )
    recipe = load_recipe(tmp_path / "recipe.yaml", {"method": "ewc", "training": {"learning_rate": 1e-2}})
    run = recipe_objective(recipe, "ewc", tmp_path)(1)
    nothing, some = run(0.0), run(1e4)
    assert [len(curve) for curve in nothing["curves"].values()] == [10, 5]
    assert nothing["curves"]["bio"][:5] == some["curves"]["bio"][:5]
    assert nothing["curves"]["bio"][5:] != some["curves"]["bio"][5:]
    assert {name: set(scores) for name, scores in nothing["test"].items()} == dict.fromkeys(
        ("bio", "cs"), {"loss", "accuracy"}
    )
    assert nothing["test"]["cs"]["loss"] != nothing["curves"]["cs"][-1]  # on the half that chose nothing
    assert recipe_objective(recipe, "ewc", tmp_path / "other")(1)(1e4) == some  # not shared, the same
    assert not list((tmp_path / f"seed-1/lambda-{1e4}").glob("*-*/*.safetensors"))


# ---- Optuna --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_optuna(sampler, tmp_path):
    pytest.importorskip("optuna")
    study = optuna_study(bowl, 0, 100, evaluations=25, sampler=sampler)
    assert len(study.trials) == 25 and study.best_params["penalty_weight"] == pytest.approx(40, abs=12)
    search = replace(SMALL, sampler=f"optuna:{sampler}", max_evaluations=12)
    result = search_lambda(search, objective(bowl, 0.1), tmp_path, console=QUIET)
    assert result["chosen"] == pytest.approx(40, abs=15)
    calls = []
    assert search_lambda(search, objective(bowl, 0.1, calls=calls), tmp_path, resume=True, console=QUIET) == result
    assert not calls


def test_without_optuna(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"pip install 'das-lm\[search\]'"):
        optuna_study(bowl, 0, 100)


def test_an_unknown_sampler_of_optuna():
    pytest.importorskip("optuna")
    with pytest.raises(UserError, match="no 'tpa'. Did you mean 'tpe'"):
        optuna_study(bowl, 0, 100, sampler="tpa")


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 5, "high": 5}, "low: 5 must be below high: 5"),
        ({"low": (0, 9), "high": (8, 20)}, "low: 9 must be below high: 8"),
        ({"low": -1}, "low: -1: λ is the weight of a penalty; write 0 or more"),
        ({"high": math.inf}, "high: inf: write one number, or two"),
        ({"low": (2, 1)}, r"low: \(2, 1\): write one number, or two to draw it from, the smaller first"),
        ({"low": (1, 2, 3)}, "write one number, or two"),
        ({"log": True}, "low: 0 is on no logarithmic scale"),
        ({"num_steps": 3}, "num_steps: 3 must be 4 or more"),
        ({"threshold": 0}, "threshold: 0 is a width of the bracket; write more than 0"),
        ({"low": 1, "log": True, "threshold": 1}, "threshold: 1 is a ratio of the bracket's ends; write more than 1"),
        ({"threshold": math.nan}, "threshold: nan"),
        ({"max_evaluations": 5}, "one grid of 5 values and λ = 0 need 6"),
        ({"trials": 0}, "trials: 0 must be 1 or more"),
        ({"confirm": 3}, "confirm: 3 trials can show nothing; write 5 or more, or 0"),
        ({"sampler": "optuna:tpa"}, "sampler: there is no 'optuna:tpa'. Did you mean 'optuna:tpe'"),
    ],
)
def test_bad_searches(options, message):
    with pytest.raises(UserError, match=message):
        Search(**options)


@pytest.mark.parametrize(
    ("method", "message"),
    [("ewx", "no method|no 'ewx'. Did you mean 'ewc'"), ("replay", "'replay' has no penalty_weight .* write ewc, l2")],
)
def test_bad_methods(method, message):
    for refuse in (
        lambda: check_method(method),
        lambda: experiment_objective("split", method),
        lambda: recipe_objective(load_recipe("bio_then_cs"), method, "out"),
    ):
        with pytest.raises(UserError, match=message):
            refuse()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"experiment": "splits"}, "no experiment 'splits'. Did you mean 'split'"),
        ({"parameters": {"groups": [[0, 1]]}}, "a single task has nothing to hold on to"),
        ({"options": {"penalty_weight": 1}}, "penalty_weight: is what is searched for; leave it out"),
        ({"options": {"learning_rat": 1}}, "learning_rat.*Did you mean 'learning_rate'"),
        ({"options": {"fisher": "exact"}}, "fisher: expected one of 'true', 'empirical', not the text 'exact'"),
        ({"epochs": 0}, "epochs: 0 must be 1 or more"),
    ],
)
def test_bad_experiments(arguments, message):
    with pytest.raises(UserError, match=message):
        experiment_objective(**{"experiment": "split", **arguments})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"domain": ["bio"]}, "domains: a single one"),
        ({"schedule": "alternating", "method": "naive"}, "schedule: 'alternating' leaves nothing to hold on to"),
    ],
)
def test_bad_recipes(overrides, message):
    with pytest.raises(UserError, match=message):
        recipe_objective(load_recipe("bio_then_cs", overrides), "ewc", "out")


# ---- the command line ----------------------------------------------------------------------------------------------


@pytest.fixture
def searched(monkeypatch):
    """Stands in for the search; collects what reaches it."""
    calls = []
    monkeypatch.setattr(lambda_search, "search_lambda", lambda *given, **options: calls.append((*given, options)))
    return calls


def test_the_command_for_an_experiment(searched, capsys):
    command = (
        "search-lambda --experiment split --groups 0,1,2 3,4,5 --scenario class --method mas --low 0.1 1 --high 1e4 "
        "--log --num_steps 7 --trials 3 --seed 8 --learning_rate 0.01 --epochs 2 --output_dir out --resume"
    )
    assert main(command.split()) == 0
    ((search, _, output, about, options),) = searched
    assert search == Search(low=(0.1, 1), high=1e4, log=True, num_steps=7, trials=3, seed=8)
    assert (output, options) == ("out", {"resume": True, "overwrite": False})
    assert about == {
        "experiment": "split",
        "method": "mas",
        "parameters": {"groups": [[0, 1, 2], [3, 4, 5]], "scenario": "class"},
        "options": {"learning_rate": 0.01},
        "epochs": 2,
    }


def test_the_command_for_a_recipe(searched, capsys):
    assert main(["search-lambda", "--recipe", "bio_then_cs", "--max_steps", "5"]) == 0
    ((search, _, output, about, options),) = searched
    assert (search, output) == (Search(), "output/search/bio_then_cs-ewc")
    assert "max_steps: 5" in about["recipe"] and about["method"] == "ewc"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "give one of --experiment and --recipe"),
        ("--experiment split --recipe bio_then_cs", "give one of --experiment and --recipe"),
        ("--recipe bio_then_cs --epochs 3", "--epochs goes with --experiment"),
        ("--recipe bio_then_cs --method replay", "'replay' has no penalty_weight"),
        ("--experiment split --low 7 --high 3", "low: 7 must be below high: 3"),
        ("--experiment split --groups 0-1", "write the classes of every task with commas"),
        ("--experiment split --lwo 7", "unknown option '--lwo'"),
    ],
)
def test_wrong_commands(command, message, searched, capsys):
    assert main(["search-lambda", *command.split()]) == 2
    assert message in capsys.readouterr().err and not searched
