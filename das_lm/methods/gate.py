"""Gate: a token counts by what the model says of it (arXiv 2502.02797, arXiv 2501.14315, arXiv 2601.02151)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from das_lm.errors import UserError
from das_lm.methods.arguments import Arguments, Positive, knob
from das_lm.methods.base import Engine, Method, Tensors
from das_lm.methods.teacher import AdapterOff, Teacher
from das_lm.model.objective import Output

#: Most likely tokens over which 'entropy' takes the entropy.
TOP = 20


@dataclass
class GateArguments(Arguments):
    token_weighting: Literal["none", "flow", "stm", "entropy"] = knob(
        "flow",
        "Weight of a token's loss: 'flow', exp(-ℓ₀ / τ) of the base model's own loss ℓ₀, τ its median over the batch "
        "(FLOW, 2502.02797, on tokens); 'stm', 0 where the base model's perplexity is above stm_perplexity "
        "(2501.14315); 'entropy', the entropy of the model's own most likely tokens over its maximum (2601.02151).",
    )
    stm_perplexity: Positive = knob(
        2.5, "With 'stm', tokens of a larger perplexity under the base model teach nothing."
    )


class Gate(Method):
    """
    The loss of each prediction is weighted, so that what contradicts the model most pulls least. The weights are no
    part of the gradient, and the mean is still over all predictions.

    Memory: 'flow' and 'stm' keep one copy of the base model (none with a LoRA adapter in its first domain), which runs
    on the domain's own rows; 'entropy' nothing.
    """

    protects_base = True
    works_sharded = False
    language_models_only = True
    arguments = GateArguments

    def __init__(self):
        self.teacher: Teacher | AdapterOff | None = None

    def attach(self, trainer: Engine) -> None:
        """Raises `UserError` for a module, and where no distributions are at hand."""
        if trainer.units is None:
            raise UserError("method: 'gate' weights the tokens of a language model; leave it out")
        if trainer.args.chunked_cross_entropy:
            raise UserError("chunked_cross_entropy: the method 'gate' looks at distributions; leave one of them out")
        super().attach(trainer)

    def begin_domain(self) -> None:
        """Keep the base model, if its loss is asked for."""
        if self.teacher is None and self.args.token_weighting in ("flow", "stm"):
            self.teacher = Teacher(self.trainer)

    @torch.no_grad()
    def weights(self, batch: dict[str, torch.Tensor], outputs: Output) -> torch.Tensor:
        """The weight of each prediction, in [0, 1], shape [predictions]."""
        args = self.args
        if args.token_weighting == "entropy":
            top = outputs.logits.float().topk(min(TOP, outputs.logits.shape[-1]), dim=-1).values
            p = top.softmax(-1)
            return -(p * p.clamp(min=1e-30).log()).sum(-1) / math.log(top.shape[-1])
        known = self.teacher({name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).losses()
        if args.token_weighting == "stm":
            return (known <= math.log(args.stm_perplexity)).float()
        return torch.exp(-known / known.median().clamp(min=1e-6)) if len(known) else known

    def change_losses(self, batch: dict[str, torch.Tensor], outputs: Output, losses: torch.Tensor) -> torch.Tensor:
        """Each loss times its weight."""
        return losses if self.args.token_weighting == "none" else losses * self.weights(batch, outputs)

    def state_dict(self) -> Tensors:
        return self.teacher.state_dict() if self.teacher else {}

    def load_state_dict(self, state: Tensors) -> None:
        self.teacher = Teacher(self.trainer, state, self.file_name)
