"""`das-lm report`: one HTML file of what a run learned and lost, in words, figures and tables."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.markup import escape
from rich.progress import track

from das_lm.errors import UserError
from das_lm.files import write_text
from das_lm.measure.intervals import Estimate
from das_lm.measure.results import FIGURES, FIGURES_NAME, LOWER_IS_BETTER, MEASURES, PAGE_NAME, PROBES, Results
from das_lm.report.benchmark import SUMMARY_NAME, Choice, Report
from das_lm.report.benchmark_plots import draw_benchmark
from das_lm.report.compare import compare
from das_lm.report.drawing import Drawing, Rows, Strong, drawing_style
from das_lm.report.figures import KINDS, draw, frontier
from das_lm.report.plain import beside_plain, plain_finding, plain_twin
from das_lm.report.runs import find_runs, is_finished
from das_lm.report.words import between, budget_findings, change, score
from das_lm.terminal import Console, printable

SEVERAL_NAME = "report"  # where the page of several runs goes
TEMPLATES = Path(__file__).parent / "templates"
#: Figures of `summarize` for which a positive value is good.
GOOD = ("gain", "backward_transfer", "forward_transfer")
#: Of `Results.run`: shown elsewhere, or numbers of a figure.
NO_FACTS = ("recipe", "warnings", "documents", "description", "inputs", "targets")


@dataclass
class Section:
    """
    A part of the page.

    Args:
        name: of its anchor and its files.
        title: its heading.
        notes: what must not be overlooked.
        words: paragraphs.
        findings: a list.
        tables: title -> rows.
        drawings: figures.
        more: tables that come after them.
        facts: how the numbers came about.
        recipe: as YAML.
    """

    name: str
    title: str
    notes: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    tables: dict[str, Rows] = field(default_factory=dict)
    drawings: list[Drawing] = field(default_factory=list)
    more: dict[str, Rows] = field(default_factory=dict)
    facts: Rows = field(default_factory=list)
    recipe: str = ""


def write_report(runs: Sequence[Path | str], output: Path | str | None = None, title: str | None = None) -> Path:
    """
    Write `report.html`, a file that needs nothing else, and every figure as `figures/NAME.png` and `.svg` beside it.

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
        path: _load_benchmark(path) if is_benchmark else _load(path) for path, is_benchmark in _places(runs).items()
    }
    labels = _labels(list(places))
    if output is None:
        output = next(iter(places)) if len(places) == 1 else SEVERAL_NAME
    title = title or f"das-lm: {next(iter(labels.values())) if len(places) == 1 else f'{len(places)} runs'}"
    page, figures = Path(output) / PAGE_NAME, Path(output) / FIGURES_NAME
    try:
        with TemporaryDirectory() as scratch:
            text = _render(title, list(_sections(places, labels, Path(scratch))))
            page.parent.mkdir(parents=True, exist_ok=True)
            write_text(page, text)
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
    return page


def _sections(places: Mapping[Path, Results | Report], labels: Mapping[Path, str], figures: Path) -> Iterator[Section]:
    """The parts of the page; of each, the figures have been written to their directory."""
    runs = [path for path, loaded in places.items() if isinstance(loaded, Results)]
    console = Console(stderr=True)
    for number in range(0 if len(runs) > 1 else 1, len(places) + 1):
        with drawing_style():
            if number == 0:
                section = _comparison(runs)
            else:
                path, loaded = list(places.items())[number - 1]
                place = f"{number}-{re.sub(r'[^A-Za-z0-9._-]+', '-', labels[path])}", labels[path]
                if isinstance(loaded, Results):
                    section = _run_section(loaded, plain_twin(loaded, path), *place)
                else:
                    section = _benchmark_section(loaded, *place)
        caption = f"figures of {escape(section.title)}"
        for drawing in track(section.drawings, caption, console=console, disable=not console.is_terminal):
            drawing.save(figures, drawing.name if len(places) == 1 else f"{section.name}-{drawing.name}")
        yield section


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


def _render(title: str, sections: Sequence[Section]) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.tests |= {"strong": lambda cell: isinstance(cell, Strong), "long": lambda cell: len(cell) > 60}
    environment.filters["unbroken"] = lambda cell: cell.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
    return printable(environment.get_template("report.html").render(title=title, sections=sections))


