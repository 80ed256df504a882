"""The figures against the numbers they are drawn from."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from das_lm.report.curves import change_curves
from das_lm.report.drawing import BETTER, WORSE, drawing_style, inline_svg
from das_lm.report.figures import TINT, frontier, importance_maps, result_matrix
from das_lm.report.run_page import run_page
from das_lm.report.table import Strong
from das_lm.report.words import short
from tests.report.full_runs import language_run, small_run

DOMAINS = ["bio", "cs", "law"]


def draw(results):
    return run_page(results, None).drawings


@pytest.fixture(scope="module")
def results():
    return language_run(DOMAINS)


@pytest.fixture(scope="module")
def drawings(results):
    with drawing_style():
        return {drawing.name: drawing for drawing in draw(results)}


def test_what_there_is_to_draw(drawings):
    assert list(drawings) == [
        *("held-out-loss", "matrix-loss", "matrix-accuracy", "matrix-cloze", "matrix-end-task", "loss-parts", "pace"),
        *("saturation", "overlap", "importance-1", "importance-2", "importance-3"),
    ]
    with drawing_style():
        assert [d.name for d in draw(small_run())] == ["task-curves", "matrix-loss", "matrix-accuracy"]
        assert [d.name for d in draw(small_run("r2"))] == ["task-curves", "predictions", "matrix-loss", "matrix-r2"]


def test_colour_says_better_or_worse_than_the_base_model(results, drawings):
    axes = drawings["matrix-loss"].figure.axes[0]
    tiles = [patch for patch in axes.patches if patch.get_linewidth() == 0]
    matrix = results.matrix("loss")
    assert len(tiles) == matrix.size
    better = matrix[0] - matrix
    for tile in tiles:
        row, column = int(tile.get_y()), int(tile.get_x())
        colour = BETTER if better[row, column] > 0 else WORSE
        expected = to_rgba(colour, TINT * abs(better[row, column]) / np.abs(better[:, column]).max())
        assert tile.get_facecolor() == pytest.approx(expected)
    worst = [tile.get_alpha() for tile in tiles if (int(tile.get_y()), int(tile.get_x())) == (3, 0)]
    assert worst == [TINT]  # the drift, far smaller than a gain, is as strong
    texts = [text.get_text() for text in axes.texts]
    assert "+0.450" in texts and texts.count("−3.000") == 1
    frames = [patch for patch in axes.patches if patch.get_linewidth() > 0]
    assert [(int(f.get_y()), int(f.get_x())) for f in frames] == [(1, 1), (2, 2), (3, 3)]
    assert all(isinstance(patch, Rectangle) for patch in axes.patches)


def test_higher_is_better_for_accuracies(results, drawings):
    tiles = [p for p in drawings["matrix-accuracy"].figure.axes[0].patches if p.get_linewidth() == 0]
    drift = next(tile for tile in tiles if (int(tile.get_y()), int(tile.get_x())) == (3, 0))
    assert results.matrix("accuracy")[3, 0] < results.matrix("accuracy")[0, 0]
    assert drift.get_facecolor()[:3] == to_rgba(WORSE)[:3]


def test_table_of_the_matrix(results, drawings):
    header, *rows = drawings["matrix-loss"].tables[""]
    assert header == ["after", "general (never learned)", *DOMAINS]
    for row, stage, scores in zip(rows, results.stages, results.matrix("loss"), strict=True):
        assert row[0] == stage["name"]
        assert [float(cell.split()[0]) for cell in row[1:]] == pytest.approx(scores, abs=5e-4)
    strong = [(i, j) for i, row in enumerate(rows) for j, cell in enumerate(row) if isinstance(cell, Strong)]
    assert strong == [(1, 2), (2, 3), (3, 4)]  # column 0 is the stage's name, 1 is general
    assert rows[0][1] == "1.500 [1.400,\N{NO-BREAK SPACE}1.600]"
    assert drawings["matrix-end-task"].tables[""][1] == ["base", "62.3% ± 6.3%"]


def test_a_matrix_without_change():
    """Nothing to divide by."""
    run = small_run()
    run.stages = run.stages[:1]
    with drawing_style():
        tiles = result_matrix(run, "accuracy").figure.axes[0].patches
    assert all(tile.get_alpha() == 0 for tile in tiles)


def test_curves_go_through_every_evaluation(results, drawings):
    """A panel per domain, from 0, the change from the base model."""
    panels = drawings["held-out-loss"].figure.axes
    for axes, domain in zip(panels, results.domains, strict=True):
        base = results.stages[0]["scores"][domain]["loss"]
        expected = [(0, 0.0)]
        for start, stage in zip((0, 100, 200), results.stages[1:], strict=True):
            expected += [(start + entry["step"], entry["held_out"][domain] - base) for entry in stage["history"]]
            expected.append((start + 100, stage["scores"][domain]["loss"] - base))
        curve = max((line.get_xydata() for line in axes.lines), key=len)
        np.testing.assert_allclose(curve, expected, atol=1e-12)
        boundaries = [line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1]
        assert boundaries[:2] == [100, 200]
    assert [axes.get_title("left") for axes in panels] == ["general (never learned)", *DOMAINS]
    assert panels[0].get_title("right") == "+0.450"
    rows = drawings["held-out-loss"].tables["held-out loss"]
    assert len(rows) == 1 + 1 + 30
    assert rows[-1] == ["300", *(f"{loss:.3f}" for loss in results.matrix("loss")[-1])]


def test_every_domain_has_a_scale_of_its_own(drawings):
    """A drift of 0.45 fills its panel as a gain of 3 does."""
    for axes in drawings["held-out-loss"].figure.axes:
        curve = max((line.get_ydata() for line in axes.lines), key=len)
        low, high = axes.get_ylim()
        assert np.ptp(curve) > 0.6 * (high - low)


def test_plain_training_beside_the_curves(results):
    """As a dashed line where that leaves the curve its shape, else in words."""
    plain = language_run(DOMAINS, method="naive")
    for stage, drift in zip(plain.stages[1:], (1.0, 2.0, 9.0), strict=True):
        stage["scores"]["general"]["loss"] = 1.5 + drift
    with drawing_style():
        general, *learned = change_curves(results, plain).figure.axes
        assert "Dashed" in change_curves(results, plain).caption
    assert [text.get_text() for text in general.texts] == ["plain training ends at +9.000 ↑"]
    assert general.get_ylim()[1] < 1
    for axes in learned:
        dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
        assert len(dashed) == 1 and not axes.texts


def test_pace(results, drawings):
    rate, norm = drawings["pace"].figure.axes
    assert [axes.get_title("left") for axes in (rate, norm)] == ["learning rate", "gradient norm, before clipping"]
    assert max((line.get_ydata() for line in rate.lines), key=len).tolist() == [1e-3] * 30
    assert drawings["pace"].tables[""][1] == ["10", "0.001", "1"]


def test_the_axes_of_the_overlap_are_named(drawings):
    first, *others = drawings["overlap"].figure.axes
    assert first.get_ylabel() == "matters to domain …" and first.get_xlabel() == "… and to domain"
    assert all(axes.get_xlabel() == "… and to domain" for axes in others)


def test_curves_without_evaluations_join_the_stages():
    run = language_run(["bio", "cs"])
    for stage in run.stages[1:]:
        for entry in stage["history"]:
            del entry["held_out"]
    with drawing_style():
        drawing = next(one for one in draw(run) if one.name == "held-out-loss")
    curve = max((line.get_xydata() for line in drawing.figure.axes[1].lines), key=len)
    np.testing.assert_allclose(curve, np.c_[[0, 100, 200], run.matrix("loss")[:, 1] - 6], atol=1e-12)
    assert "Nothing was measured within a stage" in drawing.caption


def test_parts_of_the_loss(results, drawings):
    panels = drawings["loss-parts"].figure.axes
    entries = [entry for stage in results.stages[1:] for entry in stage["history"]]
    assert [axes.get_title("left") for axes in panels] == ["total", "contrast", "mlm"]
    for axes, key in zip(panels, ("loss", "loss_contrast", "loss_mlm"), strict=True):
        line = next(line for line in axes.lines if len(line.get_xdata()) == len(entries))
        np.testing.assert_allclose(line.get_ydata(), [entry[key] for entry in entries])
        np.testing.assert_allclose(line.get_xdata(), np.arange(10, 301, 10))


def test_importance_maps_show_what_is_new_and_the_mask(results, drawings):
    for number, names in ((1, ["general", "bio"]), (2, ["cs"]), (3, ["law"])):
        panels = [axes for axes in drawings[f"importance-{number}"].figure.axes if axes.images]
        maps = results.stages[number]["importance"]["maps"]
        shown = [(kind, name) for kind in maps for name in (*names, "accumulated")]
        assert len(panels) == len(shown)
        for axes, (kind, name) in zip(panels, shown, strict=True):
            np.testing.assert_allclose(axes.images[0].get_array(), maps[kind][name])
            assert axes.images[0].get_clim() == (0, 1)
    row = drawings["importance-1"].tables[""][1]
    means = [np.mean(maps[name][0]) for maps in results.stages[1]["importance"]["maps"].values() for name in maps]
    assert [float(cell) for cell in row[1:]] == pytest.approx(means, abs=5e-4)


def test_layers_with_unequal_numbers_of_units():
    run = language_run(["bio"])
    for part in run.stages[1]["importance"]["maps"]["head"].values():
        part[1] = part[1][:2]
    with drawing_style():
        (drawing,) = importance_maps(run)
    image = drawing.figure.axes[0].images[0].get_array()
    assert np.ma.getmaskarray(image).tolist() == [[False] * 4, [False, False, True, True]]
    assert drawing.tables[""][2][1] == f"{np.mean(run.stages[1]['importance']['maps']['head']['general'][1]):.3f}"


def test_saturation_and_overlap(results, drawings):
    bars = drawings["saturation"].figure.axes[0].patches
    kinds = results.stages[1]["mean_importance"]
    expected = [stage["mean_importance"][kind] for kind in kinds for stage in results.stages[1:]]
    assert [bar.get_height() for bar in bars] == pytest.approx(expected)
    overlap = results.stages[-1]["importance"]["overlap"]
    for axes, matrix in zip(drawings["overlap"].figure.axes, overlap.values(), strict=True):
        assert [patch.get_alpha() for patch in axes.patches] == pytest.approx(TINT * np.abs(matrix).ravel())


def test_task_curves_start_before_training():
    run = small_run()
    with drawing_style():
        drawing = next(one for one in draw(run) if one.name == "task-curves")
    line = next(line for line in drawing.figure.axes[0].lines if line.get_label() == "odd")
    curve = [row["odd"] for stage in run.stages[1:] for row in stage["curve"]]
    np.testing.assert_allclose(line.get_xydata(), np.c_[np.arange(11), [0.1, *curve]])


def test_frontier():
    def point(value, gain, drift, forgetting, half):
        halves = {"gain_half": half, "drift_half": half, "forgetting_half": half}
        return {"run": f"r{value}", "value": value, "gain": gain, "drift": drift, "forgetting": forgetting, **halves}

    curves = [
        {"name": "naive", "x_label": "lr", "points": [point(0.1, 2, 0.5, 0.1, None), point(1.0, 3, 1.5, 0.6, None)]},
        {"name": "das", "x_label": "", "points": [point(None, 2.5, 0.7, 0.2, 0.05)]},
    ]
    with drawing_style():
        drawing = frontier(curves, "nats", {"T": [["run"], ["naive"]]})
        without_drift = [{**c, "points": [{**p, "drift": None} for p in c["points"]]} for c in curves]
        alone = frontier(without_drift, "nats", {})
        nothing = [{**c, "points": [{**p, "forgetting": None} for p in c["points"]]} for c in without_drift]
        assert frontier(nothing, "nats", {}) is None
    drift, forgetting = drawing.figure.axes
    naive, das = drift.containers
    np.testing.assert_allclose(naive[0].get_xydata(), [(2, 0.5), (3, 1.5)])
    np.testing.assert_allclose(np.array(das[2][1].get_segments()), [[(2.5, 0.65), (2.5, 0.75)]])
    assert list(forgetting.containers[0][0].get_ydata()) == [0.1, 0.6]
    assert np.isnan(naive[2][1].get_segments()).all()  # of one seed there is no interval
    assert {text.get_text() for text in drift.texts} == {"0.1", "1"}
    assert len(alone.figure.axes) == 1
    assert drawing.tables == {"T": [["run"], ["naive"]]}


def test_a_dollar_is_a_dollar(tmp_path):
    """Names are no formulas, and a name in a figure is glyphs: nothing of it is markup."""
    name = r"$\alpha_1$ <b>"
    run = language_run([name, "x" * 60])
    with drawing_style():
        drawing = result_matrix(run, "loss")
        labels = [text.get_text() for text in drawing.figure.findobj(Text)]
        assert all(text.get_parse_math() is False for text in drawing.figure.findobj(Text))
        drawing.save(tmp_path, "one")
    text = (tmp_path / "one.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    assert name in labels and root.tag.endswith("svg")
    assert "alpha" not in drawing.svg and "<b>" not in drawing.svg
    assert len(short("x" * 60)) == 22


def test_svg_for_a_page():
    svg = (
        '<?xml version="1.0"?>\n<!DOCTYPE svg>\n<svg width="9pt"><metadata>m</metadata><!-- <text> -->'
        '<g id="a" style="fill: #ffffff; stroke: #0072b2"/><use href="#a" xlink:href="#a" clip-path="url(#a)"/>'
        '<g style="stroke: #000000"/><g style="fill: #cccccc"/><g style="fill: #cccccd"/></svg>'
    )
    page = inline_svg(svg, "p")
    assert page.startswith("<svg") and "metadata" not in page and "<!--" not in page
    assert re.findall(r'id="(.*?)"', page) == ["p-a"]
    assert page.count("#p-a") == 3 and '"#a"' not in page
    mixtures = re.findall(r"var\(--ink\) (\d+)%, var\(--paper\)", page)
    assert mixtures == ["0", "100", "20"]  # white, black, 0.8
    assert "stroke: var(--better, #0072b2)" in page and "#cccccd" in page


def test_files_are_the_same_every_time(tmp_path):
    for name in ("a", "b"):
        with drawing_style():
            result_matrix(language_run(["bio"]), "loss").save(tmp_path, name)
    for suffix in ("svg", "png"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.svg", "b.png", "b.svg"]
