"""The arguments of a run: those of the Trainer, of text, and of the methods, which declare their own."""

from __future__ import annotations

import json
import os
import typing
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Interval
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils import is_liger_kernel_available

from das_lm.errors import UserError, did_you_mean
from das_lm.methods import METHODS
from das_lm.methods.arguments import LARGEST, NotNegative, bounds_of, choices_of, knob

#: Least and largest value of the numbers of TrainingArguments. Below 1 there is room for 1 - 1e-6.
OF_TRAINING: dict[str, tuple[float, float | None]] = {
    "per_device_train_batch_size": (1, LARGEST),
    "per_device_eval_batch_size": (1, LARGEST),
    "gradient_accumulation_steps": (1, LARGEST),
    "num_train_epochs": (1e-6, LARGEST),
    "max_steps": (-1, LARGEST),
    "learning_rate": (0, None),
    "warmup_steps": (0, LARGEST),
    "weight_decay": (0, None),
    "adam_beta1": (0, 1 - 1e-6),
    "adam_beta2": (0, 1 - 1e-6),
    "adam_epsilon": (1e-30, None),
    "max_grad_norm": (0, None),
    "label_smoothing_factor": (0, 1),
    "neftune_noise_alpha": (0, None),
    "torch_empty_cache_steps": (1, LARGEST),
    "logging_steps": (1e-6, LARGEST),
    "eval_steps": (1e-6, LARGEST),
    "eval_delay": (0, LARGEST),
    "eval_accumulation_steps": (1, LARGEST),
    "save_steps": (1e-6, LARGEST),
    "save_total_limit": (0, LARGEST),
    "seed": (0, LARGEST),
    "data_seed": (0, LARGEST),
    "dataloader_num_workers": (0, 1024),
    "dataloader_prefetch_factor": (1, 1024),
    "ddp_bucket_cap_mb": (1, LARGEST),
    "ddp_timeout": (1, 2**31 - 1),
}
#: Optimizers that step inside of the backward pass, where no mask and no method comes between.
FUSED_WITH_BACKWARD = ("lomo", "layerwise")


def _arguments_of_methods() -> type:
    """All that [`Method.arguments`] declare, as one dataclass: what several methods read is there once."""
    found: dict[str, tuple] = {}
    for kind in METHODS.values():
        hints = typing.get_type_hints(kind.arguments, include_extras=True)
        for one in fields(kind.arguments):
            again = field(default=one.default, default_factory=one.default_factory, metadata=one.metadata)
            earlier = found.setdefault(one.name, (one.name, hints[one.name], again))
            if earlier[1:] != (hints[one.name], earlier[2]) or earlier[2].default != one.default:
                raise TypeError(f"method '{kind.name}': there is another argument '{one.name}' already; rename it")
    return make_dataclass("MethodArguments", found.values())


