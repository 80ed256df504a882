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

    Raises:
        UserError: the student computes its distributions in chunks, and never has them.
    """

    def __init__(self, trainer: Engine, state: Mapping[str, torch.Tensor] | None = None, file_name: str = ""):
        self.check(trainer.args)
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
                "chunked_cross_entropy: a method that teaches output distributions (anchor, lwf, self_replay with "
                "self_replay_target: distributions) needs them whole; leave it off"
            )

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, torch.Tensor]) -> Output:
        """The teacher's output on a batch."""
        with self.trainer.accelerator.autocast():
            return self.criterion(self.model, batch)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Its weights, those that several modules share once."""
        return {f"teacher.{name}": tensor for name, tensor in self._weights().items()}

    def _weights(self) -> dict[str, torch.Tensor]:
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
