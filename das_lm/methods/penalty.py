"""Quadratic penalties: what EWC, MAS, SI, RWalk, SCP and L2 share."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from das_lm.errors import UserError
from das_lm.methods.arguments import Arguments, NotNegative, knob
from das_lm.methods.base import Method, Tensors
from das_lm.units.sharding import over_slices


@dataclass
class PenaltyArguments(Arguments):
    penalty_weight: NotNegative = knob(
        1.0,
        "λ of the penalty (λ/2) Σ Ω (θ - θ*)² of l2, ewc, mas, si, rwalk, scp. Of a published λ of MAS, SI or RWalk, "
        "whose papers leave out the ½, write twice the value. 0 is naive.",
    )


class Penalty(Method):
    """
    loss + (λ/2) Σ_i Ω_i (θ_i − θ*_i)², whose gradient λ Ω (θ − θ*) is added in closed form after the task's own
    gradient has been read, so that what is measured of the task (SI, RWalk) is never that of a penalty.
    No penalty before the first domain has ended; with λ = 0, plain training bit for bit.

    Memory: two copies of the trainable parameters, importance Ω and anchor θ*.
    """

    needs_domain_ends = True
    consolidates_base = True
    works_with_adapters = False
    arguments = PenaltyArguments
    kept = ("importance", "anchor")

    def __init__(self):
        self.importance: Tensors = {}
        self.anchor: Tensors = {}

    @torch.no_grad()
    def change_gradient(self) -> None:
        """Add λ Ω (θ − θ*), so that the gradient read before is the task's alone."""
        weight = self.args.penalty_weight * self.trainer.gradient_scale
        if weight and self.importance:
            values = self.values()
            for name, gradient in self.gradients().items():
                if name in self.importance:
                    gradient.addcmul_(self.importance[name], values[name] - self.anchor[name], value=weight)

    @torch.no_grad()
    def value(self) -> float:
        """(λ/2) Σ Ω (θ − θ*)² at the present weights."""
        parts = (
            (self.importance[name] * (value - self.anchor[name]).square()).sum()
            for name, value in self.values().items()
            if name in self.importance
        )
        total = sum(parts, torch.zeros((), device=self.args.device))
        return self.args.penalty_weight / 2 * float(self._summed(total))

    def _summed(self, value: torch.Tensor) -> torch.Tensor:
        return over_slices(value, self.parameters().values()) if self._in_slices else value

    def logs(self) -> dict[str, float]:
        return {"penalty": self.value()} if self.importance else {}

    @torch.no_grad()
    def end_domain(self) -> None:
        importance = self.measure()
        self.trainer.check_finite(importance, f"importance ({type(self).__name__.lower()})")
        self.accumulate(importance)

    @abstractmethod
    def measure(self) -> Tensors:
        """Importance of every parameter to the domain just learned."""

    def accumulate(self, importance: Tensors) -> None:
        """Add up importances, and hold on to the parameters as they are now."""
        for name, value in self.values().items():
            old = self.importance.get(name)
            self.importance[name] = importance[name] if old is None else old + importance[name]
            self.anchor[name] = value.clone()

    def load_state_dict(self, state: Tensors) -> None:
        """Raises `UserError` where the importance of a parameter is there, and not its anchor."""
        super().load_state_dict(state)
        if alone := sorted(self.importance.keys() ^ self.anchor.keys()):
            raise UserError(
                f"{self.file_name} is not whole: of '{alone[0]}' it has the importance or the anchor alone"
            )

    def state(self) -> dict[str, Any]:
        if not self.importance:
            return {}
        total = sum(float(value.sum()) for value in self.importance.values())
        total = float(self._summed(torch.tensor(total, dtype=torch.float64, device=self.args.device)))
        return {f"{type(self).__name__.lower()}_importance_sum": total}
