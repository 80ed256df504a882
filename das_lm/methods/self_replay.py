"""Self-generated replay: the base model writes what it was trained on (arXiv 2605.26097)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from das_lm.errors import UserError
from das_lm.methods.arguments import knob
from das_lm.methods.base import Engine
from das_lm.methods.replay import Replay, ReplayArguments
from das_lm.methods.teacher import Teacher
from das_lm.methods.writing import Writer, WritingArguments
from das_lm.model.objective import Output


@dataclass
class SelfReplayArguments(ReplayArguments, WritingArguments):
    self_replay_target: Literal["tokens", "distributions"] = knob(
        "tokens", "What the base model's text teaches: its tokens, or the base model's output distributions."
    )


class SelfReplay(Replay):
    """
    Before the first domain the model writes `memory_size` blocks, at temperature 1: a causal one token by token from
    its start token, a masked one by Gibbs sampling from its own masked-token distributions. They are replayed in every
    domain as [`Replay`] does. Needs no old data, as DAS.

    With `self_replay_target="distributions"` a replayed token teaches the base model's distribution in place of the
    token that was drawn.

    Memory: `memory_size` blocks; with distributions one copy of the model, and a forward pass on the replayed rows.
    """

    needs_domain_ends = False
    protects_base = True
    arguments = SelfReplayArguments
    search_grid = None
    draws_remembered = False
    language_models_only = True
    name = "self_replay"
    holds_training_text = False

    def __init__(self):
        super().__init__()
        self.teacher: Teacher | None = None

    def attach(self, trainer: Engine) -> None:
        """Raises `UserError` for a module that writes no text."""
        if trainer.units is None:
            raise UserError("method: 'self_replay' needs a language model, which can write text; use 'replay'")
        super().attach(trainer)
        if self.args.self_replay_target == "distributions":
            Teacher.check(self.args)
        if trainer.is_sharded and self.args.self_replay_target == "distributions":
            raise UserError(
                "self_replay_target: 'distributions' keeps a copy of the model, and a sharded one cannot be copied: "
                "use 'tokens', or DDP"
            )

    def begin_domain(self) -> None:
        if not len(self.memory):
            if self.args.self_replay_target == "distributions":
                self.teacher = Teacher(self.trainer)
            self.memory.add(Writer(self.trainer).rows(self.args.memory_size))
        super().begin_domain()

    def change_losses(self, batch: Mapping[str, torch.Tensor], outputs: Output, losses: torch.Tensor) -> torch.Tensor:
        """Cross-entropy with the base model's distribution where a row is replayed from this memory."""
        if self.teacher is None:
            return losses
        written = batch["replayed_from"] == self.trainer.train_dataset.number_of(type(self).__name__)  # [rows]
        if not written.any():
            return losses
        chosen = written[outputs.rows[: len(losses)]]  # [predictions]
        rows = {name: batch[name][written] for name in ("input_ids", "attention_mask", "labels")}
        taught = self.teacher(rows).logits.float().softmax(-1)
        ours = F.cross_entropy(outputs.logits[: len(losses)][chosen].float(), taught, reduction="none")
        return losses.masked_scatter(chosen, ours)

    def end_domain(self) -> None:
        """The memory stays what the base model wrote."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {**super().state_dict(), **(self.teacher.state_dict() if self.teacher else {})}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        super().load_state_dict(state)
        if any(name.startswith("teacher.") for name in state):
            self.teacher = Teacher(self.trainer, state, self.file_name)