# ---- a run ----------------------------------------------------------------------------------------------------------


def _run_section(results: Results, plain: Results | None, name: str, title: str) -> Section:
    run = results.run
    documents = run.get("documents", {})
    domains = [["domain", "learned in", "training documents", "held-out documents", "predictions scored"]]
    for domain, stage in results.domains.items():
        scores = results.stages[0]["scores"][domain]
        counts = [documents.get(domain) if stage else None, scores["documents"], scores["tokens"]]
        learned = "never learned" if stage is None else f"stage {stage}"
        domains.append([domain, learned, *("–" if count is None else f"{count:,}" for count in counts)])
    bold = " (bold: 0 lies outside the 95 % interval)" if results.intervals else ""
    return Section(
        name,
        title,
        notes=_notes(results),
        words=_words(results),
        findings=[*([plain_finding(results, plain)] if plain else []), *_findings(results)],
        tables={
            **({"Beside plain training": beside_plain(results, plain)} if plain else {}),
            f"Gain, transfer and forgetting{bold}": _figures_table(results),
        },
        drawings=draw(results),
        more={**_further_tables(results), "Domains": domains},
        facts=_facts(results),
        recipe=_yaml(run["recipe"]) if "recipe" in run else "",
    )


def _load(path: Path) -> Results:
    """
    Raises:
        UserError: the file is broken, or nothing was measured yet.
    """
    results = Results.load(path)
    if not results.stages or not results.summary():
        raise UserError(f"{path}: nothing was measured yet; there is nothing to report")
    return results


def _notes(results: Results) -> list[str]:
    notes = []
    if not is_finished(results):
        missing = {name: stage for name, stage in results.domains.items() if (stage or 0) >= len(results.stages)}
        names = ", ".join(f"{name} (stage {stage})" for name, stage in missing.items())
        notes.append(
            f"This run is not finished: {names} {'has' if len(missing) == 1 else 'have'} not been learned yet. All "
            "figures are those so far."
        )
    for domain, warnings in results.run.get("warnings", {}).items():
        notes += [f"Warning about {domain}: {warning}" for warning in warnings]
    return notes


def _words(results: Results) -> list[str]:
    """What was done, and how the signs are to be read."""
    run, measure = results.run, _main_measure(results)
    stages = [stage["name"] for stage in results.stages[1:]]
    methods = run["recipe"]["method"] if "recipe" in run else [run["method"]] if "method" in run else []
    how = f" with the method {'+'.join(methods)}" if methods else ""
    description = run.get("recipe", run).get("description", "")
    learned = f"The model learned {_listing(stages)}{how}" if stages else "Only the base model has been measured"
    scored = {
        "loss": f"the held-out loss in {results.unit} (lower is better)",
        "accuracy": "the accuracy on test data (higher is better)",
        "r2": "R² on test data (higher is better; 1 is perfect, 0 is no better than the mean)",
    }[measure]
    others = [domain for domain, stage in results.domains.items() if stage is None]
    of = f"every domain and of {_listing(others)}, never learned," if others else "every domain"
    words = [
        f"{_sentence(description)}{learned}. Before the first and after every stage, {scored} of {of} was measured."
    ]
    if stages and (remembered := results.stages[-1].get("remembered")):
        rows = [f"{count:,} rows of {name}" for name, count in remembered.items()]
        words.append(f"What it knew before is stood for by {_listing(rows)} ('self' is text that the model wrote).")
    if stages and "mean_importance" in results.stages[-1]:
        kinds = [f"{mean:.0%} for {KINDS.get(k, k)}" for k, mean in results.stages[-1]["mean_importance"].items()]
        words.append(
            f"After {stages[-1]}, the mean importance is {_listing(kinds)}. The mask of a next stage holds back every "
            "unit by its importance: one at 100 % can learn nothing more."
        )
    return words


def _sentence(text: str) -> str:
    """A description as a sentence before others."""
    return f"{text[:1].upper()}{text[1:].rstrip('.')}. " if text else ""


def _listing(names: Iterable[str]) -> str:
    *start, last = names
    return f"{', '.join(start)} and {last}" if start else last


def _main_measure(results: Results) -> str:
    """What the words are about: the loss of a language model, the accuracy or R² of a small one."""
    return results.run.get("measure", "loss")


