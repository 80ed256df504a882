"""MAS: what changes the output is important, whatever the labels (Aljundi et al., arXiv 1711.09601)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from das_lm.methods.arguments import Measuring
from das_lm.methods.ewc import FISHER_EPOCH, per_row_mean
from das_lm.methods.penalty import Penalty, PenaltyArguments, Tensors
from das_lm.model.objective import Output


@dataclass
class MASArguments(PenaltyArguments, Measuring):
    pass


class MAS(Penalty):
    """
    Memory aware synapses: Ω = mean over x of |∂‖f(x)‖²/∂θ| (equation 5), f the logits, summed over domains. The paper
    writes the penalty without the ½: its λ is half of `penalty_weight`.

    Memory: two copies of the trainable parameters.
    """

    arguments = MASArguments
    search_grid = ("penalty_weight", (1e-3, 1e-2, 1e-1, 1.0, 10.0))

    def measure(self) -> Tensors:
        trainer = self.trainer
        return per_row_mean(trainer, trainer.importance_batches(FISHER_EPOCH), squared_outputs, "absolute")


def squared_outputs(output: Output, rows: int) -> torch.Tensor:
    """‖f(x)‖² of each row, shape [rows]; of a language model summed over the predicted tokens."""
    logits = output.logits.float()
    logits = logits.masked_fill(logits <= torch.finfo(output.logits.dtype).min, 0)  # what pads a narrower head
    squares = logits.square().flatten(1).sum(1)  # [predictions]
    return squares.new_zeros(rows).index_add(0, output.rows, squares)
