"""Numbers and names as people read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from das_lm.measure.results import MEASURES, Results


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


def duration(seconds: float) -> str:
    """As long as people say it is."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, hours = seconds // 60, seconds // 3600
    return f"{minutes} min {seconds % 60} s" if hours == 0 else f"{hours:,} h {minutes % 60} min"


def gibibytes(count: float) -> str:
    """Of memory."""
    return f"{count / 2**30:.2f} GiB"


def short(name: str, length: int = 22) -> str:
    """A name as it fits into a figure."""
    name = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)
    return name if len(name) <= length else f"{name[: length - 1]}…"


def budget_findings(results: Results) -> Iterator[str]:
    """Whether the budget of the newest stage holds, past by past."""
    stage = results.stages[-1]
    for past, bound in stage.get("drift_budget", {}).items():
        mean, low, high = stage["divergence"][past]
        verdict = "holds" if mean <= bound else "holds within its interval" if low <= bound else "is exceeded"
        yield (
            f"The drift budget of {bound:.3g} nats for {past} {verdict}: {mean:.3g} on remembered text that was never "
            f"trained on, 95 % interval {low:.3g} to {high:.3g}."
        )
    if stage.get("drift_budget") and stage["landed_at"] < 1:
        yield (
            f"To keep it, the weights went back to {stage['landed_at']:.0%} of the way that training had gone."
            if stage["landed_at"]
            else "It could not be kept: the weights are those before the stage, which has learned nothing."
        )
