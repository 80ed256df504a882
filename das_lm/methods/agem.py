"""A-GEM: no step may raise the loss on a memory of what came before (Chaudhry et al., arXiv 1812.00420)."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from das_lm.methods.arguments import MemoryArguments
from das_lm.methods.base import Engine
from das_lm.methods.memory import Reservoir
from das_lm.methods.replay import Replay
from das_lm.randomness import permutation


class AGEM(Replay):
    """
    Averaged gradient episodic memory: where the gradient g and that of a batch of the memory, g_mem, disagree,
    ⟨g, g_mem⟩ < 0, the step follows g − (⟨g, g_mem⟩ / ⟨g_mem, g_mem⟩) g_mem (equation 11), over all trainable
    parameters together, penalties included. The promise holds for the gradient: what rescales the step (Adam, a mask)
    can break it.

    Memory: `memory_size` rows, a uniform sample of all domains so far, and one copy of the gradients; a forward and a
    backward pass more per step.
    """

    works_sharded = False
    consolidates_base = True
    draws_remembered = False
    mixes = False
    arguments = MemoryArguments
    search_grid = None
    order = 1

    @torch.no_grad()
    def change_gradient(self) -> None:
        """Take out of the gradient what would raise the loss of the memory."""
        if not len(self.memory):
            return
        theirs = memory_gradient(self.trainer, self.memory, "memory")
        product = _dot(gradient(self.trainer), theirs)
        if product < 0:
            add_to_gradient(self.trainer, theirs, -float(product / _dot(theirs, theirs)))


def gradient(trainer: Engine) -> list[torch.Tensor]:
    """The gradient as it is: a tensor for every trainable parameter, in the model's order."""
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in _parameters(trainer)]


def add_to_gradient(trainer: Engine, change: list[torch.Tensor], weight: float) -> None:
    """Add weight × change to the gradient; a parameter that neither has a gradient nor gets one is left without."""
    for parameter, added in zip(_parameters(trainer), change, strict=True):
        if parameter.grad is not None:
            parameter.grad.add_(added, alpha=weight)
        elif weight and added.any():
            parameter.grad = weight * added


def memory_gradient(trainer: Engine, memory: Reservoir, name: str) -> list[torch.Tensor]:
    """
    The gradient of the loss on a batch of a memory, a tensor for every one of [`gradient`]: as many rows as a training
    batch of all processes, or all there are. Rows are a function of (seed, name, step) alone, their masks of the
    domains that are learned too.

    Args:
        name: of the memory.
    """
    args, step = trainer.args, trainer.state.global_step
    count = max(args.world_size, min(len(memory), args.per_device_train_batch_size * args.world_size))
    drawn = np.resize(permutation(len(memory), args.seed, name, step), count)[args.process_index :: args.world_size]
    data = trainer.train_dataset
    rows = [data.row(memory, (name, *data.domains), int(index), step) for index in drawn]
    batch = {key: value.to(args.device) for key, value in trainer.data_collator(rows).items()}
    with torch.enable_grad():
        return trainer.gradient_of(batch)


def _parameters(trainer: Engine) -> list[nn.Parameter]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _dot(first: list[torch.Tensor], second: list[torch.Tensor]) -> torch.Tensor:
    return sum(torch.dot(a.flatten().float(), b.flatten().float()) for a, b in zip(first, second, strict=True))
