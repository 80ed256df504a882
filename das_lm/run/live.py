"""The page of a run that goes on: it is drawn at every evaluation and after every stage."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from das_lm.measure.results import Results
from das_lm.run.facts import history

if TYPE_CHECKING:
    from das_lm.run.walk import Walk
    from das_lm.training.trainer import ContinualTrainer


class LivePage(TrainerCallback):
    """
    Draws the page whenever all held-out domains have been measured in training.

    Args:
        output: directory of the run.
        results: of the stages so far.
        stage: name of the one that is learned.
    """

    def __init__(self, output: Path, results: Results, stage: str):
        self.output, self.results, self.stage = output, results, stage

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        log = history(state.log_history)
        if state.is_world_process_zero and log and set(self.results.domains) <= set(log[-1].get("held_out", ())):
            draw(self.output, self.results, self.stage, state.global_step, state.max_steps, log)


def watch(walk: Walk, trainer: ContinualTrainer, stage: str) -> None:
    """Have the page drawn while a trainer learns a stage, where the walk draws one."""
    if walk.draws:
        trainer.add_callback(LivePage(walk.output, walk.results, stage))


def draw(
    output: Path, results: Results, stage: str = "", step: int = 0, steps: int = 0, log: Sequence[dict[str, Any]] = ()
) -> None:
    """Draw the page as far as the run has come; what keeps it from being drawn keeps nothing from being learned."""
    from das_lm.report.page import write_running

    now = time.strftime("%H:%M:%S")
    running = [{"name": stage, "step": step, "max_steps": steps, "drawn": now, "history": log}] if step else []
    try:
        write_running(replace(results, run={**results.run, "running": running}), output)
    except Exception as error:
        print(f"{output}: the page cannot be drawn on the way ({error!r})")


@contextmanager
def settled(walk: Walk) -> Iterator[None]:
    """When a run ends early, its page no longer says that it goes on."""
    try:
        yield
    except BaseException:
        from das_lm.report.page import stop_reloading

        if walk.draws:
            stop_reloading(walk.output)
        raise


def finish(output: Path) -> Path:
    """Draw the page and the figures of a run that has ended."""
    from das_lm.report.page import write_report

    return write_report([output])
