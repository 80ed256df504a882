"""Pull-back: every so many steps the weights go a part of the way back to the base model's (arXiv 2501.05559)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from das_lm.methods.arguments import Arguments, Count, Share, knob
from das_lm.methods.base import Method, Tensors


@dataclass
class PullBackArguments(Arguments):
    pull_back_every: Count = knob(10, "p: after every p steps the weights are pulled back.")
    pull_back: Share = knob(0.1, "β of θ ← (1 - β) θ + β θ_base.")


class PullBack(Method):
    """
    θ ← (1 − β) θ + β θ_base after every p steps. θ_base are the weights before the first domain, in all domains.

    Memory: one copy of the trainable parameters.
    """

    #: After masks, which scale what the optimizer alone did.
    order = 1
    protects_base = True
    works_with_adapters = False
    arguments = PullBackArguments
    search_grid = ("pull_back", (0.03, 0.1, 0.3))
    kept = ("base",)
    name = "pull_back"

    def __init__(self):
        self.base: Tensors = {}

    def begin_domain(self) -> None:
        if not self.base:
            self.base = {name: value.clone() for name, value in self.values().items()}

    @torch.no_grad()
    def mask_step(self) -> None:
        """Pull back, if a stretch of p steps is over."""
        if (self.trainer.state.global_step + 1) % self.args.pull_back_every == 0:
            values = self.values()
            torch._foreach_lerp_(list(values.values()), [self.base[name] for name in values], self.args.pull_back)