@dataclass
class ContinualConfig(_arguments_of_methods(), TrainingArguments):
    """
    Arguments of a [`ContinualTrainer`]: those of [`~transformers.TrainingArguments`], these, and those that the
    methods declare, each in its file in `das_lm/methods`.

    Raises:
        ValueError, UserError: a value is out of bounds, none of its choices, or does not go with another.
    """

    max_length: Annotated[int, Interval(ge=8, le=LARGEST)] = knob(
        128, "Tokens per packed training block and per window of a held-out document, special tokens included."
    )
    separate_documents: bool = knob(
        True,
        "Of a causal model: in a packed block no token attends to another document, and positions begin anew. Not "
        "where a chat template ends every turn with the token that ends documents.",
    )
    mlm_probability: Annotated[float, Interval(ge=0.01, le=1)] = knob(
        0.15,
        "Share of tokens that masked language modeling predicts: 80 in 100 become the mask token, 10 a random one.",
    )
    chunked_cross_entropy: bool = knob(
        False,
        "Compute the logits of a training step and their loss a chunk at a time, forward and backward (torch's "
        "linear_cross_entropy, from 2.13 on): predictions x vocabulary is never in memory. For causal models with a "
        "large vocabulary; costs computing the logits twice.",
    )
    non_unit_lr_scale: NotNegative = knob(
        1.0,
        "Learning-rate factor of what is no unit (embeddings, norms, LM head) and so is not masked; 0 freezes it.",
    )

    # Of TrainingArguments, with another default: labels and example ids are no arguments of the model's forward.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off: see ContinualConfig."})
    logging_steps: float = field(default=10, metadata={"help": "Log every X update steps."})
    report_to: None | str | list[str] = field(
        default="tensorboard", metadata={"help": "Where the curves go: 'tensorboard', 'wandb', …, 'none', 'all'."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Off: a loss that is no number stops the run."}
    )

    def __post_init__(self):
        if self.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
            # Before transformers looks for it. Its reason is not the missing library.
            raise UserError(
                "deepspeed: not supported: its engine steps inside of the backward pass and keeps the weights that it "
                "steps in a buffer of its own, so that no mask comes between; use FSDP2, which shards as ZeRO does "
                "(recipes/accelerate/fsdp2.yaml), or DDP"
            )
        if self.parallelism_config is not None:
            raise UserError("parallelism_config: not supported; use FSDP2 (recipes/accelerate/fsdp2.yaml), or DDP")
        if self.report_to is None:
            self.report_to = "none"
        self._check_numbers()
        self._check_choices()
        self._check_mappings()
        super().__post_init__()
        self.dataloader_pin_memory &= self.device.type != "cpu"
        if self.importance_batch_size is None:
            self.importance_batch_size = self.per_device_train_batch_size
        if self.chunked_cross_entropy and self.label_smoothing_factor:
            raise ValueError("chunked_cross_entropy: computes no label smoothing; leave one of the two off")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns: must be false; labels and example ids are no model arguments")
        if self.save_strategy == SaveStrategy.BEST and self.metric_for_best_model is None:
            raise ValueError("save_strategy: 'best' needs metric_for_best_model, such as bio_loss for the domain bio")
        for name in ("load_best_model_at_end", "metric_for_best_model"):
            if getattr(self, name) and self.eval_strategy == IntervalStrategy.NO:
                raise ValueError(f"{name}: nothing is measured while training; write eval_strategy: epoch")
        if self.mixed_precision not in ("no", "fp16", "bf16"):
            raise ValueError(f"ACCELERATE_MIXED_PRECISION: '{self.mixed_precision}' is none of no, fp16, bf16")
        self._check_schedule()

    def _check_numbers(self) -> None:
        for name, (low, high) in BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not (value >= low and (high is None or value <= high)):
                bounds = f"at most {high}" if high is not None and value > high else f"at least {low}"
                bounds = f"between {low} and {high}" if high is not None and high <= 1 else bounds
                raise ValueError(f"{name}: {value} must be {bounds}")
        if self.max_steps == 0:
            raise ValueError("max_steps: 0 would be no limit; write 1 or more, or -1 to train for num_train_epochs")

    def _check_choices(self) -> None:
        for name, valid in CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in valid:
                raise ValueError(f"{name}: '{value}' is none of {', '.join(valid)}")
        for kind in METHODS.values():
            kind.arguments.check(self)
        if self.train_sampling_strategy != "random":
            raise ValueError(
                f"train_sampling_strategy: '{self.train_sampling_strategy}' does nothing here, for every row has its "
                "place by the seed; leave it out"
            )
        if any(part in self.optim for part in FUSED_WITH_BACKWARD):
            raise ValueError(
                f"optim: '{self.optim}' steps inside of the backward pass, where no mask comes between; write another"
            )
        for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
            if getattr(self, name) and not self.dataloader_num_workers:
                raise ValueError(f"{name}: there are no workers; write dataloader_num_workers too, or leave it out")
        if self.ddp_backend is not None and int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise ValueError("ddp_backend: there is one process, which talks to no other; leave it out")
        names = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        unknown = sorted(set(names) - set(INTEGRATION_TO_CALLBACK) - {"all", "none"})
        if unknown:
            raise ValueError(f"report_to: '{unknown[0]}' is none of none, all, {', '.join(INTEGRATION_TO_CALLBACK)}")
        if self.torch_compile_backend is not None or self.torch_compile_mode is not None:
            from accelerate.utils import DynamoBackend
            from torch._inductor import list_mode_options

            backends = [one.value.lower() for one in DynamoBackend if one.value != "NO"]
            for name, valid in (("torch_compile_backend", backends), ("torch_compile_mode", list_mode_options())):
                value = getattr(self, name)
                if value is not None and value not in valid:
                    raise ValueError(f"{name}: '{value}' is none of {', '.join(valid)}")

    def _check_mappings(self) -> None:
        for name in self._VALID_DICT_FIELDS:
            given, is_file = getattr(self, name), name in ("accelerator_config", "fsdp_config")
            if isinstance(given, str):
                with suppress(OSError, ValueError):
                    is_path = is_file and Path(given).is_file()  # no pipe, on which it would wait
                    text = Path(given).read_text("utf-8") if is_path else given
                    if not is_file or text.lstrip()[:1] == "{":
                        given = json.loads(text)
            if isinstance(given, str | list | int | float):
                what = "no mapping, and no file of one" if is_file else "no mapping"
                raise ValueError(f"{name}: '{given}' is {what}; write it as JSON, as in {{\"a\": 1}}")
            if name.endswith("checkpointing_kwargs") and (given or {}).get("use_reentrant"):
                raise ValueError(
                    f"{name}: use_reentrant must be false; reentrant checkpointing gives the gates wrong gradients "
                    "without a message"
                )
            if name == "accelerator_config" and isinstance(given, dict):
                known = {one.name for one in fields(AcceleratorConfig)}
                unknown = sorted(set(map(str, given)) - known)
                if unknown:
                    raise ValueError(f"{name}: there is no '{unknown[0]}'.{did_you_mean(unknown[0], known)}")
                if "num_steps" in (given.get("gradient_accumulation_kwargs") or {}):
                    raise ValueError(f"{name}: num_steps has another place: write gradient_accumulation_steps")

    def learning_rates(self, steps: Iterable[int], total: int) -> list[float]:
        """The learning rate at some steps of a run of `total` steps, as far as the schedule alone decides it."""
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=self.learning_rate)
        warmup, kwargs = self.get_warmup_steps(total), self.lr_scheduler_kwargs
        schedule = get_scheduler(self.lr_scheduler_type, optimizer, warmup, total, kwargs)
        if not isinstance(schedule, LambdaLR):
            return [self.learning_rate for _ in steps]  # follows what is measured
        return [self.learning_rate * schedule.lr_lambdas[0](step) for step in steps]

    def _check_schedule(self) -> None:
        total = self.max_steps if self.max_steps > 0 else 1000
        try:
            sound = all(rate >= 0 for rate in self.learning_rates((0, total // 2, total - 1), total))
            reason = "a learning rate below 0"
        except Exception as error:  # whatever a schedule makes of its arguments
            sound, reason = False, error
        if not sound:
            raise ValueError(
                f"lr_scheduler_kwargs: {self.lr_scheduler_kwargs} does not go with lr_scheduler_type "
                f"'{self.lr_scheduler_type.value}': {reason}"
            )

    @property
    def precision(self) -> dict[str, str]:
        """What decides about rounding, whether the arguments say so or the environment (`ACCELERATE_…`)."""
        prefix = "ACCELERATE_DYNAMO_"
        compiler = {name[len(prefix) :].lower(): value for name, value in sorted(os.environ.items()) if prefix in name}
        if self.torch_compile:
            compiler = {"backend": self.torch_compile_backend, "mode": self.torch_compile_mode or "default"}
        if compiler.get("backend", "no").lower() == "no":
            compiler = {"backend": "no"}
        matmul = torch.backends.cuda.matmul
        tf32 = getattr(matmul, "fp32_precision", None) or ("tf32" if matmul.allow_tf32 else "ieee")
        tf32 = {"0": "ieee", "1": "tf32"}.get(os.environ.get("NVIDIA_TF32_OVERRIDE", ""), tf32)
        return {
            "mixed": self.mixed_precision,
            "float32": "tf32" if tf32 == "tf32" else "ieee",
            "compiler": " ".join(compiler.values()).lower(),
        }

    def check_packages(self) -> None:
        """
        Whether this machine has what the arguments name; and whether `optim_args` are some of the optimizer's.

        Raises:
            ValueError: it has not, or they are not.
        """
        from transformers import Trainer

        if self.use_liger_kernel and not is_liger_kernel_available():
            raise ValueError("use_liger_kernel: liger-kernel is not installed: pip install liger-kernel")
        for name in self.report_to:
            try:
                INTEGRATION_TO_CALLBACK[name]()
            except Exception as error:  # each has its own
                raise ValueError(f"report_to: '{name}' is not installed, or not whole: {error}") from error
        try:
            optimizer, options = Trainer.get_optimizer_cls_and_kwargs(self)
            optimizer([torch.nn.Parameter(torch.zeros(2, 2))], **options)
        except Exception as error:  # whatever an optimizer makes of its arguments
            if isinstance(error, ImportError) or self.optim_target_modules is None:  # what these are, a model tells
                given = f" with optim_args '{self.optim_args}'" if self.optim_args else ""
                raise ValueError(f"optim: '{self.optim.value}'{given}: {error}") from error


#: The name for users of DAS.
DASConfig = ContinualConfig

_HINTS = typing.get_type_hints(ContinualConfig, include_extras=True)
#: Least and largest value (`None`: any) of every number.
BOUNDS = {**OF_TRAINING, **{name: bounds for name, hint in _HINTS.items() if (bounds := bounds_of(hint))}}
#: Values of what takes one of few.
CHOICES = {
    **{one.name: one.metadata["choices"] for one in fields(ContinualConfig) if one.metadata.get("choices")},
    **{name: choices for name, hint in _HINTS.items() if (choices := choices_of(hint))},
}
