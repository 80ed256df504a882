"""The page of one run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from das_lm.errors import UserError
from das_lm.measure.intervals import Estimate
from das_lm.measure.results import FIGURES, LOWER_IS_BETTER, MEASURES, PROBES, Results
from das_lm.report.curves import budget, change_curves, loss_parts, pace, task_curves
from das_lm.report.figures import KINDS, importance_maps, overlap, predictions, result_matrix, saturation
from das_lm.report.parts import Headline, Page, Part, listing, sentence
from das_lm.report.plain import beside_plain, plain_finding
from das_lm.report.runs import is_finished
from das_lm.report.table import Rows, Strong
from das_lm.report.words import between, budget_findings, change, duration, gibibytes, score

#: Figures of `summarize` for which a positive value is good.
GOOD = ("gain", "backward_transfer", "forward_transfer")
GOES_ON = "While the run goes on, this page loads itself again."
#: Of `Results.run`: shown elsewhere, or numbers of a figure.
NO_FACTS = ("recipe", "warnings", "documents", "description", "inputs", "targets", "running")


def load(path: Path) -> Results:
    """
    Raises:
        UserError: the file is broken, or nothing was measured yet.
    """
    results = Results.load(path)
    if not results.stages or not results.summary():
        raise UserError(f"{path}: nothing was measured yet; there is nothing to report")
    return results


def run_page(results: Results, plain: Results | None) -> Page:
    """
    All that a run learned and lost; to be made in [`drawing_style`].

    Args:
        results: of the run; while it is going on, `run["running"]` has the stage that is being learned.
        plain: of its twin by plain training.
    """
    run = results.run
    bold = " (bold: 0 lies outside the 95 % interval)" if results.intervals else ""
    trained = [*results.stages[1:], *run.get("running", ())]
    has_steps = bool(trained) and all("step" in stage for stage in trained)
    maps = not run.get("running") and any("importance" in stage for stage in trained)  # they take long to draw
    first, *others = (result_matrix(results, measure) for measure in results.measures)
    parts = [
        Part("Over training", drawings=_over_training(results, plain, has_steps)),
        Part("After every stage", drawings=[first, *others]),
        _samples(results),
        Part(
            "In numbers",
            words=_words(results),
            findings=_findings(results),
            tables={
                **({"Beside plain training": beside_plain(results, plain)} if plain else {}),
                f"Gain, transfer and forgetting{bold}": _figures_table(results),
            },
            folded={**_further_tables(results), "Domains": _domains(results)},
        ),
        Part(
            "Training",
            drawings=[*loss_parts(results), *pace(results), *budget(results)] if has_steps else [],
            folded={"What it cost": cost} if len(cost := _cost(results)) > 1 else {},
        ),
        Part(
            "Importance",
            words=_words_of_importance(results),
            drawings=[
                *([saturation(results)] if any("mean_importance" in stage for stage in results.stages) else []),
                *([*overlap(results), *importance_maps(results)] if maps else []),
            ],
        ),
        Part(
            "How the numbers came about",
            folded={"Versions, machine, text and stages": rows} if len(rows := _facts(results)) > 1 else {},
            text={"Recipe": _yaml(run["recipe"])} if "recipe" in run else {},
        ),
    ]
    top = _lead(results), _notes(results), _headlines(results, plain), plain_finding(results, plain)
    return Page(*top, [part for part in parts if part])


def _over_training(results: Results, plain: Results | None, has_steps: bool) -> list[Any]:
    stages = results.stages[1:]
    drawings = [change_curves(results, plain)] if has_steps else []
    drawings += [task_curves(results)] if any("curve" in stage for stage in stages) else []
    return drawings + ([predictions(results)] if any("predictions" in stage for stage in stages) else [])


# ---- the top --------------------------------------------------------------------------------------------------------


def _headlines(results: Results, plain: Results | None) -> list[Headline]:
    """Gain, drift and forgetting with their intervals, and what the run has cost."""
    measure, last = _main_measure(results), len(results.stages) - 1
    if not last:
        return []
    learned = {name: stage for name, stage in results.domains.items() if stage is not None and stage <= last}
    of = {
        "gain": ("learned of", list(learned)),
        "drift": ("lost of", [name for name, stage in results.domains.items() if stage is None]),
        "forgetting": ("lost again of", [name for name, stage in learned.items() if stage < last]),
    }
    headlines = []
    for figure, (words, names) in of.items():
        value, ends = results.summary()[measure][figure], results.intervals.get(measure, {}).get(figure)
        if value is None:
            why = "all that is measured is learned" if figure == "drift" else "nothing was learned after anything yet"
            headlines.append(Headline(figure, why, "–"))
            continue
        about = f"{words} {listing(names) if len(names) < 4 else f'{len(names)} domains'}"
        beside = [f"95 % interval {between(ends, change, measure)}"] if ends else ["without an interval"]
        is_noise = ends is not None and ends[0] <= 0 <= ends[1]
        if is_noise:
            beside.append("does not stand out of the noise")
        elif value < 0:
            beside.append("below 0: it got worse" if figure in GOOD else "below 0: it got better")
        if plain and (theirs := plain.summary()[measure][figure]) is not None:
            beside.append(f"plain training: {change(theirs, measure)}")
        mood = "" if is_noise or not value else "better" if (value > 0) == (figure in GOOD) else "worse"
        headlines.append(Headline(figure, about, change(value, measure), beside, mood))
    return headlines + _cost_headline(results)


def _cost_headline(results: Results) -> list[Headline]:
    stages = results.stages[1:]
    seconds = [stage.get("seconds") for stage in stages]
    steps, tokens = sum(stage.get("step", 0) for stage in stages), sum(map(_tokens, stages))
    beside = []
    if tokens:
        beside.append(f"{tokens:,} tokens")
        beside += [f"{tokens / sum(seconds):,.0f} tokens a second"] if all(seconds) else []
    if peaks := [stage["peak_memory"] for stage in stages if stage.get("peak_memory")]:
        beside.append(f"peak memory {gibibytes(max(peaks))}")
    many = f"{steps:,} step{'s' * (steps != 1)}" if steps else ""
    if all(seconds):
        return [Headline("cost", many or "training", duration(sum(seconds)), beside)]
    return [Headline("cost", "training", many, beside)] if many else []


def _tokens(stage: Mapping[str, Any]) -> int:
    return sum(stage.get("tokens_seen", {}).values())


def _cost(results: Results) -> Rows:
    """Time, steps, tokens and memory of every stage."""
    rows = [["stage", "steps", "time", "tokens", "tokens a second", "peak memory so far"]]
    for stage in results.stages[1:]:
        seconds, tokens, peak = stage.get("seconds"), _tokens(stage), stage.get("peak_memory")
        cells = [
            f"{stage['step']:,}" if "step" in stage else "–",
            duration(seconds) if seconds else "–",
            f"{tokens:,}" if tokens else "–",
            f"{tokens / seconds:,.0f}" if tokens and seconds else "–",
            gibibytes(peak) if peak else "–",
        ]
        if set(cells) != {"–"}:
            rows.append([stage["name"], *cells])
    return rows


def _lead(results: Results) -> list[str]:
    """What was done."""
    run, stages = results.run, [stage["name"] for stage in results.stages[1:]]
    methods = run["recipe"]["method"] if "recipe" in run else [run["method"]] if "method" in run else []
    how = f" with the method {'+'.join(methods)}" if methods else ""
    description = run.get("recipe", run).get("description", "")
    learned = f"The model learned {listing(stages)}{how}" if stages else "Only the base model has been measured"
    return [f"{sentence(description)}{learned}."]


def _notes(results: Results) -> list[str]:
    notes, running = [], results.run.get("running")
    if running:
        of = f" of {running[0]['max_steps']:,}" if running[0].get("max_steps") else ""
        notes.append(
            f"Running: {running[0]['name']}, step {running[0]['step']:,}{of}, drawn at {running[0]['drawn']}. "
            f"{GOES_ON}"
        )
    elif not is_finished(results):
        missing = {name: stage for name, stage in results.domains.items() if (stage or 0) >= len(results.stages)}
        names = ", ".join(f"{name} (stage {stage})" for name, stage in missing.items())
        notes.append(
            f"This run is not finished: {names} {'has' if len(missing) == 1 else 'have'} not been learned yet. All "
            "figures are those so far."
        )
    for domain, warnings in results.run.get("warnings", {}).items():
        notes += [f"Warning about {domain}: {warning}" for warning in warnings]
    return notes


def _main_measure(results: Results) -> str:
    """What the words are about: the loss of a language model, the accuracy or R² of a small one."""
    return results.run.get("measure", "loss")


# ---- in words -------------------------------------------------------------------------------------------------------


def _words(results: Results) -> list[str]:
    """How the signs are to be read, and what stands for the past."""
    measure = _main_measure(results)
    scored = {
        "loss": f"the held-out loss in {results.unit} (lower is better)",
        "accuracy": "the accuracy on test data (higher is better)",
        "r2": "R² on test data (higher is better; 1 is perfect, 0 is no better than the mean)",
    }[measure]
    others = [domain for domain, stage in results.domains.items() if stage is None]
    of = f"every domain and of {listing(others)}, never learned," if others else "every domain"
    words = [f"Before the first and after every stage, {scored} of {of} was measured."]
    if len(results.stages) > 1 and (remembered := results.stages[-1].get("remembered")):
        rows = [f"{count:,} rows of {name}" for name, count in remembered.items()]
        words.append(f"What it knew before is stood for by {listing(rows)} ('self' is text that the model wrote).")
    return words


def _words_of_importance(results: Results) -> list[str]:
    stage = results.stages[-1]
    if "mean_importance" not in stage:
        return []
    kinds = [f"{mean:.0%} for {KINDS.get(kind, kind)}" for kind, mean in stage["mean_importance"].items()]
    return [
        f"After {stage['name']}, the mean importance is {listing(kinds)}. The mask of a next stage holds back every "
        "unit by its importance: one at 100 % can learn nothing more."
    ]


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
    for one in (probe for probe in PROBES if probe in results.measures):
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


# ---- tables ---------------------------------------------------------------------------------------------------------


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
    if "lm_eval" in results.measures:
        rows = [["lm-eval", "score", "examples", "tasks", "in the prompt", "guessing", "all scores at the end"]]
        for name, one in stages[-1]["lm_eval"].items():
            guess = "–" if one["chance"] is None else score(one["chance"], "lm_eval")
            means = ", ".join(f"{metric} {score(value, 'lm_eval')}" for metric, value in one["metrics"].items())
            shots = "as the task says" if one["num_fewshot"] is None else str(one["num_fewshot"])
            rows.append([name, one["metric"], f"{one['examples']:,}", f"{one['tasks']:,}", shots, guess, means])
        tables["Tasks of lm-eval"] = rows
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


def _samples(results: Results) -> Part:
    """What the base model and the newest one say at the same places."""
    base, last = (stage.get("samples", {}) for stage in (results.stages[0], results.stages[-1]))
    rows = [["domain", "text", "right", "base", f"after {results.stages[-1]['name']}"]]
    for domain, places in base.items():
        for old, new in zip(places, last.get(domain, ()), strict=False):
            if (old["before"], old["right"]) == (new["before"], new["right"]):  # new words may cut a text otherwise
                guesses = (_guesses(one) for one in (old, new))
                rows.append([domain, f"{old['before']} ____ {old['after']}".strip(), old["right"], *guesses])
    if len(rows) == 1 or len(results.stages) == 1:
        return Part("")
    words = (
        "What the model holds most probable in the gap, before the first stage and now; bold where that is right. "
        "What was masked, too, is …"
    )
    return Part("Before and after", [words], folded={f"{len(rows) - 1} places of held-out text": rows})


def _guesses(place: Mapping[str, Any]) -> str:
    text = ", ".join(f"{token or '␣'} {share:.0%}" for token, share in place["guesses"] if share >= 0.005)
    return Strong(text) if place["guesses"][0][0] == place["right"] else text


def _reasons(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items()) or "none"


def _estimate(values: Sequence[float]) -> str:
    mean, half = Estimate.of(values)
    return f"{mean:.1%}" if half is None else f"{mean:.1%} ± {half:.1%}"


def _domains(results: Results) -> Rows:
    documents = results.run.get("documents", {})
    rows = [["domain", "learned in", "training documents", "held-out documents", "predictions scored"]]
    for domain, stage in results.domains.items():
        scores = results.stages[0]["scores"][domain]
        counts = [documents.get(domain) if stage else None, scores["documents"], scores["tokens"]]
        learned = "never learned" if stage is None else f"stage {stage}"
        rows.append([domain, learned, *("–" if count is None else f"{count:,}" for count in counts)])
    return rows


def _facts(results: Results) -> Rows:
    rows = [["", ""], *as_rows({key: value for key, value in results.run.items() if key not in NO_FACTS})]
    for stage in results.stages:
        facts = [f"{stage['step']:,} steps"] if "step" in stage else []
        if stage.get("seconds") is not None:
            facts.append(f"{stage['seconds']:,.0f} s")
        if "checkpoint" in stage:
            facts.append(f"model in {stage['checkpoint']}")
        if facts:
            rows.append([f"stage {stage['name']}", ", ".join(facts)])
    return rows


def _flat(facts: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in facts.items():
        inner = _flat(value) if isinstance(value, Mapping) else [("", value)]
        yield from ((f"{name} {key}".strip(), one) for key, one in inner)


def as_rows(facts: Mapping[str, Any]) -> Rows:
    """A table of two columns."""
    rows = []
    for key, value in facts.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{name} {one}" for name, one in _flat(value))
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        if value not in (None, ""):
            rows.append([key.replace("_", " "), str(value)])
    return rows


def _yaml(data: Any) -> str:
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110)
