"""The result matrix and what it says about forgetting; kept in `forgetting.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.markup import escape
from rich.table import Table

from das_lm.errors import UserError, as_user_error
from das_lm.files import write_json
from das_lm.measure.bootstrap import interval, resampled_ratios
from das_lm.measure.intervals import Estimate
from das_lm.plain_words import key_path

if TYPE_CHECKING:
    from das_lm.measure.held_out import HeldOut

FILE_NAME = "forgetting.json"
PAGE_NAME, FIGURES_NAME, VALUES_NAME = "report.html", "figures", "results.csv"  # what is shown of it
FORMAT_VERSION = 1
#: What is scored -> its name for people, and how one score is written.
MEASURES = {
    "loss": ("loss", ".3f"),
    "bits_per_byte": ("bits per byte", ".3f"),
    "accuracy": ("top-1 accuracy", ".1%"),
    "r2": ("R²", ".3f"),
    "cloze": ("cloze accuracy", ".1%"),
    "lm_eval": ("lm-eval score", ".1%"),
    "end_task": ("end-task macro F1", ".1%"),
}
LOWER_IS_BETTER = ("loss", "bits_per_byte")
#: Measures that are no scores of a domain -> where they stand in a stage.
PROBES = {"cloze": "cloze", "lm_eval": "lm_eval", "end_task": "end_tasks"}
#: The score in the entries of those that are means over examples.
EXAMPLES = {"cloze": "accuracy", "lm_eval": "score"}
#: The figures of `summarize`, for people.
FIGURES = {
    "average": "average over learned domains",
    "gain": "gain of a domain in its own stage",
    "backward_transfer": "backward transfer",
    "forward_transfer": "forward transfer",
    "forgetting": "forgetting, from the best value",
    "forgetting_rate": "forgetting rate",
    "drift": "drift of what was never learned",
}


def summarize(matrix: np.ndarray, learned: Sequence[int | None], lower_is_better: bool) -> dict[str, Any]:
    """
    The figures of continual learning, from scores after every stage. Of all but `average`, whose scale is the score's
    own, a positive value of a transfer or a gain is good and a positive value of a forgetting or a drift is bad, for
    losses and accuracies alike.

    Args:
        matrix: R[i][j], the score on domain j after stage i; row 0 is the base model. Shape [1 + stages, domains], or
            [1 + stages, domains, resamples]: then every figure has the shape [resamples].
        learned: for each domain the stage (1, 2, …) in which it was learned, or `None` if it never was.
        lower_is_better: whether the scores are losses.

    Returns:
        `average`: mean over the learned domains of R[T][j];
        `gain`: mean over them of what their own stage brought, R[j][j] against R[j−1][j];
        `backward_transfer`: mean over the domains learned before the last stage of R[T][j] against R[j][j];
        `forward_transfer`: mean over the domains learned after the first stage of R[j−1][j] against R[0][j];
        `forgetting`: mean over the domains learned before the last stage of the best value since they were learned
        against the final one (Chaudhry et al., 1801.10112);
        `forgetting_rate`: the same from R[j][j] (DAS, 2302.03241);
        `drift`: mean over the domains never learned of R[0][j] against R[T][j].
        A figure is `None` where there is no domain to take it over, and while nothing has been learned.
    """
    worth = -matrix if lower_is_better else matrix
    last = len(matrix) - 1
    own = [(j, stage) for j, stage in enumerate(learned) if stage is not None and stage <= last]
    earlier = [(j, stage) for j, stage in own if stage < last]
    later = [(j, stage) for j, stage in own if stage > 1]

    def mean(values: list[np.ndarray]) -> Any:
        if not values:
            return None
        return np.mean(values, axis=0) if matrix.ndim > 2 else float(np.mean(values))

    return {
        "average": mean([matrix[last, j] for j, _ in own]),
        "gain": mean([worth[stage, j] - worth[stage - 1, j] for j, stage in own]),
        "backward_transfer": mean([worth[last, j] - worth[stage, j] for j, stage in earlier]),
        "forward_transfer": mean([worth[stage - 1, j] - worth[0, j] for j, stage in later]),
        "forgetting": mean([worth[stage:last, j].max(axis=0) - worth[last, j] for j, stage in earlier]),
        "forgetting_rate": mean([worth[stage, j] - worth[last, j] for j, stage in earlier]),
        "drift": mean([worth[0, j] - worth[last, j] for j, stage in enumerate(learned) if stage is None and last]),
    }


class _Part(BaseModel):
    """What has to be as the README beside this file tells it, where it is there; there may be more."""

    model_config = ConfigDict(strict=True, extra="allow")


Entry, Scores = dict[str, Any], dict[str, dict[str, float]]  # a score: domain -> measure -> value
Interval = Annotated[list[float], Field(min_length=2, max_length=2)]


class _Recipe(_Part):
    model_name_or_path: str = ""
    domains: list[Entry]
    method: list[str]
    measure: list[Entry] = []
    training: Entry = {}
    peft: Entry = {}


class _Run(_Part):
    recipe: _Recipe | None = None
    processes: int = 1
    warnings: dict[str, list[str]] = {}
    versions: dict[str, str] = {}
    text: dict[str, dict[str, Any]] = {}
    parts: dict[str, dict[str, float]] = {}
    training: Entry = {}
    options: Entry = {}


class _Moment(_Part):
    step: int
    held_out: dict[str, float] = {}


class _Importance(_Part):
    domains: list[str]
    maps: dict[str, dict[str, list[list[float]]]]
    overlap: dict[str, list[list[float]]]


class _Stage(_Part):
    name: str
    scores: Scores
    checkpoint: str = ""
    measured: dict[str, str] = {}
    intervals: dict[str, dict[str, Interval]] = {}
    pseudo: Scores = {}
    cloze: dict[str, Entry] = {}
    lm_eval: dict[str, Entry] = {}
    end_tasks: dict[str, Entry] = {}
    step: int = 0
    seconds: float | None = None
    peak_memory: float | None = None
    mean_importance: dict[str, float] = {}
    tokens_seen: dict[str, int] = {}
    history: list[_Moment] = []
    samples: dict[str, list[Entry]] = {}
    importance: _Importance | None = None
    curve: list[dict[str, float]] = []
    predictions: list[float] = []


class _File(_Part):
    domains: dict[str, int | None]
    stages: list[_Stage]
    run: _Run
    unit: str = ""
    intervals: dict[str, dict[str, Interval]] = {}


def _number(text: str) -> float:
    """A number of JSON. Raises `ValueError` for what das-lm does not write: NaN, infinity, or beyond a float."""
    if not math.isfinite(float(text)):
        raise ValueError(f"'{text[:20]}' is no number that can be computed with")
    return float(text) if set(text) & set(".eE") else int(text)


@dataclass
class Results:
    """
    What was measured after every stage of a run; see the README beside this file for all that a stage may hold.

    Args:
        domains: name of each measured domain -> stage (1, 2, …) in which it is learned, `None` if it never is.
        stages: per stage, the base model first: `name`, `scores` (domain -> `loss`, `accuracy` or `r2`, `tokens`,
            `documents`), and further measures and facts.
        run: the recipe, versions, and whatever else says how the numbers came about.
        unit: of the loss.
        intervals: measure -> figure of `summarize` -> its 95 % interval, `[low, high]`.
    """

    domains: dict[str, int | None]
    stages: list[dict[str, Any]] = field(default_factory=list)
    run: dict[str, Any] = field(default_factory=dict)
    unit: str = "nats per masked token"
    intervals: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    @property
    def causal(self) -> bool:
        """Whether they are of causal language models, of which every token of a text is predicted."""
        return self.unit == "nats per token"

    # ---- scores ------------------------------------------------------------------------------------------------

    @property
    def measures(self) -> list[str]:
        """What is measured of every stage: `loss`, `accuracy` or `r2` of the domains, `cloze`, `lm_eval`,
        `end_task`."""
        scores = next(iter(self.stages[0]["scores"].values())) if self.stages else ("loss", "accuracy")
        probes = [measure for measure, key in PROBES.items() if self.stages and all(key in s for s in self.stages)]
        return [measure for measure in MEASURES if measure in scores or measure in probes]

    def columns(self, measure: str = "loss") -> dict[str, int | None]:
        """What a measure is taken of -> the stage in which it is learned: the domains; or sets of questions,
        tasks of lm-eval, or end-tasks, which belong to the domain that their name says (`bio`, `bio.chemprot`)."""
        if measure not in PROBES:
            return self.domains
        return {name: self.domains.get(name.split(".")[0]) for name in self.stages[0][PROBES[measure]]}

    def matrix(self, measure: str = "loss") -> np.ndarray:
        """Scores, shape [1 + stages, columns]; of an end-task, macro F1, the mean over seeds."""
        if measure == "end_task":
            return np.array([[np.mean(task["macro_f1"]) for task in s["end_tasks"].values()] for s in self.stages])
        if measure in EXAMPLES:
            key = EXAMPLES[measure]
            return np.array([[entry[key] for entry in s[PROBES[measure]].values()] for s in self.stages])
        return np.array([[stage["scores"][domain][measure] for domain in self.domains] for stage in self.stages])

    def summary(self) -> dict[str, dict[str, Any]]:
        """Measure -> figures of `summarize`."""
        return {
            measure: summarize(self.matrix(measure), list(self.columns(measure).values()), measure in LOWER_IS_BETTER)
            for measure in self.measures
        }

    def integrated_loss(self) -> dict[str, float] | None:
        """
        The loss of every learned domain integrated over training since it was introduced, per unit of time: its mean
        over the evaluations since then.

        Returns:
            domain -> nats, or `None` where there was no evaluation during training.
        """
        curves: dict[str, list[float]] = {domain: [] for domain, stage in self.domains.items() if stage is not None}
        for number, stage in enumerate(self.stages):
            for entry in stage.get("history", ()):
                for domain, curve in curves.items():
                    if domain in entry.get("held_out", ()) and self.domains[domain] <= number:
                        curve.append(entry["held_out"][domain])
        return {domain: float(np.mean(curve)) for domain, curve in curves.items()} if all(curves.values()) else None

    def tokens_seen(self) -> list[tuple[str, str, str]]:
        """Stage, source of text, and how many tokens of it the stage was trained on; of the parts of a mixture by
        their share of its characters."""
        rows = []
        for stage in self.stages:
            for source, tokens in stage.get("tokens_seen", {}).items():
                parts = self.run.get("parts", {}).get(source, {})
                rows += [
                    (stage["name"], f"{source}: {part}", f"about {tokens * share:,.0f}")
                    for part, share in parts.items()
                ]
                rows += [] if parts else [(stage["name"], source, f"{tokens:,}")]
        return rows

    def add_intervals(self, measure: str, sums: Sequence[Mapping[str, tuple[np.ndarray, np.ndarray]]]) -> None:
        """
        Intervals of the scores of a measure and of its figures, by the paired bootstrap.

        Args:
            measure: a ratio of sums: `loss`, `bits_per_byte`, `accuracy`, `cloze`, `lm_eval`.
            sums: per stage, column -> numerators and denominators of its score, each [documents].
        """
        columns = self.columns(measure)
        ratios = np.stack(
            [resampled_ratios(*zip(*(stage[name] for stage in sums), strict=True), name) for name in columns], axis=1
        )  # [1 + stages, columns, resamples]
        for stage, row in zip(self.stages, ratios, strict=True):
            for name, values in zip(columns, row, strict=True):
                if measure in EXAMPLES:
                    stage[PROBES[measure]][name]["interval"] = interval(values)
                else:
                    stage.setdefault("intervals", {}).setdefault(name, {})[measure] = interval(values)
        figures = summarize(ratios, list(columns.values()), lower_is_better=measure in LOWER_IS_BETTER)
        self.intervals[measure] = {name: interval(value) for name, value in figures.items() if value is not None}

    def add_held_out_intervals(self, stages: Sequence[Mapping[str, HeldOut]]) -> None:
        """The same of what is measured of the domains, from what was measured of every document of every stage."""
        self.add_intervals("loss", [{name: (one.nats, one.tokens) for name, one in stage.items()} for stage in stages])
        if "accuracy" in self.measures:
            sums = [{name: (one.correct, one.tokens) for name, one in stage.items()} for stage in stages]
            self.add_intervals("accuracy", sums)
        if "bits_per_byte" in self.measures:
            sums = [{name: (one.nats / np.log(2), one.bytes) for name, one in stage.items()} for stage in stages]
            self.add_intervals("bits_per_byte", sums)

    def add_end_task_intervals(self) -> None:
        """Intervals of the figures of end-tasks, Student's t over seeds, where all tasks have the same seeds."""
        tasks = [task for stage in self.stages for task in stage["end_tasks"].values()]
        self.intervals.pop("end_task", None)
        if len({tuple(task["seeds"]) for task in tasks}) > 1 or len(tasks[0]["seeds"]) < 2:
            return
        scores = np.array([[task["macro_f1"] for task in stage["end_tasks"].values()] for stage in self.stages])
        figures = summarize(scores, list(self.columns("end_task").values()), lower_is_better=False)
        estimates = {name: Estimate.of(values) for name, values in figures.items() if values is not None}
        self.intervals["end_task"] = {name: [e.mean - e.half, e.mean + e.half] for name, e in estimates.items()}

    # ---- the file ----------------------------------------------------------------------------------------------

    def save(self, directory: Path) -> None:
        """Write `forgetting.json`."""
        data = {"format": "das_lm.forgetting", "version": FORMAT_VERSION, **asdict(self), "summary": self.summary()}
        if (integrated := self.integrated_loss()) is not None:
            data["integrated_loss"] = integrated
        write_json(directory / FILE_NAME, data)

    @classmethod
    def load(cls, directory: Path | str) -> Self:
        """
        Read `forgetting.json`.

        Raises:
            UserError: it is broken, not as [`save`] writes it, or of a newer version.
        """
        path = Path(directory) / FILE_NAME
        with as_user_error(f"{path} cannot be read"):
            text = path.read_text(encoding="utf-8")
            data = json.loads(text, parse_int=_number, parse_float=_number, parse_constant=_number)
        with as_user_error(f"{path} is not as das-lm writes it"):
            if data["version"] > FORMAT_VERSION:
                raise UserError(f"{path} has version {data['version']}; this release reads {FORMAT_VERSION}")
            try:
                _File.model_validate(data)
            except ValidationError as error:
                first = error.errors()[0]
                raise ValueError(f"{key_path(first['loc'])}: {first['msg']}") from None
            results = cls(**{field.name: data[field.name] for field in fields(cls) if field.name in data})
            if results.stages:  # all that is asked of them
                _ = results.tables(), results.integrated_loss()
        return results

    # ---- for people --------------------------------------------------------------------------------------------

    def tables(self) -> list[Table]:
        """All that was measured, for the console."""
        return [self.table(), *(self.probe_table(name) for name in PROBES if name in self.measures), self.figures()]

    def table(self) -> Table:
        """The matrix of losses: the stage in which a domain was learned stands in bold."""
        others = [measure for measure in self.measures if measure != "loss" and measure not in PROBES]
        names = "".join(f" ({MEASURES[measure][0]})" for measure in others)

        def cell(stage: dict[str, Any], domain: str) -> str:
            score = stage["scores"][domain]
            return f"{score['loss']:.3f}" + "".join(f" ({score[one]:{MEASURES[one][1]}})" for one in others)

        return self._matrix_table(f"Held-out loss, {self.unit}{names}", self.domains, cell)

    def probe_table(self, measure: str) -> Table:
        """The matrix of what questions or end-tasks say."""
        name, style = MEASURES[measure]
        columns, matrix = self.columns(measure), self.matrix(measure)

        def cell(stage: dict[str, Any], column: str) -> str:
            """A score with its interval."""
            score = matrix[self.stages.index(stage), list(columns).index(column)]
            entry = stage[PROBES[measure]][column]
            if measure == "end_task":
                half = Estimate.of(entry["macro_f1"]).half
                return f"{score:{style}}" + (f" ± {half:{style}}" if half is not None else "")
            low, high = entry.get("interval", (None, None))
            return f"{score:{style}}" + (f" ({low:{style}} to {high:{style}})" if low is not None else "")

        return self._matrix_table(f"{name[0].upper()}{name[1:]}", columns, cell)

    def _matrix_table(
        self, title: str, columns: Mapping[str, int | None], cell: Callable[[dict[str, Any], str], str]
    ) -> Table:
        table = Table(title=title, title_justify="left")
        table.add_column("after")
        for column, stage in columns.items():
            table.add_column(escape(column if stage else f"{column} (never learned)"), justify="right")
        for index, stage in enumerate(self.stages):
            cells = [(cell(stage, column), learned == index) for column, learned in columns.items()]
            table.add_row(escape(stage["name"]), *(f"[bold]{text}[/bold]" if own else text for text, own in cells))
        return table

    def figures(self) -> Table:
        """The figures of forgetting, with their intervals."""
        table = Table(title="Forgetting (positive is bad) and transfer (positive is good)", title_justify="left")
        table.add_column("")
        summary = self.summary()
        for measure in summary:
            table.add_column(MEASURES[measure][0], justify="right")

        def cell(measure: str, name: str) -> str:
            value, ends = summary[measure][name], self.intervals.get(measure, {}).get(name)
            style = ".3f" if name == "average" else "+.3f"
            beside = f" ({ends[0]:{style}} to {ends[1]:{style}})" if ends else ""
            return "–" if value is None else f"{value:{style}}{beside}"

        for name, meaning in FIGURES.items():
            table.add_row(meaning, *(cell(measure, name) for measure in summary))
        if self.intervals:
            table.caption = "in brackets: 95 % interval, paired bootstrap over documents"
        return table
