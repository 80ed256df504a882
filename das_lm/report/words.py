"""Numbers and names as people read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from das_lm.measure.results import MEASURES

if TYPE_CHECKING:
    pass


def score(value: float, measure: str) -> str:
    """A score as text."""
    return f"{value:{MEASURES[measure][1]}}".replace("-", "−")


def change(value: float, measure: str) -> str:
    """A difference of scores as text; of shares in percentage points."""
    is_share = MEASURES[measure][1].endswith("%")
    return (f"{100 * value:+.1f}\N{NO-BREAK SPACE}pp" if is_share else f"{value:+.3f}").replace("-", "−")


def between(ends: Sequence[float], write: Any, measure: str) -> str:
    """An interval as text, by [`score`] or [`change`]."""
    low, high = (write(end, measure) for end in ends)
    return f"[{low},\N{NO-BREAK SPACE}{high}]"


def short(name: str, length: int = 22) -> str:
    """A name as it fits into a figure."""
    name = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)
    return name if len(name) <= length else f"{name[: length - 1]}…"
