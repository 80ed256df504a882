"""Models and tokenizers that a recipe names: built in, in a directory, or of the hub; whole, or an adapter."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    TrainingArguments,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from das_lm.data.built_in import MODELS
from das_lm.data.packing import highest_id, special_tokens
from das_lm.errors import UserError, as_user_error
from das_lm.model import adapters
from das_lm.units import ARCHITECTURES, Architecture

if TYPE_CHECKING:
    from das_lm.run.recipe import Recipe

#: What a config counts, and what is made one by one for it -> more than any model has.
TOO_MANY = {r"(num|n)_(.+_)?(layers?|blocks)": 1_000, r"num_labels": 1_000_000}


def model_path(recipe: Recipe) -> str:
    """Where the base model is."""
    return _path(recipe.model_name_or_path)


def _path(name: str) -> str:
    return str(MODELS.get(name, name))


def _config(path: str, recipe: Recipe) -> Any:
    """The config of a model, or of the model that an adapter belongs to."""
    base = adapters.base_of(path)
    return read_config(_path(base) if base else path, recipe.trust_remote_code)


def read_config(path: str, trust_remote_code: bool = False, **options: Any) -> Any:
    """
    The config of a model; `options` are those of `from_pretrained`.

    Raises:
        UserError: it cannot be read, or asks for more than any model has.
    """
    with as_user_error(_cannot_load(path)):
        written, _ = PreTrainedConfig.get_config_dict(path, **options)
        for key, value in _numbers(written):
            most = next((most for name, most in TOO_MANY.items() if re.fullmatch(name, key)), value)
            if value > most or (value < 0 and re.match("num_|n_", key)):
                raise ValueError(f"its config has {key}: {value:.5g}")
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **options)
        if not all(isinstance(name, str) for name in config.architectures or ()):
            raise ValueError("its config has architectures that are no names")
    return config


def _numbers(config: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """(Key, value) of all numbers, those of configs within included."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif isinstance(value, int | float):
            yield str(key), value


def check_model(recipe: Recipe) -> None:
    """
    Look at the config alone, before anything heavy loads.

    Raises:
        UserError: no such model, an architecture that is not supported, a wrong entry for it, or weights that cannot
            be trained as the recipe says.
    """
    config = _config(model_path(recipe), recipe)
    if recipe.units is None and config.model_type not in ARCHITECTURES:
        raise UserError(
            f"model_name_or_path: models of type '{config.model_type}' are not supported; supported are "
            f"{', '.join(sorted(ARCHITECTURES))}; for another one, das-lm units proposes what to write as `units:` in "
            "the recipe"
        )
    if recipe.units is not None:
        Architecture.from_dict(recipe.units)
    _check_adapters(recipe, getattr(config, "quantization_config", None) is not None)


def _check_adapters(recipe: Recipe, quantized: bool) -> None:
    name = recipe.model_name_or_path
    if recipe.peft is None:
        if quantized:
            raise UserError(
                f"model_name_or_path: '{name}' is quantized, so that its weights cannot be trained; train adapters "
                "(peft: {adapters: apart} in the recipe), or take the model in full precision"
            )
        return
    if recipe.peft["adapters"] != "apart" and quantized:
        raise UserError(
            f"model_name_or_path: '{name}' is quantized, and an adapter cannot be added to its weights without loss; "
            "write adapters: apart"
        )
    if recipe.peft["adapters"] != "merge" and adapters.base_of(model_path(recipe)):
        raise UserError(
            f"model_name_or_path: '{name}' is an adapter itself, and PEFT loads no adapter of an adapter; write "
            "adapters: merge"
        )
    growing = [domain.name for domain in recipe.domains if domain.add_tokens]
    if recipe.peft["adapters"] != "merge" and growing:
        raise UserError(
            f"domain '{growing[0]}': add_tokens: the embeddings of new tokens belong to no adapter; write adapters: "
            "merge, or leave add_tokens out"
        )
    if recipe.peft.get("load_in_4bit") and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("peft: load_in_4bit needs bitsandbytes: pip install bitsandbytes, or leave it out")


def is_causal(recipe: Recipe, path: str | None = None) -> bool:
    """Whether a model is a causal language model rather than a masked one: what its config says that it was saved as,
    or else what its type is made for."""
    return saved_as_causal(_config(path or model_path(recipe), recipe))


def saved_as_causal(config: Any) -> bool:
    """[`is_causal`] of a config."""
    saved_as = set(config.architectures or ())
    if saved_as & set(MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()):
        return False
    if saved_as & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        return True
    return config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def load_model(path: str, recipe: Recipe) -> Any:
    """
    Load a language model with all of its weights, in fp32; one with an adapter as the sum of both, or, with
    `load_in_4bit`, as a model of PEFT.

    Raises:
        UserError: it cannot be loaded, lacks weights, which would be random, or is the adapter of another model.
    """
    base = adapters.base_of(path)
    if base is None:
        return _load_whole(path, recipe)
    if path != model_path(recipe) and not _is_same(base, recipe.model_name_or_path):
        raise UserError(
            f"the adapter in {path} is of another model: of '{base}', not of '{recipe.model_name_or_path}'; name its "
            f"own model, or, if it has only moved, correct base_model_name_or_path in {path}/adapter_config.json"
        )
    model = _load_whole(_path(base), recipe)
    model = adapters.load_adapter(model, path, merge=not getattr(model.config, "quantization_config", None))
    model.name_or_path = path
    return model


