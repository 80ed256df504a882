"""GEM: no step may raise the loss on any earlier domain's memory (Lopez-Paz and Ranzato, arXiv 1706.08840)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import nnls

from das_lm.errors import UserError
from das_lm.methods.agem import AGEM, add_to_gradient, gradient, memory_gradient
from das_lm.methods.arguments import MemoryArguments, NotNegative, knob
from das_lm.methods.base import Engine, Method
from das_lm.methods.memory import Reservoir


@dataclass
class GEMArguments(MemoryArguments):
    gem_margin: NotNegative = knob(
        0.0, "Least value of every multiplier in GEM's projection (Lopez-Paz and Ranzato, 1706.08840, section 3)."
    )


class GEM(Method):
    """
    Gradient episodic memory: where the gradient g disagrees with that of some earlier domain's memory, ⟨g, g_k⟩ < 0,
    the step follows the nearest gradient that disagrees with none (section 3; see [`multipliers`]). The promise holds
    for the gradient: what rescales the step (Adam, a mask) can break it.

    `gem_margin` pushes the step towards improving earlier domains. The paper takes a memory's gradient over all its
    rows, at every step; here it is that of a batch of them.

    Memory: `memory_size` rows of every earlier domain, and a copy of the gradients for each; a forward and a backward
    pass more for each per step.
    """

    needs_domain_ends = True
    holds_training_text = True
    works_sharded = False
    consolidates_base = True
    arguments = GEMArguments
    search_grid = ("gem_margin", (0.0, 0.5, 1.0, 2.0))
    order = 1

    def __init__(self):
        self.memories: list[Reservoir] = []

    def attach(self, trainer: Engine) -> None:
        """Raises `UserError` beside A-GEM."""
        if any(isinstance(other, AGEM) for other in trainer.methods):
            raise UserError(
                "method: 'agem' and 'gem' both project the gradient, and the second projection breaks the promise of "
                "the first; take one"
            )
        super().attach(trainer)

    @torch.no_grad()
    def change_gradient(self) -> None:
        """Project the gradient to the nearest one that raises the loss of no memory."""
        if not self.memories:
            return
        theirs = [
            memory_gradient(self.trainer, memory, f"memory {domain}") for domain, memory in enumerate(self.memories)
        ]
        margin = self.args.gem_margin * self.trainer.gradient_scale
        weights = multipliers(gradient(self.trainer), theirs, margin)
        for weight, change in zip(weights, theirs, strict=True):
            add_to_gradient(self.trainer, change, weight)

    def end_domain(self) -> None:
        memory = Reservoir(self.args.memory_size, self.args.seed)
        for rows in self.trainer.train_dataset.domains.values():
            memory.add(rows)
        self.memories.append(memory)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {
            f"{domain}.{name}": tensor
            for domain, memory in enumerate(self.memories)
            for name, tensor in memory.state_dict().items()
        }

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """One memory for each earlier domain. Raises `ValueError` for what is none."""
        self.memories = []
        while any(name.startswith(prefix := f"{len(self.memories)}.") for name in state):
            memory = Reservoir(self.args.memory_size, self.args.seed)
            own = {n.removeprefix(prefix): tensor for n, tensor in state.items() if n.startswith(prefix)}
            memory.load_state_dict(own, self.trainer)
            self.memories.append(memory)


def multipliers(
    gradient: Sequence[torch.Tensor], constraints: Sequence[Sequence[torch.Tensor]], margin: float = 0.0
) -> list[float]:
    """
    The v ≥ margin for which g̃ = g + Σ_k v_k g_k is shortest. Then ⟨g̃, g_k⟩ ≥ 0 for all k, and with margin 0 no such g̃
    is nearer to g. All 0 where no constraint is violated to begin with.

    This dual problem is one of non-negative least squares in v − margin. It depends on the products of the g_k and g
    alone: with their root, a matrix of K + 1 columns that has the same products, it is solved exactly.

    Args:
        gradient: g, a tensor for every parameter.
        constraints: g_k for every k, in the same order.
        margin: least value of every multiplier.
    """
    count = len(constraints)
    products = torch.zeros(count + 1, count + 1, dtype=torch.float64)
    for column, *others in zip(gradient, *constraints, strict=True):
        block = torch.stack([part.flatten() for part in (*others, column)]).double()  # [K + 1, values]
        products += (block @ block.T).cpu()
    if not products.isfinite().all():  # infinite in fp16: the step is skipped
        return [0.0] * count
    if (products[:count, count] >= 0).all():
        return [0.0] * count
    values, vectors = torch.linalg.eigh(products)
    root = (values.clamp(min=0).sqrt()[:, None] * vectors.T).numpy()
    matrix, vector = root[:, :count], root[:, count]
    solution, _ = nnls(matrix, -(vector + margin * matrix.sum(axis=1)), maxiter=100 * count)
    return (solution + margin).tolist()
