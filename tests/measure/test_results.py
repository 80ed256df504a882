"""The figures of forgetting against matrices worked out by hand, and the file that holds them."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from das_lm.errors import UserError
from das_lm.measure.results import FILE_NAME, MEASURES, Results, summarize

#: Losses (lower is better): columns general (never learned), bio (stage 1), cs (stage 2), law (stage 3).
LOSSES = np.array(
    [
        [2.0, 5.0, 6.0, 7.0],  # base
        [2.3, 3.0, 5.5, 7.2],  # after bio
        [2.2, 2.8, 4.0, 6.6],  # after cs
        [2.5, 3.6, 4.3, 3.5],  # after law
    ]
)
LEARNED = [None, 1, 2, 3]
EXPECTED = {
    "average": (3.6 + 4.3 + 3.5) / 3,
    "gain": ((5.0 - 3.0) + (5.5 - 4.0) + (6.6 - 3.5)) / 3,
    "backward_transfer": ((3.0 - 3.6) + (4.0 - 4.3)) / 2,
    "forward_transfer": ((6.0 - 5.5) + (7.0 - 6.6)) / 2,
    "forgetting": ((3.6 - 2.8) + (4.3 - 4.0)) / 2,  # bio was best after cs
    "forgetting_rate": ((3.6 - 3.0) + (4.3 - 4.0)) / 2,
    "drift": 2.5 - 2.0,
}


def test_losses_by_hand():
    assert summarize(LOSSES, LEARNED, lower_is_better=True) == pytest.approx(EXPECTED)


def test_accuracies_by_hand():
    """Higher is better: the same meaning of the signs."""
    accuracies = np.array([[0.8, 0.1, 0.2], [0.7, 0.5, 0.25], [0.6, 0.4, 0.9]])
    assert summarize(accuracies, [None, 1, 2], lower_is_better=False) == pytest.approx(
        {
            "average": (0.4 + 0.9) / 2,
            "gain": ((0.5 - 0.1) + (0.9 - 0.25)) / 2,
            "backward_transfer": 0.4 - 0.5,
            "forward_transfer": 0.25 - 0.2,
            "forgetting": 0.5 - 0.4,
            "forgetting_rate": 0.5 - 0.4,
            "drift": 0.8 - 0.6,
        }
    )


def test_signs_are_those_of_worth():
    """Losses, and accuracies that are their negatives, give the same figures but for the average."""
    losses = summarize(LOSSES, LEARNED, lower_is_better=True)
    accuracies = summarize(-LOSSES, LEARNED, lower_is_better=False)
    assert accuracies.pop("average") == pytest.approx(-losses.pop("average"))
    assert accuracies == pytest.approx(losses)


def test_columns_may_come_in_any_order():
    order = [3, 1, 0, 2]
    assert summarize(LOSSES[:, order], [LEARNED[j] for j in order], True) == pytest.approx(EXPECTED)


def test_one_stage():
    """Nothing was learned before the last stage or after the first one: no forgetting and no transfer to speak of."""
    figures = summarize(LOSSES[:2], LEARNED, lower_is_better=True)
    assert figures["average"] == pytest.approx(3.0) and figures["gain"] == pytest.approx(2.0)
    assert figures["drift"] == pytest.approx(0.3)
    for name in ("backward_transfer", "forward_transfer", "forgetting", "forgetting_rate"):
        assert figures[name] is None


def test_no_domain_is_measured_that_was_not_learned():
    assert summarize(LOSSES[:, 1:], LEARNED[1:], lower_is_better=True)["drift"] is None


def test_base_model_alone():
    figures = summarize(LOSSES[:1], LEARNED, lower_is_better=True)
    assert set(figures.values()) == {None}


def test_domains_of_one_stage():
    """Interleaved: all are learned in stage 1."""
    figures = summarize(LOSSES[:2], [None, 1, 1, 1], lower_is_better=True)
    assert figures["gain"] == pytest.approx(((5 - 3) + (6 - 5.5) + (7 - 7.2)) / 3)
    assert figures["average"] == pytest.approx((3 + 5.5 + 7.2) / 3) and figures["forgetting"] is None


def results(stages=4):
    """The matrix above, with accuracies that are 1 − loss / 10."""
    domains = dict(zip(("general", "bio", "cs", "law"), LEARNED, strict=True))
    rows = []
    for name, row in list(zip(("base", "bio", "cs", "law"), LOSSES.tolist(), strict=True))[:stages]:
        scores = {
            domain: {"loss": loss, "accuracy": 1 - loss / 10, "tokens": 10, "documents": 2}
            for domain, loss in zip(domains, row, strict=True)
        }
        rows.append({"name": name, "scores": scores, "steps": 7})
    return Results(domains, rows, {"seed": 1, "recipe": {"domains": [], "method": ["das"]}})


def test_matrix_and_summary():
    np.testing.assert_allclose(results().matrix(), LOSSES)
    np.testing.assert_allclose(results().matrix("accuracy"), 1 - LOSSES / 10)
    summary = results().summary()
    assert summary["loss"] == pytest.approx(EXPECTED)
    tenths = {name: value / 10 for name, value in EXPECTED.items() if name != "average"}
    assert {name: summary["accuracy"][name] for name in tenths} == pytest.approx(tenths)


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_round_trip(stages, tmp_path):
    before = results(stages)
    before.save(tmp_path)
    after = Results.load(tmp_path)
    assert after == before and list(after.domains) == list(before.domains)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_file_holds_all_that_is_needed_to_redraw_it(tmp_path):
    results().save(tmp_path)
    data = json.loads((tmp_path / FILE_NAME).read_text())
    assert data["format"] == "das_lm.forgetting" and data["version"] == 1
    assert data["summary"]["loss"] == pytest.approx(EXPECTED)
    assert data["stages"][2]["scores"]["bio"] == {"loss": 2.8, "accuracy": 0.72, "tokens": 10, "documents": 2}
    assert data["domains"] == {"general": None, "bio": 1, "cs": 2, "law": 3} and data["run"]["seed"] == 1


def test_newer_version(tmp_path):
    results().save(tmp_path)
    data = json.loads((tmp_path / FILE_NAME).read_text())
    (tmp_path / FILE_NAME).write_text(json.dumps({**data, "version": 2}))
    with pytest.raises(UserError, match=f"{FILE_NAME} has version 2; this release reads 1"):
        Results.load(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"version": 1, "domains": {}}', '{"version": null}'])
def test_broken_file(text, tmp_path):
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(UserError, match=f"{FILE_NAME} (cannot be read|is not as das-lm)"):
        Results.load(tmp_path)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=f"{FILE_NAME} cannot be read"):
        Results.load(tmp_path)


def rendered(table, styled=False):
    console = Console(width=120, record=True, force_terminal=True, file=io.StringIO())
    console.print(table)
    return console.export_text(styles=styled)


def test_table_of_losses():
    """Every score is there, and a domain's own stage stands in bold."""
    text = rendered(results().table())
    for loss in LOSSES.flatten():
        assert f"{loss:.3f} ({1 - loss / 10:.1%})" in text
    lines = text.splitlines()
    assert "general (never learned)" in lines[2] and "law (never learned)" not in text
    assert [line.split()[1] for line in lines if "%" in line] == ["base", "bio", "cs", "law"]
    styled = rendered(results().table(), styled=True)
    for loss in (3.0, 4.0, 3.5):
        assert f"\x1b[1m{loss:.3f}" in styled
    assert styled.count("\x1b[1m3.000") == 1 and "\x1b[1m2.800" not in styled


