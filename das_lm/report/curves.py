"""Curves over training: held-out loss, tasks, the parts of the loss, the drift budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from das_lm.measure.results import MEASURES, Results
from das_lm.report.benchmark_plots import FLOOR
from das_lm.report.drawing import GREY, INK, STYLES, WIDTH, Drawing
from das_lm.report.words import change, score, short


def stages_of(results: Results) -> list[dict[str, Any]]:
    """All stages after the base model, and the one that is being learned, which has no `scores` yet."""
    return [*results.stages[1:], *results.run.get("running", ())]


def ends_of(results: Results) -> np.ndarray:
    """Optimizer steps at the end of every stage, shape [1 + stages]; the base model's is 0."""
    return np.cumsum([0, *(stage["step"] for stage in stages_of(results))])


def held_out_points(results: Results) -> dict[str, np.ndarray]:
    """Domain -> steps and losses, shape [points, 2]: those of the result matrix, and of the evaluations in between."""
    ends = ends_of(results)
    curves = {domain: [(0, results.stages[0]["scores"][domain]["loss"])] for domain in results.domains}
    for start, end, stage in zip(ends[:-1], ends[1:], stages_of(results), strict=True):
        for domain, points in curves.items():
            points += [
                (start + entry["step"], entry["held_out"][domain])
                for entry in stage.get("history", ())
                if domain in entry.get("held_out", ())
            ]
            if "scores" in stage:
                points.append((end, stage["scores"][domain]["loss"]))
    return {domain: np.array(points) for domain, points in curves.items()}


