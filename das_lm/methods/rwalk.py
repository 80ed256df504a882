"""RWalk: the Fisher and the path, both kept while a domain is learned (Chaudhry et al., arXiv 1801.10112)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from das_lm.methods.arguments import Batches, Count, FisherArguments, Share, knob
from das_lm.methods.ewc import FISHER_EPOCH, fisher
from das_lm.methods.penalty import PenaltyArguments, Tensors
from das_lm.methods.si import PathIntegral
from das_lm.units.sharding import over_slices


@dataclass
class RWalkArguments(PenaltyArguments, FisherArguments, Batches):
    rwalk_decay: Share = knob(
        0.9, "Share of the old value in the moving average of the Fisher (Chaudhry et al., 1801.10112, equation 7)."
    )
    rwalk_interval: Count = knob(10, "Steps between two updates of that Fisher and of the path score.")


class RWalk(PathIntegral):
    """
    Riemannian walk: Ω = F + s. F is the diagonal Fisher, a moving average over training batches (equation 7); the
    score s adds up, over stretches of `rwalk_interval` steps, max(0, ΔL) / (½ F Δθ² + ε), the fall of the loss that a
    parameter brought (−Σ g·Δθ, g the unpenalised gradient) per distance moved in the Fisher's metric (equation 9). The
    last stretch ends with the domain, however short it is.
    Scores are halved and summed over domains. Both are normalised to a largest value of 1 before they are added, as in
    the authors' experiments. The paper writes the penalty without the ½: its λ is half of `penalty_weight`.

    Memory: nine copies of the trainable parameters: importance, anchor, Fisher, score, the stretch's fall and start,
    the old score, and during a step the gradient and the parameters before it.
    """

    consolidates_base = False  # it measures the path of training, and has not seen the base model's
    arguments = RWalkArguments
    search_grid = ("penalty_weight", (1e-1, 1.0, 10.0, 100.0, 1e3))
    kept = (*PathIntegral.kept, "fisher", "score", "old_score", "start")
    EPSILON = 1e-3

    def __init__(self):
        super().__init__()
        self.fisher: Tensors = {}
        self.score: Tensors = {}
        self.old_score: Tensors = {}
        self.start: Tensors = {}

    def begin_domain(self) -> None:
        if not self.score:
            for name, value in self.values().items():
                self.score[name] = torch.zeros_like(value)
                self.start[name] = value.clone()
        super().begin_domain()

    def loss(self, model: nn.Module, batch: Mapping[str, torch.Tensor], outputs: Any) -> dict[str, torch.Tensor]:
        self._batch = batch
        return {}

    @torch.no_grad()
    def after_step(self) -> None:
        """Every `rwalk_interval` steps, a stretch ends."""
        super().after_step()
        if (self.trainer.state.global_step + 1) % self.args.rwalk_interval == 0:
            self._end_stretch([self._batch])

    @torch.no_grad()
    def finish_weights(self) -> None:
        """The last stretch ends, where the steps have led. Its Fisher is of a batch that a resumed run has too."""
        if self.trainer.state.global_step % self.args.rwalk_interval:
            rows = self.args.importance_batch_size * self.args.world_size
            self._end_stretch(self.trainer.importance_batches(FISHER_EPOCH, rows))

    def _end_stretch(self, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """The Fisher's moving average, and the score of the path since the last time."""
        with self.trainer.private_randomness("rwalk", self.trainer.state.global_step):
            new = fisher(self.trainer, batches, self.args.fisher)
        decay = self.args.rwalk_decay
        for name, value in self.values().items():
            old = self.fisher.get(name)
            self.fisher[name] = new[name] if old is None else decay * old + (1 - decay) * new[name]
            distance = 0.5 * self.fisher[name] * (value - self.start[name]).square()
            self.score[name] += self.path[name].clamp(min=0) / (distance + self.EPSILON)
            self.path[name].zero_()
            self.start[name].copy_(value)

    def measure(self) -> Tensors:
        """Score and Fisher, each brought to [0, 1]; the score is the mean with that of the domains before."""
        for name, score in self.score.items():
            old = self.old_score.get(name)
            self.old_score[name] = score if old is None else (old + score) / 2
        scores, fishers = self._to_one(self.old_score), self._to_one(self.fisher)
        importance = {name: scores[name] + fishers.get(name, 0) for name in scores}
        self.score, self.path, self.start = {}, {}, {}
        return importance

    def accumulate(self, importance: Tensors) -> None:
        self.importance = importance  # the score and the Fisher have the past in them
        self.anchor |= {name: value.clone() for name, value in self.values().items()}

    def _to_one(self, tensors: Tensors) -> Tensors:
        """Divided by the largest value of all."""
        largest = torch.zeros((), device=self.args.device)
        for tensor in tensors.values():
            if tensor.numel():  # a slice may be empty
                largest = torch.maximum(largest, tensor.max())
        largest = float(over_slices(largest, self.parameters().values(), "max"))
        return {name: tensor / largest if largest > 0 else tensor for name, tensor in tensors.items()}
