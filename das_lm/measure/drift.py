"""Whether checkpoints have lost more than they may: the rise of held-out loss from the base model, with interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table

from das_lm.errors import UserError
from das_lm.measure.bootstrap import interval, resampled_ratios

if TYPE_CHECKING:
    from das_lm.measure.held_out import HeldOut


class DriftExceeded(UserError):
    """A checkpoint has lost more than it may, beyond noise. The command line ends with status 3."""

    status = 3


@dataclass
class Drift:
    """
    The rise of the loss on a domain from the base model to a checkpoint, nats per predicted token.

    Args:
        stage: the checkpoint.
        domain: the held-out text.
        bound: what it may be.
        value: what it is.
        low, high: its 95 % interval, paired bootstrap over documents.
    """

    stage: str
    domain: str
    bound: float
    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """`within` its bound, `exceeded` beyond noise, or `undecided`: the interval holds the bound."""
        return "exceeded" if self.low > self.bound else "undecided" if self.high > self.bound else "within"


def drifts(
    names: Sequence[str], held_out: Sequence[Mapping[str, HeldOut]], bounds: Mapping[str, float]
) -> list[Drift]:
    """
    Args:
        names: of the checkpoints, the base model first.
        held_out: of each of them, domain -> what every document says.
        bounds: domain -> nats per predicted token.

    Returns:
        one for every checkpoint after the base model and every bound.
    """
    found = []
    for domain, bound in bounds.items():
        stages = [stage[domain] for stage in held_out]
        nats, tokens = ([getattr(stage, what).astype(float) for stage in stages] for what in ("nats", "tokens"))
        resampled = resampled_ratios(nats, tokens, domain)
        exact = [float(one.sum() / count.sum()) for one, count in zip(nats, tokens, strict=True)]
        for index, name in enumerate(names[1:], 1):
            low, high = interval(resampled[index] - resampled[0])
            found.append(Drift(name, domain, bound, exact[index] - exact[0], low, high))
    return found


def drift_table(found: Sequence[Drift]) -> Table:
    """Every drift beside its bound."""
    table = Table(title="Drift from the base model, nats per token (95 % interval)", title_justify="left")
    for heading in ("checkpoint", "text", "drift", "bound", "verdict"):
        table.add_column(heading, justify="right" if heading in ("drift", "bound") else "left")
    for one in found:
        value = f"{one.value:+.3f} ({one.low:+.3f} to {one.high:+.3f})"
        table.add_row(one.stage, one.domain, value, f"{one.bound:g}", one.verdict)
    return table


def check_drifts(found: Sequence[Drift]) -> None:
    """Raises `DriftExceeded` where one is beyond its bound, and beyond noise."""
    exceeded = [one for one in found if one.verdict == "exceeded"]
    if exceeded:
        told = ", ".join(f"'{one.domain}' {one.value:+.3f} > {one.bound:g} after '{one.stage}'" for one in exceeded)
        raise DriftExceeded(f"max_drift: exceeded beyond noise: {told}")
