"""What people read of a search: `result.json`, tables and the plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape

from das_lm.classic.search.curve import LEVEL, Curve, verdict
from das_lm.classic.search.directory import PLOT_NAME, RESULT_NAME, Ledger
from das_lm.classic.search.settings import Search
from das_lm.files import write_json
from das_lm.report.drawing import BETTER, WORSE
from das_lm.report.table import Table
from das_lm.terminal import Console


def report(
    search: Search,
    ledger: Ledger,
    stopped: Mapping[int, str],
    about: Mapping[str, Any],
    output: Path,
    console: Console,
) -> dict[str, Any]:
    """Write `result.json` and the plot, print the tables."""
    curve = Curve(search, [ledger.trial(number) for number in range(search.trials)])
    result = _result(search, ledger, stopped, about, curve)
    write_json(output / RESULT_NAME, result)
    plot(curve, result, output / PLOT_NAME)
    console.print(*_tables(result), sep="\n")
    console.print(f"[bold]{escape(result['finding'])}[/bold]", soft_wrap=True)
    console.print(f"Results: {output / RESULT_NAME}    Plot: {output / PLOT_NAME}", soft_wrap=True, markup=False)
    return result


def _result(
    search: Search, ledger: Ledger, stopped: Mapping[int, str], about: Mapping[str, Any], curve: Curve
) -> dict[str, Any]:
    """What `result.json` holds."""
    weights = sorted({*search.references, curve.chosen}) if search.confirm else []
    runs = {weight: [ledger.entries[number, weight] for number in search.confirming] for weight in weights}
    confirmed = {weight: [run["measure"] for run in of_weight] for weight, of_weight in runs.items()}
    tests = {weight: [run.get("test") for run in of_weight] for weight, of_weight in runs.items()}
    judged = verdict(curve.chosen, confirmed, search)
    return {
        "format": "das_lm.lambda_search",
        "version": 1,
        "search": asdict(search),
        "objective": dict(about),
        "chosen": curve.chosen,
        "chosen_interval": curve.chosen_interval,
        "stands_out": judged["stands_out"],
        "finding": judged["finding"],
        "level": LEVEL,
        "comparisons": [{"lambda": weight, **figures} for weight, figures in judged["comparisons"].items()],
        "confirmed": [
            {
                "lambda": weight,
                "measure": confirmed[weight],
                "test": tests[weight],
                "test_mean": _mean_scores(tests[weight]),
            }
            for weight in weights
        ],
        "curve": {
            "lambda": curve.weights.tolist(),
            "difference_to_0": curve.values.tolist(),
            "interval": [side.tolist() for side in curve.interval] if curve.interval else None,
        },
        "trials": [_of_trial(search, number, trial, stopped[number]) for number, trial in enumerate(curve.trials)],
    }


def _of_trial(search: Search, number: int, trial: Mapping[float, float | None], stopped: str) -> dict[str, Any]:
    best = min(trial, key=lambda weight: math.inf if trial[weight] is None else trial[weight])
    return {
        "seed": search.trial_seed(number),
        "bracket": list(search.bracket(number)),
        "evaluations": len(trial),
        "diverged": [weight for weight, value in trial.items() if value is None],
        "best": best,
        "measure": trial[best],
        "measure_of_0": trial[0.0],
        "stopped": stopped,
    }


def _mean_scores(tests: Sequence[Mapping[str, Mapping[str, float]] | None]) -> dict[str, float]:
    """Mean over trials and tasks of every score on the test splits."""
    scores = [task for test in tests if test for task in test.values()]
    return {kind: float(np.mean([task[kind] for task in scores])) for kind in scores[0]} if scores else {}


def _tables(result: Mapping[str, Any]) -> list[Any]:
    def number(value: float | None, style: str = ".4f") -> str:
        return "–" if value is None else format(value, style)

    rows = [["trial", "first bracket", "values of λ", "best λ", "its measure", "λ = 0"]]
    for index, trial in enumerate(result["trials"], 1):
        bracket = "{:.4g} to {:.4g}".format(*trial["bracket"])
        measures = number(trial["measure"]), number(trial["measure_of_0"])
        rows.append([str(index), bracket, str(trial["evaluations"]), f"{trial['best']:.4g}", *measures])
    trials = Table("Trials that choose: integrated loss", rows).console()
    interval = result["chosen_interval"]
    over = f", 95 % interval over trials {interval[0]:.4g} to {interval[1]:.4g}" if interval else ""
    trials.caption = f"the curve over all trials is lowest at λ = {result['chosen']:.4g}{over}"
    if not result["comparisons"]:
        return [trials]
    kinds = list(dict.fromkeys(kind for entry in result["confirmed"] for kind in entry["test_mean"]))
    rows = [["λ", "difference", "p (one-sided)", *(f"test {kind}" for kind in kinds)]]
    comparisons = {figures["lambda"]: figures for figures in result["comparisons"]}
    for entry in result["confirmed"]:
        figures = comparisons.get(entry["lambda"], {"difference": None, "p": None})
        scores = (number(entry["test_mean"].get(kind)) for kind in kinds)
        rows.append([f"{entry['lambda']:.4g}", number(figures["difference"], "+.4f"), number(figures["p"]), *scores])
    title = f"λ = {result['chosen']:.4g} in {result['search']['confirm']} new trials"
    return [trials, Table(title, rows).console()]


def plot(curve: Curve, result: Mapping[str, Any], path: Path) -> None:
    """The curve with its interval, what was measured, and the choice, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    blue, orange, grey = BETTER, WORSE, "#666666"
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    inside = [(w, value) for w, value in curve.points() if w > 0 or not curve.zero_apart]
    label = f"runs of {len(curve.trials)} trials"
    axes.plot(*zip(*inside, strict=True), "o", color=grey, alpha=0.45, ms=4, mew=0, label=label)
    axes.axhline(0, color="black", ls="--", lw=1, label="λ = 0: no penalty")
    shown = [curve.values.min(), curve.values.max(), 0.0, *np.quantile([y for _, y in inside], [0.02, 0.95])]
    if curve.interval:
        low, high = curve.interval
        axes.fill_between(curve.weights, low, high, color=blue, alpha=0.25, lw=0, label="95 % over trials")
        shown += [np.quantile(low, 0.1), np.quantile(high, 0.9)]
    axes.plot(curve.weights, curve.values, color=blue, lw=2, label="smooth over trials")
    lowest = f"lowest: λ = {result['chosen']:.4g}"
    if result["chosen_interval"]:
        low, high = result["chosen_interval"]
        lowest += f" (95 %: {low:.4g} to {high:.4g})"
        axes.plot([low, high], [0.02, 0.02], color=orange, lw=5, alpha=0.8, transform=axes.get_xaxis_transform())
    axes.axvline(result["chosen"], color=orange, lw=1.5, label=lowest)
    margin = 0.06 * (max(shown) - min(shown)) or 1.0
    axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.set_xscale("log" if curve.search.log else "linear")
    axes.set_xlabel("λ (penalty_weight)")
    axes.set_ylabel("integrated loss, difference to λ = 0")
    axes.set_title(result["finding"], fontsize=10, loc="left", wrap=True)
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
