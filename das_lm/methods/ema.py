"""EMA: a moving average of the weights, with which a domain ends."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from das_lm.methods.arguments import Arguments, Share, knob
from das_lm.methods.base import Method, Tensors


@dataclass
class EMAArguments(Arguments):
    ema_decay: Share = knob(0.999, "Decay per step of the moving average of the weights that ema ends a domain with.")


class EMA(Method):
    """
    θ̄ ← d θ̄ + (1 − d) θ after every step, starting at the weights before the domain; the domain ends with θ̄ (Polyak and
    Juditsky, 1992; as a guard against forgetting it is an interpolation that also averages the noise of the steps).

    Memory: one copy of the trainable parameters.
    """

    needs_domain_ends = True
    protects_base = True
    arguments = EMAArguments
    search_grid = ("ema_decay", (0.9, 0.99, 0.997, 0.999))
    order = 1
    kept = ("average",)

    def __init__(self):
        self.average: Tensors = {}

    def begin_domain(self) -> None:
        if not self.average:
            self.average = {name: value.clone() for name, value in self.values().items()}

    @torch.no_grad()
    def after_step(self) -> None:
        values = self.values()
        torch._foreach_lerp_([self.average[name] for name in values], list(values.values()), 1 - self.args.ema_decay)

    @torch.no_grad()
    def finish_weights(self) -> None:
        for name, value in self.values().items():
            value.copy_(self.average[name])
        self.average = {}
