"""The Hugging Face Trainer, learning one domain with continual-learning methods: `ContinualTrainer`, `DASTrainer`."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import HubStrategy, SaveStrategy

from das_lm.data.packing import ends_documents, separator_of
from das_lm.errors import UserError
from das_lm.methods import Method, without_effect
from das_lm.model.objective import LanguageModeling, ModuleLoss, Output, check_head_in_chunks
from das_lm.randomness import addressed_seed
from das_lm.training import given, inputs, resuming
from das_lm.training.cpu import keep_freed_memory
from das_lm.training.guard import Guard
from das_lm.training.hooks import Hooks
from das_lm.training.optimizer import OptimizingTrainer
from das_lm.training.remembering import remembered_by
from das_lm.training.tokens_seen import TokensSeen
from das_lm.units import Architecture, Units

logger = logging.getLogger(__name__)


class ContinualTrainer(OptimizingTrainer):
    """
    Learns one domain with one or several continual-learning methods.

    With `processing_class`, the model is a language model, masked or causal; without, it is any module whose forward
    takes columns of the data sets by name and returns a loss (see [`ModuleLoss`]).

    Args:
        model: a language model, loaded with its LM head, in fp32, or its name, as for `from_pretrained`; or another
            module.
        args: the arguments; a [`ContinualConfig`], or plain `TrainingArguments`. With `push_to_hub` it is
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
        remember: what stands for what the model knew before the first domain, for the methods that hold on to it:
            data as `train_dataset`, `"self"`, text that the model writes, or how many rows of it; or a dictionary of
            these by name, each alone, with a weight, or with a weight and how far the model may drift on it (see
            `drift_budget`), such as `{"wiki": (texts, 2.0), "self": (4096, 1.0, 0.02)}`. A later domain goes on with
            what was written before the first.
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
        remember: Any = None,
        data_collator: Callable[[list], dict[str, torch.Tensor]] | None = None,
        **kwargs: Any,
    ):
        self.args = args = given.as_config(args)
        given.check_arguments(args, kwargs | {"method": method, "model_init": model_init})
        args.hub_strategy = HubStrategy.END  # a push on the way writes training_args.bin, a pickle with the token
        if args.device.type == "cpu":
            keep_freed_memory()
        self.domain, self._method, self._architecture, self._peft_config = domain, method, architecture, peft_config
        self._remember = remember
        model, self.processing_class = given.named_model(model, model_init, model_init_kwargs, processing_class)
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
        given.check_last_batch(args, domain, self.train_dataset)
        # The loss below is divided by all that the accumulated batch holds.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self._loss_shifts_labels = False  # ours are shifted already: the Trainer counts the first of a row, too
        self._until_backward = ExitStack()
        self.guard, self.tokens_seen, self._hooks = Guard(self), TokensSeen(self), Hooks(self)
        self._make_methods()
        self.callback_handler.callbacks.insert(0, self._hooks)

    def _take(self, model: nn.Module) -> None:
        """A model is here: its units, and what a batch asks of it (the Trainer's `objective` is that of a search)."""
        self.has_adapter = isinstance(model, PeftModel)
        if self.processing_class is None:
            given.check_module(self.args)
            self.units, self.criterion = None, ModuleLoss(model)
            return
        given.check_language_model(model, self.processing_class, self._architecture)
        self.units = Units(model, self._architecture)
        if self.args.chunked_cross_entropy:
            check_head_in_chunks(self.units)
        causal = self.units.model.can_generate()
        separated = causal and self.args.separate_documents and ends_documents(self.processing_class)
        separator = separator_of(self.processing_class) if separated else None
        self.criterion = LanguageModeling(self.units, causal, separator)

    def _make_methods(self) -> None:
        """The methods, attached to the model that is here."""
        self.methods = given.make_methods(self._method)
        if self.is_sharded:
            self._check_sharding()
        given.check_methods(self.methods, self.has_adapter, self.is_sharded)
        self.remembered = remembered_by(self._remember, self.methods, self.inputs, self.args)
        parts = [part for one in self.methods for part in one.parts(self)]
        remembered = [] if self.remembered is None else [self.remembered]
        self.methods = sorted([*remembered, *self.methods, *parts], key=lambda one: one.order)
        for one in self.methods:
            one.attach(self)

    def _adapted(self, model: nn.Module) -> nn.Module:
        """The model with its adapter, if it has one or gets one."""
        seed = addressed_seed(self.args.seed, self.domain, "adapter")
        return given.adapted(model, self._peft_config, self.args, self.processing_class, seed)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """What `model_init` makes, with an adapter if it gets one."""
        return self._adapted(super().call_model_init(trial))

    # ---- training: a run of steps ----------------------------------------------------------------------------------

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
        self._resumes_from = resuming.go_on(self, resume_from_checkpoint)
        self.guard.begin()
        signals = self._hooks.begin()
        try:
            with signals if self.args.save_strategy != SaveStrategy.NO else nullcontext():
                return super().train(resume_from_checkpoint=self._resumes_from, **kwargs)
        except pickle.UnpicklingError as error:  # torch refuses, with weights_only, all that is no tensor
            raise UserError(
                f"checkpoint {self._resumes_from}: refused, for reading a file of it would run code; remove it, and "
                "resume from an older one"
            ) from error
        finally:
            self.unfreeze()

    def _hp_search_setup(self, trial: Any) -> None:
        """The model that will be trained is here, and in a search the arguments of the trial."""
        super()._hp_search_setup(trial)
        if self.model_init is not None:
            self._take(self.model)
            self.inputs.again(self.train_dataset)
            self._make_methods()
        self.tokens_seen.begin(self._resumes_from)
        for method in self.methods if self._resumes_from else ():
            method.load(Path(self._resumes_from))
        if self.tells_of_methods_without_effect and (warning := without_effect(self.methods)):
            logger.warning("domain '%s': %s", self.domain, warning)
        self.freeze()

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # it shuffles itself, by address

    # ---- one step, in this order -----------------------------------------------------------------------------------

    def call_hook(self, name: str) -> None:
        """Call a hook of all methods, in their order."""
        for method in self.methods:
            getattr(method, name)()

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward ([`compute_loss`]) and backward of one batch; after the last of a step, what reads and changes the
        gradient. What the methods opened (gates) stays until the backward pass is over."""
        with self._until_backward:
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self.call_hook("read_gradient")
            self.call_hook("change_gradient")
        return loss

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
            self.tokens_seen.note(batch, inputs)
        outputs = self.criterion(model, batch, self.args.chunked_cross_entropy)
        if outputs.loss is not None:
            loss = self._share(outputs.loss, num_items_in_batch)
        else:
            own = outputs.of_first(len(inputs["input_ids"]))
            losses = own.losses(self.args.label_smoothing_factor)
            if num_items_in_batch is None:
                return (losses.mean(), outputs) if return_outputs else losses.mean()
            for method in self.methods:
                losses = method.change_losses(inputs, own, losses)
            loss = self._share(losses, num_items_in_batch)
        self.guard.note(self.criterion.name, loss)
        for method in self.methods:
            for name, extra in method.loss(model, inputs, outputs).items():
                extra = self._share(extra, num_items_in_batch)
                self.guard.note(name, extra)
                loss = loss + extra
        return (loss, outputs) if return_outputs else loss

    def _share(self, losses: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
        """What the losses of a batch's predictions, [predictions], are of their mean over the step's; or what a mean
        over the batch, a scalar, is of the mean over the step's batches."""
        if not losses.ndim:
            return losses / self.current_gradient_accumulation_steps
        share = losses.sum() / num_items_in_batch
        if self.args.average_tokens_across_devices:  # counted over all processes, which DDP averages
            share = share * self.accelerator.num_processes
        return share

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm of the gradient before clipping. The Trainer asks for it after it has clipped, last before the
        optimizer steps, so that this is where a step is stopped that would spoil the weights."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.guard.check_step(grad_norm)
        return grad_norm

    def before_step(self) -> None:
        """The gradient is clipped, and the optimizer will step."""
        self.call_hook("before_step")

    def after_step(self) -> None:
        """The optimizer has stepped: masks act before anybody looks."""
        self.call_hook("mask_step")
        self.call_hook("after_step")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the parts of the loss beside their sum."""
        if "loss" in logs:
            logs.update(self.guard.means(self.state.global_step))
            logs.update(self.figures())
        super().log(logs, start_time)


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
