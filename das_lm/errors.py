"""The one exception for what a person can put right."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Bad input: the message says what is wrong, where, and what to write instead.

    The command line prints the message alone and exits with its status; from Python it is an ordinary exception.
    """

    status = 2


class NotFinite(UserError):
    """Training came to NaN or infinity: in the loss, a gradient, weights, or importance."""


@contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """Whatever a library raises in here, which reads what users have, becomes one `UserError`: `what`, and why."""
    try:
        yield
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"  # of tokenizers and safetensors, no Exception
        if isinstance(error, UserError) or not (isinstance(error, Exception) or is_panic):
            raise
        raise UserError(f"{what}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """What an exception says, in one line that is not too long; its type where that would say little."""
    line = " ".join(str(error).split())
    if not line or isinstance(error, LookupError | TypeError | AttributeError | AssertionError):
        line = f"{type(error).__name__}: {line}".removesuffix(": ")
    return line if len(line) <= 300 else f"{line[:300]} …"


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the choice nearest to ``word``, or the sorted choices when none is near."""
    choices = sorted(set(choices))
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    if near:
        return f" Did you mean '{near[0]}'?"
    return f" Valid: {', '.join(choices)}." if choices and len(choices) <= 24 else ""


def speaks() -> bool:
    """Whether this process tells what happens: the first of those that a launcher started, which sets all three."""
    return not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= set(os.environ) or os.environ["RANK"] == "0"
