"""
The search for a penalty's weight λ, with the noise of training taken seriously.

A trial is one base model, one order of the data and one set of seeds, and λ alone differs between its runs: common
random numbers. It measures a grid of λ, keeps the best and its two neighbours as the new bracket, and repeats. Trials
differ more than λ does, so curves are compared within trials, and what the search found is then tested in trials that
had no part in the choice.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from das_lm.errors import NotFinite, UserError, did_you_mean
from das_lm.files import write_json, write_text
from das_lm.randomness import addressed_seed
from das_lm.terminal import Console

if TYPE_CHECKING:
    import optuna

    from das_lm.classic.benchmark import Run as BenchmarkRun
    from das_lm.run.recipe import Recipe

SETTINGS_NAME, EVALUATIONS_NAME = "search.json", "evaluations.jsonl"
RESULT_NAME, PLOT_NAME = "result.json", "curve.png"
SAMPLERS = ("bracket", "optuna:gp", "optuna:qmc", "optuna:random", "optuna:tpe")
KNOTS = 41  # of the smooth curve
BOOTSTRAPS = 1000
LEVEL = 0.05  # of the test
SAME = 1e-3  # of the distance between two values of a grid: nearer ones are one value

#: λ -> `measure`, the integrated loss (`None`: training diverged), and whatever else is worth keeping, as JSON.
Run = Callable[[float], Mapping[str, Any]]
#: Seed of a trial -> its runs, which share everything but λ.
Objective = Callable[[int], Run]


@dataclass(frozen=True)
class Search:
    """
    Where and how long λ is searched for.

    Args:
        low: lower end of the first bracket; of a pair, every trial draws its own from between the two.
        high: upper end, likewise.
        num_steps: values from the lower to the upper end of a bracket.
        log: whether values are spread, and ends drawn, on a logarithmic scale.
        threshold: a trial is over once its bracket is narrower: `high − low`, with `log` `high / low`. By default a
            twentieth of the first bracket, with `log` 1.5.
        max_evaluations: values of λ that a trial may measure, λ = 0 among them.
        trials: how many choose λ.
        confirm: how many others test the choice; 0 leaves the test out.
        sampler: `"bracket"`, or an Optuna sampler such as `"optuna:tpe"`, which spends all of `max_evaluations`.
        seed: of everything.

    Raises:
        UserError: values that are no search.
    """

    low: float | tuple[float, float] = 0.0
    high: float | tuple[float, float] = 100.0
    num_steps: int = 5
    log: bool = False
    threshold: float | None = None
    max_evaluations: int = 30
    trials: int = 5
    confirm: int = 10
    sampler: str = "bracket"
    seed: int = 0

    def __post_init__(self):
        for name in ("low", "high"):
            value = getattr(self, name)
            ends = [float(end) for end in (value if isinstance(value, Sequence) else (value, value))]
            if len(ends) != 2 or not all(map(math.isfinite, ends)) or ends[0] > ends[1]:
                raise UserError(f"{name}: {value}: write one number, or two to draw it from, the smaller first")
            if ends[0] < 0:
                raise UserError(f"{name}: {value}: λ is the weight of a penalty; write 0 or more")
            object.__setattr__(self, name, (ends[0], ends[1]))
        if self.low[1] >= self.high[0]:
            raise UserError(f"low: {self.low[1]:g} must be below high: {self.high[0]:g}")
        if self.log and self.low[0] == 0:
            raise UserError("low: 0 is on no logarithmic scale; write a small number such as 0.01 (λ = 0 is measured)")
        if self.num_steps < 4:
            raise UserError(
                f"num_steps: {self.num_steps} must be 4 or more; the best of 3 values and its neighbours are again "
                "the whole bracket"
            )
        least = 1 if self.log else 0
        if self.threshold is not None and not self.threshold > least:
            what = "ratio of the bracket's ends" if self.log else "width of the bracket"
            raise UserError(f"threshold: {self.threshold:g} is a {what}; write more than {least}")
        if self.max_evaluations <= self.num_steps:
            raise UserError(
                f"max_evaluations: {self.max_evaluations}: one grid of {self.num_steps} values and λ = 0 need "
                f"{self.num_steps + 1}"
            )
        if self.trials < 1:
            raise UserError(f"trials: {self.trials} must be 1 or more")
        if self.confirm != 0 and self.confirm < 5:
            raise UserError(f"confirm: {self.confirm} trials can show nothing; write 5 or more, or 0 for no test")
        if self.sampler not in SAMPLERS:
            raise UserError(f"sampler: there is no '{self.sampler}'.{did_you_mean(self.sampler, SAMPLERS)}")

    def bracket(self, trial: int) -> tuple[float, float]:
        """The first bracket of a trial."""
        draws = np.random.default_rng(addressed_seed(self.seed, "bracket", trial)).random(2)
        return tuple(self._between(*ends, share) for ends, share in zip((self.low, self.high), draws, strict=True))

    def trial_seed(self, trial: int) -> int:
        """The seed of everything in a trial; those that test the choice come after those that made it."""
        return addressed_seed(self.seed, "trial", trial) % 2**31

    def _between(self, low: float, high: float, share: float) -> float:
        if low == high:
            return low
        value = low * (high / low) ** share if self.log else low + share * (high - low)
        return float(f"{value:.6g}")

    def grid(self, low: float, high: float, count: int) -> list[float]:
        """Values from low to high, both included."""
        inner = [self._between(low, high, step / (count - 1)) for step in range(1, count - 1)]
        return [low, *inner, high]

    def position(self, weight: float) -> float:
        """Where λ stands between the lowest and the highest end of any trial, 0 to 1."""
        low, high = self.low[0], self.high[1]
        if self.log:
            return math.log(weight / low) / math.log(high / low)
        return (weight - low) / (high - low)

    @property
    def references(self) -> list[float]:
        """What a minimum has to be better than: no penalty, and both ends of the range."""
        return sorted({0.0, self.low[0], self.high[1]})


# ---- one trial -----------------------------------------------------------------------------------------------------


class _Spent(Exception):
    """The budget of a trial is spent."""


def bracket_search(measure: Callable[[float], float], low: float, high: float, search: Search) -> str:
    """
    Measure a grid, keep the best value and its two neighbours, repeat.

    Args:
        measure: λ -> what is to be small. Called once per value.
        low: lower end of the first bracket.
        high: its upper end.
        search: number of values, scale and threshold.

    Returns:
        why it stopped.
    """
    known: dict[float, float] = {}
    threshold = search.threshold or (1.5 if search.log else (high - low) / 20)
    while True:
        grid = []
        same = SAME * (search.position(high) - search.position(low)) / (search.num_steps - 1)
        for weight in search.grid(low, high, search.num_steps):
            place = search.position(weight)
            weight = next((one for one in known if abs(search.position(one) - place) < same), weight)
            if weight not in known:
                known[weight] = measure(weight)
            grid.append(weight)
        best = min(range(len(grid)), key=lambda index: known[grid[index]])
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
        if (high / low if search.log else high - low) < threshold:
            return "the bracket is narrower than the threshold"


def optuna_study(
    objective: Callable[[float], float],
    low: float,
    high: float,
    log: bool = False,
    evaluations: int = 30,
    sampler: str | optuna.samplers.BaseSampler = "tpe",
    seed: int = 0,
) -> optuna.Study:
    """
    The search of a trial as an Optuna study that minimises the parameter `penalty_weight`.

    Args:
        objective: λ -> what is to be small.
        low: least λ.
        high: greatest λ.
        log: whether λ is searched on a logarithmic scale.
        evaluations: how often the objective is called.
        sampler: `"gp"`, `"qmc"`, `"random"`, `"tpe"`, or an Optuna sampler.
        seed: of a sampler given by name.

    Raises:
        UserError: Optuna is not installed, or there is no such sampler.
    """
    try:
        import optuna
    except ImportError:
        raise UserError("the samplers of Optuna need it installed: pip install 'das-lm[search]'") from None
    if isinstance(sampler, str):
        names = {"gp": "GP", "qmc": "QMC", "random": "Random", "tpe": "TPE"}
        if sampler not in names:
            raise UserError(f"sampler: there is no '{sampler}'.{did_you_mean(sampler, names)}")
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = getattr(optuna.samplers, f"{names[sampler]}Sampler")(seed=seed % 2**31)
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(sampler=sampler)
        study.optimize(
            lambda trial: objective(trial.suggest_float("penalty_weight", low, high, log=log)), n_trials=evaluations
        )
    finally:
        optuna.logging.set_verbosity(verbosity)
    return study


# ---- what the trials say -------------------------------------------------------------------------------------------


@dataclass
class Curve:
    """
    The measure against λ, over trials: least squares of a piecewise linear curve with [`KNOTS`] knots, an intercept
    for every trial (so that only differences within trials count) and a penalty on second differences, whose weight
    is chosen by generalised cross-validation. Where λ = 0 lies outside of the range, it has a value of its own.

    Args:
        search: the range and the scale.
        trials: per trial, λ -> measure, `None` where training diverged; those values are left out.
    """

    search: Search
    trials: list[dict[float, float | None]]

    def __post_init__(self):
        self.zero_apart = self.search.log or self.search.low[0] > 0
        self.weights = np.array(self.search.grid(self.search.low[0], self.search.high[1], KNOTS))
        second = np.diff(np.eye(KNOTS), 2, axis=0)
        self._rough = np.zeros((KNOTS + 1, KNOTS + 1))
        self._rough[:KNOTS, :KNOTS] = second.T @ second * KNOTS**3  # the integral of the squared second derivative
        # The level is nowhere in the data; what a trial says nothing about is 0.
        self._level = np.ones_like(self._rough) / KNOTS + 1e-9 * np.eye(KNOTS + 1)
        parts = [self._part(trial) for trial in self.trials]
        self._gram, self._moment, self._square, self._count = map(np.array, zip(*parts, strict=True))
        self._once = np.ones(len(self.trials))

    def _design(self, trial: Mapping[float, float | None]) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the design, shape [values, KNOTS + 1], and the measures; the last column is λ = 0 by itself."""
        finite = {weight: value for weight, value in trial.items() if value is not None}
        rows = np.zeros((len(finite), KNOTS + 1))
        for row, weight in zip(rows, finite, strict=True):
            if weight == 0 and self.zero_apart:
                row[-1] = 1
            else:
                place = min(max(self.search.position(weight), 0), 1) * (KNOTS - 1)
                left = min(int(place), KNOTS - 2)
                row[left : left + 2] = left + 1 - place, place - left
        return rows, np.array(list(finite.values()))

    def _part(self, trial: Mapping[float, float | None]) -> tuple[np.ndarray, np.ndarray, float, int]:
        """A trial's normal equations, about its own mean."""
        rows, values = self._design(trial)
        if len(rows):
            rows, values = rows - rows.mean(0), values - values.mean()
        return rows.T @ rows, rows.T @ values, float(values @ values), len(values)

    def _solve(self, times: np.ndarray, roughness: float) -> np.ndarray:
        """The curve where every trial counts so many times: shape […, trials] -> […, KNOTS + 1]."""
        gram = np.tensordot(times, self._gram, 1) + roughness * self._rough + self._level
        return np.linalg.solve(gram, (times @ self._moment)[..., None])[..., 0]

    @cached_property
    def roughness(self) -> float:
        """The weight of the penalty with the least error of generalised cross-validation."""
        gram, moment = self._gram.sum(0), self._moment.sum(0)

        def error(roughness: float) -> float:
            values = self._solve(self._once, roughness)
            hat = np.linalg.solve(gram + roughness * self._rough + self._level, gram)
            free = self._count.sum() - len(self.trials) - float(np.trace(hat))
            residual = self._square.sum() - 2 * values @ moment + values @ gram @ values
            return math.inf if free <= 0.5 else max(residual, 0) / free**2

        return min(np.logspace(-6, 1, 15), key=error)

    def _against_zero(self, values: np.ndarray) -> np.ndarray:
        return values[..., :KNOTS] - values[..., [-1 if self.zero_apart else 0]]

    @cached_property
    def values(self) -> np.ndarray:
        """The curve at `weights`, as the difference to λ = 0."""
        return self._against_zero(self._solve(self._once, self.roughness))

    @cached_property
    def resampled(self) -> np.ndarray:
        """The curve from trials drawn with replacement, shape [BOOTSTRAPS, KNOTS]."""
        generator = np.random.default_rng(addressed_seed(self.search.seed, "bootstrap"))
        times = generator.multinomial(len(self.trials), self._once / len(self.trials), BOOTSTRAPS)
        return self._against_zero(self._solve(times, self.roughness))

    @property
    def interval(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Pointwise 95 % interval over trials; none from fewer than three."""
        return tuple(np.quantile(self.resampled, [0.025, 0.975], axis=0)) if len(self.trials) > 2 else None

    @property
    def chosen(self) -> float:
        """The λ where the curve is lowest."""
        return float(self.weights[self.values.argmin()])

    @property
    def chosen_interval(self) -> tuple[float, float] | None:
        """95 % interval over trials of the λ where the curve is lowest; none from fewer than three."""
        if len(self.trials) < 3:
            return None
        lowest = np.sort(self.weights[self.resampled.argmin(1)])
        return float(lowest[int(0.025 * BOOTSTRAPS)]), float(lowest[math.ceil(0.975 * BOOTSTRAPS) - 1])

    def points(self) -> list[tuple[float, float]]:
        """Every measured value as (λ, difference to λ = 0), with its trial's level taken out."""
        curve = self._solve(self._once, self.roughness)
        zero = curve[-1] if self.zero_apart else curve[0]
        points = []
        for trial in self.trials:
            rows, values = self._design(trial)
            finite = [weight for weight, value in trial.items() if value is not None]
            if finite:
                points += zip(finite, values - values.mean() + (rows @ curve).mean() - zero, strict=True)
        return [(weight, float(value)) for weight, value in points]


def compare(chosen: Sequence[float | None], other: Sequence[float | None]) -> dict[str, Any]:
    """
    Is a value of λ better than another? The exact one-sided Wilcoxon signed-rank test of the differences within
    trials; a run that diverged is worse than any that did not.

    Args:
        chosen: measure by trial.
        other: the same of the other value.

    Returns:
        `difference`: mean over the trials where neither diverged, negative if the first is better; `p`.
    """
    from scipy.stats import wilcoxon

    pairs = list(zip(chosen, other, strict=True))
    differences = [a - b for a, b in pairs if a is not None and b is not None]
    beyond = 1 + 2 * max(map(abs, differences), default=0.0)
    for a, b in pairs:
        if (a is None) != (b is None):
            differences.append(beyond if a is None else -beyond)
    different = [value for value in differences if value != 0]
    finite = [a - b for a, b in pairs if a is not None and b is not None]
    return {
        "difference": float(np.mean(finite)) if finite else None,
        "p": float(wilcoxon(different, alternative="less").pvalue) if different else 1.0,
    }


def verdict(chosen: float, confirmed: Mapping[float, Sequence[float | None]], search: Search) -> dict[str, Any]:
    """
    Does a minimum stand out of the noise? It does if λ is no end of the range and is better than λ = 0 and than both
    ends, each at [`LEVEL`], in trials that had no part in choosing it. Since *all* of the comparisons have to succeed,
    none needs a correction: if one of them has nothing to find, all succeed with probability [`LEVEL`] at most.

    Args:
        chosen: the λ.
        confirmed: λ -> measure by trial, for the chosen one and `search.references`.
        search: the range.

    Returns:
        `stands_out` (`None` without trials), `comparisons` by reference, and the `finding` in words.
    """
    rest = [weight for weight in search.references if weight != chosen]
    comparisons = {weight: compare(confirmed[chosen], confirmed[weight]) for weight in rest} if confirmed else {}
    better = [weight for weight, figures in comparisons.items() if figures["p"] < LEVEL]
    not_better = [weight for weight in comparisons if weight not in better]
    edge = 1.5 / (KNOTS - 1)
    place = 0.0 if chosen == 0 else search.position(chosen)
    at_end = "low" if place < edge else "high" if place > 1 - edge else None
    found = f"λ = {chosen:.4g}"
    if not confirmed:
        stands_out, finding = None, f"not tested: the curve is lowest at {found}"
    elif not_better or (at_end and not better):
        stands_out = False
        finding = f"no minimum stands out of the noise: {found} is not better than " + _listed(not_better)
        if better:
            finding += f", though than {_listed(better)}"
    elif at_end:
        stands_out = False
        finding = f"no minimum inside of the range: {found} is at its end, and better than {_listed(better)}; "
        if at_end == "high":
            finding += "search with a greater high"
        else:
            finding += "the less penalty, the better" if search.low[0] == 0 else "search with a smaller low"
    else:
        stands_out, finding = True, f"a minimum stands out: {found} is better than {_listed(better)}"
    return {"stands_out": stands_out, "finding": finding, "comparisons": comparisons}


def _listed(weights: Sequence[float]) -> str:
    words = [f"λ = {weight:.4g}" for weight in weights]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


# ---- the search ----------------------------------------------------------------------------------------------------


class _Ledger:
    """What has been measured, in a file: (trial, λ) -> figures. Every line is on the disk before the next run."""

    def __init__(self, path: Path):
        self.path, self.entries = path, {}
        if path.is_file():
            try:
                lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{path} cannot be read: {error}; start again with --overwrite_output_dir") from None
            whole = []
            for number, line in enumerate(lines, 1):
                try:
                    entry = json.loads(line)
                    _ = entry["measure"]  # or the line is none
                    self.entries[entry["trial"], entry["lambda"]] = entry
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    if number < len(lines):
                        raise UserError(f"{path}:{number}: cannot be read: {error}; remove this line") from None
                    continue  # the last one: what wrote it was killed
                whole.append(line if line.endswith("\n") else f"{line}\n")
            if whole != lines:
                write_text(path, "".join(whole))

    def add(self, trial: int, weight: float, figures: Mapping[str, Any]) -> None:
        entry = {"trial": trial, "lambda": weight, **figures}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.entries[trial, weight] = entry

    def trial(self, trial: int) -> dict[float, float | None]:
        """λ -> measure, in the order of measuring."""
        return {weight: entry["measure"] for (number, weight), entry in self.entries.items() if number == trial}


class _Trial:
    """The runs of a trial: each λ once, from the file where it is there."""

    def __init__(self, number: int, search: Search, objective: Objective, ledger: _Ledger, done: Callable[..., None]):
        self.number, self.search, self.objective, self.ledger, self.done = number, search, objective, ledger, done
        self.asked: set[float] = set()
        self.limit: int | None = None

    @cached_property
    def run(self) -> Run:
        return self.objective(self.search.trial_seed(self.number))

    def measure(self, weight: float) -> float:
        """The measure of a λ; infinite where training diverged."""
        if weight not in self.asked:
            if self.limit is not None and len(self.asked) >= self.limit:
                raise _Spent
            if (self.number, weight) not in self.ledger.entries:
                self.ledger.add(self.number, weight, self.run(weight))
            self.asked.add(weight)
            self.done(self.number, weight)
        value = self.ledger.entries[self.number, weight]["measure"]
        return math.inf if value is None else value

    def search_all(self) -> str:
        """λ = 0, then the search; says why it stopped."""
        self.limit = self.search.max_evaluations
        low, high = self.search.bracket(self.number)
        self.measure(0.0)
        try:
            if self.search.sampler == "bracket":
                return bracket_search(self.measure, low, high, self.search)
            kind, seed = self.search.sampler.removeprefix("optuna:"), self.search.trial_seed(self.number)
            optuna_study(self.measure, low, high, self.search.log, self.limit - 1, kind, seed)
        except _Spent:
            pass
        return "the budget is spent"


def search_lambda(
    search: Search,
    objective: Objective,
    output_dir: str | Path,
    about: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """
    Search for λ in several trials, choose it, and test the choice in others.

    Args:
        search: where and how long.
        objective: seed of a trial -> λ -> figures; see [`experiment_objective`] and [`recipe_objective`].
        output_dir: where every run is written at once (`evaluations.jsonl`), and at the end `result.json` and a plot.
        about: what the objective is, as JSON: a search goes on only with the same.
        resume: go on with the search in `output_dir`; more trials may be asked for.
        overwrite: remove it first.
        console: for what people read.

    Returns:
        what `result.json` holds.

    Raises:
        UserError: another search in `output_dir`.
    """
    from das_lm.run.directory import locked, put_back

    output, console = Path(output_dir), console or Console(highlight=False)
    with locked(output):
        _open_output(output, {"search": asdict(search), "objective": dict(about or {})}, resume, overwrite)
        try:
            return _search(search, objective, output, about or {}, console)
        except Exception:
            put_back(output, _entries, SETTINGS_NAME)  # if nothing has been measured
            raise


def _search(
    search: Search, objective: Objective, output: Path, about: Mapping[str, Any], console: Console
) -> dict[str, Any]:
    from das_lm.run.directory import drop_aside

    ledger = _Ledger(output / EVALUATIONS_NAME)
    stopped: dict[int, str] = {}
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    try:
        with progress:
            total = search.trials * search.max_evaluations
            bar = progress.add_task("search", total=total)

            def done(trial: int, weight: float) -> None:
                drop_aside(output)
                known = {w: value for w, value in ledger.trial(trial).items() if value is not None}
                best = min(known, key=known.get) if known else math.nan
                name = f"trial {trial + 1}" if trial < search.trials else "test"
                note = f"{name}: λ = {weight:.4g}; best so far {best:.4g} ({known.get(best, math.nan):.4f})"
                progress.update(bar, advance=1, description=note)

            for number in range(search.trials):
                stopped[number] = _Trial(number, search, objective, ledger, done).search_all()
                progress.update(bar, completed=(number + 1) * search.max_evaluations)
            curve = Curve(search, [ledger.trial(number) for number in range(search.trials)])
            weights = sorted({*search.references, curve.chosen})
            bar = progress.add_task("test of the choice", total=search.confirm * len(weights))
            for number in _confirming(search):
                trial = _Trial(number, search, objective, ledger, done)
                for weight in weights:
                    trial.measure(weight)
    except KeyboardInterrupt:
        if stopped:
            console.print("interrupted; so far:")
            _report(replace(search, trials=len(stopped), confirm=0), ledger, stopped, about, output, console)
        raise
    return _report(search, ledger, stopped, about, output, console)


def _confirming(search: Search) -> range:
    """Numbers of the trials that test the choice: never those of trials that choose, even when more are asked for."""
    return range(1_000_000, 1_000_000 + search.confirm)


def _report(
    search: Search,
    ledger: _Ledger,
    stopped: Mapping[int, str],
    about: Mapping[str, Any] | None,
    output: Path,
    console: Console,
) -> dict[str, Any]:
    """Write `result.json` and the plot, print the table."""
    trials = [ledger.trial(number) for number in range(search.trials)]
    curve = Curve(search, trials)
    chosen = curve.chosen
    confirmed = {
        weight: [ledger.entries[number, weight]["measure"] for number in _confirming(search)]
        for weight in {*search.references, chosen}
        if search.confirm
    }
    judged = verdict(chosen, confirmed, search)
    per_trial = []
    for number, trial in enumerate(trials):
        known = {weight: math.inf if value is None else value for weight, value in trial.items()}
        best = min(known, key=known.get)
        per_trial.append(
            {
                "seed": search.trial_seed(number),
                "bracket": list(search.bracket(number)),
                "evaluations": len(trial),
                "diverged": [weight for weight, value in trial.items() if value is None],
                "best": best,
                "measure": trial[best],
                "measure_of_0": trial[0.0],
                "stopped": stopped[number],
            }
        )
    tests = {
        weight: [ledger.entries[number, weight].get("test") for number in _confirming(search)] for weight in confirmed
    }
    result = {
        "format": "das_lm.lambda_search",
        "version": 1,
        "search": asdict(search),
        "objective": dict(about or {}),
        "chosen": chosen,
        "chosen_interval": curve.chosen_interval,
        "stands_out": judged["stands_out"],
        "finding": judged["finding"],
        "level": LEVEL,
        "comparisons": [{"lambda": weight, **figures} for weight, figures in judged["comparisons"].items()],
        "confirmed": [
            {
                "lambda": weight,
                "measure": confirmed[weight],
                "test": tests[weight],
                "test_mean": _mean_scores(tests[weight]),
            }
            for weight in sorted(confirmed)
        ],
        "curve": {
            "lambda": curve.weights.tolist(),
            "difference_to_0": curve.values.tolist(),
            "interval": [side.tolist() for side in curve.interval] if curve.interval else None,
        },
        "trials": per_trial,
    }
    write_json(output / RESULT_NAME, result)
    plot(curve, result, output / PLOT_NAME)
    console.print(*_tables(result), sep="\n")
    console.print(f"[bold]{escape(judged['finding'])}[/bold]", soft_wrap=True)
    console.print(f"Results: {output / RESULT_NAME}    Plot: {output / PLOT_NAME}", soft_wrap=True, markup=False)
    return result


def _mean_scores(tests: Sequence[Mapping[str, Mapping[str, float]] | None]) -> dict[str, float]:
    """Mean over trials and tasks of every score on the test splits."""
    scores = [task for test in tests if test for task in test.values()]
    return {kind: float(np.mean([task[kind] for task in scores])) for kind in scores[0]} if scores else {}


def _tables(result: Mapping[str, Any]) -> list[Table]:
    def number(value: float | None, style: str = ".4f") -> str:
        return "–" if value is None else format(value, style)

    trials = Table(title="Trials that choose: integrated loss", title_justify="left")
    for column in ("trial", "first bracket", "values of λ", "best λ", "its measure", "λ = 0"):
        trials.add_column(column, justify="right")
    for index, trial in enumerate(result["trials"], 1):
        low, high = trial["bracket"]
        cells = (number(trial["best"], ".4g"), number(trial["measure"]), number(trial["measure_of_0"]))
        trials.add_row(str(index), f"{low:.4g} to {high:.4g}", str(trial["evaluations"]), *cells)
    interval = result["chosen_interval"]
    over = f", 95 % interval over trials {interval[0]:.4g} to {interval[1]:.4g}" if interval else ""
    trials.caption = f"the curve over all trials is lowest at λ = {result['chosen']:.4g}{over}"
    if not result["comparisons"]:
        return [trials]
    title = f"λ = {result['chosen']:.4g} in {result['search']['confirm']} new trials"
    tests = Table(title=title, title_justify="left")
    kinds = list(dict.fromkeys(kind for entry in result["confirmed"] for kind in entry["test_mean"]))
    for column in ("λ", "difference", "p (one-sided)", *(f"test {kind}" for kind in kinds)):
        tests.add_column(column, justify="right")
    comparisons = {figures["lambda"]: figures for figures in result["comparisons"]}
    for entry in result["confirmed"]:
        figures = comparisons.get(entry["lambda"], {"difference": None, "p": None})
        scores = (number(entry["test_mean"].get(kind)) for kind in kinds)
        tests.add_row(f"{entry['lambda']:.4g}", number(figures["difference"], "+.4f"), number(figures["p"]), *scores)
    return [trials, tests]


def plot(curve: Curve, result: Mapping[str, Any], path: Path) -> None:
    """The curve with its interval, what was measured, and the choice, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    blue, orange, grey = "#0072B2", "#D55E00", "#666666"  # told apart with any colour vision (Okabe and Ito)
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    inside = [(w, value) for w, value in curve.points() if w > 0 or not curve.zero_apart]
    label = f"runs of {len(curve.trials)} trials"
    axes.plot(*zip(*inside, strict=True), "o", color=grey, alpha=0.45, ms=4, mew=0, label=label)
    axes.axhline(0, color="black", ls="--", lw=1, label="λ = 0: no penalty")
    shown = [curve.values.min(), curve.values.max(), 0.0, *np.quantile([y for _, y in inside], [0.02, 0.95])]
    if curve.interval:
        low, high = curve.interval
        axes.fill_between(curve.weights, low, high, color=blue, alpha=0.25, lw=0, label="95 % over trials")
        shown += [np.quantile(low, 0.1), np.quantile(high, 0.9)]
    axes.plot(curve.weights, curve.values, color=blue, lw=2, label="smooth over trials")
    lowest = f"lowest: λ = {result['chosen']:.4g}"
    if result["chosen_interval"]:
        low, high = result["chosen_interval"]
        lowest += f" (95 %: {low:.4g} to {high:.4g})"
        axes.plot([low, high], [0.02, 0.02], color=orange, lw=5, alpha=0.8, transform=axes.get_xaxis_transform())
    axes.axvline(result["chosen"], color=orange, lw=1.5, label=lowest)
    margin = 0.06 * (max(shown) - min(shown)) or 1.0
    axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.set_xscale("log" if curve.search.log else "linear")
    axes.set_xlabel("λ (penalty_weight)")
    axes.set_ylabel("integrated loss, difference to λ = 0")
    axes.set_title(result["finding"], fontsize=10, loc="left", wrap=True)
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _open_output(output: Path, settings: dict[str, Any], resume: bool, overwrite: bool) -> None:
    """Refuse to mix searches, before anything runs."""
    from das_lm.run.directory import ASIDE_NAME, LOCK_NAME, foreign_files, move_aside, put_back

    settings = json.loads(json.dumps(settings))
    path = output / SETTINGS_NAME
    if resume and overwrite:
        raise UserError("--resume goes on with a search, --overwrite_output_dir removes it: give one of them")
    if not resume or not all(one.is_file() for one in (path, output / ASIDE_NAME / SETTINGS_NAME)):
        put_back(output, _entries, SETTINGS_NAME)  # a search that was to take its place was killed
    entries = _entries(output)
    if not entries and any(one.name != LOCK_NAME for one in output.iterdir()):
        raise UserError(f"output_dir: {output} is not empty and holds no search; name another directory")
    if resume and not entries:
        raise UserError(f"--resume: {output} holds no search to go on with; leave --resume out")
    if entries and not resume and not overwrite:
        raise UserError(
            f"output_dir: {output} holds another search; give --resume to go on with it, --overwrite_output_dir to "
            "start again, or another --output_dir"
        )
    if overwrite and entries:
        foreign = []
        for one in output.glob("runs/*/*"):
            name = one.relative_to(output)
            foreign += [name / inside for inside in foreign_files(one, beside=True)] if one.is_dir() else []
            foreign += [name] if one.is_file() and one.suffix != ".log" else []
        if foreign:
            raise UserError(
                f"--overwrite_output_dir: no search wrote {foreign[0]} in {output}, among what is removed; move it "
                "elsewhere, or name another --output_dir"
            )
        move_aside(entries)
    if resume:
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            pairs = [(kind, key) for kind in settings for key in {**before[kind], **settings[kind]}]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path} cannot be read: {error}; start again with --overwrite_output_dir") from None
        for kind, key in pairs:
            old, new = before[kind].get(key), settings[kind].get(key)
            if old != new and (kind, key) not in (("search", "trials"), ("search", "confirm")):
                raise UserError(
                    f"--resume: the search in {output} has another '{key}': {old!r}, not {new!r}; give the same, or "
                    "another --output_dir"
                )
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
    except OSError as error:
        raise UserError(f"output_dir: cannot write to {output}: {error.strerror}") from error


def _entries(output: Path) -> list[Path]:
    """All that a search has written, its settings last; nothing where there is none of ours."""
    try:
        settings = json.loads((output / SETTINGS_NAME).read_text(encoding="utf-8"))
        if set(settings) != {"search", "objective"} or not settings["search"].keys() >= {"trials", "confirm"}:
            return []
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return []
    names = ("runs", EVALUATIONS_NAME, RESULT_NAME, PLOT_NAME, SETTINGS_NAME)
    return [output / name for name in names if (output / name).exists()]


# ---- what is measured ----------------------------------------------------------------------------------------------


def integrated_loss(curves: Sequence[Sequence[float]]) -> float | None:
    """
    The area under every task's loss after it was introduced, per unit of time: its mean over the evaluations since
    then; summed over the tasks.

    Args:
        curves: by task, the loss at every evaluation since the task's training began.

    Returns:
        `None` where a loss is no finite number.
    """
    total = float(sum(np.mean(curve) for curve in curves))
    return total if math.isfinite(total) else None


def check_method(method: str) -> None:
    """
    Raises:
        UserError: there is no such method, or it has no λ.
    """
    from das_lm.methods import METHODS
    from das_lm.methods.penalty import Penalty

    penalties = [name for name, kind in METHODS.items() if issubclass(kind, Penalty)]
    if method not in METHODS:
        raise UserError(f"method: there is no '{method}'.{did_you_mean(method, penalties)}")
    if method not in penalties:
        raise UserError(f"method: '{method}' has no penalty_weight to search for; write {', '.join(penalties)}")


def experiment_objective(
    experiment: str,
    method: str = "ewc",
    parameters: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    epochs: int | None = None,
) -> Objective:
    """
    λ of a small model's experiment: the loss on the development splits after every epoch, of every task since it was
    introduced. The first task is learned once per trial: before a domain has ended, there is no penalty. The test
    splits are measured at the end of every run, and play no part in the search.

    Args:
        experiment: name of it.
        method: a penalty.
        parameters: of the experiment, see `build_experiment`.
        options: fields of [`DASConfig`], over the benchmark's `DEFAULTS`.
        epochs: passes over each task; the experiment's own if `None`.

    Raises:
        UserError: a method without λ, no such experiment, one with a single task, or wrong options.
    """
    from das_lm.classic.benchmark import Run, _checked_options

    check_method(method)
    if "penalty_weight" in (options or {}):
        raise UserError("penalty_weight: is what is searched for; leave it out")
    if epochs is not None and epochs < 1:
        raise UserError(f"epochs: {epochs} must be 1 or more")
    options = _checked_options(options or {})
    run = Run(experiment, method, 0, dict(parameters or {}), options, epochs=epochs, split="development")
    built = run.build()
    if len(built.tasks) < 2:
        raise UserError(f"experiment '{experiment}': a single task has nothing to hold on to; give two or more")
    with TemporaryDirectory() as scratch:
        run.arguments(built, scratch)  # what is wrong shows here
    return lambda seed: _ExperimentTrial(replace(run, seed=seed))


class _ExperimentTrial:
    """The runs of a trial: one model after the first task, and from there every λ."""

    def __init__(self, run: BenchmarkRun):
        self.run, self.experiment = run, run.build()

    def _trainer(self, number: int, model: Any, method: Any, weight: float, scratch: str) -> Any:
        from das_lm.classic.benchmark import make_trainer

        run = replace(self.run, options={**self.run.options, "penalty_weight": weight})
        return make_trainer(run, self.experiment, model, [method], number, scratch)

    def _learn(self, trainer: Any) -> list[dict[str, float]]:
        """Learn a task; gives the metrics after every epoch."""
        from das_lm.classic.benchmark import _Curve

        curve = _Curve(trainer)
        trainer.add_callback(curve)
        trainer.train()
        return curve.metrics

    def _new(self) -> tuple[Any, Any]:
        from das_lm.methods import METHODS

        return self.experiment.build_model(self.run.seed), METHODS[self.run.method]()

    @cached_property
    def _first(self) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, float]]]:
        """Parameters and the method's state after the first task, and its metrics."""
        model, method = self._new()
        with TemporaryDirectory() as scratch:
            metrics = self._learn(self._trainer(0, model, method, 0.0, scratch))
        return _copied(model.state_dict()), _copied(method.state_dict()), metrics

    def __call__(self, weight: float) -> dict[str, Any]:
        parameters, state, metrics = self._first
        model, method = self._new()
        model.load_state_dict(parameters)
        stages, tasks = [metrics], self.experiment.tasks
        with TemporaryDirectory() as scratch:
            for number in range(1, len(tasks)):
                trainer = self._trainer(number, model, method, weight, scratch)
                if number == 1:
                    method.load_state_dict(_copied(state))
                try:
                    stages.append(self._learn(trainer))
                except UserError as error:
                    return _diverged(error)
            curves = {
                task.name: [metrics[f"eval_{task.name}_loss"] for stage in stages[number:] for metrics in stage]
                for number, task in enumerate(tasks)
            }
            measure = integrated_loss(list(curves.values()))
            if measure is None:
                return {"measure": None}
            metrics = trainer.evaluate({task.name: task.test for task in tasks})
        kinds = ("loss", self.experiment.measure)
        test = {task.name: {kind: metrics[f"eval_{task.name}_{kind}"] for kind in kinds} for task in tasks}
        return {"measure": measure, "curves": curves, "test": test}


def _diverged(error: UserError) -> dict[str, Any]:
    """What a run gives that came to NaN or infinity; other errors go on."""
    if not isinstance(error, NotFinite):
        raise error
    return {"measure": None}


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def recipe_objective(recipe: Recipe, method: str, directory: str | Path) -> Objective:
    """
    λ of a recipe's walk: the loss at every `eval_steps` (by default five times per domain) and so at its end, of every
    domain that is learned, since it was introduced, on one half of its held-out documents. The other half is measured
    when all is learned, and plays no part in the search; nor does text that is only measured. The base model is
    measured, and the first domain learned, once per trial.

    Args:
        recipe: the walk; its method is replaced.
        method: a penalty.
        directory: where the runs go. Of each, `forgetting.json` and the curves stay; the weights do not.

    Raises:
        UserError: a method without λ, fewer than two domains, or domains that do not come one after the other.
    """
    check_method(method)
    if len(recipe.domains) < 2:
        raise UserError("domains: a single one has nothing to hold on to; give two or more")
    if recipe.schedule != "sequential":
        raise UserError(f"schedule: '{recipe.schedule}' leaves nothing to hold on to; write sequential")
    for domain in recipe.domains:
        for name in ("penalty_weight", "seed", "data_seed"):
            if name in domain.training:
                raise UserError(f"domain '{domain.name}': training: '{name}' is set by the search; leave it out")
    return lambda seed: _RecipeTrial(recipe, method, Path(directory), seed)


class _RecipeTrial:
    """The walks of a trial; they share the directory of the first domain."""

    def __init__(self, recipe: Recipe, method: str, directory: Path, seed: int):
        training = {"eval_strategy": "steps", "eval_steps": 0.2, "report_to": [], "disable_tqdm": True}
        training |= {**recipe.training, "seed": seed, "data_seed": seed}
        self.recipe = replace(recipe, method=[method], training=training)
        self.directory = directory / f"seed-{seed}"

    def __call__(self, weight: float) -> dict[str, Any]:
        from das_lm.measure.results import Results
        from das_lm.run.directory import RECIPE_NAME, mark, stages_of
        from das_lm.run.walk import continual_pretrain

        output = self.directory / f"lambda-{weight!r}"
        training = {**self.recipe.training, "penalty_weight": weight}
        recipe = replace(self.recipe, training=training, output_dir=str(output))
        stages, shared = stages_of(recipe, output), self.directory / "first"
        first = shared / stages[0].directory.name
        if (output / "forgetting.json").is_file() and len(Results.load(output).stages) > len(stages):
            shutil.rmtree(output)  # finished and then killed, perhaps with its weights already gone
        if not (output / RECIPE_NAME).is_file() and (shared / "forgetting.json").is_file():
            output.mkdir(parents=True, exist_ok=True)
            if not stages[0].directory.exists():
                stages[0].directory.symlink_to(first.absolute(), target_is_directory=True)
            mark(output, recipe)
            results = Results.load(shared)
            results.save(output)
            write_text(output / RECIPE_NAME, recipe.to_yaml())  # the last: now there is a run to go on with
        output.mkdir(parents=True, exist_ok=True)
        with open(f"{output}.log", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            try:
                results = continual_pretrain(recipe, (output / RECIPE_NAME).is_file(), halves=True, report=False)
            except UserError as error:
                return _diverged(error)
        if not (shared / "forgetting.json").is_file():
            shared.mkdir(exist_ok=True)
            mark(shared, recipe)
            shutil.copytree(stages[0].directory, first, dirs_exist_ok=True)
            Results(results.domains, results.stages[:2], results.run).save(shared)
        histories = [
            json.loads((stage.directory / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
            for stage in stages
        ]
        curves = {
            stage.name: [
                entry[key]
                for history in histories[number:]
                for entry in history
                if (key := f"eval_{stage.name}_loss") in entry
            ]
            for number, stage in enumerate(stages)
        }
        for stage in stages:
            if stage.directory.is_symlink():
                stage.directory.unlink()
            else:
                shutil.rmtree(stage.directory)
        last = results.stages[-1]["scores"]
        test = {stage.name: {kind: last[stage.name][kind] for kind in results.measures} for stage in stages}
        return {"measure": integrated_loss(list(curves.values())), "curves": curves, "test": test}
