"""The moments of training that a method sees."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from das_lm.errors import UserError
from das_lm.files import write_tensors

if TYPE_CHECKING:
    from das_lm.trainer import ContinualTrainer


class Method:
    """
    A continual-learning method: plain training, unless it overrides a moment. The moments, in order:

    - [`attach`], once per trainer, and [`begin_domain`];
    - for every batch [`add_rows`], then [`change_losses`] and [`loss`];
    - for every optimizer step [`read_gradient`], [`change_gradient`], (clipping), [`before_step`], (the optimizer),
      [`after_step`];
    - [`finish_weights`], then [`end_domain`].

    Of several methods, all have had one moment before any has the next. What a method keeps travels in checkpoints, by
    [`state_dict`] and [`load_state_dict`]. One object may serve one domain after another, each with a trainer of its
    own; made by name, a method finds its state beside the weights that the model was loaded from.
    """

    #: Consolidates when a domain ends, so that domains must come one after the other.
    needs_domain_ends = False
    #: Learns every domain together with all before it.
    needs_earlier_domains = False
    #: Whether it can train a LoRA adapter. What remembers single parameters cannot: the next domain has others.
    works_with_adapters = True

    def attach(self, trainer: ContinualTrainer) -> None:
        """The trainer is made. Raises `UserError` for arguments or a model that the method cannot work with."""
        is_new = not hasattr(self, "trainer")
        self.trainer, self.args = trainer, trainer.args
        beside = self.beside(self.file_name)
        if is_new and beside:
            self.load(beside.parent)

    @property
    def model(self) -> nn.Module:
        """The model, without what wraps it for data parallelism."""
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name; those that several modules share once."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def beside(self, file_name: str) -> Path | None:
        """A file beside the weights that the model was loaded from, if it was loaded and there is one."""
        loaded_from = getattr(self.model, "name_or_path", "")
        path = Path(loaded_from, file_name)
        return path if loaded_from and path.is_file() else None

    def begin_domain(self) -> None:
        """A domain begins, or goes on after an interruption: model and optimizer are in place."""

    def add_rows(self, batch: dict[str, torch.Tensor], until_backward: ExitStack) -> dict[str, torch.Tensor]:
        """
        Rows to append to the batch, so that all goes through one `model(…)` call.

        Args:
            batch: of a language model `input_ids`, `attention_mask`, `labels`, each of shape [rows, tokens], and
                `example_id`, [rows]; of another module its own columns, and `example_id`.
            until_backward: contexts entered here stay open until the backward pass is over.

        Returns:
            the batch, with further rows whose labels are ignored or not, as the method needs.
        """
        return batch

    def change_losses(self, batch: dict[str, torch.Tensor], outputs: Any, losses: torch.Tensor) -> torch.Tensor:
        """
        Other losses for some predictions of a language model, shape [predictions]; by default those of the labels.

        Args:
            batch: the domain's own rows.
            outputs: of all rows, the domain's own first.
            losses: what the methods before this one made of them.
        """
        return losses

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor], outputs: Any) -> dict[str, torch.Tensor]:
        """
        What to add to the domain's loss: name -> scalar, a mean over the batch.

        Args:
            batch: the domain's own rows.
            outputs: of all rows, the domain's own first; see `das_lm.objective.Output`.
        """
        return {}

    def read_gradient(self) -> None:
        """The gradients are those of the loss: accumulated over batches, averaged over processes, not yet clipped, and
        (fp16) still times `trainer.gradient_scale`. They may be read, not changed."""

    def change_gradient(self) -> None:
        """The same moment, for adding the gradient of a penalty, or projecting."""

    def before_step(self) -> None:
        """The gradients are final: clipped (and, in fp16, no longer scaled, if `max_grad_norm` is above 0)."""

    def after_step(self) -> None:
        """The optimizer has stepped, or the gradient scaler has skipped the step."""

    def finish_weights(self) -> None:
        """The domain has been learned: the last chance to change the weights, before any method consolidates them."""

    def end_domain(self) -> None:
        """The weights are final: consolidate."""

    # ---- state ----------------------------------------------------------------------------------------------------

    @property
    def file_name(self) -> str:
        """Name of the method's file in a checkpoint."""
        return f"{type(self).__name__.lower()}.safetensors"

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What has to survive an interruption, or the end of the domain; nothing is written if it is empty."""
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """
        Take back what [`state_dict`] gave.

        Raises:
            UserError: it is of another model.
        """

    def save(self, directory: Path) -> None:
        """Write the method's state into a checkpoint."""
        state = self.state_dict()
        if state:
            write_tensors(directory / self.file_name, state, {"format": "das_lm.method", "version": "1"})

    def load(self, directory: Path) -> None:
        """
        Read what [`save`] wrote, before a domain goes on.

        Raises:
            UserError: the file is broken, or of another model.
        """
        path = directory / self.file_name
        if path.is_file():
            try:
                state = load_file(path, device=str(self.args.device))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} cannot be read: {error}") from error
            self.load_state_dict(state)

    def logs(self) -> dict[str, float]:
        """Figures to log beside the loss."""
        return {}

    def state(self) -> dict[str, Any]:
        """What a person wants to know of the method's state, for `continual_state.json`."""
        return {}
