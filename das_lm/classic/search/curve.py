"""What the trials say: the curve over them, the test of the choice, and the finding in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from das_lm.classic.search.settings import Search
from das_lm.randomness import addressed_seed

KNOTS = 41  # of the smooth curve
BOOTSTRAPS = 1000
LEVEL = 0.05  # of the test


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

    def _design(self, trial: Mapping[float, float | None]) -> tuple[np.ndarray, list[float], np.ndarray]:
        """Rows of the design, shape [values, KNOTS + 1], whose last column is λ = 0 by itself; λ and measure of
        each value."""
        finite = {weight: value for weight, value in trial.items() if value is not None}
        rows = np.zeros((len(finite), KNOTS + 1))
        for row, weight in zip(rows, finite, strict=True):
            if weight == 0 and self.zero_apart:
                row[-1] = 1
            else:
                place = min(max(self.search.position(weight), 0), 1) * (KNOTS - 1)
                left = min(int(place), KNOTS - 2)
                row[left : left + 2] = left + 1 - place, place - left
        return rows, list(finite), np.array(list(finite.values()))

    def _part(self, trial: Mapping[float, float | None]) -> tuple[np.ndarray, np.ndarray, float, int]:
        """A trial's normal equations, about its own mean."""
        rows, _, values = self._design(trial)
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
            rows, weights, values = self._design(trial)
            if weights:
                values = values - values.mean() + (rows @ curve).mean() - zero
                points += zip(weights, values.tolist(), strict=True)
        return points


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
    finite = [a - b for a, b in pairs if a is not None and b is not None]
    beyond = 1 + 2 * max(map(abs, finite), default=0.0)
    diverged = [beyond if a is None else -beyond for a, b in pairs if (a is None) != (b is None)]
    different = [value for value in finite + diverged if value != 0]
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
