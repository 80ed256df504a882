"""Figures of the report, drawn from what stands in `forgetting.json`; beside each the same as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from das_lm.measure.intervals import Estimate
from das_lm.measure.results import LOWER_IS_BETTER, MEASURES, PROBES, Results
from das_lm.report.curves import legend
from das_lm.report.drawing import BETTER, INK, STYLES, WIDTH, WORSE, Drawing
from das_lm.report.table import Rows, Strong
from das_lm.report.words import between, change, score, short

TINT = 0.55  # of the strongest cell: the number in it stays legible in black on white and in white on black
KINDS = {"head": "attention heads", "intermediate": "intermediate neurons", "output": "output neurons"}


def result_matrix(results: Results, measure: str) -> Drawing:
    """
    A heat map: stages below each other, what is measured beside each other. The colour is the change from the base
    model, every column on its own scale: what a model knew moves less than what it learns, and matters as much.
    """
    columns, matrix = results.columns(measure), results.matrix(measure)
    better = (matrix[0] - matrix) if measure in LOWER_IS_BETTER else matrix - matrix[0]  # [1 + stages, columns]
    spans = np.abs(better).max(axis=0)  # [columns]
    names = [short(name) for name in columns]
    stages = [f"after {short(stage['name'])}" if number else "base" for number, stage in enumerate(results.stages)]
    letter = 0.075  # inches, about
    beside, longest = 0.4 + letter * max(map(len, stages)), letter * max(map(len, names))
    slanted = beside + (longest + 0.2) * len(names) > WIDTH
    column_width = 0.95 if slanted else max(0.95, longest + 0.2)
    width = beside + column_width * len(names) + 0.8 * letter * len(names[-1]) * slanted
    height = 0.6 + 0.44 * len(stages) + 0.5 * longest * slanted
    figure = Figure(figsize=(min(WIDTH, width), height), layout="constrained")
    axes = figure.subplots()
    for row, column in np.ndindex(matrix.shape):
        strength = better[row, column] / spans[column] if spans[column] else 0.0
        is_own = list(columns.values())[column] == row
        moved = change(matrix[row, column] - matrix[0, column], measure) if row else ""
        _tile(axes, row, column, strength, score(matrix[row, column], measure), is_own, below=moved)
    _tile_axes(axes, names, stages, slanted)
    name, unit = MEASURES[measure][0], f", {results.unit}" if measure == "loss" else ""
    table = [["after", *(name if stage else f"{name} (never learned)" for name, stage in columns.items())]]
    for number, stage in enumerate(results.stages):
        cells = [_with_interval(stage, column, matrix[number, at], measure) for at, column in enumerate(columns)]
        own = [stage == number for stage in columns.values()]
        table.append([stage["name"], *(Strong(c) if o else c for c, o in zip(cells, own, strict=True))])
    has_intervals = any("[" in cell or "±" in cell for row in table[1:] for cell in row[1:])
    return Drawing(
        f"matrix-{measure.replace('_', '-')}",
        f"Result matrix: {name}{unit}",
        f"{'Lower' if measure in LOWER_IS_BETTER else 'Higher'} is better; small: the change from the base model. "
        "Blue: better than it; orange: worse; every column has a scale of its own, the strongest colour is its "
        "largest change. Framed: the stage that learned it."
        + (" In brackets, in the table: 95 % interval." if has_intervals else ""),
        figure,
        {"": table},
    )


def _with_interval(stage: Mapping[str, Any], column: str, value: float, measure: str) -> str:
    text = score(value, measure)
    if measure == "end_task":
        half = Estimate.of(stage["end_tasks"][column]["macro_f1"]).half
        return text if half is None else f"{text} ± {score(half, measure)}"
    if measure in PROBES:
        ends = stage[PROBES[measure]][column].get("interval")
    else:
        ends = stage.get("intervals", {}).get(column, {}).get(measure)
    return f"{text} {between(ends, score, measure)}" if ends else text


def _tile(
    axes: Axes,
    row: int,
    column: int,
    strength: float,
    text: str,
    framed: bool = False,
    size: float = 9,
    below: str = "",
) -> None:
    """A cell of a heat map: a strength of −1 … 1."""
    colour = BETTER if strength > 0 else WORSE
    axes.add_patch(Rectangle((column + 0.02, row + 0.03), 0.96, 0.94, color=colour, alpha=TINT * abs(strength), lw=0))
    if framed:
        axes.add_patch(Rectangle((column + 0.03, row + 0.05), 0.94, 0.9, fill=False, edgecolor=INK, lw=1.2))
    if below:
        axes.text(column + 0.5, row + 0.74, below, ha="center", va="center_baseline", fontsize=6.5, color="0.25")
    axes.text(
        column + 0.5,
        row + (0.38 if below else 0.5),
        text,
        ha="center",
        va="center_baseline",
        fontsize=size,
        weight="bold" if framed else "normal",
    )


def _tile_axes(axes: Axes, columns: Sequence[str], rows: Sequence[str], slanted: bool) -> None:
    axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
    axes.xaxis.tick_top()
    turned = {"rotation": 30, "ha": "left", "rotation_mode": "anchor"} if slanted else {}
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns, **turned)
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


# ---- importance -----------------------------------------------------------------------------------------------------


def importance_maps(results: Results) -> list[Drawing]:
    """Per stage: the importance of what was new in it, and of all so far, which is the mask of the next stage."""
    drawings, shown = [], set()
    for number, stage in enumerate(results.stages):
        if "importance" not in stage:
            continue
        maps: dict[str, dict[str, list[list[float]]]] = stage["importance"]["maps"]
        new = [name for name in stage["importance"]["domains"] if name not in shown]
        shown.update(new)
        names = {**{name: name for name in new}, "accumulated": "all so far"}
        layers = max(len(values) for kind in maps.values() for values in kind.values())
        height = min(max(0.1 * layers + 0.45, 1.1), 2.2)
        figure = Figure(figsize=(WIDTH, 0.5 + height * len(maps)), layout="constrained")
        panels = figure.subplots(len(maps), len(names), sharey="row", squeeze=False)
        table = [["layer", *(f"{KINDS.get(kind, kind)}: {title}" for kind in maps for title in names.values())]]
        columns: list[list[str]] = []
        for row, (kind, parts) in zip(panels, maps.items(), strict=True):
            for axes, (name, title) in zip(row, names.items(), strict=True):
                values = _rectangle(parts[name])
                extent = (0.5, values.shape[1] + 0.5, values.shape[0] + 0.5, 0.5)
                image = axes.imshow(
                    values, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="none", extent=extent
                )
                axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
                axes.yaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
                axes.tick_params(length=2, labelsize=7)
                if axes in panels[0]:
                    axes.set_title(short(title, max(8, 72 // len(names))))
                axes.set_xlabel("head" if kind == "head" else f"neurons, in {values.shape[1]} bins", fontsize=7)
                columns.append([f"{mean:.3f}" for mean in np.nanmean(values, axis=1)])
            row[0].set_ylabel(f"{KINDS.get(kind, short(kind))}\nlayer", fontsize=8)
        figure.colorbar(image, ax=panels, fraction=0.025, pad=0.01, label="importance")
        table += [[str(layer + 1), *(c[layer] if layer < len(c) else "–" for c in columns)] for layer in range(layers)]
        drawings.append(
            Drawing(
                f"importance-{number}",
                f"Importance after {stage['name']}",
                "0: free to learn; 1: held back entirely by the mask of the next stage. Neighbouring neurons are "
                "averaged in bins. The table has the mean of every layer; the maps stand in forgetting.json.",
                figure,
                {"": table},
            )
        )
    return drawings


def _rectangle(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """Layers may have unequal numbers of units: shape [layers, most units], filled up with NaN."""
    longest = max(map(len, rows))
    return np.array([[*row, *[np.nan] * (longest - len(row))] for row in rows])


def overlap(results: Results) -> list[Drawing]:
    """How alike the domains' importance is, a heat map per kind of unit; none with one domain."""
    importance = [stage["importance"] for stage in results.stages if "importance" in stage][-1]
    names, matrices = importance["domains"], importance["overlap"]
    if len(names) < 2:
        return []
    labels = [f"{short(name, 18)}  {number}" for number, name in enumerate(names, 1)]
    beside = 0.3 + 0.075 * max(map(len, labels))
    side = min(0.55, (WIDTH - beside) / len(matrices) / len(names) - 0.02)  # of a tile, in inches
    size = (0.3 + beside + (side * len(names) + 0.15) * len(matrices), 1.0 + 0.75 * side * len(names))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(matrices), squeeze=False)[0]
    tables = {}
    for axes, (kind, matrix) in zip(panels, matrices.items(), strict=True):
        for row, column in np.ndindex(len(names), len(names)):
            rho = matrix[row][column]
            text = f"{rho:.2f}".replace("-", "−") if side > 0.24 else ""
            _tile(axes, row, column, rho, text, size=9 if side > 0.38 else 6)
        _tile_axes(
            axes,
            [str(number + 1) for number in range(len(names))],
            labels if axes is panels[0] else [""] * len(names),
            False,
        )
        axes.set_xlabel("… and to domain", fontsize=8)
        axes.xaxis.set_label_position("top")
        axes.set_title(KINDS.get(kind, short(kind)), fontsize=9, y=-0.02, va="top", pad=0)
        if axes is panels[0]:
            axes.set_ylabel("matters to domain …", fontsize=8)
        rows = [[name, *(f"{value:+.3f}".replace("-", "−") for value in matrix[at])] for at, name in enumerate(names)]
        tables[KINDS.get(kind, kind)] = [["", *names], *rows]
    return [
        Drawing(
            "overlap",
            "Overlap of importance between domains",
            "Whether the units that matter to one domain (rows) matter to another (columns, by their numbers), a "
            "square per kind of unit: Spearman's ρ over all of them. 1, the same units matter to both; 0, nothing in "
            "common; below 0, what matters to the one does not to the other.",
            figure,
            tables,
        )
    ]


