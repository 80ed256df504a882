"""A run that goes on: from a checkpoint that is whole, with the rows and the learning rate that it would have had."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from das_lm.data.streaming import TrainingStream
from das_lm.errors import UserError
from das_lm.files import broken_file, newest_checkpoint, write_json
from das_lm.training.config import ContinualConfig

if TYPE_CHECKING:
    from das_lm.training.trainer import ContinualTrainer

BATCH_NAME = "batch.json"
STREAM_NAME = "stream.json"


def batch_of(args: ContinualConfig) -> dict[str, int]:
    """Return what the rows of an update step are the product of."""
    return {
        "processes": args.world_size,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
    }


def save_place(trainer: ContinualTrainer, checkpoint: Path) -> None:
    """Write into a checkpoint where in the data it was saved."""
    batch = batch_of(trainer.args)
    write_json(checkpoint / BATCH_NAME, batch)
    if isinstance(trainer.train_dataset, TrainingStream):
        position = trainer.state.global_step * math.prod(batch.values())
        write_json(checkpoint / STREAM_NAME, trainer.train_dataset.state_dict(position))


def go_on(trainer: ContinualTrainer, checkpoint: str | Path | bool | None) -> str | None:
    """
    Make a trainer's data ready to go on from a checkpoint.

    Args:
        checkpoint: or `True` for the newest whole one in `output_dir`; `None` or `False` for a new run.

    Returns:
        its path.

    Raises:
        UserError: there is none, it is not whole, or a run goes on from it with other data.
    """
    if checkpoint is True:
        checkpoint = newest_checkpoint(trainer.args.output_dir)
        if checkpoint is None:
            raise UserError(f"there is no whole checkpoint in {trainer.args.output_dir} to resume from")
    if not checkpoint:
        return None
    broken = broken_file(str(checkpoint))
    if broken:
        raise UserError(f"checkpoint {checkpoint} is not whole: {broken}; resume from an older one")
    batch, place = Path(checkpoint, BATCH_NAME), Path(checkpoint, STREAM_NAME)
    if batch.is_file():
        check_order(trainer, json.loads(batch.read_text(encoding="utf-8")))
    if isinstance(trainer.train_dataset, TrainingStream) and place.is_file():
        trainer.train_dataset.load_state_dict(json.loads(place.read_text(encoding="utf-8")))
    return str(checkpoint)


def check_order(trainer: ContinualTrainer, before: Mapping[str, int]) -> None:
    """
    Check that a run which began with another batch, see [`batch_of`], goes on with the same rows in every update step.

    Raises:
        UserError: it does not.
    """
    args = trainer.args
    now, rows = batch_of(args), math.prod(before.values())
    if now == before:
        return
    begun, here = (" × ".join(f"{value} {name}" for name, value in one.items()) for one in (before, now))
    if math.prod(now.values()) != rows:
        raise UserError(
            f"the run began with {rows} rows per update step ({begun}) and would go on with "
            f"{math.prod(now.values())} ({here}), other data in every step: choose per_device_train_batch_size "
            f"and gradient_accumulation_steps so that the product is {rows} again"
        )
    # Several processes fill up the last batch of an epoch, in a way that depends on all three.
    if max(before["processes"], now["processes"]) > 1:
        length = len(trainer.train_dataset)
        if length % rows and not 0 < args.max_steps * rows <= length:
            raise UserError(
                f"the run began with {begun}; {here} would be other data at the end of every epoch, where the "
                f"{length} rows of domain '{trainer.domain}' do not fill {rows} rows per update step: go on as it "
                "began"
            )


def check_length(trainer: ContinualTrainer, before: Mapping[str, float], checkpoint: str | Path | None) -> str | None:
    """
    Check that a run which began with another length goes on as one that began with the present one.

    Args:
        before: `max_steps`, and `num_train_epochs` if that is not given.
        checkpoint: to go on from.

    Returns:
        What happens to the learning rate; `None` if the length is the same.

    Raises:
        UserError: it is shorter, or the learning rate up to here would have been another one.
    """
    args, domain = trainer.args, trainer.domain
    began, batches = copy.copy(args), trainer.get_train_dataloader()
    for name, value in before.items():
        setattr(began, name, value)
    was, now = (trainer.set_initial_training_values(one, batches)[-1] for one in (began, args))
    done = int(str(checkpoint).rpartition("-")[2]) if checkpoint else 0
    if was == now:
        return None
    if now < was:
        raise UserError(
            f"max_steps: '{domain}' began to learn for {was} steps, and {now} are fewer: a run goes on as long as it "
            "began, or longer"
        )
    rates = [args.learning_rates(range(done + 1), steps) for steps in (was, now)]
    kind = args.lr_scheduler_type.value
    if done and not np.allclose(*rates, rtol=1e-9, atol=0):
        raise UserError(
            f"max_steps: '{domain}' has learned {done} of {was} steps, and lr_scheduler_type '{kind}' has brought the "
            f"learning rate to {rates[0][-1]:.3g}; in a run of {now} steps it would be {rates[1][-1]:.3g}: give "
            f"max_steps {was}, or begin anew. A run can go on longer with constant, and with warmup_stable_decay "
            "before its decay"
        )
    return (
        f"'{domain}' learns {now} steps, not {was}: the learning rate of lr_scheduler_type '{kind}' is that of a run "
        f"of {now} steps from the beginning, {rates[1][-1]:.3g} in step {done + 1}"
    )
