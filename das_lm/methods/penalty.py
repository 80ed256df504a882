"""Quadratic penalties: what EWC, MAS, SI, RWalk, SCP and L2 share."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import nn

from das_lm.errors import UserError
from das_lm.methods.base import Method

Tensors = dict[str, torch.Tensor]  # name of a parameter -> tensor of its shape


class Penalty(Method):
    """
    loss + (λ/2) Σ_i Ω_i (θ_i − θ*_i)², whose gradient λ Ω (θ − θ*) is added in closed form after the task's own
    gradient has been read, so that what is measured of the task (SI, RWalk) is never that of a penalty.
    No penalty before the first domain has ended; with λ = 0, plain training bit for bit.

    Memory: two copies of the trainable parameters, importance Ω and anchor θ*.
    """

    needs_domain_ends = True
    works_with_adapters = False

    def __init__(self):
        self.importance: Tensors = {}
        self.anchor: Tensors = {}

    @torch.no_grad()
    def change_gradient(self) -> None:
        weight = self.args.penalty_weight * self.trainer.gradient_scale
        for name, parameter in self.parameters().items():
            if weight and name in self.importance and parameter.grad is not None:
                parameter.grad.addcmul_(self.importance[name], parameter - self.anchor[name], value=weight)

    @torch.no_grad()
    def value(self) -> float:
        """(λ/2) Σ Ω (θ − θ*)² at the present weights."""
        total = sum(
            (self.importance[name] * (parameter - self.anchor[name]).square()).sum()
            for name, parameter in self.parameters().items()
            if name in self.importance
        )
        return self.args.penalty_weight / 2 * float(total)

    def logs(self) -> dict[str, float]:
        return {"penalty": self.value()} if self.importance else {}

    @torch.no_grad()
    def end_domain(self) -> None:
        self.accumulate(self.measure())

    @abstractmethod
    def measure(self) -> Tensors:
        """Importance of every parameter to the domain just learned."""

    def accumulate(self, importance: Tensors) -> None:
        """Add up importances, and hold on to the parameters as they are now."""
        for name, parameter in self.parameters().items():
            old = self.importance.get(name)
            self.importance[name] = importance[name] if old is None else old + importance[name]
            self.anchor[name] = parameter.detach().clone()

    def state_dict(self) -> Tensors:
        return {
            f"{kind}.{name}": tensor
            for kind in ("importance", "anchor")
            for name, tensor in getattr(self, kind).items()
        }

    def load_state_dict(self, state: Tensors) -> None:
        parameters = self.parameters()
        for kind in ("importance", "anchor"):
            setattr(self, kind, taken(state, kind, parameters, self.file_name))

    def state(self) -> dict[str, Any]:
        if not self.importance:
            return {}
        total = sum(float(value.sum()) for value in self.importance.values())
        return {f"{type(self).__name__.lower()}_importance_sum": total}


def taken(state: Tensors, kind: str, parameters: dict[str, nn.Parameter], file_name: str) -> Tensors:
    """
    The tensors `kind.<parameter>` of a method's state.

    Raises:
        UserError: they are of another model.
    """
    tensors = {name.removeprefix(f"{kind}."): tensor for name, tensor in state.items() if name.startswith(f"{kind}.")}
    for name, tensor in tensors.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            here = list(parameters[name].shape) if name in parameters else "absent"
            raise UserError(
                f"{file_name} does not fit the model: '{name}' is {list(tensor.shape)} there and {here} in the model"
            )
    return tensors
