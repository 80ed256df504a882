"""`das-lm report`: HTML files of what runs learned and lost, in words, figures and tables."""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.markup import escape
from rich.progress import track

from das_lm.errors import UserError
from das_lm.files import write_text
from das_lm.measure.results import FIGURES_NAME, PAGE_NAME, VALUES_NAME, Results
from das_lm.report.benchmark import SUMMARY_NAME, Report
from das_lm.report.drawing import drawing_style
from das_lm.report.parts import Page
from das_lm.report.plain import plain_twin
from das_lm.report.run_page import GOES_ON, load, run_page
from das_lm.report.runs import find_runs
from das_lm.report.several_page import benchmark_page, comparison_page, load_benchmark
from das_lm.report.table import Table
from das_lm.report.terms import TERMS, defined
from das_lm.terminal import Console, printable

SEVERAL_NAME = "report"  # where the page of several runs goes
SINGLE_NAME = "reports"  # and below it those of each
TEMPLATES = Path(__file__).parent / "templates"
_RELOAD = '<meta http-equiv="refresh" content="15">'  # on the page of a run that goes on, in seconds


def write_report(runs: Sequence[Path | str], output: Path | str | None = None, title: str | None = None) -> Path:
    """
    Write `report.html`, a file that needs nothing else, every figure as `figures/NAME.png` and `.svg` beside it, and
    all that was measured as `results.csv`. The page of several runs compares them and links to one of each in
    `reports/`.

    Args:
        runs: directories of runs (with a `forgetting.json`) or of classic benchmarks, or directories with such below
            them. Several runs are compared.
        output: directory to write to; by default that of the run, of several `report`.
        title: of the page.

    Returns:
        the page.

    Raises:
        UserError: nothing to report, a file that cannot be read, or an output that cannot be written; nothing of an
            earlier report is half-written.
    """
    places = {
        path: load_benchmark(path) if is_benchmark else load(path) for path, is_benchmark in _places(runs).items()
    }
    labels = _labels(list(places))
    if output is None:
        output = next(iter(places)) if len(places) == 1 else SEVERAL_NAME
    title = title or f"das-lm: {next(iter(labels.values())) if len(places) == 1 else f'{len(places)} runs'}"
    try:
        with TemporaryDirectory() as scratch:
            pages = _pages(places, labels, title, Path(scratch))
            for name, text in pages.items():
                (Path(output) / name).parent.mkdir(parents=True, exist_ok=True)
                write_text(Path(output) / name, text)
            figures = Path(output) / FIGURES_NAME
            figures.mkdir(exist_ok=True)
            for drawn in sorted(Path(scratch).iterdir()):
                partial = figures / f".{drawn.name}.{os.getpid()}"
                shutil.move(drawn, partial)
                os.replace(partial, figures / drawn.name)
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:  # a page shows what stands in files
        names = ", ".join(map(str, places))
        raise UserError(f"{names}: cannot be shown ({type(error).__name__}: {error})") from error
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"output_dir: cannot write to {output}: {reason}; name another with --output_dir") from None
    return Path(output) / PAGE_NAME


def write_running(results: Results, output: Path) -> None:
    """Write the page of a run that goes on, without files of its figures; it loads itself again."""
    with drawing_style():
        page = run_page(results, plain_twin(results, output))
        for drawing in page.drawings:
            drawing.draw(drawing.name)
    write_text(output / PAGE_NAME, _render(f"das-lm: {output.resolve().name}", page, reload=_RELOAD))


def stop_reloading(output: Path) -> None:
    """Say on the page of a run that has ended early that it goes on no more."""
    page = output / PAGE_NAME
    if page.is_file() and (text := page.read_text(encoding="utf-8")) != (still := text.replace(_RELOAD, "", 1)):
        write_text(page, still.replace(GOES_ON, "It has ended there."))