def saturation(results: Results) -> Drawing:
    """Mean importance of every kind of unit after every stage."""
    stages = [stage for stage in results.stages if "mean_importance" in stage]
    kinds = list(dict.fromkeys(kind for stage in stages for kind in stage["mean_importance"]))
    figure = Figure(figsize=(min(WIDTH, 3.2 + 0.9 * len(stages)), 2.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(kinds)
    for number, kind in enumerate(kinds):
        heights = [stage["mean_importance"].get(kind, np.nan) for stage in stages]
        places = np.arange(len(stages)) + (number - (len(kinds) - 1) / 2) * width
        colour = STYLES[number % len(STYLES)][0]
        axes.bar(places, heights, 0.92 * width, color=colour, label=KINDS.get(kind, short(kind)))
    letters = max(6, 60 // len(stages))
    axes.set_xticks(range(len(stages)), [short(stage["name"], min(22, letters)) for stage in stages])
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylabel("mean importance")
    axes.set_xlabel("after the stage")
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)
    legend(figure, axes)
    table = [["after", *(KINDS.get(kind, kind) for kind in kinds)]]
    for stage in stages:
        values = stage["mean_importance"]
        table.append([stage["name"], *(f"{values[kind]:.1%}" if kind in values else "–" for kind in kinds)])
    return Drawing(
        "saturation",
        "Saturation of the mask",
        "Mean importance of all domains so far: the share of a unit's gradient that the mask of the next stage holds "
        "back. Near 100 %, nothing of that kind can learn any more.",
        figure,
        {"": table},
    )


# ---- small models, benchmarks, frontiers ----------------------------------------------------------------------------


def predictions(results: Results) -> Drawing:
    """What a regression predicts after every stage, against the truth."""
    inputs, targets = np.array(results.run["inputs"]), np.array(results.run["targets"])
    stages = [stage for stage in results.stages[1:] if "predictions" in stage]
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(inputs, targets, color="0.8", linewidth=6, solid_capstyle="round", label="truth")
    for (colour, dashes), stage in zip(STYLES * len(stages), stages, strict=False):
        label = f"after {short(stage['name'])}"
        axes.plot(inputs, stage["predictions"], color=colour, linestyle=dashes, linewidth=1.4, label=label)
    margin = 0.6 * (targets.max() - targets.min())
    axes.set_ylim(targets.min() - margin, targets.max() + margin)
    axes.set(xlabel="input", ylabel="target")
    legend(figure, axes)
    table = [["input", "truth", *(f"after {stage['name']}" for stage in stages)]]
    columns = [inputs, targets, *(stage["predictions"] for stage in stages)]
    table += [[f"{value:.4g}".replace("-", "−") for value in row] for row in zip(*columns, strict=True)]
    return Drawing("predictions", "Predictions", "Grey: the truth.", figure, {"": table})


def frontier(curves: Sequence[Mapping[str, Any]], unit: str, tables: Mapping[str, Rows]) -> Drawing | None:
    """
    What was lost against what was gained, a line per method; `None` where nothing could be lost.

    Args:
        curves: `Comparison.frontier`.
        unit: of the figures.
        tables: `Comparison.tables()`.
    """
    all_points = [point for curve in curves for point in curve["points"]]
    losses = [loss for loss in ("drift", "forgetting") if any(point[loss] is not None for point in all_points)]
    if not losses:
        return None
    figure = Figure(figsize=(WIDTH, 3.9 + 0.17 * len(curves)), layout="constrained")
    panels = figure.subplots(1, len(losses), squeeze=False)[0]
    for axes, loss in zip(panels, losses, strict=True):
        for number, curve in enumerate(curves):
            points = [point for point in curve["points"] if point[loss] is not None]
            colour, dashes = STYLES[number % len(STYLES)]
            axes.errorbar(
                [point["gain"] for point in points],
                [point[loss] for point in points],
                xerr=[point["gain_half"] or np.nan for point in points],
                yerr=[point[f"{loss}_half"] or np.nan for point in points],
                color=colour,
                linestyle=dashes,
                linewidth=1.3,
                elinewidth=0.8,
                capsize=2,
                marker="osD^vP"[number // len(STYLES) % 6],
                markersize=4,
                label=short(curve["name"], 80) + (f", over {short(curve['x_label'])}" if curve["x_label"] else ""),
            )
            for point in points[:: max(1, len(points) - 1)] if len(points) > 1 else ():
                text = f"{point['value']:g}" if isinstance(point["value"], float) else short(str(point["value"]), 10)
                at = (point["gain"], point[loss])
                axes.annotate(text, at, (4, 5), textcoords="offset points", fontsize=7, color="0.35")
        axes.set(xlabel=f"gain ({unit}) → better", ylabel=f"{loss} ({unit}) → worse")
        axes.grid(color="0.92", linewidth=0.6)
        axes.set_axisbelow(True)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", handlelength=3.2, fontsize=8)
    return Drawing(
        "frontier",
        "Frontier: what was lost against what was gained",
        "Lower right is best. A line joins the runs of a method that differ in one setting, whose first and last "
        "value stand beside it; bars: 95 % interval over seeds, where there are several.",
        figure,
        dict(tables),
    )