def change_curves(results: Results, plain: Results | None = None) -> Drawing:
    """What the held-out loss of every domain has changed from the base model, a panel with its own scale for each."""
    ends, points = ends_of(results), held_out_points(results)
    theirs = held_out_points(plain) if plain else {}
    columns = min(3, len(points))
    rows = -(-len(points) // columns)
    figure = Figure(figsize=(WIDTH * (0.45, 0.75, 1.0)[columns - 1], 0.35 + 2.0 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    for axes, (domain, curve) in zip(panels, points.items(), strict=False):
        stage, change_of = results.domains[domain], curve - [0, curve[0, 1]]
        colour = STYLES[0][0] if change_of[-1, 1] <= 0 else STYLES[1][0]
        if stage and stage < len(ends):
            axes.axvspan(ends[stage - 1], ends[stage], color="0.93", linewidth=0)
        for end in ends[1:-1]:
            axes.axvline(end, color="0.75", linewidth=0.8)
        axes.axhline(0, color="0.5", linewidth=0.8)
        axes.plot(*change_of.T, color=colour, linewidth=1.6)
        at_ends = np.searchsorted(change_of[:, 0], ends, side="right") - 1
        axes.plot(*change_of[at_ends].T, "o", color=colour, markersize=3.5)
        if domain in theirs:
            _reference(axes, change_of, theirs[domain] - [0, theirs[domain][0, 1]])
        name = short(domain, 24) if stage else f"{short(domain, 12)} (never learned)"
        axes.set_title(name, loc="left", fontsize=8.5)
        axes.set_title(change(float(change_of[-1, 1]), "loss"), loc="right", fontsize=8.5, color=colour, weight="bold")
        axes.set_xlim(-0.02 * ends[-1], 1.02 * ends[-1])
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:+.3g}".replace("-", "−") if value else "0")
        axes.tick_params(labelsize=8)
        axes.grid(axis="y", color="0.92", linewidth=0.6)
        axes.set_axisbelow(True)
    for axes in panels[len(points) :]:
        axes.remove()
    figure.supxlabel("optimizer step", fontsize=8)
    figure.supylabel("change of the loss", fontsize=8)
    steps = sorted({int(step) for curve in points.values() for step, _ in curve})
    values = {domain: {int(step): value for step, value in curve} for domain, curve in points.items()}
    table = [["step", *points]]
    table += [[f"{s:,}", *(score(v[s], "loss") if s in v else "–" for v in values.values())] for s in steps]
    measured = any("held_out" in entry for stage in stages_of(results) for entry in stage.get("history", ()))
    jumps = any(len(set(curve[:, 0])) < len(curve) for curve in points.values())
    landing = " A jump at the end of a stage: what its method did to the weights then." if jumps else ""
    between_ends = "" if measured else " Nothing was measured within a stage, the lines only join its ends."
    reference = " Dashed: plain training; where it leaves the panel, an arrow says where it ends." if plain else ""
    return Drawing(
        "held-out-loss",
        "Held-out loss: change from the base model",
        f"In {results.unit}; below 0 is better. Every panel has a scale of its own. Grey: while the domain is "
        f"learned; vertical lines and dots: the ends of the stages.{reference}{landing}{between_ends}",
        figure,
        {"held-out loss": table},
    )


def _reference(axes: Axes, own: np.ndarray, theirs: np.ndarray) -> None:
    """Plain training beside a curve, unless it would press that flat; then where it ends."""
    low, high = (extreme(theirs[:, 1].tolist() + own[:, 1].tolist()) for extreme in (min, max))
    if high - low <= 4 * np.ptp(own[:, 1]):
        axes.plot(*theirs.T, color=GREY, linestyle=STYLES[1][1], linewidth=1.2)
        return
    low, high = axes.get_ylim()
    is_above = theirs[-1, 1] > own[-1, 1]
    room = 0.2 * (high - low)
    axes.set_ylim(low - room * (not is_above), high + room * is_above)
    text = f"plain training ends at {change(float(theirs[-1, 1]), 'loss')} {'↑' if is_above else '↓'}"
    place = (0.02, 0.97 if is_above else 0.03)
    axes.text(*place, text, transform=axes.transAxes, va="top" if is_above else "bottom", fontsize=7.5, color="0.35")


def task_curves(results: Results) -> Drawing:
    """The score of every task after every epoch, of a small model."""
    measure = results.run["measure"]
    base = {domain: results.stages[0]["scores"][domain][measure] for domain in results.domains}
    rows = [base, *(row for stage in results.stages[1:] for row in stage["curve"])]
    ends = np.cumsum([0, *(len(stage["curve"]) for stage in results.stages[1:])])
    figure, [axes] = _curve_axes(results, ends, "epoch")
    curves = {task: np.array([(epoch, row[task]) for epoch, row in enumerate(rows)]) for task in results.domains}
    _draw_curves(axes, results.domains, curves, ends)
    axes.set_ylabel(MEASURES[measure][0])
    clipped = ""
    if measure == "accuracy":
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    elif axes.get_ylim()[0] < FLOOR:
        axes.set_ylim(FLOOR, 1.05)
        clipped = f" Not drawn below {FLOOR:g}."
    legend(figure, axes)
    table = [["epoch", *results.domains]]
    table += [[str(epoch), *(score(row[task], measure) for task in results.domains)] for epoch, row in enumerate(rows)]
    name = MEASURES[measure][0]
    return Drawing(
        "task-curves",
        f"{name[0].upper()}{name[1:]} of every task over all epochs",
        f"Higher is better. Thick: while a task is learned; vertical lines: the ends of the stages.{clipped}",
        figure,
        {"": table},
    )


def _curve_axes(results: Results, ends: np.ndarray, label: str, panels: int = 1) -> tuple[Figure, np.ndarray]:
    """Panels below each other over training, with the boundaries of the stages."""
    figure = Figure(figsize=(WIDTH, 3.6 if panels == 1 else 0.7 + 1.35 * panels), layout="constrained")
    all_axes = figure.subplots(panels, sharex=True, squeeze=False)[:, 0]
    for axes in all_axes:
        for end in ends[1:-1]:
            axes.axvline(end, color="0.75", linewidth=0.8)
        axes.grid(axis="y", color="0.92", linewidth=0.6)
        axes.set_axisbelow(True)
    all_axes[-1].set_xlabel(label)
    all_axes[-1].set_xlim(-0.01 * ends[-1], 1.01 * ends[-1])  # dots at the ends are whole
    all_axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    for start, end, stage in zip(ends[:-1], ends[1:], stages_of(results), strict=True):
        letters = int(70 * (end - start) / ends[-1])  # as many as fit
        if letters > 1:
            place = ((start + end) / 2, 1.02)
            all_axes[0].text(
                *place,
                short(stage["name"], letters),
                ha="center",
                va="bottom",
                fontsize=8,
                color="0.35",
                transform=all_axes[0].get_xaxis_transform(),
            )
    return figure, all_axes


def _draw_curves(
    axes: Axes, learned: Mapping[str, int | None], curves: Mapping[str, np.ndarray], ends: np.ndarray
) -> None:
    """
    A line per domain, thick while it is learned, with a dot at the end of every stage; never-learned ones in grey.

    Args:
        curves: domain -> points, shape [points, 2].
        ends: of the stages, shape [1 + stages].
    """
    drawn = {True: 0, False: 0}  # learned ones, never-learned ones
    for domain, points in curves.items():
        stage = learned[domain]
        number = drawn[stage is not None]
        drawn[stage is not None] += 1
        colour = STYLES[number % len(STYLES)][0] if stage else GREY
        dashes = STYLES[(number + number // len(STYLES)) % len(STYLES)][1]
        axes.plot(*points.T, color=colour, linestyle=dashes, linewidth=1.4, label=short(domain))
        axes.plot(*points[np.searchsorted(points[:, 0], ends, side="right") - 1].T, "o", color=colour, markersize=3.5)
        if stage and stage < len(ends):
            own = points[(points[:, 0] >= ends[stage - 1]) & (points[:, 0] <= ends[stage])]
            axes.plot(*own.T, color=colour, linewidth=4, alpha=0.35, solid_capstyle="round")


def legend(figure: Figure, axes: Axes) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", handlelength=3.2)


def loss_parts(results: Results) -> list[Drawing]:
    """What the training loss is made of, a panel per part; none where no loss was logged."""
    ends = ends_of(results)
    entries = [
        (start + entry["step"], stage["name"], entry)
        for start, stage in zip(ends[:-1], stages_of(results), strict=True)
        for entry in stage.get("history", ())
        if "loss" in entry
    ]
    parts = dict.fromkeys(key for _, _, entry in entries for key in sorted(entry) if key.split("_")[0] == "loss")
    if not parts:
        return []
    figure, panels = _curve_axes(results, ends, "optimizer step", panels=len(parts))
    for axes, (number, part) in zip(panels, enumerate(parts), strict=True):
        points = np.array([(step, entry[part]) for step, _, entry in entries if part in entry])
        axes.plot(*points.T, color=STYLES[number % len(STYLES)][0], linewidth=1.3, marker=".", markersize=4)
        axes.set_title(_part(part), loc="left", fontsize=9, pad=14 if number == 0 else 6)
    table = [["step", "stage", *map(_part, parts)]]
    table += [
        [f"{step:,}", stage, *(f"{entry[part]:.4g}" if part in entry else "–" for part in parts)]
        for step, stage, entry in entries
    ]
    caption = (
        "In nats, mean over the steps since the entry before. What is minimised is the total, the sum of its parts."
    )
    return [Drawing("loss-parts", "Training loss and its parts", caption, figure, {"": table})]


def pace(results: Results) -> list[Drawing]:
    """The learning rate and the norm of the gradient, where they were logged."""
    ends, names = ends_of(results), {"learning_rate": "learning rate", "grad_norm": "gradient norm, before clipping"}
    entries = [
        (start + entry["step"], entry)
        for start, stage in zip(ends[:-1], stages_of(results), strict=True)
        for entry in stage.get("history", ())
    ]
    shown = [key for key in names if any(key in entry for _, entry in entries)]
    if not shown:
        return []
    figure, panels = _curve_axes(results, ends, "optimizer step", panels=len(shown))
    for axes, (number, key) in zip(panels, enumerate(shown), strict=True):
        points = np.array([(step, entry[key]) for step, entry in entries if key in entry])
        axes.plot(*points.T, color=STYLES[number + 3][0], linewidth=1.3, marker=".", markersize=4)
        axes.set_title(names[key], loc="left", fontsize=9, pad=14 if number == 0 else 6)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.3g}"))
    table = [["step", *(names[key] for key in shown)]]
    table += [
        [f"{step:,}", *(f"{entry[key]:.3g}" if key in entry else "–" for key in shown)]
        for step, entry in entries
        if set(shown) & set(entry)
    ]
    caption = "At the steps that were logged. A norm that leaps is a step that went wrong."
    return [Drawing("pace", "Learning rate and gradient norm", caption, figure, {"": table})]


def budget(results: Results) -> list[Drawing]:
    """λ and the divergence of every past that has a bound, over training; none where there is no bound."""
    ends, lines, table = ends_of(results), {}, [["step", "stage", "past", "λ", "divergence", "bound"]]
    for start, stage in zip(ends[:-1], stages_of(results), strict=True):
        for past, bound in stage.get("drift_budget", {}).items():
            for entry in stage.get("history", ()):
                if f"budget_{past}_weight" in entry:
                    point = (start + entry["step"], entry[f"budget_{past}_weight"], entry[f"budget_{past}_divergence"])
                    lines.setdefault(past, []).append((*point, bound))
                    table.append([f"{point[0]:,}", stage["name"], past, *(f"{x:.4g}" for x in (*point[1:], bound))])
    if not lines:
        return []
    figure, (weights, divergences) = _curve_axes(results, ends, "optimizer step", panels=2)
    for number, (past, points) in enumerate(lines.items()):
        (colour, dashes), at = STYLES[number % len(STYLES)], np.array(points)
        weights.plot(*at[:, [0, 1]].T, color=colour, linestyle=dashes, linewidth=1.4, label=short(past))
        divergences.plot(*at[:, [0, 2]].T, color=colour, linestyle=dashes, linewidth=1.4)
        divergences.step(*at[:, [0, 3]].T, color=INK, linewidth=0.8, where="mid")
    weights.set_yscale("log")
    for ticks in (weights.yaxis.set_major_formatter, weights.yaxis.set_minor_formatter):
        ticks(StrMethodFormatter("{x:g}"))
    weights.set_title("λ", loc="left", fontsize=9, pad=14)
    divergences.set_title("divergence on remembered rows, and its bound (thin)", loc="left", fontsize=9, pad=6)
    legend(figure, weights)
    caption = (
        "How strongly each past is held on to, λ, and the running mean of its divergence in nats per predicted token. "
        "The bound belongs to the end of a stage: while the learning rate is high, the divergence may be higher."
    )
    return [Drawing("drift-budget", "The drift budget", caption, figure, {"": table})]


def _part(key: str) -> str:
    return "total" if key == "loss" else key.removeprefix("loss_").replace("_", " ")
