"""Plain training beside a run, in its report."""

import re

import pytest

from das_lm.files import recipe_folders
from das_lm.measure.results import FILE_NAME, Results
from das_lm.report.page import write_report
from das_lm.report.plain import beside_plain, plain_finding, plain_twin
from das_lm.run.recipe_file import load_recipe

RECIPE = {
    "model_name_or_path": "some/model",
    "domains": [{"name": "bio", "data": "bio.txt"}],
    "measure": [{"name": "old", "data": "old.txt"}],
    "schedule": "sequential",
    "training": {"learning_rate": 1e-4},
}


def results(method: list[str], drift: float, **recipe) -> Results:
    given = {**RECIPE, "method": method, "output_dir": "unused", **recipe}
    stages = [
        {"name": name, "scores": {"old": score(old), "bio": score(bio)}}
        for name, old, bio in (("base", 1.0, 3.0), ("bio", 1.0 + drift, 2.0 + drift / 10))
    ]
    run = {"recipe": given, "text": {"bio": {"training": "a"}}, "versions": {}, "device": "cpu"}
    return Results({"old": None, "bio": 1}, stages, run)


def score(loss: float) -> dict[str, float]:
    return {"loss": loss, "accuracy": 1 / (1 + loss), "tokens": 100, "documents": 10}


@pytest.fixture
def runs(tmp_path):
    for name, one in (
        ("ours", results(["anchor"], 0.1)),
        ("plain", results(["naive"], 0.8)),
        ("faster", results(["naive"], 0.9, training={"learning_rate": 1.0})),
    ):
        (tmp_path / name).mkdir()
        one.save(tmp_path / name)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / FILE_NAME).write_text("{")
    return tmp_path


def test_the_twin_is_plain_training_with_all_else_equal(runs):
    ours = Results.load(runs / "ours")
    twin = plain_twin(ours, runs / "ours")
    assert twin.summary()["loss"]["drift"] == pytest.approx(0.8)
    assert plain_twin(twin, runs / "plain") is None
    ours.run["text"]["bio"]["training"] = "b"
    assert plain_twin(ours, runs / "ours") is None


def test_what_is_shown_of_it(runs):
    ours = Results.load(runs / "ours")
    twin = plain_twin(ours, runs / "ours")
    sentence = plain_finding(ours, twin)
    assert "gain +0.990 against +0.920, drift +0.100 against +0.800" in sentence
    table = beside_plain(ours, twin)
    assert ["drift of what was never learned", "+0.100", "+0.800"] in table
    assert ["old, accuracy at the end", "47.6%", "35.7%"] in table
    page = re.sub("</?abbr.*?>", "", write_report([runs / "ours"]).read_text())
    assert "plain training: +0.800" in page
    assert "Beside plain training" in page and page.index(sentence[:40]) < page.index("never learned: ")


@pytest.mark.parametrize("name", ["bio_then_cs", "bio_then_cs_gpt"])
def test_the_built_in_recipes_have_a_twin(name):
    """Made with the recipe as it is now (`scripts/plain_twins.py`)."""
    (folder, *_) = [one for one in recipe_folders() if (one / "plain" / name).is_dir()]
    twin, recipe = Results.load(folder / "plain" / name), load_recipe(name)
    assert twin.run["recipe"]["training"] == recipe.training and len(twin.stages) == 3
    text = recipe.load_text()
    assert {name: text[name].fingerprints for name in twin.domains} == {n: twin.run["text"][n] for n in twin.domains}
