"""Forgetting as a module of the `evaluate` library, loaded from its path."""

from pathlib import Path

import evaluate
import pytest

import das_lm.measure

MODULE = Path(das_lm.measure.__file__).parent / "metrics" / "forgetting"


@pytest.fixture(scope="module")
def forgetting(tmp_path_factory):
    import datasets

    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_MODULES_CACHE", str(cache / "modules"))
        yield evaluate.load(str(MODULE), cache_dir=str(cache))


def test_figures_of_losses_and_accuracies(forgetting):
    losses = [[2.0, 5.0, 6.0], [2.3, 3.0, 5.5], [2.5, 3.6, 4.0]]
    found = forgetting.compute(scores=losses, learned=[None, 1, 2])
    assert found["forgetting"] == pytest.approx(0.6) and found["drift"] == pytest.approx(0.5)
    assert found["average"] == pytest.approx(3.8) and found["forward_transfer"] == pytest.approx(0.5)
    negated = forgetting.compute(
        scores=[[-x for x in row] for row in losses], learned=[None, 1, 2], lower_is_better=False
    )
    assert negated == pytest.approx({**found, "average": -3.8})


def test_rows_can_be_added_as_stages_end(forgetting):
    for row in ([0.1, 0.2], [0.9, 0.3], [0.7, 0.8]):
        forgetting.add(scores=row)
    assert forgetting.compute(learned=[1, 2], lower_is_better=False)["forgetting"] == pytest.approx(0.2)
