"""Plots of a benchmark: every task over time, final averages, and of a regression its predictions."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy import stats

from das_lm.measure.intervals import Estimate
from das_lm.report.benchmark import Report
from das_lm.report.drawing import BETTER, BOUNDS, STYLES, WORSE, Drawing

FLOOR = -1.0  # below which R² is not drawn
FIRST_DAY = 151  # of the year, of the experiment `seasons`


def plot_all(report: Report, directory: Path) -> list[Path]:
    """
    Write the plots of a report: `tasks.png`, `final.png`, and of a regression `predictions.png`.

    Args:
        report: what came out of a benchmark.
        directory: an existing one.

    Returns:
        the files.
    """
    figures = {"tasks": plot_tasks(report), "final": plot_final(report)}
    if report.measure == "r2":
        figures["predictions"] = plot_predictions(report)
    paths = []
    for name, figure in figures.items():
        path = directory / f"{name}.png"
        temporary = path.with_name(f".{name}.{os.getpid()}.png")
        try:
            figure.savefig(temporary, dpi=150)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        paths.append(path)
    return paths


def shown(report: Report) -> dict[str, tuple]:
    """Method -> colour and dashes: the best ones and the bounds; more lines would not be told apart."""
    methods = [name for name in report.order() if name not in BOUNDS][: len(STYLES)]
    styles = dict(zip(methods, STYLES, strict=False))
    return {name: styles.get(name) or BOUNDS[name] for name in report.order() if name in styles or name in BOUNDS}


def plot_tasks(report: Report) -> Figure:
    """A panel per task: its score over the epochs, a line per method, a band of the 95 % interval over seeds."""
    tasks, styles = report.tasks, shown(report)
    figure = Figure(figsize=(8, 1.1 + 1.5 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), sharex=True, sharey=True, squeeze=False)[:, 0]
    stages = next(iter(report.results.values()))[0].stages[1:]
    learned = next(iter(report.results.values()))[0].domains
    ends = np.cumsum([len(stage["curve"]) for stage in stages])
    for number, (task, axes) in enumerate(zip(tasks, panels, strict=True)):
        stage = learned[task] - 1
        axes.axvspan(ends[stage] - len(stages[stage]["curve"]), ends[stage], color="0.93", linewidth=0)
        for end in ends[:-1]:
            axes.axvline(end, color="0.75", linewidth=0.6)
        for method, (colour, dashes) in styles.items():
            curves = _scaled(report, report.curves(method)[:, :, number])  # [seeds, 1 + epochs]
            epochs, mean = np.arange(curves.shape[1]), curves.mean(0)
            axes.plot(epochs, mean, color=colour, linestyle=dashes, linewidth=1.5, label=method)
            if len(curves) > 1:
                half = stats.t.ppf(0.975, len(curves) - 1) * curves.std(0, ddof=1) / np.sqrt(len(curves))
                axes.fill_between(epochs, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
        axes.set_title(task, loc="left", fontsize=9)
        _limit(axes, report)
    panels[-1].set_xlabel("epoch (grey: while the task is learned)")
    panels[-1].set_xlim(0, ends[-1])
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    below = f", not drawn below {FLOOR:g}" if report.measure == "r2" else ""
    figure.supylabel(f"{_axis(report)}{below}", fontsize=9)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside right upper",
        frameon=False,
        handlelength=3.2,
        title=_legend_title(report, styles),
        alignment="left",
    )
    return figure


def plot_final(report: Report) -> Figure:
    """The final average of every method with its interval, each seed as a dot above it; the bounds as lines."""
    methods = report.order()[::-1]
    figure = Figure(figsize=(6.4, 1.2 + 0.28 * len(methods)), layout="constrained")
    axes = figure.subplots()
    for place, method in enumerate(methods):
        values = _scaled(report, report.final(method).mean(1))
        estimate = Estimate.of(values)
        beats = report.verdict(method) == "yes"
        colour = BOUNDS[method][0] if method in BOUNDS else BETTER if beats else WORSE
        axes.plot(values, np.full(len(values), place + 0.3), ".", color=colour, markersize=5, markeredgewidth=0)
        axes.errorbar(
            estimate.mean,
            place,
            xerr=estimate.half,
            fmt="o" if beats or method in BOUNDS else "s",
            color=colour,
            markersize=5,
            capsize=2.5,
            linewidth=1.2,
        )
        if method in BOUNDS:
            axes.axvline(estimate.mean, color=colour, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    axes.set_yticks(range(len(methods)), methods)
    axes.set_ylim(-0.6, len(methods) - 0.3)
    axes.set_xlabel(f"final average over all tasks, {_axis(report)}")
    if "naive" in report.results and len(report.seeds) > 1:
        axes.set_title("● beats naive   ■ does not   (95 % interval of the paired difference)", fontsize=9, loc="left")
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    return figure


def plot_predictions(report: Report) -> Figure:
    """After each stage, the prices that the model of the first seed predicts, against the true ones."""
    styles = shown(report)
    first = {method: report.results[method][0] for method in styles}
    run = next(iter(first.values())).run
    targets, days = np.array(run["targets"]), FIRST_DAY + np.arange(len(run["targets"]))
    names = [stage["name"] for stage in next(iter(first.values())).stages]
    figure = Figure(figsize=(8, 1.0 + 2.3 * (len(names) - 1)), layout="constrained")
    panels = figure.subplots(len(names) - 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    margin = 0.6 * (targets.max() - targets.min())
    for number, axes in enumerate(panels, 1):
        axes.plot(days, targets, color="0.8", linewidth=6, solid_capstyle="round", label="true price")
        for method, (colour, dashes) in styles.items():
            predictions = first[method].stages[number]["predictions"]
            axes.plot(days, predictions, color=colour, linestyle=dashes, linewidth=1.4, label=method)
        axes.set_title(f"after {names[number]}", loc="left", fontsize=9)
        axes.set_ylim(targets.min() - margin, targets.max() + margin)
    panels[-1].set_xlabel("day of the year (summer ends and autumn begins at day 243)")
    panels[-1].set_xlim(days[0], days[-1])
    for axes in panels:
        axes.axvline(243, color="0.75", linewidth=0.6)
    figure.supylabel("price", fontsize=9)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside right upper",
        frameon=False,
        handlelength=3.2,
        title=f"{_legend_title(report, styles)}\n(seed {report.seeds[0]})",
        alignment="left",
    )
    return figure


def _scaled(report: Report, values: np.ndarray) -> np.ndarray:
    return 100 * values if report.measure == "accuracy" else values


def _axis(report: Report) -> str:
    return "accuracy (%)" if report.measure == "accuracy" else "R²"


def _limit(axes: Axes, report: Report) -> None:
    low, high = axes.get_ylim()
    if report.measure == "accuracy":
        axes.set_ylim(-3, 103)
    else:
        axes.set_ylim(max(low, FLOOR), min(max(high, 1.0), 1.05))


def _legend_title(report: Report, styles: dict[str, tuple]) -> str:
    left_out = len(report.results) - len(styles)
    best = len(styles) - sum(name in BOUNDS for name in styles)
    return f"the best {best} of\n{best + left_out} methods" if left_out else "method"


def draw_benchmark(report: Report) -> list[Drawing]:
    """The figures of a classic benchmark."""
    final, tasks, *averages = report.rows().items()
    drawings = [
        Drawing(
            "final", "Final average of every method", "Each small dot is a seed.", plot_final(report), dict([final])
        ),
        Drawing(
            "tasks",
            "Every task over all epochs",
            "Band: 95 % interval over seeds.",
            plot_tasks(report),
            dict([tasks, *averages]),
        ),
    ]
    if report.measure == "r2":
        runs = {method: results[0] for method, results in report.results.items()}
        truth = next(iter(runs.values())).run["targets"]
        columns = [truth, *(one.stages[-1]["predictions"] for one in runs.values())]
        table = [["true price", *runs], *([f"{value:.3f}" for value in row] for row in zip(*columns, strict=True))]
        caption = f"Of seed {report.seeds[0]}. The table has those after the last stage, in the order of the days."
        drawings.append(Drawing("predictions", "Predictions", caption, plot_predictions(report), {"": table}))
    return drawings