def _is_same(one: str, other: str) -> bool:
    """Whether two names are of one model: equal, or of one directory."""
    return one == other or (os.path.isdir(one) and os.path.isdir(other) and os.path.samefile(one, other))


def _load_whole(path: str, recipe: Recipe) -> Any:
    options = {"attn_implementation": recipe.attn_implementation} if recipe.attn_implementation else {}
    if recipe.peft and recipe.peft.get("load_in_4bit"):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # as QLoRA (Dettmers et al., arXiv 2305.14314)
    options["trust_remote_code"] = recipe.trust_remote_code
    if recipe.new_lm_head is None:
        return load_whole(path, is_causal(recipe, path), **options)
    with torch.random.fork_rng([]):
        torch.manual_seed(recipe.training.get("seed", TrainingArguments.seed))
        return load_whole(path, is_causal(recipe, path), new_head=True, **options)


def load_whole(path: str, causal: bool, new_head: bool = False, **options: Any) -> Any:
    """
    Load a language model with all of its weights, in fp32 unless `options`, those of `from_pretrained`, say otherwise.

    Args:
        new_head: it lacks its LM head alone, and gets a new one, drawn from torch's generator and tied to the
            embeddings.

    Raises:
        UserError: it cannot be loaded or run, lacks weights, or has the head that is to be new.
    """
    options.setdefault("dtype", torch.float32)  # a masked update below one ulp of a half-precision parameter is lost
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # its load report; what is missing is said below
    kind = AutoModelForCausalLM if causal else AutoModelForMaskedLM
    try:
        with as_user_error(_cannot_load(path)):
            model, info = kind.from_pretrained(path, output_loading_info=True, **options)
    except UserError as error:
        if isinstance(error.__cause__, UnpicklingError):  # whose own advice is to run the code
            reason = "its .bin file is broken, or reading it would run code; save the model as safetensors"
        elif "ignore_mismatched_sizes" in str(error):  # and a report, which is not shown
            reason = "its weights have other shapes than its config says"
        else:
            raise
        raise UserError(f"{_cannot_load(path)}: {reason}") from error
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
    missing = sorted(info["missing_keys"])
    lacks_head = missing and not any(name.startswith(f"{model.base_model_prefix}.") for name in missing)
    if missing and not (new_head and lacks_head):
        raise UserError(
            f"model_name_or_path: the checkpoint {path} lacks weights of the language model, which would be "
            f"random: {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}; use one that has its LM head"
            f"{', or begin with a new one (--new_lm_head STEPS)' if lacks_head else ''}"
        )
    if new_head and not missing:
        raise UserError(f"new_lm_head: the model {path} has its LM head; leave new_lm_head out")
    if new_head:
        model.config.tie_word_embeddings = True
        model.tie_weights()
        if not head_parameters(model):
            raise UserError(
                f"new_lm_head: the head of a {type(model).__name__} is one matrix, and tied to the embeddings it has "
                "nothing of its own to learn: set tie_word_embeddings to true in the model's config.json instead"
            )
    if "attn_implementation" not in options and model.device.type != "meta":  # others may need a GPU
        with as_user_error(f"model_name_or_path: '{path}' can be loaded, but not run"), torch.no_grad():
            model(input_ids=torch.tensor([[0, 1]], device=model.device))["logits"]
    return model


def head_parameters(model: Any) -> list[torch.nn.Parameter]:
    """What a language model has beside its base model."""
    base = {id(parameter) for parameter in model.base_model.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in base]


def load_tokenizer(path: str, recipe: Recipe) -> Any:
    """
    Load the tokenizer of a model.

    Raises:
        UserError: there is none, it is broken, or it is of another model.
    """
    with as_user_error(_cannot_load(path)):
        vocabulary = _config(path, recipe).vocab_size
    return read_tokenizer(path, vocabulary, trust_remote_code=recipe.trust_remote_code)


def read_tokenizer(path: str, vocabulary: int, **options: Any) -> Any:
    """The same for a model of so many tokens; `options` are those of `from_pretrained`."""
    with as_user_error(f"model_name_or_path: no tokenizer can be loaded from '{path}'"):
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes where there is none
            raise ValueError("no tokenizer is saved beside the model")
        if not isinstance(tokenizer.model_max_length, int | float):
            raise ValueError("its model_max_length is no number")
        special_tokens(tokenizer)
        highest = highest_id(tokenizer)
    if highest >= vocabulary:
        raise UserError(
            f"model_name_or_path: the tokenizer of '{path}' gives ids up to {highest}, and the model knows "
            f"{vocabulary} tokens; give its own"
        )
    return tokenizer


def _cannot_load(path: str) -> str:
    return f"model_name_or_path: '{path}' cannot be loaded"
