"""LoRA adapters (PEFT): a fresh one for every domain, merged into the model, stacked, or kept apart."""

from __future__ import annotations

import copy
import math
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from safetensors.torch import load_file

from das_lm.errors import UserError, as_user_error
from das_lm.files import write_tensors
from das_lm.units.soft_mask import check_fresh

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

#: What becomes of a domain's adapter: merged into the weights that the next domain starts from; added to those of the
#: domains before, beside the base model, which stays as it is; or neither, every domain starting at the base model.
ADAPTERS = ("merge", "stack", "apart")
#: Arguments of PEFT's `LoraConfig` that a recipe can give.
LORA_ARGUMENTS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "bias",
    "use_rslora",
    "init_lora_weights",
    "modules_to_save",
)
#: Directory, in that of a domain that was merged, with its adapter alone.
DIRECTORY = "adapter"


def lora_config(peft: Mapping[str, Any]) -> LoraConfig:
    """The adapter that the key `peft` of a recipe describes."""
    return LoraConfig(**{key: value for key, value in peft.items() if key in LORA_ARGUMENTS})


def with_adapter(model: PreTrainedModel, config: LoraConfig, seed: int) -> PeftModel:
    """
    Give a language model a fresh adapter; all else is frozen.

    Args:
        model: the model; its projections are wrapped in place.
        config: the adapter, as for PEFT's `get_peft_model`; it stays as it is.
        seed: of the adapter's random half.

    Raises:
        UserError: the adapter does not fit the model, or cannot be trained here; see [`check_adapter_kind`].
    """
    if isinstance(model, PeftModel):
        raise UserError(
            "peft_config: the model has an adapter already; give the one or the other, or merge what it has before "
            "(merge_and_unload)"
        )
    if not isinstance(config, LoraConfig):
        raise UserError(f"peft_config: {type(config).__name__} is not supported; give a LoraConfig")
    if config.target_parameters:
        raise UserError("peft: target_parameters are not supported; name projections in target_modules")
    config = copy.deepcopy(config)
    config.task_type = "CAUSAL_LM" if model.can_generate() else None  # PEFT has no type for masked language models
    try:
        with torch.random.fork_rng([]), _quiet():
            torch.manual_seed(seed)
            adapted = get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise UserError(f"peft: {' '.join(str(error).split())}") from error
    check_adapter_kind(adapted)
    check_fresh(dict(adapted.named_parameters()), f"init_lora_weights={config.init_lora_weights!r} changes the model")
    return adapted


def check_adapter_kind(model: PeftModel) -> None:
    """
    Refuse adapters that do more than add B A to the weights of projections, or whose merging would change more than
    they do.

    Raises:
        UserError: no LoRA; a variant such as DoRA; an adapter of embeddings; a copy or an adapter of weights that
            several modules share.
    """
    if not isinstance(model.active_peft_config, LoraConfig):
        raise UserError(f"peft: {type(model.active_peft_config).__name__} is not supported; use a LoraConfig")
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            if module.lora_variant:
                kind = type(next(iter(module.lora_variant.values()))).__name__.removesuffix("LinearVariant")
                raise UserError(f"peft: '{name}' has an adapter of the kind {kind}; only plain LoRA is supported")
            if module.lora_embedding_A:
                raise UserError(
                    f"peft: '{name}' is an embedding; leave it out of target_modules, or name it in modules_to_save"
                )
            weights = [module.get_base_layer().weight]
        elif isinstance(module, ModulesToSaveWrapper):
            weights = list(module.original_module.parameters())
        else:
            continue
        if any(uses[id(weight)] > 1 for weight in weights):
            raise UserError(
                f"peft: '{name}' shares its weights with another module (tied embeddings), which merging would change "
                "too; leave it out"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings of PEFT that tell a user nothing, or what is said here in other words."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")  # PEFT sees Conv1D and corrects it
        warnings.filterwarnings("ignore", "Found missing adapter keys")
        warnings.filterwarnings("ignore", ".*tie_word_embeddings")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


# ---- directories -------------------------------------------------------------------------------------------------


def base_of(path: str) -> str | None:
    """The name of the model that the directory `path` holds an adapter of; `None` if it holds no adapter.

    Raises:
        UserError: the adapter does not say.
    """
    if not Path(path, CONFIG_NAME).is_file():
        return None
    with as_user_error(f"the adapter in {path} cannot be read"), _quiet():
        base = PeftConfig.from_pretrained(path).base_model_name_or_path
    if not isinstance(base, str):
        raise UserError(f"{Path(path, CONFIG_NAME)}: base_model_name_or_path is missing, the model that it adapts")
    return base


def load_adapter(model: PreTrainedModel, path: str, merge: bool) -> PreTrainedModel | PeftModel:
    """
    Load an adapter into the model that it belongs to.

    Args:
        model: the model.
        path: directory of the adapter.
        merge: add it to the weights, so that a plain model is left, all of which can be trained.

    Raises:
        UserError: it is of another model, or broken.
    """
    with as_user_error(f"the adapter in {path} does not fit its model, or is broken"), _quiet():
        adapted = PeftModel.from_pretrained(model, path)
        saved = load_file(Path(path, SAFETENSORS_WEIGHTS_NAME))
    check_adapter_kind(adapted)
    different = saved.keys() ^ get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    if different:
        raise UserError(f"the adapter in {path} is of another model: they differ in {min(different)}")
    return adapted.merge_and_unload().requires_grad_(True) if merge else adapted


def finish(model: PeftModel, directory: Path, how: str, base: str, before: Path | None) -> None:
    """
    Make a finished domain of the adapter that PEFT has saved in a directory.

    Args:
        model: the model with the adapter; `"merge"` merges it.
        directory: where it is saved. `"merge"` leaves a whole model there, which transformers loads, and the adapter
            in a directory of its own; the others leave an adapter of the base model, which PEFT loads.
        how: one of [`ADAPTERS`].
        base: name of the base model.
        before: directory of the domain before, if there is one, whose adapter `"stack"` adds.
    """
    if how == "merge":
        alone = directory / DIRECTORY
        alone.mkdir()
        for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
            shutil.move(directory / name, alone / name)
        model.merge_and_unload().save_pretrained(directory)
        return
    config = PeftConfig.from_pretrained(directory)
    config.base_model_name_or_path = base
    if how == "stack" and before is not None:
        _stack(config, directory, before)
    config.save_pretrained(directory)


def _stack(config: LoraConfig, directory: Path, before: Path) -> None:
    """Put two adapters of the same configuration side by side: the sum B₁A₁ + B₂A₂ is [B₁ B₂][A₁; A₂]."""
    earlier, own = (load_file(path / SAFETENSORS_WEIGHTS_NAME) for path in (before, directory))
    count = PeftConfig.from_pretrained(before).r // config.r + 1
    stacked = {}
    for name, tensor in own.items():
        if name.endswith(".lora_A.weight"):
            tensor = torch.cat([earlier[name], tensor])  # [rank, inputs]
        elif name.endswith(".lora_B.weight"):
            tensor = torch.cat([earlier[name], tensor], dim=1)  # [outputs, rank]
        stacked[name] = tensor  # of biases and whole modules the newer value
    # The factor alpha / r (with use_rslora alpha / √r) stays what it was.
    growth = math.sqrt(count) if config.use_rslora else count
    config.r, config.lora_alpha = config.r * count, config.lora_alpha * growth
    config.rank_pattern = {name: rank * count for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {name: alpha * growth for name, alpha in config.alpha_pattern.items()}
    write_tensors(directory / SAFETENSORS_WEIGHTS_NAME, stacked, {"format": "pt"})
