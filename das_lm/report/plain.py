"""Plain training beside a run: the same model, text and steps without a method."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from das_lm.errors import UserError
from das_lm.files import recipe_folders
from das_lm.measure.results import FILE_NAME, Results
from das_lm.report.runs import is_finished
from das_lm.report.words import change, score

FIGURES = {"gain": "gain", "drift": "drift of what was never learned", "forgetting": "forgetting"}
#: Keys of a recipe in which a run and its plain twin may differ.
_MAY_DIFFER = ("method", "remember", "output_dir", "description")


def plain_twin(results: Results, directory: Path) -> Results | None:
    """
    A finished run of `naive` whose recipe and text are otherwise the same: one beside the run's directory, or the one
    that comes with a recipe of the package (`scripts/plain_twins.py`).
    """
    if "recipe" not in results.run or results.run["recipe"]["method"] == ["naive"]:
        return None
    for path in _candidates(directory):
        try:
            other = Results.load(path.parent)
        except UserError:  # somebody else's file
            continue
        is_whole = "recipe" in other.run and len(other.stages) == len(results.stages)
        if is_whole and other.run["recipe"]["method"] == ["naive"] and _about(other) == _about(results):
            return other
    return None


def _candidates(directory: Path) -> Iterator[Path]:
    folders = [directory.absolute().parent, *(folder / "plain" for folder in recipe_folders())]
    for folder in folders:
        yield from sorted(folder.glob(f"*/{FILE_NAME}"))


def _about(results: Results) -> tuple[Any, ...]:
    """What a run and its twin have in common."""
    recipe = {key: value for key, value in results.run["recipe"].items() if key not in _MAY_DIFFER}
    text = {name: results.run.get("text", {}).get(name) for name in results.domains}
    return recipe, text, results.domains, results.unit


def beside_plain(results: Results, plain: Results) -> list[list[str]]:
    """A table of a run and its twin: what was gained and lost, and every domain at the end."""
    rows = [["", "this run", "plain training"]]
    for figure, words in FIGURES.items():
        values = [one.summary()["loss"][figure] for one in (results, plain)]
        if None not in values:
            rows.append([words, *(change(value, "loss") for value in values)])
    for measure in ("loss", "accuracy"):
        for domain in results.domains:
            ends = [one.stages[-1]["scores"][domain][measure] for one in (results, plain)]
            rows.append([f"{domain}, {measure} at the end", *(score(value, measure) for value in ends)])
    return rows


def plain_finding(results: Results, plain: Results | None) -> str:
    """The same in one sentence; of a finished run whose twin is not known, how to know it."""
    if plain is None:
        if "recipe" not in results.run or results.run["recipe"]["method"] == ["naive"] or not is_finished(results):
            return ""
        return (
            "How plain training does here is not known: run the same with --method naive, in a directory beside this."
        )
    ours, theirs = (one.summary()["loss"] for one in (results, plain))
    parts = [
        f"{figure} {change(ours[figure], 'loss')} against {change(theirs[figure], 'loss')}"
        for figure in FIGURES
        if None not in (ours[figure], theirs[figure])
    ]
    return f"Beside plain training of the same model, with the same text and steps: {', '.join(parts)}."
