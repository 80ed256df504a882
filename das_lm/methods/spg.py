"""SPG: soft-masking of parameter-level gradient flow (Konishi et al., ICML 2023, arXiv 2306.14775)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from das_lm.methods.arguments import Measuring, SoftMasking
from das_lm.methods.base import Engine, Method, Tensors
from das_lm.methods.das import GRADIENT_EPOCH
from das_lm.units.importance import normalize
from das_lm.units.soft_mask import ParameterMask, check_optimizer


@dataclass
class SPGArguments(SoftMasking, Measuring):
    pass


class SPG(Method):
    """
    Every parameter is held back in proportion to its importance γ to what came before: g ⊗ (1 − γ), or the step that
    the optimizer took, by `soft_mask_target`. The first domain is not masked.

    After a domain, for each parameter tensor, γ = |tanh(standardise(Σ_n ∂L(x_n)/∂θ))|, of the signed gradient summed
    over the data. A module with several heads (`heads`, and a method `head_logits(inputs, task)`) adds the cross-head
    importance: the same with the sum of the logits of every earlier task's head, on the present data, in the place of
    L; the largest value counts. So it does over the domains (section 3 of the paper). Its heads have no importance of
    their own and are held back by the mean γ of all other parameters.

    Memory: one copy of the trainable parameters for γ, another for the mask, with `soft_mask_target="update"` one more
    for the parameters before the step; after a domain, one gradient of the loss and one of each earlier head.
    """

    needs_domain_ends = True
    works_with_adapters = False
    works_sharded = False
    consolidates_base = True
    arguments = SPGArguments
    search_grid = ("soft_mask_strength", (0.25, 0.5, 0.75, 1.0))
    kept = ("importance",)

    def __init__(self):
        self.importance: Tensors = {}
        self.tasks: set[int] = set()  # whose heads have been learned

    def attach(self, trainer: Engine) -> None:
        super().attach(trainer)
        check_optimizer(self.args.optim.value, self.args.soft_mask_target)

    def begin_domain(self) -> None:
        """Mask by the importance of all tasks so far; the first task is unmasked."""
        strength, masked = self.args.soft_mask_strength, []
        if self.importance and strength > 0:
            mean = torch.cat([importance.flatten() for importance in self.importance.values()]).mean()
            for name, parameter in self.parameters().items():
                masked.append((parameter, strength * self.importance.get(name, mean)))
        self.mask = ParameterMask(masked, self.args.soft_mask_target)

    def before_step(self) -> None:
        self.mask.before_step()

    def mask_step(self) -> None:
        self.mask.mask_step()

    def end_domain(self) -> None:
        """Normalise the task's gradients, and keep the largest importance."""
        self.mask = None
        for gradients in self._summed_gradients():
            self.trainer.check_finite(gradients, "importance (spg)")
            for name, gradient in gradients.items():
                importance = normalize(gradient, "paper")
                old = self.importance.get(name)
                self.importance[name] = importance if old is None else torch.maximum(old, importance)

    # ---- importance ------------------------------------------------------------------------------------------------

    def _summed_gradients(self) -> list[Tensors]:
        """Signed gradients, summed over the data of all processes: of the loss, and of each earlier head's logits.
        Dropout off."""
        trainer, model = self.trainer, self.model
        parameters = {name: p for name, p in self.parameters().items() if not self._is_head(name)}
        earlier = sorted(self.tasks) if self._has_heads else []
        sums = [[torch.zeros_like(p, dtype=torch.float32) for p in parameters.values()] for _ in (None, *earlier)]
        was_training = model.training
        model.eval()
        with torch.enable_grad(), trainer.private_randomness(GRADIENT_EPOCH):
            for batch in trainer.importance_batches(GRADIENT_EPOCH):
                if "task" in batch:
                    self.tasks.update(batch["task"].unique().tolist())
                for total, task in zip(sums, (None, *earlier), strict=True):
                    with trainer.accelerator.autocast():
                        loss = self._loss(batch) if task is None else model.head_logits(batch["inputs"], task).sum()
                    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                    for one, gradient in zip(total, gradients, strict=True):
                        if gradient is not None:
                            one += gradient
        model.train(was_training)
        return [
            {name: trainer.accelerator.reduce(one, "sum") for name, one in zip(parameters, total, strict=True)}
            for total in sums
        ]

    def _loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The domain's loss, summed over the predictions of a batch."""
        output = self.trainer.criterion(self.model, batch)
        return output.losses().sum() if output.loss is None else output.loss * len(output.rows)

    # ---- parameters ------------------------------------------------------------------------------------------------

    @property
    def _has_heads(self) -> bool:
        return hasattr(self.model, "heads") and len(self.model.heads) > 1

    def _is_head(self, name: str) -> bool:
        return self._has_heads and name.startswith("heads.")

    # ---- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> Tensors:
        """With the tasks whose heads are known."""
        state = super().state_dict()
        if self.tasks:
            state["tasks"] = torch.tensor(sorted(self.tasks))
        return state

    def load_state_dict(self, state: Tensors) -> None:
        super().load_state_dict(state)
        self.tasks = set(state["tasks"].tolist()) if "tasks" in state else set()

    def state(self) -> dict[str, Any]:
        if not self.importance:
            return {}
        values = [importance.flatten() for importance in self.importance.values()]
        return {"spg_mean_importance": float(torch.cat(values).mean())}
