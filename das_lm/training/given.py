"""The arguments, the model and the methods that users hand to a trainer, as it works with them."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.training_args import ParallelMode

from das_lm.data.built_in import MODELS
from das_lm.errors import UserError, did_you_mean
from das_lm.methods import METHODS, Method
from das_lm.model.adapters import base_of, check_adapter_kind, with_adapter
from das_lm.model.loading import load_whole, read_config, read_tokenizer, saved_as_causal
from das_lm.training.config import ContinualConfig
from das_lm.units import Architecture


def as_config(args: TrainingArguments | None) -> ContinualConfig:
    """
    The arguments as a [`ContinualConfig`]; of plain `TrainingArguments` all are taken as they are, but
    `remove_unused_columns`, which must be off.

    Raises:
        UserError: the arguments of another trainer.
    """
    if args is None:
        return ContinualConfig()
    if isinstance(args, ContinualConfig):
        return args
    if type(args) is not TrainingArguments:
        raise UserError(
            f"args: {type(args).__name__} is of another trainer; give a ContinualConfig, or TrainingArguments"
        )
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(args) if field.init}
    return ContinualConfig(**{**given, "remove_unused_columns": False})


def check_arguments(args: ContinualConfig, given: Mapping[str, Any]) -> None:
    """
    Args:
        given: further arguments of the trainer by name.

    Raises:
        UserError: what no model can be trained with here, and arguments of the Trainer that would be ignored.
    """
    if args.n_gpu > 1:
        raise UserError(
            f"one process sees {args.n_gpu} GPUs and would wrap the model in DataParallel, which gates and masks do "
            "not survive: start it with `accelerate launch`, or show it one GPU with CUDA_VISIBLE_DEVICES=0"
        )
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        version = (args.fsdp_plugin_args or {}).get("fsdp_version", os.environ.get("FSDP_VERSION", "1"))
        if int(version) != 2:
            raise UserError(
                "fsdp: version 1 joins the parameters of many modules into one vector, in which masks find no unit; "
                "write version 2: fsdp_version: 2 in accelerate's file (recipes/accelerate/fsdp2.yaml), or "
                "fsdp_config: {version: 2}"
            )
        if args.parallel_mode != ParallelMode.DISTRIBUTED:
            raise UserError("fsdp: there is one process, and nothing to share out; leave it off, or start several")
    if given.get("compute_loss_func"):
        raise UserError(
            "compute_loss_func: methods and measures read the loss of every single prediction, which a loss of the "
            "whole batch hides; leave it out, or train a module whose forward returns your loss (no processing_class)"
        )
    if given.get("compute_metrics"):
        if args.prediction_loss_only:
            raise UserError("prediction_loss_only: compute_metrics needs the predictions; leave one of the two out")
        for name, off in (
            ("batch_eval_metrics", False),
            ("include_for_metrics", []),
            ("eval_do_concat_batches", True),
        ):
            if getattr(args, name) != off:
                raise UserError(
                    f"{name}: compute_metrics gets the predictions and labels of the whole data set, and nothing "
                    "else; leave it out (preprocess_logits_for_metrics makes what is kept of a batch small)"
                )
    if given.get("model_init"):
        if any(isinstance(one, Method) for one in _as_list(given["method"])):
            raise UserError("method: with model_init every run begins anew; give a method's name or class, no object")
        if any(given.get("optimizers") or ()):
            raise UserError(
                "optimizers: belong to one model, and model_init makes others; give optimizer_cls_and_kwargs"
            )


def named_model(
    model: str | Path | nn.Module | None, model_init: Any, options: Mapping[str, Any] | None, tokenizer: Any
) -> tuple[nn.Module | None, Any]:
    """
    The model and its tokenizer (`None` for a module that reads no text). A language model that is given by name is
    loaded, masked or causal as it was saved, in fp32 unless `options`, those of `from_pretrained`, say otherwise; its
    tokenizer too, unless one is given.

    Raises:
        UserError: neither a model nor a `model_init` is given, or both; or the model cannot be loaded, or is an
            adapter.
    """
    if (model is None) == (model_init is None):
        raise UserError("model: give a model or its name, or in its place a model_init that makes it")
    if model_init is not None and not (callable(model_init) and len(inspect.signature(model_init).parameters) <= 1):
        raise UserError("model_init: give a function of nothing, or of a trial alone, that returns a model")
    model = os.fspath(model) if isinstance(model, Path) else model
    options = dict(options or {})
    if not isinstance(model, str):
        if options:
            raise UserError("model_init_kwargs: are for a model that is given by name; leave them out")
        return model, tokenizer
    path = str(MODELS.get(model, model))
    if base_of(path):
        raise UserError(f"model: '{model}' is an adapter; load it with PEFT's PeftModel, and give the model")
    shared = {key: options[key] for key in ("revision", "token", "trust_remote_code", "cache_dir") if key in options}
    try:
        model = load_whole(path, saved_as_causal(read_config(path, **shared)), **options)
        tokenizer = read_tokenizer(path, model.config.vocab_size, **shared) if tokenizer is None else tokenizer
    except UserError as error:  # in the words of a recipe
        raise UserError(str(error).replace("model_name_or_path: ", "model: ", 1)) from error
    return model, tokenizer


def check_module(args: ContinualConfig) -> None:
    """Raises `UserError` for arguments that a module which is no language model cannot follow."""
    for name, off, what in (("non_unit_lr_scale", 1, "units"), ("chunked_cross_entropy", False, "an LM head")):
        if getattr(args, name) != off:
            raise UserError(f"{name}: only a language model has {what}; leave it at {off} for another module")


def check_last_batch(args: ContinualConfig, domain: str, rows: Any) -> None:
    """Raises `UserError` where `dataloader_drop_last` would leave out all rows of a domain."""
    batch = args.per_device_train_batch_size * args.world_size
    if args.dataloader_drop_last and rows is not None and 0 < len(rows) < batch:
        raise UserError(
            f"dataloader_drop_last: domain '{domain}' has {len(rows)} rows, fewer than the {batch} of a batch, and "
            "nothing would be learned; leave it off, or make the batch smaller"
        )


def check_language_model(model: nn.Module, tokenizer: Any, architecture: Any) -> None:
    """Raises `UserError` for a module with a tokenizer that is no language model, and for what is no tokenizer or
    architecture."""
    if not hasattr(model, "config"):
        raise UserError(
            f"processing_class: {type(model).__name__} is no language model of transformers; leave processing_class "
            "out, and give rows of what its forward takes"
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UserError(
            f"processing_class: {type(tokenizer).__name__} is no tokenizer; give what AutoTokenizer.from_pretrained "
            "makes"
        )
    if not isinstance(architecture, Architecture | None):
        raise UserError(f"architecture: give an Architecture, not {type(architecture).__name__}")


def adapted(model: nn.Module, config: Any, args: ContinualConfig, tokenizer: Any, seed: int) -> nn.Module:
    """
    The model, with a fresh adapter if there is a `config` for one.

    Raises:
        UserError: the adapter, or the model without one, cannot be trained.
    """
    if not isinstance(model, nn.Module):
        raise UserError(
            f"model: {type(model).__name__} is no model; give a model or its name (model_init: return one)"
        )
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
        return with_adapter(model, config, seed)
    check_adapter_kind(model)
    return model


def make_methods(method: Any) -> list[Method]:
    """
    Args:
        method: a name in `METHODS`, a class or an object of [`Method`]; or a list of them.

    Raises:
        UserError: it is something else, or stands there twice.

    Returns:
        them in the order in which they take turns.
    """
    methods = [_make_method(one) for one in _as_list(method)]
    methods.sort(key=lambda one: (one.order, type(one).__name__))
    for one, following in pairwise(methods):
        if type(one) is type(following):
            raise UserError(f"method: '{one.name}' stands there twice; leave one out")
    return methods


def check_methods(methods: Sequence[Method], has_adapter: bool, is_sharded: bool) -> None:
    """Raises `UserError` for methods that cannot train a model with an adapter, or a sharded one, if it is."""
    for one in methods:
        if has_adapter and not one.works_with_adapters:
            raise UserError(
                f"method: '{one.name}' remembers single parameters, and the next domain's "
                "adapter has others: train all weights, without peft, or use another method, such as das or replay"
            )
        if is_sharded and not one.works_sharded:
            raise UserError(
                f"method: '{one.name}' needs whole parameters, and fsdp leaves each process a "
                "slice of them: use DDP, or another method, such as das, ewc or replay"
            )


def _as_list(method: Any) -> Sequence[Any]:
    return method if isinstance(method, list | tuple) else [method]


def _make_method(method: Any) -> Method:
    if isinstance(method, Method):
        return method
    if isinstance(method, type) and issubclass(method, Method):
        return method()
    if not isinstance(method, str):
        raise UserError(f"method: {type(method).__name__} is no method; give a name such as 'das', or a Method")
    if method not in METHODS:
        raise UserError(f"method: '{method}' is unknown.{did_you_mean(method, METHODS)}")
    return METHODS[method]()