def _findings(results: Results) -> list[str]:
    """What every domain gained and lost, and whether that stands out of the noise."""
    measure = _main_measure(results)
    matrix, name = results.matrix(measure), MEASURES[measure][0]
    worth = -matrix if measure in LOWER_IS_BETTER else matrix
    last, found = len(matrix) - 1, []
    for column, (domain, stage) in enumerate(results.domains.items()):
        at = [score(value, measure) for value in matrix[:, column]]
        if stage is None and last:
            drift = worth[0, column] - worth[last, column]
            became = "worse" if drift > 0 else "better"
            found.append(
                f"{domain}, never learned: {name} from {at[0]} to {at[last]}, a drift of {change(drift, measure)} "
                f"({became} than before)."
            )
        elif stage is not None and stage <= last:
            gain, lost = worth[stage, column] - worth[stage - 1, column], worth[stage, column] - worth[last, column]
            text = (
                f"{domain}: its stage took the {name} from {at[stage - 1]} to {at[stage]}, a gain of "
                f"{change(gain, measure)}"
            )
            size = change(abs(lost), measure).lstrip("+")
            if stage == last:
                text += "; it was learned last, so nothing could be lost of it yet."
            elif lost > 0:
                share = f" ({lost / gain:.0%} of the gain)" if gain > 0 else ""
                text += f"; at the end it is {at[last]}: {size} was lost again{share}."
            else:
                text += f"; at the end it is {at[last]}: nothing was lost, it got {size} better."
            found.append(text)
    found += list(budget_findings(results))
    for one in (measure, *(probe for probe in PROBES if probe in results.measures)):
        for figure, words in _FIGURE_WORDS.items():
            value, ends = results.summary()[one][figure], results.intervals.get(one, {}).get(figure)
            if value is not None:
                what = words.format(MEASURES[one][0])
                found.append(f"{what}: {change(value, one)}{_verdict(figure, ends, one)}.")
    return found


_FIGURE_WORDS = {
    "gain": "Gain in {}, on average over what was learned",
    "forgetting": "Forgetting in {} (from the best value on), on average over what was learned before the last stage",
    "drift": "Drift in {}, on average over what was never learned",
}


def _verdict(figure: str, ends: Sequence[float] | None, measure: str) -> str:
    if ends is None:
        return ", without an interval"
    if ends[0] <= 0 <= ends[1]:
        return f", 95 % interval {between(ends, change, measure)}: it does not stand out of the noise"
    good = (ends[0] > 0) == (figure in GOOD)
    return (
        f", 95 % interval {between(ends, change, measure)}: it stands out of the noise, for the "
        f"{'better' if good else 'worse'}"
    )


def _figures_table(results: Results) -> Rows:
    summary = results.summary()
    rows = [["", "positive is", *(MEASURES[measure][0] for measure in summary)]]
    for figure, meaning in FIGURES.items():
        sign = "" if figure == "average" else "good" if figure in GOOD else "bad"
        write = score if figure == "average" else change
        cells = []
        for measure, values in summary.items():
            ends = results.intervals.get(measure, {}).get(figure)
            if values[figure] is None:
                cells.append("–")
                continue
            text = write(values[figure], measure) + (f" {between(ends, write, measure)}" if ends else "")
            stands_out = ends and figure != "average" and not ends[0] <= 0 <= ends[1]
            cells.append(Strong(text) if stands_out else text)
        rows.append([meaning, sign, *cells])
    return rows


