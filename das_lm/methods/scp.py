"""SCP: sliced Cramér preservation (Kolouri et al., ICLR 2020, openreview BJge3TNKwH)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from das_lm.methods.arguments import Count, Measuring, knob
from das_lm.methods.ewc import FISHER_EPOCH
from das_lm.methods.penalty import Penalty, PenaltyArguments, Tensors


@dataclass
class SCPArguments(PenaltyArguments, Measuring):
    scp_projections: Count = knob(100, "Random directions per batch from which SCP estimates its sketch.")


class SCP(Penalty):
    """
    Ω = mean over random unit vectors ξ of (∂⟨ξ, f̄⟩/∂θ)², f̄ the mean output (logits) over the data: parameters that
    move the distribution of the outputs in any direction are held. Needs no labels. Summed over domains.

    Memory: two copies of the trainable parameters; while a domain is consolidated, as many more as directions go
    through one backward pass together (at most `MAX_ELEMENTS` numbers).
    """

    works_sharded = False
    arguments = SCPArguments
    search_grid = ("penalty_weight", (1e-1, 1.0, 10.0, 100.0, 1e3))
    MAX_ELEMENTS = 50_000_000

    def measure(self) -> Tensors:
        """The mean over `scp_projections` random directions, as many at a time as fit."""
        trainer, parameters = self.trainer, self.parameters()
        size = sum(parameter.numel() for parameter in parameters.values())
        total = self.args.scp_projections
        chunk = max(1, min(total, self.MAX_ELEMENTS // size))
        squares = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        with trainer.private_randomness(FISHER_EPOCH):
            seed = int(torch.randint(2**62, ()))
        generator = torch.Generator().manual_seed(seed)
        directions = None
        for start in range(0, total, chunk):
            count = min(chunk, total - start)
            gradients: list[torch.Tensor] = []
            directions, predictions = None, torch.zeros((), device=trainer.args.device)
            for batch in trainer.importance_batches(FISHER_EPOCH):
                summed, number = self._summed_output(batch)  # [classes]
                if directions is None:
                    drawn = torch.randn(count, len(summed), generator=generator)
                    directions = (drawn / drawn.norm(dim=1, keepdim=True)).to(summed.device)
                here = torch.autograd.grad(
                    summed, list(parameters.values()), directions, is_grads_batched=True, allow_unused=True
                )
                here = [
                    p.new_zeros(count, *p.shape) if g is None else g
                    for g, p in zip(here, parameters.values(), strict=True)
                ]
                gradients = here if not gradients else torch._foreach_add(gradients, here)
                predictions += number
            predictions = trainer.accelerator.reduce(predictions, "sum")
            for name, gradient in zip(squares, gradients, strict=True):
                mean = trainer.accelerator.reduce(gradient, "sum") / predictions
                squares[name] += mean.square().sum(0) / total
        return squares

    @torch.enable_grad()
    def _summed_output(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        """Logits summed over the predictions of a batch, dropout off, and the number of predictions."""
        model = self.model
        was_training = model.training
        model.eval()
        with self.trainer.accelerator.autocast():
            logits = self.trainer.criterion(model, batch).logits
        logits = logits.float().masked_fill(logits <= torch.finfo(logits.dtype).min, 0)  # what pads a narrower head
        model.train(was_training)
        return logits.reshape(len(logits), -1).sum(0), len(logits)
