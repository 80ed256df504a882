"""What came out of a benchmark: means with intervals over seeds, tables, and `benchmark.json`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from das_lm.files import write_json, write_text
from das_lm.measure.intervals import Estimate
from das_lm.measure.results import Results
from das_lm.report.table import Table, markdown_tables

SUMMARY_NAME = "benchmark.json"
TABLE_NAME = "table.md"


@dataclass
class Choice:
    """
    What a search tried of a method and chose.

    Args:
        tried: per grid point its `options` and its `score`, the mean over the search's seeds of the final average over
            all tasks on development data; `None` if a run could not be finished.
        chosen: the options with the best score; of several the first. Without a search, what was chosen elsewhere.
    """

    tried: list[dict[str, Any]] = field(default_factory=list)
    chosen: dict[str, Any] = field(default_factory=dict)

    @property
    def at_edge(self) -> list[str]:
        """Options whose chosen value is the first or last of those tried."""
        ends = [self.tried[0]["options"], self.tried[-1]["options"]] if self.tried else []
        return [key for key, value in self.chosen.items() if value in [end[key] for end in ends]]


@dataclass
class Report:
    """
    What came out of a benchmark.

    Args:
        experiment: its name.
        description: one line for people.
        measure: `"accuracy"` or `"r2"`.
        seeds: of the runs.
        results: method -> results, one per seed.
        choices: method -> what the search tried and chose.
        run: how the numbers came about.
    """

    experiment: str
    description: str
    measure: str
    seeds: list[int]
    results: dict[str, list[Results]]
    choices: dict[str, Choice]
    run: dict[str, Any] = field(default_factory=dict)

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in their order."""
        return list(next(iter(self.results.values()))[0].domains)

    def final(self, method: str) -> np.ndarray:
        """Final score of every task, shape [seeds, tasks]."""
        return np.stack([results.matrix(self.measure)[-1] for results in self.results[method]])

    def averages(self, method: str) -> np.ndarray:
        """Average over the tasks learned so far after every stage, shape [seeds, stages]."""
        learned = np.array(list(self.results[method][0].domains.values()))
        matrices = [results.matrix(self.measure) for results in self.results[method]]
        return np.array([[m[i, learned <= i].mean() for i in range(1, len(m))] for m in matrices])

    def curves(self, method: str) -> np.ndarray:
        """Score of every task before training and after every epoch, shape [seeds, 1 + epochs, tasks]."""
        runs = []
        for results in self.results[method]:
            base = {task: score[self.measure] for task, score in results.stages[0]["scores"].items()}
            rows = [base, *(row for stage in results.stages[1:] for row in stage["curve"])]
            runs.append([[row[task] for task in self.tasks] for row in rows])
        return np.array(runs)

    def difference(self, method: str) -> Estimate | None:
        """Final average minus that of `naive`, seed by seed."""
        if method == "naive" or "naive" not in self.results:
            return None
        return Estimate.of(self.final(method).mean(1) - self.final("naive").mean(1))

    def verdict(self, method: str) -> str:
        """Whether the method beats `naive`: the interval of the difference is above 0."""
        difference = self.difference(method)
        if difference is None or difference.half is None:
            return "–"
        if difference.mean - difference.half > 0:
            return "yes"
        return "no, worse" if difference.mean + difference.half < 0 else "no"

    def order(self) -> list[str]:
        """The lower bound, the methods from best to worst, the upper bound."""
        middle = sorted(set(self.results) - {"naive", "joint"}, key=lambda name: -self.final(name).mean())
        return [name for name in ("naive", *middle, "joint") if name in self.results]

    def forgetting(self, method: str) -> Estimate | None:
        """From the best score since a task was learned to the final one."""
        values = [results.summary()[self.measure]["forgetting"] for results in self.results[method]]
        return None if None in values else Estimate.of(values)

    # ---- for people -----------------------------------------------------------------------------------------------

    def rows(self) -> dict[str, list[list[str]]]:
        """Title -> rows of cells, the first the header: the figures, the tasks, and the averages on the way."""
        name = "accuracy in %" if self.measure == "accuracy" else "R²"
        figures = [["method", "chosen", "average", "minus naive", "beats naive", "forgetting"]]
        tasks = [["method", *self.tasks]]
        methods = self.order()
        stages = [stage["name"] for stage in self.results[methods[0]][0].stages[1:]]
        averages = [["method", *(f"after {stage}" for stage in stages)]]
        for method in methods:
            final, choice = self.final(method), self.choices[method]
            chosen = [
                f"{key} {float(value):g}{'*' if key in choice.at_edge else ''}" for key, value in choice.chosen.items()
            ]
            figures.append(
                [
                    method,
                    ", ".join(chosen) or "–",
                    self._cell(Estimate.of(final.mean(1))),
                    self._cell(self.difference(method), signed=True),
                    self.verdict(method),
                    self._cell(self.forgetting(method)),
                ]
            )
            tasks.append([method, *(self._cell(Estimate.of(column)) for column in final.T)])
            averages.append([method, *(self._cell(Estimate.of(column)) for column in self.averages(method).T)])
        tables = {f"{self.experiment}, after the last task, {name}": figures, f"Each task, final {name}": tasks}
        if len(stages) > 1:
            tables[f"Average over the tasks so far, {name}"] = averages
        return tables

    def _cell(self, estimate: Estimate | None, signed: bool = False) -> str:
        if estimate is None:
            return "–"
        scale, digits = (100, 1) if self.measure == "accuracy" else (1, 3)
        mean = format(scale * estimate.mean, f"{'+' if signed else ''}.{digits}f")
        return mean if estimate.half is None else f"{mean} ± {scale * estimate.half:.{digits}f}"

    def notes(self) -> str:
        """How the tables are to be read."""
        count = len(self.seeds)
        lines = [
            f"Test data, mean over {count} seeds ± half of the 95 % interval (Student's t); *minus naive* is paired "
            "by seed, and a method beats naive if that interval is above 0."
            if count > 1
            else "Test data, one seed: no interval, and so no verdict."
        ]
        if self.run.get("chosen_from"):
            lines.append(f"Parameters as chosen in {self.run['chosen_from']}, not on these data.")
        if self.run.get("search_seeds"):
            lines.append(
                f"Chosen on development data with seed {', '.join(map(str, self.run['search_seeds']))}, from the "
                f"grids in {SUMMARY_NAME}; * is the edge of its grid."
            )
        return " ".join(lines)

    def tables(self) -> list[Any]:
        """For the console."""
        tables = [Table(title, rows, words=("chosen",)).console() for title, rows in self.rows().items()]
        return [*tables, self.notes()]

    def markdown(self) -> str:
        """For a file."""
        parts = [f"# {self.experiment}", self.description, self.notes(), *markdown_tables(self.rows())]
        return "\n\n".join(parts) + "\n"

    def save(self, directory: Path) -> None:
        """Write tables, plots, and last `benchmark.json`."""
        from das_lm.report.benchmark_plots import plot_all

        write_text(directory / TABLE_NAME, self.markdown())
        plot_all(self, directory)
        methods = {
            method: {
                "chosen": choice.chosen,
                "at_edge": choice.at_edge,
                "tried": choice.tried,
                "final_average": Estimate.of(self.final(method).mean(1))._asdict(),
                "minus_naive": (difference := self.difference(method)) and difference._asdict(),
                "beats_naive": self.verdict(method),
                "forgetting": (forgetting := self.forgetting(method)) and forgetting._asdict(),
            }
            for method, choice in self.choices.items()
        }
        facts = {"description": self.description, "measure": self.measure, "seeds": self.seeds, **self.run}
        write_json(
            directory / SUMMARY_NAME,
            {"experiment": self.experiment, "parameters": facts.pop("parameters", {}), **facts, "methods": methods},
        )
