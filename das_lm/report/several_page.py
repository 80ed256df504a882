"""The page of several runs side by side, and of a classic benchmark."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from das_lm.errors import UserError
from das_lm.measure.results import Results
from das_lm.report.benchmark import SUMMARY_NAME, Choice, Report
from das_lm.report.benchmark_plots import draw_benchmark
from das_lm.report.compare import compare
from das_lm.report.figures import frontier
from das_lm.report.parts import Page, Part, listing, sentence
from das_lm.report.run_page import as_rows, load
from das_lm.report.table import Links


def comparison_page(directories: Sequence[Path], links: Mapping[Path, str], others: Mapping[str, str]) -> Page:
    """
    The ranking first, a row per configuration; then the runs at equal gain.

    Args:
        directories: of runs.
        links: resolved directory -> the path of its own page.
        others: name of everything that has a page -> its path.
    """
    listed = [["", "report"], *([name, Links.to({"open": path})] for name, path in others.items())]
    pages = Part("The report of every run", folded={f"{len(others)} reports": listed})
    try:
        comparison = compare(directories)
    except UserError as error:
        return Page(notes=[f"The runs are not compared: {error}."], parts=[pages])
    header, *rows = comparison.ranking()
    for row, one in zip(rows, comparison.ranked(), strict=True):
        row.insert(1, Links.to({seed: links[run.directory.resolve()] for seed, run in one.runs.items()}))
    drawing = frontier(comparison.frontier, comparison.unit, {})
    tables = list(comparison.tables().items())
    parts = [
        Part("Ranking", [comparison.ranking_reading()], tables={"": [[header[0], "seeds", *header[1:]], *rows]}),
        Part("Frontier", drawings=[drawing] if drawing else []),
        Part("At equal gain", findings=comparison.findings(), tables=dict(tables[1:]), folded=dict(tables[:1])),
        Part("How to read it", [comparison.reading()]),
        pages,
    ]
    return Page(notes=comparison.notes, parts=[part for part in parts if part])


def load_benchmark(path: Path) -> Report:
    """
    Read what a classic benchmark wrote.

    Raises:
        UserError: it is broken, or not finished.
    """
    file = path / SUMMARY_NAME
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if "methods" not in data:
            raise UserError(f"{path}: this benchmark is not finished; the same das-lm classic command goes on with it")
        results: dict[str, list[Results]] = {method: [] for method in data["methods"]}
        for run in data["runs"]:
            one = load(path / run)
            results[one.run["method"]].append(one)
        choices = {method: Choice(one["tried"], one["chosen"]) for method, one in data["methods"].items()}
        about = {key: data[key] for key in ("experiment", "description", "measure", "seeds")}
        return Report(**about, results=results, choices=choices, run=data)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {error!r}") from None


def benchmark_page(report: Report) -> Page:
    """A classic benchmark: its methods over seeds."""
    beaten = [method for method in report.order() if method != "joint" and report.verdict(method) == "yes"]
    findings = []
    if "naive" in report.results and len(report.seeds) > 1:
        findings = [f"Beats naive: {listing(beaten)}." if beaten else "No method beats naive."]
    facts = {key: value for key, value in report.run.items() if key not in ("methods", "runs", "description", "seeds")}
    words = [report.notes().replace("*minus naive*", "“minus naive”")]
    final, *others = draw_benchmark(report)
    parts = [
        Part("Methods", words, findings, dict(final.tables), [final]),
        Part("Tasks", drawings=others),
        Part("How the numbers came about", folded={"The benchmark": [["", ""], *as_rows(facts)]}),
    ]
    final.tables.clear()  # it stands open above
    return Page([sentence(report.description).strip()], parts=parts)
