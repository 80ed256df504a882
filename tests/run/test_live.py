"""The page of a run that goes on."""

import numpy as np
import pytest

from das_lm.measure.results import PAGE_NAME, Results
from das_lm.report import page as report_page
from das_lm.report.page import write_report
from das_lm.run import live
from das_lm.run.live import draw as really_draw  # `conftest` takes it away
from das_lm.training.trainer import ContinualTrainer
from tests.helpers import Interrupted, run_recipe

REFRESH = 'http-equiv="refresh"'
EVALUATE = ("--eval_strategy", "steps", "--eval_steps", "2")


@pytest.fixture
def pages(monkeypatch):
    """Every page that was drawn on the way."""
    drawn, write = [], report_page.write_running

    def note(results, output):
        write(results, output)
        drawn.append((output / PAGE_NAME).read_text(encoding="utf-8"))

    monkeypatch.setattr(live, "draw", really_draw)
    monkeypatch.setattr(report_page, "write_running", note)
    return drawn


def test_the_page_follows_the_run_and_changes_nothing(world, finished, tmp_path, pages):
    assert run_recipe(world, tmp_path / "run", *EVALUATE) == 0
    assert all(REFRESH in page and "script" not in page.lower() for page in pages)
    at = [f"Running: bio, step {step} of 6," for step in (2, 4, 6)] + [f"Running: cs, step {s} of 4," for s in (2, 4)]
    where = [next(number for number, page in enumerate(pages) if one in page) for one in at]
    assert where == [1, 2, 3, 5, 6] and len(pages) == 7  # besides, after the base model and after bio
    assert "bio (stage 1), cs (stage 2) have not been learned yet" in pages[0]
    assert "Held-out loss: change" in pages[1] and "Held-out loss: change" not in pages[0]
    assert not (tmp_path / "run" / "figures").exists()
    ours, theirs = Results.load(tmp_path / "run"), Results.load(finished)
    np.testing.assert_array_equal(ours.matrix(), theirs.matrix())
    assert "running" not in ours.run and all(stage["peak_memory"] > 2**20 for stage in ours.stages[1:])
    assert REFRESH not in write_report([tmp_path / "run"]).read_text(encoding="utf-8")


def test_a_run_that_is_interrupted_goes_on_no_more(world, tmp_path, pages, monkeypatch):
    step = ContinualTrainer.training_step

    def interrupted(trainer, *args, **kwargs):
        if trainer.state.global_step == 3:
            raise Interrupted
        return step(trainer, *args, **kwargs)

    monkeypatch.setattr(ContinualTrainer, "training_step", interrupted)
    with pytest.raises(Interrupted):
        run_recipe(world, tmp_path / "run", *EVALUATE)
    text = (tmp_path / "run" / PAGE_NAME).read_text(encoding="utf-8")
    assert "Running: bio, step 2 of 6" in text and REFRESH not in text and "It has ended there." in text


def test_what_cannot_be_drawn_is_learned(world, tmp_path, monkeypatch, capsys):
    def broken(results, output):
        raise ValueError("no ink")

    monkeypatch.setattr(live, "draw", really_draw)
    monkeypatch.setattr(report_page, "write_running", broken)
    assert run_recipe(world, tmp_path / "run", *EVALUATE) == 0
    assert "the page cannot be drawn on the way (ValueError('no ink'))" in capsys.readouterr().out
    assert len(Results.load(tmp_path / "run").stages) == 3
