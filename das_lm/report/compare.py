"""
Runs side by side: seeds averaged, and what every method forgets at the gain that the reference has too.

Whatever slows learning also lowers drift and forgetting, a smaller learning rate as well as a mask. So a method is
compared with plain training at the learning rate that gains as much.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape

from das_lm.errors import UserError, did_you_mean
from das_lm.files import write_json, write_text
from das_lm.measure.intervals import Estimate
from das_lm.measure.results import LOWER_IS_BETTER, MEASURES
from das_lm.report.configurations import (
    COSTS,
    Configuration,
    Series,
    configurations_of,
    number,
    series_of,
    up_to_its_peak,
)
from das_lm.report.frontier import Frontier
from das_lm.report.runs import FinishedRun, check_comparable, find_runs, is_finished
from das_lm.report.table import Table, as_markdown, markdown_tables
from das_lm.terminal import Console

COMPARISON_NAME, TABLE_NAME = "comparison.json", "table.md"
#: Figures of `summarize` that are shown -> their names here.
FIGURES = {"gain": "gain", "drift": "drift", "forgetting_rate": "forgetting", "average": "final average"}
#: Runs of the reference further apart, relative to the gain between them, give no verdict: of how the frontier runs in
#: between they say too little. Learning rates a factor of √2 apart are usually near enough.
NEAR = 0.15


# ---- at equal gain -------------------------------------------------------------------------------------------------


@dataclass
class AtEqualGain:
    """
    A configuration against the reference that gains as much.

    Args:
        configuration: not of the reference.
        differences: `drift` and `forgetting_rate` -> what is lost more than by the reference, over the seeds; `None`
            where it is not measured.
        seeds: those in which the reference reaches the gain.
        nearest: how much less and how much more the nearest runs of the reference gain, mean over these seeds.
        runs: of the reference in a seed, the fewest.
        problem: why there is no seed.
    """

    configuration: Configuration
    differences: dict[str, Estimate | None]
    seeds: list[str]
    nearest: tuple[float, float] | None = None
    runs: int = 0
    problem: str = ""

    @property
    def doubt(self) -> str:
        """Why the reference allows no verdict, if it does not."""
        if self.nearest is None:
            return ""
        if sum(self.nearest) > NEAR * self.configuration.estimate("gain").mean:
            return f"its nearest runs are further apart than {NEAR:.0%} of the gain"
        return "two runs do not show how much it bends between them" if self.runs < 3 else ""

    def verdict(self, figure: str) -> str:
        """What a difference to the reference says, in words."""
        difference = self.differences[figure]
        if self.doubt or difference.half is None:
            return "no verdict"
        if abs(difference.mean) <= difference.half:
            return "unclear"
        return "less" if difference.mean < 0 else "more"


# ---- the comparison ------------------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """
    Runs side by side.

    Args:
        curves: all configurations.
        measure: what gain, drift and forgetting are taken of: `"loss"`, `"accuracy"` …
        unit: of the measure, for people.
        reference: what the others are compared with at equal gain: one of the curves, without what lies past its
            peak; `None` for no such comparison.
        notes: what was left out, and why.
    """

    curves: list[Series]
    measure: str
    unit: str
    reference: Series | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def configurations(self) -> list[Configuration]:
        """Of all curves."""
        return [one for curve in self.curves for one in curve.configurations]

    def _measured(self, figures: Iterable[str]) -> list[str]:
        """Those figures that there are domains for: none is never learned, or there is but one."""
        return [figure for figure in figures if all(one.estimate(figure) for one in self.configurations)]

    @property
    def frontier(self) -> list[dict[str, Any]]:
        """
        What is lost against what is gained: a curve per method over its knob.

        Returns:
            per curve its `name`, `x_label` (the knob, `""` for a single point) and `points`: `run`, `value` of the
            knob, `gain`, `drift`, `forgetting`, and half of the 95 % interval of each, `gain_half` and so on.
        """
        curves = []
        for curve in self.curves:
            points = []
            for one in curve.configurations:
                value = number(one.setting(curve.knob)) if curve.knob else None
                point: dict[str, Any] = {"run": one.label, "value": value}
                for figure in ("gain", *COSTS):
                    estimate = one.estimate(figure)
                    point[FIGURES[figure]] = estimate and estimate.mean
                    point[f"{FIGURES[figure]}_half"] = estimate and estimate.half
                points.append(point)
            curves.append({"name": curve.name, "x_label": curve.knob or "", "points": points})
        return curves

    def at_equal_gain(self) -> list[AtEqualGain]:
        """All configurations but the reference's against it, seed by seed, in each up to the reference's peak."""
        if self.reference is None or not self._measured(COSTS):
            return []
        others = (curve for curve in self.curves if curve.name != self.reference.name)
        return [self._at_equal_gain(one, self.reference) for curve in others for one in curve.configurations]

    def _at_equal_gain(self, configuration: Configuration, reference: Series) -> AtEqualGain:
        differences: dict[str, list[float]] = {figure: [] for figure in COSTS}
        seeds, nearest, counts, paired = [], [], [], False
        for seed, own in configuration.figures.items():
            runs = [one.figures[seed] for one in reference.configurations if seed in one.figures]
            paired |= bool(runs)
            runs = runs[: max(range(len(runs)), key=lambda at, runs=runs: (runs[at]["gain"], at), default=0) + 1]
            gains = {run["gain"] for run in runs}
            if not runs or not min(gains) <= own["gain"] <= max(gains):
                continue
            seeds.append(seed)
            counts.append(len(gains))
            below = max(gain for gain in gains if gain <= own["gain"])
            above = min(gain for gain in gains if gain >= own["gain"])
            nearest.append((own["gain"] - below, above - own["gain"]))
            for figure in COSTS:
                if own[figure] is not None:
                    expected = Frontier((run["gain"], run[figure]) for run in runs).loss(own["gain"])
                    differences[figure].append(own[figure] - expected)
        estimates = {figure: Estimate.of(values) if values else None for figure, values in differences.items()}
        problem = ""
        if not paired:
            problem = "no seed in common with the reference"
        elif not seeds:
            ascending = sorted(reference.configurations, key=lambda one: one.estimate("gain").mean)
            ends = ascending[0], ascending[-1]
            gain, *reached = (self._number(one.estimate("gain").mean) for one in (configuration, *ends))
            problem = f"no equal gain: gain {gain}, the reference reaches {reached[0]} to {reached[1]}"
        if not seeds:
            return AtEqualGain(configuration, estimates, seeds, problem=problem)
        below, above = (sum(side) / len(seeds) for side in zip(*nearest, strict=True))
        return AtEqualGain(configuration, estimates, seeds, (below, above), min(counts))

    # ---- for people ------------------------------------------------------------------------------------------------

    def _number(self, value: float, sign: str = "") -> str:
        share = self.measure not in (*LOWER_IS_BETTER, "r2")
        return format(100 * value if share else value, f"{sign}.{1 if share else 3}f")

    def _cell(self, estimate: Estimate, sign: str = "") -> str:
        mean = self._number(estimate.mean, sign)
        return mean if estimate.half is None else f"{mean} ± {self._number(estimate.half)}"

    def tables(self) -> dict[str, list[list[str]]]:
        """Title -> rows of cells, the first the header: the figures, and the comparison at equal gain."""
        shown, costs = self._measured(FIGURES), self._measured(COSTS)
        figures = [["run", "seeds", *(FIGURES[figure] for figure in shown)]]
        for one in self.configurations:
            figures.append([one.label, str(len(one.runs)), *(self._cell(one.estimate(figure)) for figure in shown)])
        tables = {f"Gain, and what it cost ({self.unit})": figures}
        compared = [["run", "gain", *(FIGURES[figure] for figure in costs)]]
        for one in self.at_equal_gain():
            gain = self._number(one.configuration.estimate("gain").mean)
            compared.append([one.configuration.label, gain, *(self._against(one, figure) for figure in costs)])
        if len(compared) > 1:
            tables[f"At equal gain, minus {self.reference.name} ({self.unit})"] = compared
        return tables

    def _kept(self, one: Configuration) -> Estimate:
        """Gain less what was lost, over the seeds."""
        lost = [[figures[figure] or 0.0 for figure in COSTS] for figures in one.figures.values()]
        return Estimate.of([f["gain"] - sum(costs) for f, costs in zip(one.figures.values(), lost, strict=True)])

    def ranked(self) -> list[Configuration]:
        """All configurations, the one that keeps most first."""
        return sorted(self.configurations, key=lambda one: -self._kept(one).mean)

    def ranking(self) -> list[list[str]]:
        """Rows of cells, the first the header: a row per configuration, the one that keeps most first."""
        shown = self._measured(("gain", *COSTS))
        verdicts = {id(one.configuration): one for one in self.at_equal_gain()}
        rows = [["run", "kept", *(FIGURES[figure] for figure in shown), *(["at equal gain"] if verdicts else [])]]
        for rank, one in enumerate(self.ranked(), 1):
            cells = [self._cell(self._kept(one)), *(self._cell(one.estimate(figure)) for figure in shown)]
            if verdicts:
                cells.append(self._in_short(verdicts[id(one)]) if id(one) in verdicts else "the reference")
            rows.append([f"{rank}. {one.label}", *cells])
        return rows

    def _in_short(self, one: AtEqualGain) -> str:
        if one.problem:
            return "no equal gain" if one.problem.startswith("no equal gain") else one.problem
        known = [figure for figure, difference in one.differences.items() if difference is not None]
        verdicts = {FIGURES[figure]: one.verdict(figure) for figure in known}
        same = set(verdicts.values())
        return same.pop() if len(same) == 1 else ", ".join(f"{verdict} {name}" for name, verdict in verdicts.items())

    def ranking_reading(self) -> str:
        """How the ranking is to be read."""
        return (
            f"By what is kept: gain less drift less forgetting, in {self.unit}, mean over the seeds. It is an order, "
            "no verdict: whether one forgets less than another of the same gain stands under “At equal gain”."
        )

    def _against(self, one: AtEqualGain, figure: str) -> str:
        difference = one.differences[figure]
        return "–" if difference is None else f"{self._cell(difference, '+')} {one.verdict(figure)}"

    def findings(self) -> list[str]:
        """What every configuration forgets at equal gain, in words."""
        found = []
        for one in self.at_equal_gain():
            if one.problem:
                found.append(f"{one.configuration.label}: {one.problem}.")
                continue
            gain = self._number(one.configuration.estimate("gain").mean)
            below, above = map(self._number, one.nearest)
            words = ", ".join(
                f"{FIGURES[figure]} {self._cell(difference, '+')} ({one.verdict(figure)})"
                for figure, difference in one.differences.items()
                if difference is not None
            )
            doubt = f" No verdict: {one.doubt}; run it with values in between." if one.doubt else ""
            found.append(
                f"{one.configuration.label}, at the gain of {gain} against {self.reference.name}: {words}; "
                f"{len(one.seeds)} of {len(one.configuration.runs)} seeds. The nearest runs of {self.reference.name} "
                f"gain {below} less and {above} more.{doubt}"
            )
        return found

    def reading(self) -> str:
        """How the tables are to be read."""
        several = any(len(one.runs) > 1 for one in self.configurations)
        lines = [
            "Mean over seeds ± half of the 95 % interval (Student's t); of one seed there is none."
            if several
            else "One seed: no interval, and so no verdict.",
            "Gain: what a domain's own stage brings. Drift: what is lost of what was never learned. Forgetting: what "
            "is lost of a domain after its own stage.",
        ]
        if self.reference:
            lines.append(
                f"Whatever slows learning also forgets less, so the others are compared with {self.reference.name} at "
                "equal gain: seed by seed, on the convex curve below its runs up to the one that gains most. "
                "Negative is better: less, more where the interval leaves out 0."
            )
        return " ".join(lines)

    def print(self, console: Console | None = None) -> None:
        """Show it."""
        console = console or Console(highlight=False)
        for title, rows in self.tables().items():
            console.print(Table(title, rows).console())
        for line in [self.reading(), *self.findings(), *self.notes]:
            console.print(escape(line), soft_wrap=True)

    def to_json(self) -> dict[str, Any]:
        """All of it, as it stands in `comparison.json`; figures are means, with half of their 95 % intervals."""

        def as_json(estimates: dict[str, Estimate | None]) -> dict[str, Any]:
            return {FIGURES[figure]: estimate and estimate._asdict() for figure, estimate in estimates.items()}

        return {
            "measure": self.measure,
            "unit": self.unit,
            "reference": self.reference and self.reference.name,
            "configurations": [
                {
                    "run": one.label,
                    "method": one.method,
                    "settings": one.settings,
                    "runs": {seed: str(run.directory) for seed, run in one.runs.items()},
                    **as_json({figure: one.estimate(figure) for figure in FIGURES}),
                }
                for one in self.configurations
            ],
            "frontier": self.frontier,
            "at_equal_gain": [
                {
                    "run": one.configuration.label,
                    "seeds": one.seeds,
                    "nearest": one.nearest and dict(zip(("below", "above"), one.nearest, strict=True)),
                    "doubt": one.doubt or None,
                    "problem": one.problem or None,
                    **as_json(one.differences),
                    "verdict": {FIGURES[f]: value and one.verdict(f) for f, value in one.differences.items()},
                }
                for one in self.at_equal_gain()
            ],
            "findings": self.findings(),
            "notes": self.notes,
        }

    def save(self, directory: Path) -> None:
        """
        Write `table.md` and `comparison.json`.

        Raises:
            UserError: the directory cannot be written to.
        """
        lines = [f"- {as_markdown(line)}" for line in [*self.findings(), *self.notes]]
        parts = ["# Runs side by side", as_markdown(self.reading()), *markdown_tables(self.tables()), "\n".join(lines)]
        try:
            directory.mkdir(parents=True, exist_ok=True)
            write_text(directory / TABLE_NAME, "\n\n".join(part for part in parts if part) + "\n")
            write_json(directory / COMPARISON_NAME, self.to_json())
        except OSError as error:
            raise UserError(f"output_dir: cannot write to {directory}: {error.strerror}") from error


def compare(runs: Sequence[Path | str], reference: str | None = None, measure: str = "loss") -> Comparison:
    """
    Put runs side by side.

    Args:
        runs: directories that hold a `forgetting.json`, or directories below which there are such, as those of a sweep
            or a classic benchmark. Of the latter, what was run to choose something on development data is left out.
        reference: the method, or the curve of it, that others are compared with at equal gain; `naive` by default.
            Of a method with several curves, the longest.
        measure: what gain, drift and forgetting are taken of: `"loss"`, `"accuracy"`, `"r2"`, `"cloze"`,
            `"lm_eval"`, `"end_task"`.

    Raises:
        UserError: nothing to compare, runs that cannot be compared, or an unknown measure or reference.
    """
    directories = find_runs(runs)
    loaded = [FinishedRun.load(directory) for directory in directories]
    notes = [
        f"Left out, not finished: {run.directory} ({len(run.results.stages)} stages measured)."
        for run in loaded
        if not is_finished(run.results)
    ]
    loaded = [run for run in loaded if is_finished(run.results)]
    if not loaded:
        raise UserError(f"{directories[0]}: not finished yet, and no other run is; there is nothing to compare")
    chosen_with = [run for run in loaded if run.results.run.get("split") == "development"]
    if 0 < len(chosen_with) < len(loaded):
        loaded = [run for run in loaded if run not in chosen_with]
        notes.append(f"Left out, run on development data: {len(chosen_with)}.")
    check_comparable(loaded, measure)

    curves = series_of(configurations_of(loaded, measure))
    unit = {"loss": loaded[0].results.unit, "bits_per_byte": "bits per byte", "r2": "R²"}.get(
        measure, f"{MEASURES[measure][0]}, %"
    )
    curve, more = _reference(curves, reference)
    first = (reference or "naive", curve and curve.name)
    curves.sort(key=lambda one: (one.name not in first, one.configurations[0].method not in first))  # stable
    return Comparison(curves, measure, unit, curve, notes + more)


def _reference(curves: Sequence[Series], name: str | None) -> tuple[Series | None, list[str]]:
    """
    The curve to compare with, and what is to be said of it.

    Raises:
        UserError: there is none of that name.
    """
    found = [curve for curve in curves if (name or "naive") in (curve.name, curve.configurations[0].method)]
    if name and not found:
        names = [known for curve in curves for known in (curve.name, curve.configurations[0].method)]
        raise UserError(f"reference '{name}': there is no such method.{did_you_mean(name, names)}")
    if not found:
        return None, ["No comparison at equal gain: there is no naive run; name another method as the reference."]
    longest = max(found, key=lambda curve: len(curve.configurations))
    curve = up_to_its_peak(longest)
    left = [one.label for one in longest.configurations if one not in curve.configurations]
    notes = [f"Past the peak of what {curve.name} gains, no reference: {', '.join(left)}."]
    if len(curve.configurations) == 1:
        advice = "runs of it with several learning rates (das-lm sweep) would be a reference"
        return None, [*notes[: len(left)], f"No comparison at equal gain: {curve.name} has one gain only; {advice}."]
    return curve, notes[: len(left)]