def test_table_of_figures():
    """Seven figures with their signs, and a dash where there is none."""
    text = rendered(results().figures())
    row = next(line for line in text.splitlines() if "best value" in line)
    assert "+0.550" in row and "+0.055" in row
    assert "-0.450" in next(line for line in text.splitlines() if "backward" in line)
    text = rendered(results(2).figures())
    assert next(line for line in text.splitlines() if "best value" in line).count("–") == 2


def of_small_models(measure: str, unit: str) -> Results:
    """Two tasks of a small model, scored by its loss and by one other measure."""
    rows = {"base": (0.1, 0.2), "even": (0.9, 0.25), "odd": (0.4, 0.8)}
    stages = [
        {"name": name, "scores": {d: {"loss": 1 - s, measure: s} for d, s in zip(("even", "odd"), row, strict=True)}}
        for name, row in rows.items()
    ]
    return Results({"even": 1, "odd": 2}, stages, {"method": "ewc"}, unit)


@pytest.mark.parametrize(
    ("measure", "unit", "title", "cell"),
    [
        ("accuracy", "nats", "Held-out loss, nats (top-1 accuracy)", "0.600 (40.0%)"),
        ("r2", "squared error", "Held-out loss, squared error (R²)", "0.600 (0.400)"),
    ],
)
def test_results_of_small_models(measure, unit, title, cell, tmp_path):
    """Other units, and R² in the place of accuracy: in the file, the figures and the tables."""
    before = of_small_models(measure, unit)
    before.save(tmp_path)
    assert Results.load(tmp_path) == before and before.measures == ["loss", measure]
    summary = json.loads((tmp_path / FILE_NAME).read_text())["summary"]
    assert set(summary) == {"loss", measure}
    assert summary[measure]["forgetting"] == pytest.approx(0.5) and summary[measure]["average"] == pytest.approx(0.6)
    text = rendered(before.table())
    assert title in text and cell in text
    assert MEASURES[measure][0] in rendered(before.figures())


def test_a_file_without_a_unit_is_of_a_language_model(tmp_path):
    results().save(tmp_path)
    data = json.loads((tmp_path / FILE_NAME).read_text())
    assert data.pop("unit") == "nats per masked token"
    (tmp_path / FILE_NAME).write_text(json.dumps(data))
    assert Results.load(tmp_path) == results()
    assert "Held-out loss, nats per masked token (top-1 accuracy)" in rendered(results().table())
