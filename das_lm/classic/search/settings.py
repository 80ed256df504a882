"""Where and how long λ is searched for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from das_lm.errors import UserError, did_you_mean
from das_lm.randomness import addressed_seed

OPTUNA = {"gp": "GPSampler", "qmc": "QMCSampler", "random": "RandomSampler", "tpe": "TPESampler"}
SAMPLERS = ("bracket", *(f"optuna:{name}" for name in OPTUNA))


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

    @property
    def confirming(self) -> range:
        """Numbers of the trials that test the choice: never those of trials that choose, even of more."""
        return range(1_000_000, 1_000_000 + self.confirm)

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
