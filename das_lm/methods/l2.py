"""L2: every parameter is held to its value after the previous domain."""

import torch

from das_lm.methods.penalty import Penalty, Tensors


class L2(Penalty):
    """The baseline of Kirkpatrick et al. (arXiv 1612.00796): Ω = 1, θ* the parameters after the last domain."""

    search_grid = ("penalty_weight", (1e-3, 1e-2, 1e-1, 1.0, 10.0))

    def measure(self) -> Tensors:
        return {name: torch.ones_like(value) for name, value in self.values().items()}

    def accumulate(self, importance: Tensors) -> None:
        self.importance = importance
        self.anchor = {name: value.clone() for name, value in self.values().items()}
