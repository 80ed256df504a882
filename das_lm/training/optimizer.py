"""The optimizer of a trainer, and what of the model it trains."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from das_lm.training.measuring import MeasuringTrainer
from das_lm.units.sharding import named_parameters


class OptimizingTrainer(MeasuringTrainer):
    """The part of a [`ContinualTrainer`] that makes the optimizer."""

    _frozen: set[str] = frozenset()  # names of parameters

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with a learning rate of its own for the parameters that are no units."""
        is_given, scale = self.optimizer is not None, self.args.non_unit_lr_scale
        named_parameters(self.model)  # of a sharded model, the slices are in place now
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        if not is_given and scale != 1:
            scale_learning_rate(optimizer, self._non_units(), scale)
        self._parameter_groups = [list(group["params"]) for group in optimizer.param_groups]
        return optimizer

    def _non_units(self) -> list[nn.Parameter]:
        """The trainable parameters that belong to no unit: embeddings, norms, LM head."""
        owned = self.units.owned_parameters()
        named = named_parameters(self.units.model)
        return [parameter for name, parameter in named.items() if name not in owned and parameter.requires_grad]

    def freeze(self) -> None:
        """Where their learning rate is 0, the parameters that are no units need no gradient while training."""
        others = {id(one) for one in self._non_units()} if self.args.non_unit_lr_scale == 0 else set()
        self._frozen = {name for name, one in named_parameters(self.model).items() if id(one) in others}
        self._set_frozen(True)

    def unfreeze(self) -> None:
        """Training is over."""
        self._set_frozen(False)
        self._frozen = set()

    def _set_frozen(self, frozen: bool) -> None:
        """By name: sharding puts other parameters in the place of these."""
        for name, parameter in named_parameters(self.model).items() if self._frozen else ():
            if name in self._frozen:
                parameter.requires_grad_(not frozen)

    @property
    def gradient_scale(self) -> float:
        """What the gradients have been multiplied by before the step (fp16), otherwise 1."""
        return self.accelerator.scaler.get_scale() if self.accelerator.scaler is not None else 1.0


def scale_learning_rate(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], scale: float) -> None:
    """Give some of an optimizer's parameters groups of their own, whose learning rate is `scale` times that of their
    present group."""
    scaled = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        split = [parameter for parameter in group["params"] if id(parameter) in scaled]
        if split:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in scaled]
            optimizer.add_param_group({**group, "params": split, "lr": group["lr"] * scale})
