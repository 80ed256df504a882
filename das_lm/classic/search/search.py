"""The search: trials that choose λ, and others that test the choice."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from das_lm.classic.search.curve import Curve
from das_lm.classic.search.directory import EVALUATIONS_NAME, SETTINGS_NAME, Ledger, open_output, written
from das_lm.classic.search.objectives import Objective
from das_lm.classic.search.report import report
from das_lm.classic.search.settings import Search
from das_lm.classic.search.trial import Trial
from das_lm.run.directory import drop_aside, locked, put_back
from das_lm.terminal import Console


def search_lambda(
    search: Search,
    objective: Objective,
    output_dir: str | Path,
    about: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """
    Search for λ in several trials, choose it, and test the choice in others.

    Args:
        search: where and how long.
        objective: seed of a trial -> λ -> figures; see [`experiment_objective`] and [`recipe_objective`].
        output_dir: where every run is written at once (`evaluations.jsonl`), and at the end `result.json` and a plot.
        about: what the objective is, as JSON: a search goes on only with the same.
        resume: go on with the search in `output_dir`; more trials may be asked for.
        overwrite: remove it first.
        console: for what people read.

    Returns:
        what `result.json` holds.

    Raises:
        UserError: another search in `output_dir`.
    """
    output, console = Path(output_dir), console or Console(highlight=False)
    with locked(output):
        open_output(output, {"search": asdict(search), "objective": dict(about or {})}, resume, overwrite)
        try:
            return _search(search, objective, output, about or {}, console)
        except Exception:
            put_back(output, written, SETTINGS_NAME)  # if nothing has been measured
            raise


def _search(
    search: Search, objective: Objective, output: Path, about: Mapping[str, Any], console: Console
) -> dict[str, Any]:
    ledger = Ledger(output / EVALUATIONS_NAME)
    stopped: dict[int, str] = {}
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    try:
        with progress:
            bar = progress.add_task("search", total=search.trials * search.max_evaluations)

            def done(trial: int, weight: float) -> None:
                """Show on the bar what was tried."""
                drop_aside(output)
                known = {w: value for w, value in ledger.trial(trial).items() if value is not None}
                best = min(known, key=known.get) if known else math.nan
                name = f"trial {trial + 1}" if trial < search.trials else "test"
                note = f"{name}: λ = {weight:.4g}; best so far {best:.4g} ({known.get(best, math.nan):.4f})"
                progress.update(bar, advance=1, description=note)

            for number in range(search.trials):
                stopped[number] = Trial(number, search, objective, ledger, done).search_all()
                progress.update(bar, completed=(number + 1) * search.max_evaluations)
            curve = Curve(search, [ledger.trial(number) for number in range(search.trials)])
            weights = sorted({*search.references, curve.chosen})
            bar = progress.add_task("test of the choice", total=search.confirm * len(weights))
            for number in search.confirming:
                trial = Trial(number, search, objective, ledger, done)
                for weight in weights:
                    trial.measure(weight)
    except KeyboardInterrupt:
        if stopped:
            console.print("interrupted; so far:")
            report(replace(search, trials=len(stopped), confirm=0), ledger, stopped, about, output, console)
        raise
    return report(search, ledger, stopped, about, output, console)
