"""Anchor: the base model's output distributions are held on text that it wrote (arXiv 2605.26097, 2509.04259)."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import nn

from das_lm.data.blocks import TrainingBlocks
from das_lm.data.collating import PaddingCollator
from das_lm.data.masking import labeling
from das_lm.errors import UserError
from das_lm.methods.arguments import NotNegative, knob
from das_lm.methods.base import Engine, Method
from das_lm.methods.memory import Reservoir
from das_lm.methods.teacher import Teacher
from das_lm.methods.writing import Writer, WritingArguments
from das_lm.model.objective import Output
from das_lm.randomness import addressed_seed


@dataclass
class AnchorArguments(WritingArguments):
    anchor_weight: NotNegative = knob(
        1.0, "λ of the KL divergence from the base model on what it wrote; a nat of it costs as much as λ of the loss."
    )
    anchor_share: Annotated[float, Interval(ge=0.01, le=1)] = knob(
        0.25, "Remembered rows per row of the domain. They come beside it: the domain is not seen less."
    )


class Anchor(Method):
    """
    loss + λ E KL(p_base(·|x) ‖ p_θ(·|x)) over the predicted tokens x of text that the base model writes before the
    first domain ([`Writer`]): on such text this is how much its loss rises, in nats per token. The base model is the
    teacher in every domain, so that what is lost does not add up.

    Remembered rows come beside the domain's, in the same forward pass: each row of the domain brings one along with a
    chance of `anchor_share`, a pure function of (seed, domain, epoch, row), so that a step is the same on any number
    of processes and batches. The mean is over as many predictions as are expected, `anchor_share` × the domain's.

    Memory: `memory_size` blocks, one copy of the model, and a forward pass of it on the remembered rows.
    """

    #: Before `das`, whose gates then know how many rows there are.
    order = -1
    protects_base = True
    works_sharded = False
    language_models_only = True
    arguments = AnchorArguments

    def __init__(self):
        self.memory: Reservoir | None = None
        self.teacher: Teacher | None = None

    def attach(self, trainer: Engine) -> None:
        """Raises `UserError` for a module that writes no text, and where the loss is computed in chunks."""
        if trainer.units is None:
            raise UserError("method: 'anchor' needs a language model, which can write text; use 'replay'")
        Teacher.check(trainer.args)
        if self.memory is None:
            self.memory = Reservoir(trainer.args.memory_size, trainer.args.seed)
        super().attach(trainer)

    def begin_domain(self) -> None:
        """Copy the model and let it write, unless that was done before an earlier domain."""
        if self.teacher is None:
            self.teacher = Teacher(self.trainer)
            self.memory.add([{"input_ids": block} for block in Writer(self.trainer).blocks()])
        tokenizer, args = self.trainer.processing_class, self.args
        masking = labeling(tokenizer, self.trainer.criterion.causal, args.mlm_probability)
        self._blocks, self._collator = TrainingBlocks({}, masking, args.seed), PaddingCollator(tokenizer)

    def add_rows(self, batch: dict[str, torch.Tensor], until_backward: ExitStack) -> dict[str, torch.Tensor]:
        """Append the remembered rows that this batch's rows bring along."""
        self._first, self._remembered = len(batch["input_ids"]), self._chosen(batch["example_id"].tolist())
        if self._remembered is None:
            return batch
        columns = {name: (batch[name], self._remembered[name]) for name in ("input_ids", "attention_mask", "labels")}
        length = max(rows.shape[1] for rows in columns["input_ids"])
        padding = self._collator.padding
        return {
            **batch,
            **{
                name: torch.cat([F.pad(rows, (0, length - rows.shape[1]), value=padding[name]) for rows in pair])
                for name, pair in columns.items()
            },
        }

    def _chosen(self, examples: list[int]) -> dict[str, torch.Tensor] | None:
        """The remembered rows that go with rows of the domain, as a batch; `None` where there is none."""
        args, epoch, rows = self.args, int(self.trainer.state.epoch or 0), []
        for example in examples:
            draw = addressed_seed(args.seed, "anchor", self.trainer.domain, epoch, example)
            if draw % 2**32 < args.anchor_share * 2**32:
                index = (draw >> 32) % len(self.memory)
                row = self._blocks.row(self.memory, ("anchor", self.trainer.domain, example), index, epoch)
                rows.append({name: row[name] for name in ("input_ids", "labels")})
        if not rows or args.anchor_weight == 0:
            return None
        return {name: column.to(args.device) for name, column in self._collator(rows).items()}

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor], outputs: Output) -> dict[str, torch.Tensor]:
        """λ times the divergence of each prediction in the remembered rows, [predictions], over their share."""
        if self._remembered is None:
            return {"anchor": outputs.hidden.new_zeros(0, dtype=torch.float32)}
        last = self._first + len(self._remembered["input_ids"])
        theirs = (outputs.rows >= self._first) & (outputs.rows < last)
        ours = F.log_softmax(outputs.logits[theirs].float(), dim=-1)
        taught = F.log_softmax(self.teacher(self._remembered).logits.float(), dim=-1)
        divergence = F.kl_div(ours, taught, reduction="none", log_target=True).sum(-1)
        return {"anchor": self.args.anchor_weight / self.args.anchor_share * divergence}

    # ---- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {**self.memory.state_dict(), **self.teacher.state_dict()} if self.teacher else {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.memory.load_state_dict(state, self.trainer)
        self.teacher = Teacher(self.trainer, state, self.file_name)