def _further_tables(results: Results) -> dict[str, Rows]:
    """What has no figure: loss per byte, pseudo-perplexity, how questions and end-tasks were asked."""
    stages, tables = results.stages, {}
    header = ["after", *results.domains]

    def by_stage(cell: Any) -> Rows:
        return [header, *([stage["name"], *(cell(stage, domain) for domain in results.domains)] for stage in stages)]

    per_byte = [score for stage in stages for score in stage["scores"].values() if "loss_per_byte" in score]
    if per_byte:
        tables["Held-out loss, nats per byte of predicted text"] = by_stage(
            lambda stage, domain: _optional(stage["scores"][domain], "loss_per_byte")
        )
    if any("pseudo" in stage for stage in stages):
        tables["Pseudo-perplexity: nats per token, one mask at a time"] = by_stage(
            lambda stage, domain: _optional(stage.get("pseudo", {}).get(domain, {}), "loss")
        )
    integrated = results.integrated_loss()
    if integrated:
        tables["Loss since a domain was introduced, mean over the evaluations in training"] = [
            ["domain", results.unit],
            *([domain, f"{value:.3f}"] for domain, value in integrated.items()),
        ]
    if seen := results.tokens_seen():
        tables["Tokens that were trained on"] = [["stage", "source", "tokens"], *map(list, seen)]
    if "cloze" in results.measures:
        rows = [["questions", "asked", "candidates each", "skipped"]]
        for name, one in stages[-1]["cloze"].items():
            rows.append([name, f"{one['asked']:,}", f"{one['candidates']:.1f}", _reasons(one["skipped"])])
        tables["Cloze questions"] = rows
    if "end_task" in results.measures:
        rows = [["end-task", "classes", "training", "test", "seeds", "accuracy at the end", "micro F1 at the end"]]
        for name, one in stages[-1]["end_tasks"].items():
            scores = [_estimate(one[key]) for key in ("accuracy", "micro_f1")]
            counts = [len(one["classes"]), one["train"], one["test"], len(one["seeds"])]
            rows.append([name, *(f"{count:,}" for count in counts), *scores])
        tables["End-tasks"] = rows
    return tables


def _optional(scores: Mapping[str, float], key: str) -> str:
    return f"{scores[key]:.4f}" if key in scores else "–"


def _reasons(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items()) or "none"


def _estimate(values: Sequence[float]) -> str:
    mean, half = Estimate.of(values)
    return f"{mean:.1%}" if half is None else f"{mean:.1%} ± {half:.1%}"


def _facts(results: Results) -> Rows:
    rows = [["", ""], *_as_rows({key: value for key, value in results.run.items() if key not in NO_FACTS})]
    for stage in results.stages:
        facts = [f"{stage['step']:,} steps"] if "step" in stage else []
        if stage.get("seconds") is not None:
            facts.append(f"{stage['seconds']:,.0f} s")
        if "checkpoint" in stage:
            facts.append(f"model in {stage['checkpoint']}")
        if facts:
            rows.append([f"stage {stage['name']}", ", ".join(facts)])
    return rows


def _as_rows(facts: Mapping[str, Any]) -> Rows:
    """A table of two columns."""
    rows = []
    for key, value in facts.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{name} {one}" for name, one in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        if value not in (None, ""):
            rows.append([key.replace("_", " "), str(value)])
    return rows


def _yaml(data: Any) -> str:
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110)


# ---- several runs, benchmarks ---------------------------------------------------------------------------------------


def _comparison(directories: Sequence[Path]) -> Section:
    section = Section("comparison", "The runs side by side")
    try:
        comparison = compare(directories)
    except UserError as error:
        section.notes.append(f"The runs are not compared: {error}.")
        return section
    section.notes += comparison.notes
    section.words.append(comparison.reading())
    section.findings = comparison.findings()
    tables = comparison.tables()
    drawing = frontier(comparison.frontier, comparison.unit, tables)
    if drawing is None:
        section.tables = tables
    else:
        section.drawings.append(drawing)
    return section


def _load_benchmark(path: Path) -> Report:
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
            one = _load(path / run)
            results[one.run["method"]].append(one)
        choices = {method: Choice(one["tried"], one["chosen"]) for method, one in data["methods"].items()}
        about = {key: data[key] for key in ("experiment", "description", "measure", "seeds")}
        return Report(**about, results=results, choices=choices, run=data)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {error!r}") from None


def _benchmark_section(report: Report, name: str, title: str) -> Section:
    """A classic benchmark: its methods over seeds."""
    beaten = [method for method in report.order() if method != "joint" and report.verdict(method) == "yes"]
    findings = []
    if "naive" in report.results and len(report.seeds) > 1:
        findings = [f"Beats naive: {_listing(beaten)}." if beaten else "No method beats naive."]
    facts = {key: value for key, value in report.run.items() if key not in ("methods", "runs", "description", "seeds")}
    return Section(
        name,
        title,
        words=[_sentence(report.description), report.notes().replace("*minus naive*", "“minus naive”")],
        findings=findings,
        drawings=draw_benchmark(report),
        facts=[["", ""], *_as_rows(facts)],
    )
