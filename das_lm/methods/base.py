"""The hooks of a method into training, and what it sees of the trainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import nn

from das_lm.errors import UserError, as_user_error
from das_lm.files import write_tensors
from das_lm.methods.arguments import Arguments
from das_lm.units.sharding import is_sharded, local, named_parameters, own_slice, whole

Tensors = dict[str, torch.Tensor]  # name of a parameter -> tensor of its shape


class Engine(Protocol):
    """What a method sees of the trainer, and no more."""

    args: Any  # a `ContinualConfig`
    model: nn.Module  # as it is called in a step: it may be wrapped, or sharded
    accelerator: Any
    state: Any  # with `global_step`
    processing_class: Any  # the tokenizer; `None` of a module that reads no text
    data_collator: Any
    train_dataset: Any  # `TrainingBlocks`, `TrainingStream` or `TrainingRows`
    development_dataset: Mapping[str, Any] | None
    domain: str  # its name
    methods: list[Method]  # all, in their order
    units: Any  # the model's `Units`; `None` of a module that is no language model
    criterion: Any  # what a batch asks of the model: `LanguageModeling` or `ModuleLoss`
    has_adapter: bool  # whether a LoRA adapter is trained
    remembered: Any  # `Remembered`, what stands for the model's past; `None` if nothing does

    @property
    def is_sharded(self) -> bool:
        """Whether parameters are slices (FSDP2), or will be."""

    @property
    def gradient_scale(self) -> float:
        """What the gradients have been multiplied by (fp16), otherwise 1."""

    def is_world_process_zero(self) -> bool:
        """Whether this is the main process of all."""

    def importance_batches(self, epoch: int, count: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
        """Yield this process's share of `count` rows of the domain, in batches, as `epoch` orders and masks them."""

    def gradient_of(self, batch: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Return the gradient of the loss on a batch, averaged over processes; see `MeasuringTrainer.gradient_of`."""

    def private_randomness(self, *address: Any) -> AbstractContextManager[None]:
        """Make random draws a function of (seed, domain, address), and leave training's alone."""

    def reading(self, domains: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Let [`importance_batches`] and `train_dataset` be of other rows, as if they were the domain."""

    def development_loss(self) -> float:
        """Return the mean loss on `development_dataset`."""

    def check_finite(self, tensors: Tensors, what: str) -> None:
        """Raise `NotFinite` where one holds NaN or infinity."""


class Method:
    """
    A continual-learning method: plain training, unless it overrides a hook. The hooks, in order:

    - [`attach`], once per trainer, and [`begin_domain`];
    - for every batch [`add_rows`], then [`change_losses`] and [`loss`];
    - for every optimizer step [`read_gradient`], [`change_gradient`], (clipping), [`before_step`], (the optimizer),
      [`mask_step`], [`after_step`];
    - [`finish_weights`], then [`end_domain`].

    Of several methods, of all, one hook is called before any next one, and they take turns by `order`, not as they
    are listed. What a method keeps travels in checkpoints, by [`state_dict`] and [`load_state_dict`]. One object may
    serve one domain after another, each with a trainer of its own; made by name, a method finds its state beside the
    weights that the model was loaded from.

    Under FSDP2 every process has a slice of each parameter: [`values`] and [`gradients`] are plain tensors of it, and
    what is listed in `kept` is of the same slice; in files all is whole.
    """

    #: Of several methods the lowest goes first, equal ones by name. What acts on the work of others comes after them:
    #: a projection after what adds to the gradient, an average of the weights after all, an interpolation to it last.
    order: int = 0
    #: Attributes that map the names of parameters to tensors of their shape, and make up the state.
    kept: tuple[str, ...] = ()

    #: Consolidates when a domain ends, so that domains must come one after the other.
    needs_domain_ends = False
    #: Learns every domain together with all before it.
    needs_earlier_domains = False
    #: Whether it can train a LoRA adapter. What remembers single parameters cannot: the next domain has others.
    works_with_adapters = True
    #: Whether it can train a model whose parameters FSDP2 has sharded.
    works_sharded = True
    #: Whether its file holds training text, which is pushed to no hub.
    holds_training_text = False
    #: Whether it acts in the first domain, for the sake of the base model, or only once a domain has ended.
    protects_base = False
    #: Whether it holds on to the base model where something stands for its past ([`Remembered`]): its `begin_domain`
    #: and `end_domain` are then called on that, before the first domain.
    consolidates_base = False
    #: Whether it draws rows of what is remembered itself.
    draws_remembered = False
    #: Whether it cannot do without; the model then writes it, if nothing is given.
    needs_remembered = False
    #: Whether it needs text, and so learns no classic tasks.
    language_models_only = False
    #: The source of each row that it appended to the present batch.
    appended: Sequence[str] = ()
    #: Its arguments, a dataclass of fields by [`knob`]: all that it reads, beside what all training does.
    arguments: type = Arguments
    #: Its one main argument, and what a search tries of it; on classic tasks, for MLPs of their size.
    search_grid: tuple[str, tuple] | None = None
    #: Training arguments that it cannot do without, and values that do for small models.
    needs: Mapping[str, Any] = MappingProxyType({})
    #: In recipes and on the command line; the class's own name, in small letters, if there is none.
    name = "method"

    def __init_subclass__(cls) -> None:
        cls.name = vars(cls).get("name", cls.__name__.lower())

    def parts(self, trainer: Engine) -> Sequence[Method]:
        """Methods that come with it, before it is attached; they take turns by their own `order`."""
        return ()

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """Return the names of its arguments."""
        return tuple(one.name for one in fields(cls.arguments))

    _in_slices = False  # whether what is kept is slices, or whole, as it was in a file

    def attach(self, trainer: Engine) -> None:
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
        return {name: one for name, one in named_parameters(self.model).items() if one.requires_grad}

    def values(self) -> Tensors:
        """The same as plain tensors without a history: this process's slices. To write to them is to write to the
        parameters."""
        return {name: local(parameter.detach()) for name, parameter in self.parameters().items()}

    def gradients(self) -> Tensors:
        """The gradients of those that have one, likewise."""
        return {name: local(one.grad) for name, one in self.parameters().items() if one.grad is not None}

    def take_slices(self) -> None:
        """The model is where it will be trained: of what is kept, this process needs its slices, and there."""
        if is_sharded(self.model) and not self._in_slices:
            parameters, self._in_slices = self.parameters(), True
            for kind in self.kept:
                for name, tensor in getattr(self, kind).items():  # a copy each, so that the whole can go
                    getattr(self, kind)[name] = own_slice(tensor, parameters[name]).to(parameters[name].device).clone()

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
        What to add to the domain's loss: name -> a mean over the batch, a scalar, which is averaged over the batches
        of a step; or, of a language model, a loss of each prediction, [predictions], all of which count alike in the
        step, as those of the domain do.

        Args:
            batch: the domain's own rows.
            outputs: of all rows, the domain's own first; see `das_lm.model.objective.Output`.
        """
        return {}

    def read_gradient(self) -> None:
        """The gradients are those of the loss: accumulated over batches, averaged over processes, not yet clipped, and
        (fp16) still times `trainer.gradient_scale`. They may be read, not changed."""

    def change_gradient(self) -> None:
        """The same, for adding the gradient of a penalty, or projecting."""

    def before_step(self) -> None:
        """The gradients are final: clipped (and, in fp16, no longer scaled, if `max_grad_norm` is above 0)."""

    def mask_step(self) -> None:
        """The optimizer has stepped, or the gradient scaler has skipped the step: for scaling what the step did,
        before anybody looks at the weights."""

    def after_step(self) -> None:
        """The weights are those after the step. They may be read, not changed."""

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
        return {f"{kind}.{name}": tensor for kind in self.kept for name, tensor in getattr(self, kind).items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """
        Take back what [`state_dict`] gave, whole.

        Raises:
            UserError: it is of another model.
        """
        self._in_slices = False
        for kind in self.kept:
            setattr(self, kind, taken(state, kind, self.parameters(), self.file_name))

    def save(self, directory: Path) -> None:
        """Write the method's state into a checkpoint. All processes take part, to make tensors whole; the main one
        writes."""
        state = self.state_dict()
        if self._in_slices:
            parameters, writes = self.parameters(), self.args.should_save
            for name, tensor in state.items():  # one at a time
                kind, _, parameter = name.partition(".")
                if kind in self.kept:
                    tensor = whole(tensor, parameters[parameter])
                    state[name] = tensor.cpu() if writes else tensor.new_empty(0)
        if state and self.args.should_save:
            write_tensors(directory / self.file_name, state, {"format": "das_lm.method", "version": "1"})

    def load(self, directory: Path) -> None:
        """
        Read what [`save`] wrote, before a domain goes on.

        Raises:
            UserError: the file is broken, or of another model.
        """
        path = directory / self.file_name
        if path.is_file():
            # Several processes on CPUs have a "cpu:0", which safetensors does not know.
            on_cpu = self.trainer.is_sharded or self.args.device.type == "cpu"
            with as_user_error(f"{path} cannot be read"):
                state = load_file(path, device="cpu" if on_cpu else str(self.args.device))
            broken = [name for name, one in state.items() if one.is_floating_point() and not one.isfinite().all()]
            if broken:
                raise UserError(f"{path}: '{broken[0]}' holds what is no finite number; start from another checkpoint")
            with as_user_error(f"{path} is not as das-lm writes it, or of another model"):
                self.load_state_dict(state)

    def logs(self) -> dict[str, float]:
        """Figures to log beside the loss."""
        return {}

    def state(self) -> dict[str, Any]:
        """What a person wants to know of the method's state, for `continual_state.json`."""
        return {}


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
