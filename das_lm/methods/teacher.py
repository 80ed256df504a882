"""A frozen copy of the model, which teaches by its output distributions."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from das_lm.errors import UserError
from das_lm.methods.base import Engine, taken
from das_lm.model.objective import Output


class Teacher:
    """
    The model as it is now, in evaluation mode.

    Args:
        trainer: whose model is copied.
        state: weights to take instead, as [`state_dict`] gave them.
        file_name: where they are from, for a message.

    """

    def __init__(self, trainer: Engine, state: Mapping[str, torch.Tensor] | None = None, file_name: str = ""):
        self.trainer = trainer
        self.model = copy.deepcopy(trainer.model).eval().requires_grad_(False)
        self.criterion = trainer.criterion.of(self.model)
        if state is not None:
            weights = self._weights()
            for name, tensor in taken(state, "teacher", weights, file_name).items():
                weights[name].copy_(tensor)

    @staticmethod
    def check(args: Any) -> None:
        """Raises `UserError` where the student never has its distributions whole."""
        if args.chunked_cross_entropy:
            raise UserError(
                "chunked_cross_entropy: lwf, and self_replay with self_replay_target: distributions, need output "
                "distributions whole; leave it off, or use anchor"
            )

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, torch.Tensor]) -> Output:
        """The teacher's output on a batch."""
        with self.trainer.accelerator.autocast():
            return self.criterion(self.model, batch, self.trainer.args.chunked_cross_entropy)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Its weights, those that several modules share once."""
        return {f"teacher.{name}": tensor for name, tensor in self._weights().items()}

    def _weights(self) -> dict[str, torch.Tensor]:
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}


class AdapterOff:
    """
    The base model under a LoRA adapter, as a teacher that needs no memory: the adapter is off while it speaks.

    Args:
        trainer: whose model it is.
    """

    def __init__(self, trainer: Engine):
        self.trainer = trainer

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, torch.Tensor]) -> Output:
        """The output of the model without its adapter, dropout off."""
        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        was_training = model.training
        model.eval()
        with model.disable_adapter(), trainer.accelerator.autocast():
            output = trainer.criterion(model, batch, trainer.args.chunked_cross_entropy)
        model.train(was_training)
        return output

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Nothing: it is the model's own."""
        return {}
