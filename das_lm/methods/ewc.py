"""EWC: the diagonal Fisher information says what a domain needs (Kirkpatrick et al., arXiv 1612.00796)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from das_lm.methods.arguments import FisherArguments, Measuring, Share, knob
from das_lm.methods.base import Engine
from das_lm.methods.penalty import Penalty, PenaltyArguments, Tensors
from das_lm.methods.per_example import PerExample
from das_lm.model.objective import Output
from das_lm.units.sharding import in_step

FISHER_EPOCH = -3  # address of the rows that the Fisher is measured on


@dataclass
class EWCArguments(PenaltyArguments, FisherArguments, Measuring):
    ewc_mode: Literal["separate", "online"] = knob(
        "separate",
        "'separate' keeps one penalty per domain (Kirkpatrick et al., 1612.00796), 'online' one anchor and a decaying "
        "sum of Fishers (Schwarz et al., 1805.06370).",
    )
    ewc_decay: Share = knob(0.95, "γ of online EWC: F ← γ F + F_new.")


class EWC(Penalty):
    """
    Ω = E[(∂ log p(y|x)/∂θ)²], squared per example, at the end of every domain; for a language model x is a sequence
    and log p the sum over its masked tokens.

    `ewc_mode="separate"` keeps a penalty per domain, Σ_t F_t (θ − θ_t)². Their sum is again quadratic: up to a
    constant (Σ F_t) (θ − μ)² with μ = Σ F_t θ_t / Σ F_t, so that the memory does not grow with the
    domains. `"online"` (Schwarz et al., arXiv 1805.06370) is F ← γ F + F_new around the latest parameters.

    Memory: two copies of the trainable parameters; under FSDP2, of each process's slice, and while the Fisher is
    measured the largest single parameter, whole, for each process.
    """

    arguments = EWCArguments
    search_grid = ("penalty_weight", (1.0, 10.0, 100.0, 1e3, 1e4))

    def measure(self) -> Tensors:
        trainer = self.trainer
        with trainer.private_randomness(FISHER_EPOCH):
            return fisher(trainer, trainer.importance_batches(FISHER_EPOCH), self.args.fisher)

    def accumulate(self, importance: Tensors) -> None:
        """Online: one decaying sum. Separate: one penalty that equals the sum of all, up to a constant."""
        online = self.args.ewc_mode == "online"
        for name, value in self.values().items():
            now, new = value.clone(), importance[name]
            old = self.importance.get(name)
            if old is None:
                self.importance[name], self.anchor[name] = new, now
            elif online:
                self.importance[name], self.anchor[name] = self.args.ewc_decay * old + new, now
            else:
                total = old + new
                share = torch.where(total > 0, new / total, 1.0)
                self.importance[name], self.anchor[name] = total, torch.lerp(self.anchor[name], now, share)


def fisher(trainer: Engine, batches: Iterable[Mapping[str, torch.Tensor]], labels: str) -> Tensors:
    """
    Diagonal of the Fisher information, averaged over the rows of all processes: parameter -> E[(∂ log p/∂θ)²].

    Args:
        batches: this process's share.
        labels: `"true"` samples them from the model, `"empirical"` takes those of the data.
    """

    def losses(output: Output, rows: int) -> torch.Tensor:
        if labels == "true":
            output.targets = sampled_targets(output)
        return output.row_sums(rows)

    return per_row_mean(trainer, batches, losses, "square")


def per_row_mean(trainer: Engine, batches: Iterable, losses, statistic: str) -> Tensors:
    """
    Mean over the rows of all processes of each row's own |∂ℓ/∂θ| (`"absolute"`) or (∂ℓ/∂θ)² (`"square"`), dropout off.

    Args:
        losses: (output, rows) -> ℓ of each row, shape [rows].

    Returns:
        parameter -> mean; of a sharded one, for this process's slice.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    was_training = model.training
    model.eval()
    gradients = PerExample(model, statistic)
    try:
        for batch, counts in in_step(batches, model):
            rows = len(next(iter(batch.values())))
            with trainer.accelerator.autocast():
                gradients.add(
                    rows,
                    lambda batch=batch, rows=rows: losses(trainer.criterion(model, batch), rows),
                    trainer.criterion.flattened(batch),
                    counts,
                )
    finally:
        model.train(was_training)
    reduce = trainer.accelerator.reduce
    count = reduce(torch.tensor(float(gradients.examples), device=trainer.args.device), "sum")
    if gradients.is_sharded:  # each process has summed up its slices over all of them
        return {name: total / count for name, total in gradients.sums.items()}
    return {name: reduce(total, "sum") / count for name, total in gradients.sums.items()}


@torch.no_grad()
def sampled_targets(output: Output) -> torch.Tensor:
    """Targets drawn from the model's own distribution: softmax, or a Gaussian of variance ½ (see `Output.losses`)."""
    if output.classifies:
        return torch.multinomial(output.logits.float().softmax(-1), 1).squeeze(-1)
    mean = output.logits.float().reshape(output.targets.shape)
    return mean + torch.randn_like(mean) * 0.5**0.5
