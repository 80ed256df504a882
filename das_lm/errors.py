"""The one exception for what a person can put right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input: the message says what is wrong, where, and what to write instead.

    The command line prints the message alone and exits with status 2; from Python it is an ordinary exception.
    """


class NotFinite(UserError):
    """Training came to NaN or infinity: in the loss, a gradient, weights, or importance."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the choice nearest to ``word``, or the sorted choices when none is near."""
    choices = sorted(set(choices))
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    if near:
        return f" Did you mean '{near[0]}'?"
    return f" Valid: {', '.join(choices)}." if choices and len(choices) <= 24 else ""
