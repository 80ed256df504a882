"""
Runs side by side: seeds averaged, and what every method forgets at the gain that the reference has too.

Whatever slows learning also lowers drift and forgetting, a smaller learning rate as well as a mask. So a method is
compared with plain training at the learning rate that gains as much.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.markup import escape

from das_lm.errors import UserError, did_you_mean
from das_lm.files import write_json, write_text
from das_lm.measure.intervals import Estimate
from das_lm.measure.results import FILE_NAME, LOWER_IS_BETTER, MEASURES, Results
from das_lm.report.frontier import Frontier
from das_lm.report.table import as_markdown, console_table, markdown_tables
from das_lm.terminal import Console

COMPARISON_NAME, TABLE_NAME = "comparison.json", "table.md"
#: Figures of `summarize` that are shown -> their names here.
FIGURES = {"gain": "gain", "drift": "drift", "forgetting_rate": "forgetting", "average": "final average"}
COSTS = ("drift", "forgetting_rate")
#: Training arguments that make no other configuration: the seeds, and what changes no number.
NO_SETTINGS = {
    *("seed", "data_seed", "disable_tqdm", "report_to", "run_name", "use_cpu", "per_device_eval_batch_size"),
    *("logging_steps", "logging_strategy", "save_steps", "save_strategy", "save_total_limit"),
    *("eval_steps", "eval_strategy", "dataloader_num_workers"),
}
#: Scores of the base model that differ by less, relatively, are the same: devices round differently.
SAME = 1e-3
#: Runs of the reference further apart, relative to the gain between them, give no verdict: of how the frontier runs in
#: between they say too little. Learning rates a factor of √2 apart are usually near enough.
NEAR = 0.15


# ---- runs ----------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """
    A finished run.

    Args:
        directory: where its `forgetting.json` is.
        results: what is in it.
        method: its name, or several as `"ewc+replay"`.
        seed: `"0"`; with another seed of the data `"0/7"`. Runs of one seed see the same held-out masks and order.
        settings: what else it was given: training arguments, those of a domain as `"bio.max_steps"`, and so on.
    """

    directory: Path
    results: Results
    method: str
    seed: str
    settings: dict[str, Any]

    @classmethod
    def load(cls, directory: Path) -> Run:
        """
        Read `forgetting.json`.

        Raises:
            UserError: it is broken, or does not say how the run came about.
        """
        results = Results.load(directory)
        try:
            return cls._of(directory, results)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{directory / FILE_NAME} is not as das-lm writes it ({error!r})") from None

    @classmethod
    def _of(cls, directory: Path, results: Results) -> Run:
        run = results.run
        _ = [int(score["documents"]) for stage in results.stages for score in stage["scores"].values()]
        if "recipe" in run:
            recipe = run["recipe"]
            training = recipe.get("training", {})
            seed, data_seed = training.get("seed", 42), training.get("data_seed")
            settings = dict(training)
            for domain in recipe["domains"]:
                own = {**domain, **domain.get("training", {})}
                settings |= {f"{domain['name']}.{key}": own[key] for key in own if key not in ("name", "training")}
            more = ("model_name_or_path", "schedule", "units", "attn_implementation")
            settings |= {key: recipe[key] for key in more if key in recipe}
            methods = recipe["method"]
        elif "method" in run:  # a small model
            seed, data_seed, methods = run["seed"], None, [run["method"]]
            settings = {**run["options"], "schedule": run["schedule"], "epochs": run["epochs"]}
        elif "checkpoints" in run:  # measured by das-lm evaluate: how they were trained is not known
            seed, data_seed, methods, settings = 42, None, [directory.absolute().name], dict(run["training"])
        else:
            raise UserError(
                f"{directory / FILE_NAME} names no method and no recipe: there is nothing to compare it by"
            )
        seed = str(seed) if data_seed in (None, seed) else f"{seed}/{data_seed}"
        settings = {key: value for key, value in settings.items() if key.rpartition(".")[2] not in NO_SETTINGS}
        return cls(directory, results, "+".join(methods), seed, settings)

    def setting(self, key: str) -> Any:
        """A setting, or what holds where it was not given; `None` where that is not known."""
        if key in self.settings:
            return self.settings[key]
        _, dot, shared = key.partition(".")
        if dot:
            return self.setting(shared)
        if "recipe" not in self.results.run:  # the defaults of a small model are its experiment's
            return None
        from das_lm.training.config import ContinualConfig

        argument = ContinualConfig.__dataclass_fields__.get(key)
        if argument is None:
            return None
        return argument.default_factory() if argument.default is MISSING else argument.default


def is_finished(results: Results) -> bool:
    """Whether all stages of a run have been measured."""
    return len(results.stages) > max(stage or 0 for stage in results.domains.values())


def find_runs(paths: Sequence[Path | str]) -> list[Path]:
    """
    The directories that hold a `forgetting.json`: those given, and those below them.

    Raises:
        UserError: there is none in or below one of them.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        here = []
        for directory, below, files in os.walk(path):
            below[:] = sorted(name for name in below if not name.startswith("."))
            if FILE_NAME in files:
                here.append(Path(directory))
                below.clear()
        if not here:
            problem = f"there is no {FILE_NAME} in it or below it" if path.is_dir() else "there is no such directory"
            raise UserError(f"{path}: {problem}; give directories of runs, as das-lm pretrain writes them")
        found |= {directory.resolve(): directory for directory in here}
    return list(found.values())


