"""The runs of one trial: a bracket that closes on the best λ, or an Optuna study."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

from das_lm.classic.search.directory import Ledger
from das_lm.classic.search.objectives import LearnAt, Objective
from das_lm.classic.search.settings import OPTUNA, Search
from das_lm.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import optuna

SAME = 1e-3  # of the distance between two values of a grid: nearer ones are one value


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
        if sampler not in OPTUNA:
            raise UserError(f"sampler: there is no '{sampler}'.{did_you_mean(sampler, OPTUNA)}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = getattr(optuna.samplers, OPTUNA[sampler])(seed=seed % 2**31)
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


class Trial:
    """The runs of a trial: each λ once, from the file where it is there."""

    def __init__(self, number: int, search: Search, objective: Objective, ledger: Ledger, done: Callable[..., None]):
        self.number, self.search, self.objective, self.ledger, self.done = number, search, objective, ledger, done
        self.asked: set[float] = set()
        self.limit: int | None = None

    @cached_property
    def run(self) -> LearnAt:
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
        with contextlib.suppress(_Spent):
            if self.search.sampler == "bracket":
                return bracket_search(self.measure, low, high, self.search)
            kind, seed = self.search.sampler.removeprefix("optuna:"), self.search.trial_seed(self.number)
            optuna_study(self.measure, low, high, self.search.log, self.limit - 1, kind, seed)
        return "the budget is spent"
