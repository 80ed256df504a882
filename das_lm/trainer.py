"""The Hugging Face Trainer, learning one domain with continual-learning methods: `ContinualTrainer`, `DASTrainer`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, PeftModel
from torch import nn
from torch.utils.data import SequentialSampler
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, HubStrategy, rotate_checkpoints

from das_lm import __version__
from das_lm.adapters import check_adapter_kind, with_adapter
from das_lm.config import DASConfig
from das_lm.cpu import keep_freed_memory
from das_lm.data.blocks import (
    HeldOutWindows,
    PaddingCollator,
    TrainingBlocks,
    TrainingRows,
    addressed_seed,
    collate,
    labeling,
)
from das_lm.data.packing import longest_input, pack, separator_of, windows
from das_lm.errors import UserError, did_you_mean
from das_lm.evaluation.held_out import HeldOut, held_out_losses
from das_lm.files import broken_file, newest_checkpoint, seal, write_json
from das_lm.methods import METHODS, Method
from das_lm.objective import LanguageModeling, ModuleLoss, Output, check_head_in_chunks
from das_lm.units import Architecture, Units

STATE_NAME = "continual_state.json"


class ContinualTrainer(Trainer):
    """
    Learns one domain with one or several continual-learning methods.

    With `processing_class`, the model is a language model, masked or causal; without, it is any module whose forward
    takes columns of the data sets by name and returns a loss (see [`ModuleLoss`]).

    Args:
        model: a language model, loaded with its LM head, in fp32; or another module.
        args: the arguments; a [`DASConfig`].
        method: names in `das_lm.methods.METHODS`, or [`Method`] objects; one or a list.
        train_dataset: documents (a data set with a column `text`), packed blocks (a column `input_ids`), or a
            [`TrainingBlocks`]; for another module, a map-style data set of dictionaries, or a [`TrainingRows`].
        eval_dataset: held-out documents, windows or [`HeldOutWindows`], or a dictionary of them by domain; for another
            module, a data set or a dictionary of them.
        processing_class: the tokenizer.
        domain: name of the domain that is learned.
        development_dataset: held-out data sets by domain, as in `eval_dataset`, for what a method chooses by a score
            (`interpolation_alpha="auto"`); never the ones that are reported.
        architecture: where the model's units are, for a model type that is not in the table.
        peft_config: a `LoraConfig` of PEFT: a fresh adapter learns, and the model is frozen. What is saved is the
            adapter; `trainer.model.merge_and_unload()` is the model that the next domain starts from. A `PeftModel`
            trains the adapter that it has.
        kwargs: further arguments of the Trainer.

    Raises:
        UserError: what the arguments, the model or the method cannot work with.
    """

    def __init__(
        self,
        model: nn.Module,
        args: DASConfig,
        method: str | Method | Sequence[str | Method] = "naive",
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        domain: str = "domain",
        development_dataset: Mapping[str, Any] | None = None,
        architecture: Architecture | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ):
        _refuse(args)
        args.hub_strategy = HubStrategy.END  # a push on the way holds training_args.bin: a pickle with the token in it
        if args.device.type == "cpu":
            keep_freed_memory()
        self.domain = domain
        model = self._adapted(args, model, processing_class, peft_config)
        self.has_adapter = isinstance(model, PeftModel)
        if processing_class is None:
            if args.non_unit_lr_scale != 1:
                raise UserError("non_unit_lr_scale: only a language model has units; leave it at 1 for another module")
            if args.chunked_cross_entropy:
                raise UserError("chunked_cross_entropy: only a language model has an LM head; leave it off")
            self.units, self.objective = None, ModuleLoss(model)
            kwargs.setdefault("data_collator", collate)
            if train_dataset is not None and not isinstance(train_dataset, TrainingRows):
                train_dataset = TrainingRows({domain: train_dataset}, data_seed(args))
        else:
            self.units = Units(model, architecture)
            if args.chunked_cross_entropy:
                check_head_in_chunks(self.units)
            inner = self.units.model
            self.objective = LanguageModeling(
                self.units,
                inner.can_generate(),
                separator_of(processing_class) if inner.can_generate() and args.separate_documents else None,
            )
            kwargs.setdefault("data_collator", PaddingCollator(processing_class))
            train_dataset, eval_dataset, development_dataset = self._prepared(
                args, inner, processing_class, train_dataset, eval_dataset, development_dataset
            )
        self.development_dataset = development_dataset
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        # The loss below is divided by all that the accumulated batch holds.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self._loss_parts: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=self.args.device))
        self._loss_parts_since = 0
        self._until_backward = ExitStack()
        self.methods = [_make_method(one) for one in ([method] if isinstance(method, str | Method) else method)]
        for one in self.methods:
            if self.has_adapter and not one.works_with_adapters:
                raise UserError(
                    f"method: '{type(one).__name__.lower()}' remembers single parameters, and the next domain's "
                    "adapter has others: train all weights, without peft, or use another method, such as das or replay"
                )
            one.attach(self)
        self.add_callback(_Moments(self))

    def _adapted(self, args: DASConfig, model: nn.Module, tokenizer: Any, config: PeftConfig | None) -> nn.Module:
        """The model with its adapter, if it has one or gets one."""
        if config is None and not isinstance(model, PeftModel):
            if getattr(getattr(model, "config", None), "quantization_config", None):
                raise UserError(
                    "the model is quantized, so that its weights cannot be trained: give a peft_config, or load it in "
                    "full precision"
                )
            return model
        if tokenizer is None:
            raise UserError("peft_config: only a language model takes an adapter; give a processing_class")
        if args.non_unit_lr_scale != 1:
            raise UserError("non_unit_lr_scale: with an adapter, only what peft names learns; leave it at 1")
        args.label_names = args.label_names or ["labels"]  # the Trainer cannot see them through PEFT's wrapper
        if config is not None:
            return with_adapter(model, config, addressed_seed(args.seed, self.domain, "adapter"))
        check_adapter_kind(model)
        return model

    def _prepared(
        self, args: DASConfig, model: nn.Module, tokenizer: Any, train_dataset: Any, *held_out: Any
    ) -> tuple[Any, ...]:
        """Text as the language model reads it: packed blocks, and windows of held-out documents."""
        masking = labeling(tokenizer, model.can_generate(), args.mlm_probability)
        max_length = _checked_length(args.max_length, model, tokenizer)
        if train_dataset is not None and not isinstance(train_dataset, TrainingBlocks):
            if "input_ids" not in train_dataset.column_names:
                train_dataset = pack(train_dataset, tokenizer, max_length)
            train_dataset = TrainingBlocks({self.domain: train_dataset}, masking, data_seed(args))

        def prepared(held_out: Any) -> Any:
            if held_out is None or isinstance(held_out, HeldOutWindows):
                return held_out
            if isinstance(held_out, Mapping):
                return {name: prepared(one) for name, one in held_out.items()}
            if "input_ids" not in held_out.column_names:
                held_out = windows(held_out, tokenizer, max_length)
            elif "document" not in held_out.column_names:
                held_out = held_out.add_column("document", list(range(len(held_out))))
            return HeldOutWindows(held_out, masking, data_seed(args))

        return train_dataset, *(prepared(one) for one in held_out)

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
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss of domain '{self.domain}' is {loss.item()} at step {self.state.global_step + 1}; try a "
                "smaller learning_rate, a smaller max_grad_norm, or bf16 instead of fp16"
            )
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
        outputs = self.objective(model, batch, self.args.chunked_cross_entropy)
        if outputs.loss is not None:
            loss = outputs.loss / self.current_gradient_accumulation_steps
        else:
            losses = outputs.losses(self.args.label_smoothing_factor)
            if num_items_in_batch is None:
                return (losses.mean(), outputs) if return_outputs else losses.mean()
            for method in self.methods:
                losses = method.change_losses(inputs, outputs, losses)
            loss = losses.sum() / num_items_in_batch
            if self.args.average_tokens_across_devices:  # counted over all processes, which DDP averages
                loss = loss * self.accelerator.num_processes
        self._loss_parts[f"loss_{self.objective.name}"] += loss.detach()
        for method in self.methods:
            for name, extra in method.loss(model, inputs, outputs).items():
                extra = extra / self.current_gradient_accumulation_steps
                self._loss_parts[f"loss_{name}"] += extra.detach()
                loss = loss + extra
        return (loss, outputs) if return_outputs else loss

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
            outputs = self.objective(model, batch, self.args.chunked_cross_entropy)
            loss = outputs.losses().mean() if outputs.loss is None else outputs.loss
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        gradients = [
            torch.zeros_like(parameter) if gradient is None else gradient
            for parameter, gradient in zip(parameters, gradients, strict=True)
        ]
        return [self.accelerator.reduce(gradient, "mean") for gradient in gradients]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with a learning rate of its own for the parameters that are no units."""
        is_given = self.optimizer is not None
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        scale = self.args.non_unit_lr_scale
        if is_given or scale == 1:
            return optimizer
        others = {id(parameter) for parameter in self._non_units()}
        for group in list(optimizer.param_groups):
            split = [parameter for parameter in group["params"] if id(parameter) in others]
            if split:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in others]
                optimizer.add_param_group({**group, "params": split, "lr": group["lr"] * scale})
        return optimizer

    def _non_units(self) -> list[nn.Parameter]:
        """The trainable parameters that belong to no unit: embeddings, norms, LM head."""
        owned = self.units.owned_parameters()
        named = self.units.model.named_parameters()
        return [parameter for name, parameter in named if name not in owned and parameter.requires_grad]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the parts of the loss beside their sum."""
        if "loss" in logs:
            steps = max(1, self.state.global_step - self._loss_parts_since)
            for name, total in self._loss_parts.items():
                logs[name] = self.accelerator.reduce(total, "mean").item() / steps
                total.zero_()
            for method in self.methods:
                logs.update(method.logs())
            self._loss_parts_since = self.state.global_step
        super().log(logs, start_time)

    # ---- training ------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """
        Learn the domain, then let the methods consolidate it.

        Args:
            resume_from_checkpoint: a checkpoint to go on from, or `True` for the newest whole one in `output_dir`.

        Raises:
            UserError: nothing to train on, a checkpoint that is not whole, or a loss that is no number.
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
            for method in self.methods:
                method.load(Path(resume_from_checkpoint))
        self._loss_parts.clear()
        frozen = self._non_units() if self.args.non_unit_lr_scale == 0 else []
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)

    def importance_batches(self, epoch: int) -> Iterator[dict[str, torch.Tensor]]:
        """This process's share of `importance_samples` blocks, in batches on the device, with the order and masks of
        an `epoch` (negative: never trained on). Shows a progress bar."""
        blocks = self.train_dataset.at(epoch)
        mine = range(self.args.process_index, min(self.args.importance_samples, len(blocks)), self.args.world_size)
        size = self.args.importance_batch_size
        starts = range(0, len(mine), size)
        hidden = self.args.disable_tqdm or not self.is_world_process_zero()
        for start in tqdm(starts, desc=f"importance ({self.domain})", unit="batch", disable=hidden):
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
        """Held-out loss per predicted token and top-1 accuracy of every held-out domain. Changes nothing that training
        depends on: not even the random state, which a data loader would advance."""
        with self.private_randomness("evaluate"):
            return super().evaluate(eval_dataset, *args, **kwargs)

    def measure(self, held_out: Mapping[str, Any]) -> dict[str, HeldOut]:
        """The same as [`evaluate`] of data sets by domain, document by document."""
        with self.private_randomness("evaluate"):
            return {
                name: held_out_losses(
                    self.model,
                    self.objective,
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
        self, dataloader: Any, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Replaces the mean of batch means by sums over all predicted tokens of the documents."""
        result = held_out_losses(
            self.model,
            self.objective,
            dataloader,
            self.accelerator,
            progress=None if self.args.disable_tqdm else description,
        )
        metrics = {
            f"{metric_key_prefix}_{name}": value for name, value in result.measures(self.objective.causal).items()
        }
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(result.tokens))

    # ---- checkpoints: whole or absent ----------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """A plain transformers directory, with the methods' state beside it and nothing that has to be unpickled."""
        directory = Path(output_dir or self.args.output_dir)
        card = directory / "README.md"
        had_card = card.is_file()
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        (directory / "training_args.bin").unlink(missing_ok=True)
        if self.has_adapter and not had_card:
            card.unlink()  # PEFT's draft
        for method in self.methods:
            method.save(directory)
        write_json(directory / STATE_NAME, self.continual_state())

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
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            run_directory = self._get_output_dir(trial)
            seal(Path(run_directory) / f"checkpoint-{self.state.global_step}")
            rotate_checkpoints(run_directory, limit, self.state.best_model_checkpoint, use_mtime=True)


class DASTrainer(ContinualTrainer):
    """
    Learns one domain with DAS (arXiv 2302.03241): a [`ContinualTrainer`] whose method is `das`.

    Example:

    ```python
    trainer = DASTrainer(
        model=AutoModelForMaskedLM.from_pretrained("roberta-base"),
        args=DASConfig(output_dir="bio", learning_rate=1e-4),
        train_dataset=load_dataset("text", data_files="bio.txt", split="train"),
        processing_class=AutoTokenizer.from_pretrained("roberta-base"),
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
        for method in self.trainer.methods:
            method.begin_domain()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for method in self.trainer.methods:
            method.before_step()

    def on_optimizer_step(self, args, state, control, **kwargs):
        for method in self.trainer.methods:
            method.after_step()

    def on_train_end(self, args, state, control, **kwargs):
        for method in self.trainer.methods:
            method.finish_weights()
        for method in self.trainer.methods:
            method.end_domain()


def data_seed(args: DASConfig) -> int:
    """The seed of order and masks."""
    return args.seed if args.data_seed is None else args.data_seed


def _make_method(method: str | Method) -> Method:
    if isinstance(method, Method):
        return method
    if method not in METHODS:
        raise UserError(f"method: '{method}' is unknown.{did_you_mean(method, METHODS)}")
    return METHODS[method]()


def _refuse(args: DASConfig) -> None:
    if args.n_gpu > 1:
        raise UserError(
            f"one process sees {args.n_gpu} GPUs and would wrap the model in DataParallel, which gates and masks do "
            "not survive: start it with `accelerate launch`, or show it one GPU with CUDA_VISIBLE_DEVICES=0"
        )
    for name in ("deepspeed", "fsdp"):
        if getattr(args, name):
            raise UserError(f"{name}: not supported, masks would not reach the partitioned parameters; use plain DDP")


def _checked_length(max_length: int, model: nn.Module, tokenizer: Any) -> int:
    known = len(model.get_input_embeddings().weight)
    if len(tokenizer) > known:
        raise UserError(f"processing_class: the tokenizer has {len(tokenizer)} tokens, the model {known}; give its own")
    limit = longest_input(model, tokenizer)
    if max_length > limit:
        raise UserError(f"max_length: {max_length} is beyond what the model reads, {limit} tokens")
    return max_length