def _pages(
    places: Mapping[Path, Results | Report], labels: Mapping[Path, str], title: str, figures: Path
) -> dict[str, str]:
    """Path from the output directory -> text; all figures have been written to their directory."""
    values = _values({labels[path]: loaded for path, loaded in places.items() if isinstance(loaded, Results)})
    files = {VALUES_NAME: values} if values else {}
    if len(places) == 1:
        ((path, loaded),) = places.items()
        page = _drawn(lambda: _page_of(loaded, path), title, figures, "")
        return {PAGE_NAME: _render(title, page, values=VALUES_NAME if values else ""), **files}
    links = {}
    for number, (path, loaded) in enumerate(places.items(), 1):
        name = f"{number}-{re.sub(r'[^A-Za-z0-9._-]+', '-', labels[path])}"
        page = _drawn(lambda path=path, loaded=loaded: _page_of(loaded, path), labels[path], figures, f"{name}-")
        links[path] = f"{SINGLE_NAME}/{name}.html"
        files[links[path]] = _render(f"das-lm: {labels[path]}", page, up=f"../{PAGE_NAME}")
    runs = [path for path, loaded in places.items() if isinstance(loaded, Results)]
    others = {labels[path]: links[path] for path in places}
    links = {path.resolve(): link for path, link in links.items()}
    page = _drawn(lambda: comparison_page(runs, links, others), title, figures, "comparison-")
    return {PAGE_NAME: _render(title, page, values=VALUES_NAME if values else ""), **files}


def _page_of(loaded: Results | Report, path: Path) -> Page:
    return run_page(loaded, plain_twin(loaded, path)) if isinstance(loaded, Results) else benchmark_page(loaded)


def _drawn(make: Callable[[], Page], title: str, figures: Path, prefix: str) -> Page:
    """A page whose figures have been written, each by its name after a prefix."""
    console = Console(stderr=True)
    with drawing_style():
        page = make()
    caption = f"figures of {escape(title)}"
    for drawing in track(page.drawings, caption, console=console, disable=not console.is_terminal):
        drawing.save(figures, f"{prefix}{drawing.name}")
    return page


def _places(runs: Sequence[Path | str]) -> dict[Path, bool]:
    """
    What is to be reported -> whether it is a classic benchmark, which stands for all runs below it.

    Raises:
        UserError: there is nothing.
    """
    places = {}
    for path in map(Path, runs):
        for directory in find_runs([path]):
            benchmark = directory.parent.parent
            is_part = directory != path and (benchmark / SUMMARY_NAME).is_file()
            places[benchmark if is_part else directory] = is_part
    if not places:
        raise UserError("no run is given; give directories of runs, as das-lm pretrain writes them")
    return places


def _labels(places: Sequence[Path]) -> dict[Path, str]:
    """Names of the directories, or as much of their paths as tells them apart."""
    resolved = {path: path.resolve() for path in places}
    names = {path: full.name or str(full) for path, full in resolved.items()}
    if len(set(names.values())) == len(places):
        return names
    shared = os.path.commonpath([full.parent for full in resolved.values()])
    return {path: os.path.relpath(full, shared) for path, full in resolved.items()}


def _render(title: str, page: Page, reload: str = "", values: str = "", up: str = "") -> str:
    """
    Args:
        reload: the tag by which it loads itself again, if it does.
        values: the file of all values, from the page.
        up: the page that links to this one.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"defined": defined, "table": lambda rows: Table("", rows).html()}
    template = environment.get_template("report.html")
    return printable(template.render(title=title, page=page, reload=reload, values=values, up=up, terms=TERMS))


def _values(runs: Mapping[str, Results]) -> str:
    """All that was measured, one value a line, as CSV."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["run", "after", "of", "measure", "value", "low", "high"])
    for run, results in runs.items():
        for measure in results.measures:
            for stage, row in zip(results.stages, results.matrix(measure).tolist(), strict=True):
                for column, value in zip(results.columns(measure), row, strict=True):
                    ends = stage.get("intervals", {}).get(column, {}).get(measure, ["", ""])
                    table.writerow([*map(_cell, (run, stage["name"], column)), measure, value, *ends])
            for figure, value in results.summary()[measure].items():
                if value is not None:
                    ends = results.intervals.get(measure, {}).get(figure, ["", ""])
                    table.writerow([_cell(run), "end", figure, measure, value, *ends])
    return printable(text.getvalue()) if runs else ""


def _cell(name: str) -> str:
    """A name that no spreadsheet takes for a formula."""
    return f"'{name}" if name.startswith(("=", "+", "-", "@")) else name
