"""SI: what lowered the loss on the way is important (Zenke et al., arXiv 1703.04200)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from das_lm.methods.arguments import Positive, knob
from das_lm.methods.penalty import Penalty, PenaltyArguments, Tensors


class PathIntegral(Penalty):
    """Keeps ω = −Σ_steps g·Δθ of every parameter, g the gradient of the task's loss alone, before clipping and without
    any penalty."""

    kept = (*Penalty.kept, "path")

    def __init__(self):
        super().__init__()
        self.path: Tensors = {}

    def begin_domain(self) -> None:
        if not self.path:  # otherwise the domain goes on after an interruption
            self.path = {name: torch.zeros_like(value) for name, value in self.values().items()}

    @torch.no_grad()
    def read_gradient(self) -> None:
        scale = self.trainer.gradient_scale
        self._gradient = {name: gradient / scale for name, gradient in self.gradients().items()}

    @torch.no_grad()
    def before_step(self) -> None:
        self._before = {name: value.clone() for name, value in self.values().items()}

    @torch.no_grad()
    def after_step(self) -> None:
        for name, value in self.values().items():
            moved = value - self._before[name]
            if name in self._gradient:  # a step that the gradient scaler skipped may have had infinite ones
                self.path[name].sub_(torch.where(moved == 0, 0, self._gradient[name] * moved))
        self._gradient, self._before = {}, {}


@dataclass
class SIArguments(PenaltyArguments):
    si_damping: Positive = knob(0.1, "ξ of SI (Zenke et al., 1703.04200, equation 5).")


class SI(PathIntegral):
    """
    Synaptic intelligence: the path integral ω (equation 4) becomes Ω += max(0, ω) / ((Δθ_domain)² + ξ) (equation 5).
    The paper writes the penalty without the ½: its λ is half of `penalty_weight`.

    Memory: six copies of the trainable parameters: importance, anchor, ω, the domain's start, and during a step the
    gradient and the parameters before it.
    """

    consolidates_base = False  # it measures the path of training, and has not seen the base model's
    arguments = SIArguments
    search_grid = ("penalty_weight", (1.0, 10.0, 100.0, 1e3, 1e4))
    kept = (*PathIntegral.kept, "start")

    def __init__(self):
        super().__init__()
        self.start: Tensors = {}

    def begin_domain(self) -> None:
        if not self.path:
            self.start = {name: value.clone() for name, value in self.values().items()}
        super().begin_domain()

    def finish_weights(self) -> None:
        """ω / (Δθ² + ξ), of what lowered the loss; Δθ is where the steps have led, whatever is made of it now."""
        self._measured = {
            name: self.path[name].clamp(min=0) / ((value - self.start[name]).square() + self.args.si_damping)
            for name, value in self.values().items()
        }

    def measure(self) -> Tensors:
        measured, self._measured, self.path, self.start = self._measured, {}, {}, {}
        return measured
