"""What is no finite number stops the run before it reaches the weights or a file."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from das_lm.errors import NotFinite
from das_lm.files import newest_checkpoint
from das_lm.units.sharding import full, local, named_parameters

if TYPE_CHECKING:
    from das_lm.training.trainer import ContinualTrainer


class Guard:
    """The parts of a trainer's loss: their means, to log, and whether they and the gradient are finite."""

    def __init__(self, trainer: ContinualTrainer):
        self.trainer = trainer
        self.begin()

    def begin(self) -> None:
        """Forget the parts of an earlier run."""
        self._sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=self.trainer.args.device))
        self._of_step: list[tuple[str, torch.Tensor]] = []
        self.since = 0  # the step up to which the parts have been logged

    def note(self, name: str, part: torch.Tensor) -> None:
        """Take down a part of the loss, a scalar."""
        self._sums[f"loss_{name}"] += part.detach()
        self._of_step.append((f"loss_{name}", part.detach()))

    def means(self, step: int) -> dict[str, float]:
        """Return the mean of every part over the steps since the last call, up to `step`."""
        steps, means = max(1, step - self.since), {}
        for name, total in self._sums.items():
            means[name] = self.trainer.accelerator.reduce(total, "mean").item() / steps
            total.zero_()
        self.since = step
        return means

    def check_step(self, grad_norm: torch.Tensor) -> None:
        """
        Look at every part of the loss and at the gradient, with one transfer from the device for a whole step.

        Raises:
            NotFinite: one of them is not. A gradient that overflowed in fp16 passes: the scaler skips its step.
        """
        trainer, grad_norm = self.trainer, full(grad_norm)
        names = [name for name, _ in self._of_step]
        parts = [part.float() for _, part in self._of_step]
        values = torch.stack([*parts, grad_norm.float().to(trainer.args.device)])
        self._of_step.clear()
        *losses, norm = values.tolist()
        if not math.isfinite(norm) and trainer.accelerator.num_processes > 1:  # as in all of them: agree on the part
            *losses, norm = trainer.accelerator.reduce(values, "sum").tolist()
        broken = {name: value for name, value in zip(names, losses, strict=True) if not math.isfinite(value)}
        if broken:
            raise self._not_finite(", ".join(broken), "loss", next(iter(broken.values())))
        # Scaled by less than 1, a gradient is not infinite because of fp16.
        if not math.isfinite(norm) and (trainer.accelerator.scaler is None or trainer.gradient_scale < 1):
            added = ", ".join(name for name, value in trainer.figures().items() if not math.isfinite(value))
            raise self._not_finite(added or "the loss is finite", "gradient", norm)

    def _not_finite(self, part: str, what: str, value: float) -> NotFinite:
        return NotFinite(
            f"{part}: the {what} of domain '{self.trainer.domain}' is {value} at step "
            f"{self.trainer.state.global_step + 1}; try a smaller learning_rate, a smaller max_grad_norm, or bf16 "
            f"instead of fp16{self._last_good_weights()}"
        )

    def _last_good_weights(self) -> str:
        """Where to begin again. Resuming would come to the same step."""
        trainer = self.trainer
        found = newest_checkpoint(trainer.args.output_dir)
        if found is None and trainer.state.global_step:
            found = getattr(trainer.accelerator.unwrap_model(trainer.model), "name_or_path", None)
        return f". {found} holds the last good weights: start a new run there (--model_name_or_path)" if found else ""

    def check_weights(self) -> None:
        """Check the trainable weights, before they are saved or consolidated. Raises `NotFinite`."""
        weights = named_parameters(self.trainer.accelerator.unwrap_model(self.trainer.model))
        self.check({name: weight for name, weight in weights.items() if weight.requires_grad}, "value")

    def check(self, tensors: Mapping[str, torch.Tensor], what: str) -> None:
        """
        Check what nothing would make whole again once it is kept: weights, importance.

        Args:
            tensors: by the names of parameters or groups of units; the same names in every process.
            what: they are.

        Raises:
            NotFinite: one of them holds NaN or infinity.
        """
        trainer = self.trainer
        finite = torch.stack([local(tensor.detach()).isfinite().all() for tensor in tensors.values()])
        everywhere = trainer.accelerator.reduce(finite.to(trainer.args.device).float(), "mean").tolist()
        broken = [name for name, share in zip(tensors, everywhere, strict=True) if share < 1]
        if broken:
            raise NotFinite(
                f"domain '{trainer.domain}', after step {trainer.state.global_step}: the {what} of {len(broken)} of "
                f"{len(tensors)} tensors, first of '{broken[0]}', is NaN or infinite, and is not kept; try a smaller "
                f"learning_rate, or bf16 instead of fp16{self._last_good_weights()}"
            )
