"""Every knob of a continual pre-training run, grouped and documented with its source."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils import is_liger_kernel_available

from das_lm.errors import UserError, did_you_mean
from das_lm.units.importance import ACCUMULATIONS, NORMALIZATIONS

PROXIES = ("hidden", "logits")
SOFT_MASK_TARGETS = ("update", "gradient")
UNIT_KINDS = ("head", "intermediate", "output")
FISHERS = ("true", "empirical")
EWC_MODES = ("separate", "online")
SELF_REPLAY_TARGETS = ("tokens", "distributions")
NCL_CURVATURES = ("diagonal", "kronecker")

CHOICES = {
    "importance_normalization": NORMALIZATIONS,
    "importance_accumulation": ACCUMULATIONS,
    "proxy": PROXIES,
    "soft_mask_target": SOFT_MASK_TARGETS,
    "fisher": FISHERS,
    "ewc_mode": EWC_MODES,
    "self_replay_target": SELF_REPLAY_TARGETS,
    "ncl_curvature": NCL_CURVATURES,
}
LARGEST = 2**32 - 1
#: Least and largest value of every number, those of TrainingArguments first. Below 1 there is room for 1 - 1e-6.
BOUNDS = {
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
    "max_length": (8, LARGEST),
    "mlm_probability": (0.01, 1),
    "importance_samples": (1, LARGEST),
    "importance_batch_size": (1, LARGEST),
    "gate_dropout": (0, 0.9),
    "soft_mask_strength": (0, 1),
    "non_unit_lr_scale": (0, None),
    "contrast_weight": (0, None),
    "contrast_temperature": (1e-4, None),
    "penalty_weight": (0, None),
    "ewc_decay": (0, 1),
    "si_damping": (1e-12, None),
    "rwalk_decay": (0, 1),
    "rwalk_interval": (1, LARGEST),
    "scp_projections": (1, LARGEST),
    "memory_size": (1, LARGEST),
    "replay_ratio": (0, 1),
    "self_replay_sweeps": (1, LARGEST),
    "lwf_weight": (0, None),
    "lwf_temperature": (1e-4, None),
    "ema_decay": (0, 1),
    "gem_margin": (0, None),
    "ncl_prior": (1e-12, None),
    "ncl_radius": (1e-12, None),
}
#: Optimizers that step inside of the backward pass, where no mask and no method comes between.
FUSED_WITH_BACKWARD = ("lomo", "layerwise")


@dataclass
class DASConfig(TrainingArguments):
    r"""
    Arguments of [`DASTrainer`]: those of [`~transformers.TrainingArguments`], and these.

    Parameters:
        > Text

        max_length (`int`, *optional*, defaults to `128`):
            Tokens per packed training block and per window of a held-out document, special tokens included.
        separate_documents (`bool`, *optional*, defaults to `True`):
            Of a causal model: in a packed block no token attends to another document, and positions begin anew.
        mlm_probability (`float`, *optional*, defaults to `0.15`):
            Share of tokens that masked language modeling predicts (80 % become the mask token, 10 % a random token).
        chunked_cross_entropy (`bool`, *optional*, defaults to `False`):
            Compute the logits of a training step and their loss a chunk at a time, forward and backward (torch's
            `linear_cross_entropy`, from 2.13 on): predictions × vocabulary is never in memory. For causal models with
            a large vocabulary; costs computing the logits twice.

        > Importance (DAS, arXiv 2302.03241, section 3.1)

        importance (`str`, *optional*, defaults to `"auto"`):
            Where the importance of what the model already knows comes from: `"auto"` takes `importance.safetensors`
            beside the model's weights and else computes the proxy; `"proxy"` always computes it; any other value is a
            path to an importance file or to a directory that holds one.
        importance_samples (`int`, *optional*, defaults to `1000`):
            Blocks of the domain that each importance pass reads, over all processes.
        importance_batch_size (`int`, *optional*):
            Blocks per process and batch of an importance pass. Defaults to `per_device_train_batch_size`.
        importance_normalization (`str`, *optional*, defaults to `"paper"`):
            How the raw importance of one layer and kind becomes a mask in [0, 1]: `"paper"` is |tanh(z)| of the
            standardised values (equation 4), which also protects the *least* important units; `"rank"` and
            `"positive"` (max(0, tanh z)) keep the order of its absolute values.
        importance_accumulation (`str`, *optional*, defaults to `"absolute"`):
            `"absolute"` averages |∂L/∂g| per example (equation 3); `"signed"` averages ∂L/∂g, as the authors' code.
        proxy (`str`, *optional*, defaults to `"hidden"`):
            What the proxy KL before the first domain compares between two dropout draws: `"hidden"`, the last hidden
            state (equation 5), or `"logits"`, the masked-token distributions.
        gate_dropout (`float`, *optional*, defaults to `0.1`):
            Share of units dropped through the gates, where a model without active dropout needs two different views.

        > Soft-masking (section 3.2)

        soft_mask_target (`str`, *optional*, defaults to `"update"`):
            `"gradient"` multiplies the gradients by 1 − importance (equation 6, exact for SGD); `"update"` scales the
            step that the optimizer took, which also holds for Adam, whose normalisation cancels a constant factor.
        soft_mask_units (`list[str]`, *optional*, defaults to all of `head`, `intermediate`, `output`):
            The kinds of units that are masked.
        soft_mask_strength (`float`, *optional*, defaults to `1.0`):
            The mask is 1 − strength × importance; 0 switches soft-masking off.
        non_unit_lr_scale (`float`, *optional*, defaults to `1.0`):
            Learning-rate factor of what is no unit (embeddings, norms, LM head) and so is not masked; 0 freezes it.

        > Contrastive integration (section 3.3)

        contrast_weight (`float`, *optional*, defaults to `1.0`):
            λ of the contrastive loss (equation 9); 0 leaves the loss and its views out.
        contrast_temperature (`float`, *optional*, defaults to `0.05`):
            τ of the contrastive loss (equation 8).
        contrast_prior_gradient (`bool`, *optional*, defaults to `True`):
            Whether gradient flows through the view of the prior knowledge, as in the authors' code. Without, that view
            costs a third.

        > Penalties: loss + (λ/2) Σ Ω (θ − θ*)² (`l2`, `ewc`, `mas`, `si`, `rwalk`, `scp`)

        penalty_weight (`float`, *optional*, defaults to `1.0`):
            λ. Of a published λ of MAS, SI or RWalk, whose papers leave out the ½, write twice the value. 0 is `naive`.
        fisher (`str`, *optional*, defaults to `"true"`):
            Labels of the diagonal Fisher of `ewc` and `rwalk`: `"true"` samples them from the model, `"empirical"`
            takes those of the data.
        ewc_mode (`str`, *optional*, defaults to `"separate"`):
            `"separate"` keeps one penalty per domain (Kirkpatrick et al., 1612.00796), `"online"` one anchor and a
            decaying sum of Fishers (Schwarz et al., 1805.06370).
        ewc_decay (`float`, *optional*, defaults to `0.95`):
            γ of online EWC: F ← γ F + F_new.
        si_damping (`float`, *optional*, defaults to `0.1`):
            ξ of SI (Zenke et al., 1703.04200, equation 5).
        rwalk_decay (`float`, *optional*, defaults to `0.9`):
            Share of the old value in RWalk's moving average of the Fisher (Chaudhry et al., 1801.10112, equation 7).
        rwalk_interval (`int`, *optional*, defaults to `10`):
            Steps between two updates of that Fisher and of the path score.
        scp_projections (`int`, *optional*, defaults to `100`):
            Random directions per batch from which SCP estimates its sketch.

        > Replay, distillation, weights

        memory_size (`int`, *optional*, defaults to `512`):
            Rows (blocks of text) that `replay`, `agem`, `gem` keep, and that `self_replay` writes.
        replay_ratio (`float`, *optional*, defaults to `0.05`):
            Share of the training rows that come from the memory (`replay`, `self_replay`; of both, each takes it).
        self_replay_target (`str`, *optional*, defaults to `"tokens"`):
            What the base model's text teaches: its `"tokens"`, or the base model's output `"distributions"`.
        self_replay_sweeps (`int`, *optional*, defaults to `8`):
            Gibbs sweeps over each block that the base model writes.
        lwf_weight (`float`, *optional*, defaults to `0.5`):
            Weight of the distillation from the model before the domain (`lwf`, Li and Hoiem, 1606.09282).
        lwf_temperature (`float`, *optional*, defaults to `2.0`):
            Temperature of both distributions of that loss.
        interpolation_alpha (`str`, *optional*, defaults to `"0.5"`):
            α of θ ← α θ_new + (1 − α) θ_old after a domain (`interpolate`; WiSE-FT, 2109.01903), in [0, 1]; `"auto"`
            chooses it on one half of the held-out documents of the domains learned so far; the other half is what is
            reported.
        interpolation_domains (`list[str]`, *optional*):
            Further domains, such as one of `measure`, on which `"auto"` chooses too. Without one, nothing speaks for
            the base model in the first domain.
        ema_decay (`float`, *optional*, defaults to `0.999`):
            Decay per step of the moving average of the weights that `ema` ends a domain with.

        > Gradient geometry

        gem_margin (`float`, *optional*, defaults to `0.0`):
            Least value of every multiplier in GEM's projection (Lopez-Paz and Ranzato, 1706.08840, section 3).
        ncl_curvature (`str`, *optional*, defaults to `"diagonal"`):
            Form of the precision of `ncl` (Kao et al., 2106.08085): `"diagonal"` or `"kronecker"`.
        ncl_prior (`float`, *optional*, defaults to `1.0`):
            Precision of the prior before the first domain, Λ₀ = ncl_prior · I.
        ncl_radius (`float`, *optional*, defaults to `1.0`):
            Radius r of the trust region √(½ δᵀΛδ) ≤ r of a step.
    """

    max_length: int = field(default=128, metadata={"help": "Tokens per block and per window of a held-out document."})
    separate_documents: bool = field(
        default=True, metadata={"help": "Causal models: no token attends to another document of its packed block."}
    )
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of tokens that are predicted."})
    chunked_cross_entropy: bool = field(
        default=False,
        metadata={"help": "Compute logits and their loss in chunks: less memory, for large vocabularies."},
    )

    importance: str = field(default="auto", metadata={"help": "'auto', 'proxy', or a path to an importance file."})
    importance_samples: int = field(default=1000, metadata={"help": "Blocks that each importance pass reads."})
    importance_batch_size: int | None = field(
        default=None,
        metadata={"help": "Blocks per importance batch; per_device_train_batch_size if unset."},
    )
    importance_normalization: str = field(
        default="paper", metadata={"help": f"How importance becomes a mask: {', '.join(NORMALIZATIONS)}."}
    )
    importance_accumulation: str = field(
        default="absolute",
        metadata={"help": "Average |gradient| per example ('absolute') or gradients ('signed')."},
    )
    proxy: str = field(default="hidden", metadata={"help": "What the proxy KL compares: 'hidden' or 'logits'."})
    gate_dropout: float = field(
        default=0.1, metadata={"help": "Share of units dropped through the gates of a model without dropout."}
    )

    soft_mask_target: str = field(
        default="update", metadata={"help": "Scale the optimizer's step ('update') or the gradient ('gradient')."}
    )
    soft_mask_units: list[str] = field(
        default_factory=lambda: list(UNIT_KINDS), metadata={"help": f"Masked kinds of units: {' '.join(UNIT_KINDS)}."}
    )
    soft_mask_strength: float = field(default=1.0, metadata={"help": "The mask is 1 - strength x importance."})
    non_unit_lr_scale: float = field(
        default=1.0, metadata={"help": "Learning-rate factor of embeddings, norms and LM head; 0 freezes them."}
    )

    contrast_weight: float = field(default=1.0, metadata={"help": "Weight of the contrastive loss; 0 leaves it out."})
    contrast_temperature: float = field(default=0.05, metadata={"help": "Temperature of the contrastive loss."})
    contrast_prior_gradient: bool = field(
        default=True, metadata={"help": "Let gradient flow through the view of the prior knowledge."}
    )

    penalty_weight: float = field(default=1.0, metadata={"help": "Weight λ of l2, ewc, mas, si, rwalk, scp."})
    fisher: str = field(
        default="true", metadata={"help": f"Labels of the Fisher of ewc, rwalk and ncl: {', '.join(FISHERS)}."}
    )
    ewc_mode: str = field(default="separate", metadata={"help": f"Kind of EWC: {', '.join(EWC_MODES)}."})
    ewc_decay: float = field(default=0.95, metadata={"help": "Decay of the old Fisher in online EWC."})
    si_damping: float = field(default=0.1, metadata={"help": "Damping ξ of SI."})
    rwalk_decay: float = field(default=0.9, metadata={"help": "Decay of RWalk's moving average of the Fisher."})
    rwalk_interval: int = field(default=10, metadata={"help": "Steps between updates of RWalk's Fisher and score."})
    scp_projections: int = field(default=100, metadata={"help": "Random directions per batch of SCP's sketch."})

    memory_size: int = field(default=512, metadata={"help": "Rows kept (replay, agem, gem) or written (self_replay)."})
    replay_ratio: float = field(default=0.05, metadata={"help": "Share of training rows that are replayed."})
    self_replay_target: str = field(
        default="tokens", metadata={"help": f"What self_replay teaches: {', '.join(SELF_REPLAY_TARGETS)}."}
    )
    self_replay_sweeps: int = field(default=8, metadata={"help": "Gibbs sweeps per block that self_replay writes."})
    lwf_weight: float = field(default=0.5, metadata={"help": "Weight of the distillation of lwf."})
    lwf_temperature: float = field(default=2.0, metadata={"help": "Temperature of the distillation of lwf."})
    interpolation_alpha: str = field(
        default="0.5", metadata={"help": "Share of the new weights after a domain, or 'auto'."}
    )
    interpolation_domains: list[str] = field(
        default_factory=list, metadata={"help": "Domains, learned or not, on which 'auto' chooses too."}
    )
    ema_decay: float = field(default=0.999, metadata={"help": "Decay per step of the averaged weights of ema."})

    gem_margin: float = field(default=0.0, metadata={"help": "Least multiplier of GEM's projection."})
    ncl_curvature: str = field(
        default="diagonal", metadata={"help": f"Precision of ncl: {', '.join(NCL_CURVATURES)}."}
    )
    ncl_prior: float = field(default=1.0, metadata={"help": "Prior precision of ncl."})
    ncl_radius: float = field(default=1.0, metadata={"help": "Radius of ncl's trust region."})

    # Of TrainingArguments, with another default: labels and example ids are no arguments of the model's forward.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off: see DASConfig."})
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
        if self.interpolation_alpha != "auto":
            try:
                inside = 0 <= float(self.interpolation_alpha) <= 1
            except ValueError:
                inside = False
            if not inside:
                raise ValueError(
                    f"interpolation_alpha: '{self.interpolation_alpha}' is neither a number in [0, 1] nor 'auto'"
                )

    def _check_choices(self) -> None:
        choices = {one.name: one.metadata["choices"] for one in fields(self) if one.metadata.get("choices")}
        for name, valid in {**choices, **CHOICES}.items():
            value = getattr(self, name)
            if value is not None and value not in valid:
                raise ValueError(f"{name}: '{value}' is none of {', '.join(valid)}")
        unknown = sorted(set(self.soft_mask_units) - set(UNIT_KINDS))
        if unknown:
            raise ValueError(f"soft_mask_units: '{unknown[0]}' is none of {', '.join(UNIT_KINDS)}")
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
