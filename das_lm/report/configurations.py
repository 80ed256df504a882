"""Runs that differ in nothing but the seed, and rows of these that differ in one setting."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from das_lm.errors import UserError
from das_lm.measure.intervals import Estimate
from das_lm.report.runs import FinishedRun

#: Figures of `summarize` that are better when they are less.
COSTS = ("drift", "forgetting_rate")


@dataclass(eq=False)
class Configuration:
    """
    Runs that differ in nothing but the seed.

    Args:
        runs: seed -> run.
        measure: what the figures are taken of.
        label: the method, and what sets it apart from the other configurations.
    """

    runs: dict[str, FinishedRun]
    measure: str
    label: str = ""
    figures: dict[str, dict[str, float | None]] = field(init=False)

    def __post_init__(self):
        self.figures = {seed: run.results.summary()[self.measure] for seed, run in self.runs.items()}

    @property
    def method(self) -> str:
        """Name of the method."""
        return self._any.method

    @property
    def settings(self) -> dict[str, Any]:
        """What it was given, but for seeds."""
        return self._any.settings

    def setting(self, key: str) -> Any:
        """A setting, or what holds where it was not given."""
        return self._any.setting(key)

    @property
    def _any(self) -> FinishedRun:
        return next(iter(self.runs.values()))

    def estimate(self, figure: str) -> Estimate | None:
        """A figure of `summarize` over the seeds; `None` where there is no domain to take it over."""
        values = [figures[figure] for figures in self.figures.values()]
        return None if None in values else Estimate.of(values)


@dataclass
class Series:
    """
    Configurations of a method that differ in one number.

    Args:
        name: the method, and what sets this curve apart from others.
        knob: the setting that differs; `None` of a single configuration.
        configurations: in the order of its value.
    """

    name: str
    knob: str | None
    configurations: list[Configuration]


def number(value: Any) -> float | None:
    """A setting as a number, if it is one; `interpolation_alpha` is one in quotes."""
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _key(value: Any) -> str:
    """Equal for equal settings."""
    return json.dumps(value if number(value) is None else number(value), sort_keys=True, default=str)


def _text(value: Any) -> str:
    if value is None:
        return "default"
    if isinstance(value, list):
        return "+".join(map(str, value))
    return str(value) if number(value) is None else f"{number(value):g}"


def _by_method(of: Iterable[Any]) -> dict[str, list[Any]]:
    """Runs or configurations."""
    methods: dict[str, list[Any]] = {}
    for one in of:
        methods.setdefault(one.method, []).append(one)
    return methods


def configurations_of(runs: Sequence[FinishedRun], measure: str) -> list[Configuration]:
    """
    Runs grouped into configurations, which are named by what differs.

    Raises:
        UserError: two runs of the same configuration and seed.
    """
    configurations = []
    for group in _by_method(runs).values():
        keys = sorted({key for run in group for key in run.settings})
        found: dict[tuple[str, ...], dict[str, FinishedRun]] = {}
        for run in group:
            seeds = found.setdefault(tuple(_key(run.setting(key)) for key in keys), {})
            if run.seed in seeds:
                raise UserError(
                    f"{seeds[run.seed].directory} and {run.directory} are the same configuration with the same seed, "
                    f"{run.seed}; give one of them"
                )
            seeds[run.seed] = run
        configurations += [Configuration(seeds, measure) for seeds in found.values()]
    for configuration in configurations:
        configuration.label = _label(configuration, configurations)
    return configurations


def _label(this: Configuration, configurations: Sequence[Configuration], without: str | None = None) -> str:
    """The method; what differs between its configurations; and what it was given that not all others were given."""
    siblings = [one for one in configurations if one.method == this.method]
    parts = [this.method]
    for key in dict.fromkeys(key for one in (this, *siblings) for key in one.settings):
        value = _key(this.setting(key))
        differs = any(_key(one.setting(key)) != value for one in siblings)
        is_own = key in this.settings and any(_key(one.settings.get(key)) != value for one in configurations)
        if key != without and (differs or is_own):
            parts.append(f"{key}={_text(this.setting(key))}")
    return " ".join(parts)


def series_of(configurations: Sequence[Configuration]) -> list[Series]:
    """Every configuration on one curve: over the learning rate where that differs, else over what has most values."""
    curves = []
    for rest in _by_method(configurations).values():
        keys = sorted({key for one in rest for key in one.settings})
        counts = {key: len({number(one.setting(key)) for one in rest} - {None}) for key in keys}
        for knob in sorted(keys, key=lambda key, counts=counts: (key != "learning_rate", -counts[key])):
            alike: dict[tuple[str, ...], list[Configuration]] = {}
            for one in rest:
                if number(one.setting(knob)) is not None:
                    alike.setdefault(tuple(_key(one.setting(key)) for key in keys if key != knob), []).append(one)
            for group in alike.values():
                if len(group) > 1:
                    group.sort(key=lambda one, knob=knob: number(one.setting(knob)))
                    curves.append(Series(_label(group[0], configurations, without=knob), knob, group))
                    rest = [one for one in rest if one not in group]
        curves += [Series(one.label, None, [one]) for one in rest]
    return curves


def up_to_its_peak(curve: Series) -> Series:
    """A reference from the end of its curve that loses less up to the run that gains most; of equal ones the first."""
    runs = curve.configurations
    if _lost(runs[-1]) < _lost(runs[0]):
        runs = runs[::-1]
    peak = max(runs, key=lambda one: (one.estimate("gain").mean, -_lost(one)))
    return replace(curve, configurations=runs[: runs.index(peak) + 1])


def _lost(one: Configuration) -> float:
    return sum(estimate.mean for estimate in map(one.estimate, COSTS) if estimate)
