"""The Hugging Face Trainer, learning one domain with continual-learning methods: `ContinualTrainer`, `DASTrainer`."""

from __future__ import annotations

import copy
import json
import logging
import math
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi
from peft import PeftConfig, PeftModel
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    EvalLoopOutput,
    EvalPrediction,
    HubStrategy,
    SaveStrategy,
    denumpify_detensorize,
)
from transformers.utils import SAFE_WEIGHTS_NAME

from das_lm import __version__
from das_lm.data.packing import separator_of
from das_lm.data.streaming import TrainingStream
from das_lm.errors import NotFinite, UserError
from das_lm.files import (
    broken_file,
    newest_checkpoint,
    rotate_checkpoints,
    seal,
    share,
    write_json,
    write_tensors,
)
from das_lm.measure.held_out import HeldOut, Predictions, held_out_losses
from das_lm.methods import Method, files_with_training_text, without_effect
from das_lm.model.objective import LanguageModeling, ModuleLoss, Output, check_head_in_chunks
from das_lm.randomness import addressed_seed
from das_lm.signals import Interrupted, Signals, check_signals
from das_lm.training import inputs
from das_lm.training.cpu import keep_freed_memory
from das_lm.training.sharding import ShardedTraining
from das_lm.units import Architecture, Units
from das_lm.units.sharding import full, is_sharded, local, named_parameters, whole_state_dict

logger = logging.getLogger(__name__)

STATE_NAME = "continual_state.json"
BATCH_NAME = "batch.json"
STREAM_NAME = "stream.json"


