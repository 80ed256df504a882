"""Replay: a share of every batch is earlier text (Ibrahim et al., arXiv 2403.08763)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from das_lm.errors import UserError
from das_lm.methods.arguments import MemoryArguments, Share, knob
from das_lm.methods.base import Engine, Method
from das_lm.methods.memory import Reservoir


@dataclass
class ReplayArguments(MemoryArguments):
    replay_ratio: Share = knob(
        0.05, "Share of the training rows that come from the memory (replay, self_replay; of both, each takes it)."
    )


class Replay(Method):
    """
    `replay_ratio` of the training rows come from a memory of `memory_size` rows, a uniform sample of all domains so
    far, and from what is remembered of the base model, by the weights of its sources. The number of steps stays, so
    that the domain itself is seen that much less: what a mix at a fixed budget is.
    Beside [`SelfReplay`], each takes that share.

    Memory: `memory_size` rows; no forward pass more.
    """

    needs_domain_ends = True
    holds_training_text = True
    arguments = ReplayArguments
    search_grid = ("replay_ratio", (0.1, 0.25, 0.5, 0.75))
    draws_remembered = True
    #: Whether the memory is trained on.
    mixes = True

    def __init__(self):
        self.memory: Reservoir | None = None

    def attach(self, trainer: Engine) -> None:
        """Raises `UserError` where several memories would take more than all rows."""
        memories = sum(isinstance(one, Replay) and one.mixes for one in trainer.methods)
        if memories > 1 and memories * trainer.args.replay_ratio > 1:
            raise UserError(
                f"replay_ratio: {trainer.args.replay_ratio} of the rows for each of {memories} memories is more than "
                f"all of them; write at most {1 / memories:.2g}"
            )
        if self.memory is None:
            self.memory = Reservoir(trainer.args.memory_size, trainer.args.seed)
        super().attach(trainer)

    def begin_domain(self) -> None:
        """What is remembered and the memory share the replayed rows, half and half if there are both."""
        past, own = self.trainer.remembered, type(self).__name__
        uses = self.draws_remembered and past is not None and past.for_all
        sources = {f"{own} {name}": one for name, one in past.sources.items()} if uses else {}
        memories = {name: (one.rows_to_train_on, one.weight) for name, one in sources.items() if one.weight}
        if self.mixes and len(self.memory):
            total = sum(weight for _, weight in memories.values()) or 1.0
            memories[own] = (self.memory, total)
        total = sum(weight for _, weight in memories.values())
        for name, (rows, weight) in memories.items():
            self.trainer.train_dataset.replay(name, rows, self.args.replay_ratio * weight / total)

    def end_domain(self) -> None:
        for rows in self.trainer.train_dataset.domains.values():
            self.memory.add(rows)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.memory.state_dict() if len(self.memory) else {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.memory.load_state_dict(state, self.trainer)
