"""
How a method declares its arguments: a dataclass of fields by [`knob`], whose types say what is allowed.

They become fields of [`ContinualConfig`], options of the command line, keys of `training:` in a recipe, and a column
of the README's table.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Interval

LARGEST = 2**32 - 1

Share = Annotated[float, Interval(ge=0, le=1)]
NotNegative = Annotated[float, Interval(ge=0)]
Positive = Annotated[float, Interval(ge=1e-12)]
Temperature = Annotated[float, Interval(ge=1e-4)]
Count = Annotated[int, Interval(ge=1, le=LARGEST)]


def knob(default: Any, help: str) -> Any:
    """
    Declare an argument: a field of a dataclass.

    Args:
        default: its value; a list is copied.
        help: a line for people, with the source (paper, equation).
    """
    of_default = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**of_default, metadata={"help": help})


def bounds_of(hint: Any) -> tuple[float, float | None] | None:
    """Return the least and the largest value (`None`: any) of a number of this type, where it has bounds."""
    intervals = [one for one in typing.get_args(hint) if isinstance(one, Interval)]
    if not intervals:
        return next(filter(None, map(bounds_of, typing.get_args(hint))), None) if typing.get_origin(hint) else None
    return intervals[0].ge, intervals[0].le


def choices_of(hint: Any) -> tuple[str, ...]:
    """Return the values of a `Literal`, none of another type."""
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


# ---- what several methods share ------------------------------------------------------------------------------------


@dataclass
class Arguments:
    """Of a method without knobs; the base of all others."""

    def check(self) -> None:
        """Raise `ValueError` for what the types do not say."""


@dataclass
class Batches(Arguments):
    """Of what reads rows of the domain beside training."""

    importance_batch_size: Count | None = knob(
        None, "Blocks per process and batch of an importance pass; per_device_train_batch_size if unset."
    )


@dataclass
class Measuring(Batches):
    """Of what is measured on [`ContinualTrainer.importance_batches`]."""

    importance_samples: Count = knob(1000, "Blocks of the domain that each importance pass reads, over all processes.")


@dataclass
class SoftMasking(Arguments):
    """Of what holds back parameters by a mask."""

    soft_mask_target: Literal["update", "gradient"] = knob(
        "update",
        "'gradient' multiplies the gradients by 1 - importance (DAS, equation 6, exact for SGD); 'update' scales the "
        "step that the optimizer took, which also holds for Adam, whose normalisation cancels a constant factor.",
    )
    soft_mask_strength: Share = knob(1.0, "The mask is 1 - strength x importance; 0 switches soft-masking off.")


@dataclass
class FisherArguments(Arguments):
    """Of what measures the Fisher information."""

    fisher: Literal["true", "empirical"] = knob(
        "true", "Labels of the Fisher of ewc, rwalk and ncl: sampled from the model ('true'), or the data's."
    )


@dataclass
class MemoryArguments(Arguments):
    """Of what keeps rows of earlier domains."""

    memory_size: Count = knob(
        512, "Rows (blocks of text) that replay, agem and gem keep, and that self_replay writes."
    )