class ContinualTrainer(ShardedTraining):
    """
    Learns one domain with one or several continual-learning methods.

    With `processing_class`, the model is a language model, masked or causal; without, it is any module whose forward
    takes columns of the data sets by name and returns a loss (see [`ModuleLoss`]).

    Args:
        model: a language model, loaded with its LM head, in fp32, or its name, as for `from_pretrained`; or another
            module.
        args: the arguments; a [`DASConfig`], or plain `TrainingArguments`. With `push_to_hub` it is
            [`save_model`] that pushes, whatever `hub_strategy` says.
        method: names in `das_lm.methods.METHODS`, or classes or objects of [`Method`]; one or a list, in any
            order.
        train_dataset: documents (a list of texts, or a data set with a column `text_column`, whose empty rows are left
            out; a stream of either, an `IterableDataset`, is read while training, see [`TrainingStream`]), packed
            blocks (a column `input_ids`), or a [`TrainingBlocks`]; for another module, a map-style data set of
            dictionaries or tuples, or a [`TrainingRows`]. Of a `DatasetDict` the split `train`.
        eval_dataset: held-out documents, windows or [`HeldOutWindows`], or a dictionary of them by domain; for another
            module, a data set or a dictionary of them. Of a `DatasetDict` the splits other than `train`.
        processing_class: the tokenizer; of a model that is given by name, its own.
        domain: name of the domain that is learned.
        development_dataset: held-out data, or a dictionary of it by domain, as `eval_dataset`, for what a method
            chooses by a score (`interpolation_alpha="auto"`); never what is reported.
        architecture: where the model's units are, for a model type that is not in the table.
        peft_config: a `LoraConfig` of PEFT: a fresh adapter learns, and the model is frozen. What is saved is the
            adapter; `trainer.model.merge_and_unload()` is the model that the next domain starts from. A `PeftModel`
            trains the adapter that it has.
        model_init: makes the model, in place of `model`: whenever training begins, and so for every trial of
            `hyperparameter_search`.
        model_init_kwargs: for `from_pretrained`, of a model that is given by name.
        text_column: the column that holds the text.
        data_collator: makes a batch of rows that are masked and labelled already, in place of [`PaddingCollator`].
        kwargs: further arguments of the Trainer. `compute_metrics` gets the logits and labels that
            [`predict`] returns.

    Raises:
        UserError: what the arguments, the model or the method cannot work with.
    """

    #: Off where it is told in another place, or does not matter.
    tells_of_methods_without_effect = True

    def __init__(
        self,
        model: str | Path | nn.Module | None = None,
        args: TrainingArguments | None = None,
        method: str | type[Method] | Method | Sequence[str | type[Method] | Method] = "naive",
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        domain: str = "domain",
        development_dataset: Any = None,
        architecture: Architecture | None = None,
        peft_config: PeftConfig | None = None,
        model_init: Callable[..., nn.Module] | None = None,
        model_init_kwargs: Mapping[str, Any] | None = None,
        text_column: str = "text",
        data_collator: Callable[[list], dict[str, torch.Tensor]] | None = None,
        **kwargs: Any,
    ):
        self.args = args = inputs.as_config(args)
        inputs.check_arguments(args, kwargs | {"method": method, "model_init": model_init})
        args.hub_strategy = HubStrategy.END  # a push on the way writes training_args.bin, a pickle with the token
        if args.device.type == "cpu":
            keep_freed_memory()
        self.domain, self._method, self._architecture, self._peft_config = domain, method, architecture, peft_config
        model, self.processing_class = inputs.named_model(model, model_init, model_init_kwargs, processing_class)
        self.model_init = model_init
        if model_init is not None:
            set_seed(args.seed)
        model = self._adapted(model) if model_init is None else self.call_model_init()
        self._take(model)
        if self.units is None:
            self.inputs = inputs.Rows(args, domain, model)
        else:
            self.inputs = inputs.Text(args, domain, self.units.model, self.processing_class, text_column)
        development = self.inputs.held_out(development_dataset, "development_dataset")
        named = isinstance(development, dict) or development is None
        self.development_dataset = development if named else {domain: development}
        super().__init__(
            model=model,
            args=args,
            data_collator=self.inputs.collating(data_collator),
            train_dataset=self.inputs.training(train_dataset),
            eval_dataset=self.inputs.held_out(eval_dataset),
            processing_class=self.processing_class,
            **kwargs,
        )
        self.model_init = model_init  # the Trainer makes no model of its own
        rows = args.per_device_train_batch_size * args.world_size
        if args.dataloader_drop_last and self.train_dataset is not None and 0 < len(self.train_dataset) < rows:
            raise UserError(
                f"dataloader_drop_last: domain '{domain}' has {len(self.train_dataset)} rows, fewer than the {rows} "
                "of a batch, and nothing would be learned; leave it off, or make the batch smaller"
            )
        # The loss below is divided by all that the accumulated batch holds.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self._loss_shifts_labels = False  # ours are shifted already: the Trainer counts the first of a row, too
        self._loss_parts: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=self.args.device))
        self._loss_parts_since = 0
        self._step_parts: list[tuple[str, torch.Tensor]] = []  # of the batches of the present step
        self._until_backward = ExitStack()
        self._signals = Signals()
        self._make_methods()
        self.callback_handler.callbacks.insert(0, _Moments(self))  # callbacks, too, see the masked step

    def _take(self, model: nn.Module) -> None:
        """A model is here: its units, and what a batch asks of it (the Trainer's `objective` is that of a search)."""
        self.has_adapter = isinstance(model, PeftModel)
        if self.processing_class is None:
            for name, off, what in (("non_unit_lr_scale", 1, "units"), ("chunked_cross_entropy", False, "an LM head")):
                if getattr(self.args, name) != off:
                    raise UserError(f"{name}: only a language model has {what}; leave it at {off} for another module")
            self.units, self.criterion = None, ModuleLoss(model)
            return
        inputs.check_language_model(model, self.processing_class, self._architecture)
        self.units = Units(model, self._architecture)
        if self.args.chunked_cross_entropy:
            check_head_in_chunks(self.units)
        causal = self.units.model.can_generate()
        separated = causal and self.args.separate_documents
        separator = separator_of(self.processing_class) if separated else None
        self.criterion = LanguageModeling(self.units, causal, separator)

    def _make_methods(self) -> None:
        """The methods, attached to the model that is here."""
        self.methods = inputs.make_methods(self._method)
        if self.is_sharded:
            self._check_sharding()
        for one in self.methods:
            if self.has_adapter and not one.works_with_adapters:
                raise UserError(
                    f"method: '{type(one).__name__.lower()}' remembers single parameters, and the next domain's "
                    "adapter has others: train all weights, without peft, or use another method, such as das or replay"
                )
            if self.is_sharded and not one.works_sharded:
                raise UserError(
                    f"method: '{type(one).__name__.lower()}' needs whole parameters, and fsdp leaves each process a "
                    "slice of them: use DDP, or another method, such as das, ewc or replay"
                )
            one.attach(self)

    def _adapted(self, model: nn.Module) -> nn.Module:
        """The model with its adapter, if it has one or gets one."""
        seed = addressed_seed(self.args.seed, self.domain, "adapter")
        return inputs.adapted(model, self._peft_config, self.args, self.processing_class, seed)

    # ---- a fresh model for every run: model_init, hyperparameter_search --------------------------------------------

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """What `model_init` makes, with an adapter if it gets one."""
        return self._adapted(super().call_model_init(trial))

    def _hp_search_setup(self, trial: Any) -> None:
        """The model that will be trained is here, and in a search the arguments of the trial."""
        super()._hp_search_setup(trial)
        if self.model_init is not None:
            self._take(self.model)
            self.inputs.again(self.train_dataset)
            self._make_methods()
        if self._resumes_from:
            for method in self.methods:
                method.load(Path(self._resumes_from))
        warning = without_effect(self.methods)
        if warning and self.tells_of_methods_without_effect:
            logger.warning("domain '%s': %s", self.domain, warning)
        others = {id(one) for one in self._non_units()} if self.args.non_unit_lr_scale == 0 else set()
        self._frozen = {name for name, one in named_parameters(self.model).items() if id(one) in others}
        self._set_frozen(True)

    def hyperparameter_search(
        self, hp_space: Any = None, compute_objective: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """The Trainer's, with `model_init`. The objective is, unless another is given, the mean held-out loss of
        `eval_dataset`. What is searched are arguments that leave the text as it is.

        Raises:
            UserError: the trainer has no `model_init` or no `eval_dataset`, or a trial changes the text.
        """
        if self.model_init is None or self.eval_dataset is None:
            raise UserError(
                "hyperparameter_search: every trial trains a fresh model and measures it: give the trainer a "
                "model_init in place of a model, and an eval_dataset"
            )
        return super().hyperparameter_search(hp_space, compute_objective or _mean_loss, *args, **kwargs)

    # ---- one step: batch, forward, loss, backward, optimizer -----------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # it shuffles itself, by address

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of one batch. What the methods opened (gates) stays until the backward pass is over."""
        with self._until_backward:
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            for moment in ("read_gradient", "change_gradient"):
                for method in self.methods:
                    getattr(method, moment)()
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm of the gradient before clipping. The Trainer asks for it last before the optimizer steps, so that
        this is where a step is stopped that would spoil the weights."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._check_step(grad_norm)
        return grad_norm

    def _check_step(self, grad_norm: torch.Tensor) -> None:
        """
        Look at every part of the loss and at the gradient, with one transfer from the device for a whole step.

        Raises:
            NotFinite: one of them is. A gradient that overflowed in fp16 is none of that: the gradient
                scaler skips its step.
        """
        grad_norm = full(grad_norm)
        names = [name for name, _ in self._step_parts]
        values = torch.stack([*(part.float() for _, part in self._step_parts), grad_norm.float().to(self.args.device)])
        self._step_parts.clear()
        *losses, norm = values.tolist()
        if not math.isfinite(norm) and self.accelerator.num_processes > 1:  # as in all of them: agree on the part
            *losses, norm = self.accelerator.reduce(values, "sum").tolist()
        broken = {name: value for name, value in zip(names, losses, strict=True) if not math.isfinite(value)}
        if broken:
            raise NotFinite(self._not_finite(", ".join(broken), "loss", next(iter(broken.values()))))
        # Scaled by less than 1, a gradient is not infinite because of fp16.
        if not math.isfinite(norm) and (self.accelerator.scaler is None or self.gradient_scale < 1):
            added = ", ".join(name for name, value in self._figures().items() if not math.isfinite(value))
            raise NotFinite(self._not_finite(added or "the loss is finite", "gradient", norm))

    def _not_finite(self, part: str, what: str, value: float) -> str:
        return (
            f"{part}: the {what} of domain '{self.domain}' is {value} at step {self.state.global_step + 1}; try a "
            f"smaller learning_rate, a smaller max_grad_norm, or bf16 instead of fp16{self._last_good_weights()}"
        )

    def _last_good_weights(self) -> str:
        """Where to begin again. Resuming would come to the same step."""
        found = newest_checkpoint(self.args.output_dir)
        if found is None and self.state.global_step:
            found = getattr(self.accelerator.unwrap_model(self.model), "name_or_path", None)
        return f". {found} holds the last good weights: start a new run there (--model_name_or_path)" if found else ""

    def check_finite(self, tensors: Mapping[str, torch.Tensor], what: str) -> None:
        """
        Before something is kept that nothing would make whole again: weights, importance.

        Args:
            tensors: by the names of parameters or groups of units; the same names in every process.
            what: they are.

        Raises:
            NotFinite: one of them holds NaN or infinity.
        """
        finite = torch.stack([local(tensor.detach()).isfinite().all() for tensor in tensors.values()])
        finite = finite.to(self.args.device).float()
        everywhere = self.accelerator.reduce(finite, "mean").tolist()
        broken = [name for name, share in zip(tensors, everywhere, strict=True) if share < 1]
        if broken:
            raise NotFinite(
                f"domain '{self.domain}', after step {self.state.global_step}: the {what} of {len(broken)} of "
                f"{len(tensors)} tensors, first of '{broken[0]}', is NaN or infinite, and is not kept; try a smaller "
                f"learning_rate, or bf16 instead of fp16{self._last_good_weights()}"
            )

    def _check_weights(self) -> None:
        weights = named_parameters(self.accelerator.unwrap_model(self.model))
        self.check_finite({name: weight for name, weight in weights.items() if weight.requires_grad}, "value")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Output]:
        """The domain's loss, and what the methods add to it, from one `model(…)` call."""
        batch = inputs
        if model.training:
            for method in self.methods:
                batch = method.add_rows(batch, self._until_backward)
        outputs = self.criterion(model, batch, self.args.chunked_cross_entropy)
        if outputs.loss is not None:
            loss = outputs.loss / self.current_gradient_accumulation_steps
        else:
            losses = outputs.losses(self.args.label_smoothing_factor)
            if num_items_in_batch is None:
                return (losses.mean(), outputs) if return_outputs else losses.mean()
            for method in self.methods:
                losses = method.change_losses(inputs, outputs, losses)
            loss = self._share(losses, num_items_in_batch)
        self._note(self.criterion.name, loss)
        for method in self.methods:
            for name, extra in method.loss(model, inputs, outputs).items():
                if extra.ndim:
                    extra = self._share(extra, num_items_in_batch)
                else:
                    extra = extra / self.current_gradient_accumulation_steps
                self._note(name, extra)
                loss = loss + extra
        return (loss, outputs) if return_outputs else loss

    def _share(self, losses: torch.Tensor, num_items_in_batch: torch.Tensor | int) -> torch.Tensor:
        """What the losses of a batch's predictions, [predictions], are of their mean over the step's."""
        share = losses.sum() / num_items_in_batch
        if self.args.average_tokens_across_devices:  # counted over all processes, which DDP averages
            share = share * self.accelerator.num_processes
        return share

    def _note(self, name: str, part: torch.Tensor) -> None:
        """A part of the loss: to log, and to look at before the step."""
        self._loss_parts[f"loss_{name}"] += part.detach()
        self._step_parts.append((f"loss_{name}", part.detach()))

    @property
    def gradient_scale(self) -> float:
        """What the gradients have been multiplied by before the step (fp16), otherwise 1."""
        return self.accelerator.scaler.get_scale() if self.accelerator.scaler is not None else 1.0

    def gradient_of(self, batch: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """The gradient of the loss on a batch, averaged over processes: one tensor per trainable parameter, in the
        order of `model.parameters()`. Neither `.grad` nor training's random draws change."""
        model = self.accelerator.unwrap_model(self.model)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with self.private_randomness("gradient", self.state.global_step), self.accelerator.autocast():
            outputs = self.criterion(model, batch, self.args.chunked_cross_entropy)
            loss = outputs.losses().mean() if outputs.loss is None else outputs.loss
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        gradients = [
            torch.zeros_like(parameter) if gradient is None else gradient
            for parameter, gradient in zip(parameters, gradients, strict=True)
        ]
        for index, gradient in enumerate(gradients):  # one by one, since each leaves the other copy
            gradients[index] = self.accelerator.reduce(gradient, "mean")
        return gradients

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with a learning rate of its own for the parameters that are no units."""
        is_given = self.optimizer is not None
        named_parameters(self.model)  # of a sharded model, the slices are in place now
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        scale = self.args.non_unit_lr_scale
        if is_given or scale == 1:
            self._parameter_groups = [list(group["params"]) for group in optimizer.param_groups]
            return optimizer
        others = {id(parameter) for parameter in self._non_units()}
        for group in list(optimizer.param_groups):
            split = [parameter for parameter in group["params"] if id(parameter) in others]
            if split:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in others]
                optimizer.add_param_group({**group, "params": split, "lr": group["lr"] * scale})
        self._parameter_groups = [list(group["params"]) for group in optimizer.param_groups]
        return optimizer

    def _non_units(self) -> list[nn.Parameter]:
        """The trainable parameters that belong to no unit: embeddings, norms, LM head."""
        owned = self.units.owned_parameters()
        named = named_parameters(self.units.model)
        return [parameter for name, parameter in named.items() if name not in owned and parameter.requires_grad]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the parts of the loss beside their sum."""
        if "loss" in logs:
            steps = max(1, self.state.global_step - self._loss_parts_since)
            for name, total in self._loss_parts.items():
                logs[name] = self.accelerator.reduce(total, "mean").item() / steps
                total.zero_()
            logs.update(self._figures())
            self._loss_parts_since = self.state.global_step
        super().log(logs, start_time)

    def _figures(self) -> dict[str, float]:
        """What the methods log, summed up where several have a figure of one name (`penalty`)."""
        figures: dict[str, float] = defaultdict(float)
        for method in self.methods:
            for name, value in method.logs().items():
                figures[name] += value
        return figures

    # ---- training ------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """
        Learn the domain, then let the methods consolidate it. Where checkpoints are saved (`save_strategy`), SIGTERM
        and Ctrl-C save one more after the present step.

        Args:
            resume_from_checkpoint: a checkpoint to go on from, or `True` for the newest whole one in `output_dir`.

        Raises:
            UserError: nothing to train on, a checkpoint that is not whole or was saved by a run that saw the data in
                another order, or a loss that is no number.
            Interrupted: SIGTERM or Ctrl-C.
        """
        if self.train_dataset is None or len(self.train_dataset) == 0:
            raise UserError(f"domain '{self.domain}' has no text to train on")
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise UserError(f"there is no whole checkpoint in {self.args.output_dir} to resume from")
        if resume_from_checkpoint:
            resume_from_checkpoint = str(resume_from_checkpoint)
            broken = broken_file(resume_from_checkpoint)
            if broken:
                raise UserError(
                    f"checkpoint {resume_from_checkpoint} is not whole: {broken}; resume from an older one"
                )
            batch = Path(resume_from_checkpoint, BATCH_NAME)
            if batch.is_file():
                self.check_order(json.loads(batch.read_text(encoding="utf-8")))
            place = Path(resume_from_checkpoint, STREAM_NAME)
            if isinstance(self.train_dataset, TrainingStream) and place.is_file():
                self.train_dataset.load_state_dict(json.loads(place.read_text(encoding="utf-8")))
        self._resumes_from, self._frozen = resume_from_checkpoint, set()
        self._loss_parts.clear()
        self._step_parts.clear()
        self._signals, saves = Signals(), self.args.save_strategy != SaveStrategy.NO
        try:
            with self._signals if saves else nullcontext():
                return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except pickle.UnpicklingError as error:  # torch refuses, with weights_only, all that is no tensor
            raise UserError(
                f"checkpoint {resume_from_checkpoint}: refused, for reading a file of it would run code; remove it, "
                "and resume from an older one"
            ) from error
        finally:
            self._set_frozen(False)

    def _set_frozen(self, frozen: bool) -> None:
        """By name: sharding puts other parameters in the place of these."""
        for name, parameter in named_parameters(self.model).items() if self._frozen else ():
            if name in self._frozen:
                parameter.requires_grad_(not frozen)

    @property
    def batch(self) -> dict[str, int]:
        """What the rows of an update step are the product of."""
        return {
            "processes": self.args.world_size,
            "per_device_train_batch_size": self.args.per_device_train_batch_size,
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
        }

    def check_order(self, before: Mapping[str, int]) -> None:
        """
        Whether a run that began with another [`batch`] goes on with the same rows in every update step.

        Raises:
            UserError: it does not.
        """
        now, rows = self.batch, math.prod(before.values())
        if now == before:
            return
        begun, here = (" × ".join(f"{value} {name}" for name, value in one.items()) for one in (before, now))
        if math.prod(now.values()) != rows:
            raise UserError(
                f"the run began with {rows} rows per update step ({begun}) and would go on with "
                f"{math.prod(now.values())} ({here}), other data in every step: choose per_device_train_batch_size "
                f"and gradient_accumulation_steps so that the product is {rows} again"
            )
        # Several processes fill up the last batch of an epoch, in a way that depends on all three.
        processes, args = max(before["processes"], now["processes"]), self.args
        if processes > 1:
            length = len(self.train_dataset)
            if length % rows and not 0 < args.max_steps * rows <= length:
                raise UserError(
                    f"the run began with {begun}; {here} would be other data at the end of every epoch, where the "
                    f"{length} rows of domain '{self.domain}' do not fill {rows} rows per update step: go on as it "
                    "began"
                )

    def check_length(self, before: Mapping[str, float], checkpoint: str | Path | None) -> str | None:
        """
        Whether a run that began with another length goes on as one that began with the present one.

        Args:
            before: `max_steps`, and `num_train_epochs` if that is not given.
            checkpoint: to go on from.

        Returns:
            What happens to the learning rate; `None` if the length is the same.

        Raises:
            UserError: it is shorter, or the learning rate up to here would have been another one.
        """
        began, batches = copy.copy(self.args), self.get_train_dataloader()
        for name, value in before.items():
            setattr(began, name, value)
        was, now = (self.set_initial_training_values(args, batches)[-1] for args in (began, self.args))
        done = int(str(checkpoint).rpartition("-")[2]) if checkpoint else 0
        if was == now:
            return None
        if now < was:
            raise UserError(
                f"max_steps: '{self.domain}' began to learn for {was} steps, and {now} are fewer: a run goes on as "
                "long as it began, or longer"
            )
        rates = [self.args.learning_rates(range(done + 1), steps) for steps in (was, now)]
        kind = self.args.lr_scheduler_type.value
        if done and not np.allclose(*rates, rtol=1e-9, atol=0):
            raise UserError(
                f"max_steps: '{self.domain}' has learned {done} of {was} steps, and lr_scheduler_type '{kind}' has "
                f"brought the learning rate to {rates[0][-1]:.3g}; in a run of {now} steps it would be "
                f"{rates[1][-1]:.3g}: give max_steps {was}, or begin anew. A run can go on longer with constant, and "
                "with warmup_stable_decay before its decay"
            )
        return (
            f"'{self.domain}' learns {now} steps, not {was}: the learning rate of lr_scheduler_type '{kind}' is that "
            f"of a run of {now} steps from the beginning, {rates[1][-1]:.3g} in step {done + 1}"
        )

    def _stops(self) -> bool:
        """Whether a signal has come, to whichever process, while it is postponed."""
        signals = self._signals
        if signals.postponed and self.args.world_size > 1:
            received = torch.tensor([signals.received or 0], device=self.args.device)
            signals.received = int(self.accelerator.gather(received).max()) or None
        return signals.postponed and signals.received is not None

    def importance_batches(self, epoch: int, count: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
        """This process's share of `count` blocks (by default `importance_samples`), in batches on the device, with the
        order and masks of an `epoch` (negative: never trained on). Shows a progress bar."""
        blocks = self.train_dataset.at(epoch)
        count = blocks.available(self.args.importance_samples if count is None else count)
        mine = range(self.args.process_index, count, self.args.world_size)
        size = self.args.importance_batch_size
        starts = range(0, len(mine), size)
        hidden = self.args.disable_tqdm or not self.is_world_process_zero()
        for start in tqdm(starts, desc=f"importance ({self.domain})", unit="batch", disable=hidden):
            check_signals()
            batch = self.data_collator([blocks[index] for index in mine[start : start + size]])
            yield {name: value.to(self.args.device) for name, value in batch.items()}

    @contextmanager
    def private_randomness(self, *address: Any) -> Iterator[None]:
        """Random draws (dropout) that are a function of (seed, domain, address) and leave training's alone."""
        device = self.args.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(addressed_seed(self.args.seed, self.domain, *address))
            yield

    # ---- evaluation: exact sums over documents -------------------------------------------------------------------

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Held-out loss per predicted token and top-1 accuracy of every held-out domain, and what `compute_metrics`
        makes of the predictions. Changes nothing that training depends on: not even the random state, which a data
        loader would advance.

        Args:
            eval_dataset: as for the trainer, or the name of one that it has; `None` for all of those.

        Raises:
            UserError: there is nothing to measure.
        """
        has = self.eval_dataset
        if has is None if eval_dataset is None else isinstance(eval_dataset, str) and eval_dataset not in (has or ()):
            known = f"; it has {', '.join(has)}" if isinstance(has, dict) else ""
            raise UserError(f"evaluate: the trainer has no {eval_dataset or 'eval_dataset'}{known}; give documents")
        if not isinstance(eval_dataset, str):
            eval_dataset = self.inputs.held_out(eval_dataset)
        with self.private_randomness("evaluate"):
            return super().evaluate(eval_dataset, *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Logits, labels and measures of held-out data. Of a language model they are those of the predicted tokens
        alone, shape [predictions, vocabulary] and [predictions], in the order of the windows, the longest first; they
        are all in memory, unless `preprocess_logits_for_metrics` makes less of them.

        Args:
            test_dataset: as one `eval_dataset`.
        """
        test_dataset = self.inputs.held_out(test_dataset, "test_dataset")
        if test_dataset is None or isinstance(test_dataset, dict):
            raise UserError("test_dataset: give held-out data of one domain, as an eval_dataset of the trainer")
        with self.private_randomness("evaluate"):
            return super().predict(test_dataset, *args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """All of it: `dataloader_drop_last` is about training."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last

    def measure(self, held_out: Mapping[str, Any]) -> dict[str, HeldOut]:
        """The same as [`evaluate`] of data sets by domain, document by document."""
        with self.private_randomness("evaluate"):
            model = self._ready_to_measure()
            return {
                name: held_out_losses(
                    model,
                    self.criterion,
                    self.get_eval_dataloader(one),
                    self.accelerator,
                    progress=None if self.args.disable_tqdm else f"held-out text of {name}",
                )
                for name, one in held_out.items()
            }

    def development_loss(self) -> float:
        """Mean over the domains of `development_dataset` of the loss on it."""
        metrics = self.evaluate(self.development_dataset, metric_key_prefix="development")
        return float(np.mean([metrics[f"development_{name}_loss"] for name in self.development_dataset]))

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Replaces the mean of batch means by sums over all predicted tokens of the documents."""
        predictions = Predictions(self.accelerator, self.preprocess_logits_for_metrics)
        if self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only:
            predictions = None
        result = held_out_losses(
            self._ready_to_measure(),
            self.criterion,
            dataloader,
            self.accelerator,
            progress=None if self.args.disable_tqdm else description,
            predictions=predictions,
        )
        metrics = result.measures(self.criterion.causal)
        logits, labels = predictions.arrays() if predictions else (None, None)
        if predictions and self.compute_metrics:
            own = self.compute_metrics(EvalPrediction(logits, labels))
            if not isinstance(own, Mapping):
                raise UserError(f"compute_metrics: returned {type(own).__name__}; return a dictionary of numbers")
            metrics |= denumpify_detensorize(dict(own))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(logits, labels, metrics, num_samples=len(result.tokens))

    # ---- checkpoints: whole or absent ----------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """A plain transformers directory, with the methods' state beside it and nothing that has to be unpickled. In
        place of the Trainer's, which writes `training_args.bin`: a pickle with the token in it."""
        directory = Path(output_dir or self.args.output_dir)
        card = directory / "README.md"
        had_card = card.is_file()
        if state_dict is None and is_sharded(self.model):
            state_dict = whole_state_dict(self.model)
        if self.args.should_save:
            directory.mkdir(parents=True, exist_ok=True)
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            if isinstance(model, PreTrainedModel | PeftModel):
                model.save_pretrained(directory, state_dict=state_dict)
            else:
                write_tensors(directory / SAFE_WEIGHTS_NAME, state_dict or model.state_dict(), {"format": "pt"})
            if self.processing_class is not None:
                self.processing_class.save_pretrained(directory)
            if self.has_adapter and not had_card:
                card.unlink()  # PEFT's draft
        for method in self.methods:  # all processes: each may have a slice of what is saved
            method.save(directory)
        state = self.continual_state()
        if self.args.should_save:
            for path in directory.glob("*.safetensors"):
                share(path)
            write_json(directory / STATE_NAME, state)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The Trainer's, with the same arguments, but for the files in which methods keep training text: they stay
        here."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**{"model_name": self.hub_model_id.split("/")[-1], **kwargs})
        return HfApi(library_name="das-lm", library_version=__version__).upload_folder(
            repo_id=self.hub_model_id,
            folder_path=self.args.output_dir,
            commit_message=commit_message,
            token=token,
            run_as_future=not blocking,
            ignore_patterns=["_*", f"{PREFIX_CHECKPOINT_DIR}-*", *files_with_training_text(self.methods)],
            revision=revision or self.args.hub_revision,
        )

    def create_model_card(self, tags: str | list[str] | None = None, **kwargs: Any) -> None:
        """The Trainer's draft of a card, with the tags that the cards of a walk have."""
        given = [tags] if isinstance(tags, str) else tags or []
        super().create_model_card(tags=[*given, "das-lm", "continual-pretraining"], **kwargs)

    def continual_state(self) -> dict[str, Any]:
        """What was learned how: for people, and for the next domain."""
        return {
            "version": 1,
            "das_lm": __version__,
            "domain": self.domain,
            "methods": [type(method).__name__ for method in self.methods],
            "step": self.state.global_step,
            **{name: value for method in self.methods for name, value in method.state().items()},
        }

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The Trainer's checkpoint, sealed by a manifest; older ones are removed only after that."""
        self._check_weights()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            run_directory = self._get_output_dir(trial)
            checkpoint = Path(run_directory) / f"checkpoint-{self.state.global_step}"
            write_json(checkpoint / BATCH_NAME, self.batch)
            if isinstance(self.train_dataset, TrainingStream):
                position = self.state.global_step * math.prod(self.batch.values())
                write_json(checkpoint / STREAM_NAME, self.train_dataset.state_dict(position))
            seal(checkpoint)
            rotate_checkpoints(run_directory, self.state.global_step, limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()  # where one process ends, launchers end the others, sealed or not


class DASTrainer(ContinualTrainer):
    """
    Learns one domain with DAS (arXiv 2302.03241): a [`ContinualTrainer`] whose method is `das`.

    Example:

    ```python
    trainer = DASTrainer(
        model="roberta-base",
        args=DASConfig(output_dir="bio", learning_rate=1e-4),
        train_dataset=Domain("bio", data="bio.txt").load().train,
        domain="bio",
    )
    trainer.train()
    trainer.save_model("bio/final")
    ```
    """

    def __init__(self, *args: Any, method: str | Method | Sequence[str | Method] = "das", **kwargs: Any):
        super().__init__(*args, method=method, **kwargs)


class _Moments(TrainerCallback):
    """Hands the Trainer's moments to the methods."""

    def __init__(self, trainer: ContinualTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._loss_parts_since = state.global_step
        self.is_stopping = False
        for method in self.trainer.methods:
            method.take_slices()
        for method in self.trainer.methods:
            method.begin_domain()
        self.trainer._signals.postponed = args.save_strategy != SaveStrategy.NO

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer._stops():
            self.is_stopping = control.should_save = True
        check_signals()

    on_evaluate = on_step_end  # it may have taken long

    def on_save(self, args, state, control, **kwargs):
        if self.is_stopping:
            saved = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            raise Interrupted(self.trainer._signals.received, f"'{self.trainer.domain}' is saved as {saved}")

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for method in self.trainer.methods:
            method.before_step()

    def on_optimizer_step(self, args, state, control, **kwargs):
        for method in self.trainer.methods:
            method.mask_step()
        for method in self.trainer.methods:
            method.after_step()

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer._signals.stop()  # what follows is done again
        self.trainer._check_weights()
        for method in self.trainer.methods:
            method.finish_weights()
        for method in self.trainer.methods:
            method.end_domain()


def _mean_loss(metrics: Mapping[str, float]) -> float:
    return float(np.mean([value for name, value in metrics.items() if name.endswith("_loss")]))