def _check_comparable(runs: Sequence[Run], measure: str) -> None:
    """
    Refuse to compare what was not measured alike.

    Raises:
        UserError: other domains, another model, or other held-out text.
    """
    for run in runs:
        if measure not in run.results.measures:
            raise UserError(
                f"{run.directory}: '{measure}' was not measured.{did_you_mean(measure, run.results.measures)}"
            )
    first: dict[str, Run] = {}
    for run in runs:
        for other in (runs[0], first.setdefault(run.seed, run)):
            what = _difference(other, run, measure)
            if what:
                raise UserError(f"{other.directory} and {run.directory} cannot be compared: {what}")


def _difference(one: Run, other: Run, measure: str) -> str | None:
    """In what two runs were measured differently, in words."""
    left, right = one.results, other.results
    for taken_of in ("loss", measure):
        if left.columns(taken_of) != right.columns(taken_of):
            columns = (_in_words(results.columns(taken_of)) for results in (left, right))
            return "the one measures {}; the other {}".format(*columns)
    if left.unit != right.unit:
        return f"the losses of the one are in {left.unit}, those of the other in {right.unit}"
    for key in ("experiment", "parameters", "split"):
        if left.run.get(key) != right.run.get(key):
            return f"{key} is {left.run.get(key)} for the one, {right.run.get(key)} for the other"
    for domain, score in left.stages[0]["scores"].items():
        base = right.stages[0]["scores"][domain]
        if score["documents"] != base["documents"]:
            return (
                f"the held-out text of '{domain}' has {score['documents']:,} documents in the one, "
                f"{base['documents']:,} in the other"
            )
        if one.seed == other.seed and not math.isclose(score["loss"], base["loss"], rel_tol=SAME):
            return (
                f"before training the loss on '{domain}' is {score['loss']:.3f} in the one, {base['loss']:.3f} in the "
                "other: another model, or other held-out text"
            )
    return None


def _in_words(columns: dict[str, int | None]) -> str:
    return ", ".join(f"{name} ({f'stage {stage}' if stage else 'never learned'})" for name, stage in columns.items())


# ---- configurations and curves -------------------------------------------------------------------------------------


@dataclass(eq=False)
class Configuration:
    """
    Runs that differ in nothing but the seed.

    Args:
        runs: seed -> run.
        measure: what the figures are taken of.
        label: the method, and what sets it apart from the other configurations.
    """

    runs: dict[str, Run]
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
    def _any(self) -> Run:
        return next(iter(self.runs.values()))

    def estimate(self, figure: str) -> Estimate | None:
        """A figure of `summarize` over the seeds; `None` where there is no domain to take it over."""
        values = [figures[figure] for figures in self.figures.values()]
        return None if None in values else Estimate.of(values)


@dataclass
class Curve:
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


def _configurations(runs: Sequence[Run], measure: str) -> list[Configuration]:
    """
    Runs grouped into configurations, which are named by what differs.

    Raises:
        UserError: two runs of the same configuration and seed.
    """
    configurations = []
    for group in _by_method(runs).values():
        keys = sorted({key for run in group for key in run.settings})
        found: dict[tuple[str, ...], dict[str, Run]] = {}
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


def _curves(configurations: Sequence[Configuration]) -> list[Curve]:
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
                    curves.append(Curve(_label(group[0], configurations, without=knob), knob, group))
                    rest = [one for one in rest if one not in group]
        curves += [Curve(one.label, None, [one]) for one in rest]
    return curves


# ---- at equal gain -------------------------------------------------------------------------------------------------


def _up_to_its_peak(curve: Curve) -> Curve:
    """A reference from the end of its curve that loses less up to the run that gains most; of equal ones the first."""
    runs = curve.configurations
    if _lost(runs[-1]) < _lost(runs[0]):
        runs = runs[::-1]
    peak = max(runs, key=lambda one: (one.estimate("gain").mean, -_lost(one)))
    return replace(curve, configurations=runs[: runs.index(peak) + 1])


def _lost(one: Configuration) -> float:
    return sum(estimate.mean for estimate in map(one.estimate, COSTS) if estimate)


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

    curves: list[Curve]
    measure: str
    unit: str
    reference: Curve | None = None
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

    def _at_equal_gain(self, configuration: Configuration, reference: Curve) -> AtEqualGain:
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
            console.print(console_table(title, rows))
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
        measure: what gain, drift and forgetting are taken of: `"loss"`, `"accuracy"`, `"r2"`, `"cloze"`, `"end_task"`.

    Raises:
        UserError: nothing to compare, runs that cannot be compared, or an unknown measure or reference.
    """
    directories = find_runs(runs)
    loaded = [Run.load(directory) for directory in directories]
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
    _check_comparable(loaded, measure)

    curves = _curves(_configurations(loaded, measure))
    unit = {"loss": loaded[0].results.unit, "bits_per_byte": "bits per byte", "r2": "R²"}.get(
        measure, f"{MEASURES[measure][0]}, %"
    )
    curve, more = _reference(curves, reference)
    first = (reference or "naive", curve and curve.name)
    curves.sort(key=lambda one: (one.name not in first, one.configurations[0].method not in first))  # stable
    return Comparison(curves, measure, unit, curve, notes + more)


def _reference(curves: Sequence[Curve], name: str | None) -> tuple[Curve | None, list[str]]:
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
    curve = _up_to_its_peak(longest)
    left = [one.label for one in longest.configurations if one not in curve.configurations]
    notes = [f"Past the peak of what {curve.name} gains, no reference: {', '.join(left)}."]
    if len(curve.configurations) == 1:
        advice = "runs of it with several learning rates (das-lm sweep) would be a reference"
        return None, [*notes[: len(left)], f"No comparison at equal gain: {curve.name} has one gain only; {advice}."]
    return curve, notes[: len(left)]
