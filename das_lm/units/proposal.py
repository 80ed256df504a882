"""An entry for a model type that is not in the table: guessed from names and shapes, kept if the contract holds."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, fields
from typing import Any

import torch
from torch import nn

from das_lm.errors import UserError
from das_lm.units.architectures import Architecture
from das_lm.units.contract import find_problems
from das_lm.units.discovery import Units, features_of, head_owners, is_transposed

ATTENTION_LAYOUTS = ("head", "kv", "head head head", "head kv kv", "(head kv kv)", "head head", "kv kv", "(kv kv)")
ATTENTION_OUT = re.compile(r"(^|[._])(out|output|o_proj|dense|c_proj|wo)", re.IGNORECASE)
FFN_OUT = re.compile(r"(^|[._])(down|out|fc2|w2|wo|c_proj|lin2|dense_4h_to_h|proj_out)", re.IGNORECASE)
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")


def find_layers(model: nn.Module) -> str:
    """
    Path inside the base model of its list of layers.

    Raises:
        UserError: there is no list of as many modules as the config counts layers.
    """
    for path, module in model.base_model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers:
            return path
    raise UserError(
        f"{type(model.base_model).__name__} has no list of {model.config.num_hidden_layers} layers; DAS needs one"
    )


def propose(model: nn.Module) -> Architecture:
    """
    The first guess for which the contract holds.

    Args:
        model: as [`check_contract`] takes it.

    Raises:
        UserError: there is none; the message names what the layers hold.
    """
    count = 0
    for count, entry in enumerate(_guesses(model), 1):  # noqa: B007 (the count is read below)
        try:
            if next(find_problems(Units(model, entry)), None) is None:
                return entry
        except UserError:  # it does not fit at all
            continue
    layers = model.base_model.get_submodule(find_layers(model))
    held = [f"{path} {list(module.weight.shape)}" for path, module in _projections(layers[0]).items()]
    raise UserError(
        f"no entry was found for model type '{model.config.model_type}': the contract holds for none of {count} "
        f"guesses. A layer has the projections {', '.join(held)}. Write an entry by hand, as those in "
        "das_lm/units/architectures.py, and check it with --entry FILE.yaml"
    )


def as_yaml(entry: Architecture) -> str:
    """The entry as `units:` of a recipe, without what is left at its default."""
    import yaml

    plain: dict[str, Any] = {}
    for one in fields(entry):
        value = getattr(entry, one.name)
        default = one.default if one.default_factory is MISSING else one.default_factory()
        if value != default:
            plain[one.name] = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump({"units": plain}, sort_keys=False)


# ---- guesses -----------------------------------------------------------------------------------------------------


def _guesses(model: nn.Module) -> Iterator[Architecture]:
    path = find_layers(model)
    layers = model.base_model.get_submodule(path)
    heads = next((name for name in HEADS if isinstance(getattr(model.config, name, None), int)), None)
    if heads is None:
        raise UserError(f"the config of model type '{model.config.model_type}' has none of {', '.join(HEADS)}")
    hidden = model.get_input_embeddings().weight.shape[1]
    fused = [any(parameter.ndim == 3 for parameter in layer.parameters()) for layer in layers]
    experts = list(_guess_experts(layers[fused.index(True)], hidden)) if any(fused) else [{}]
    dense = [{"ffn_in": {}, "ffn_out": None}] if all(fused) else list(_guess_ffn(layers[fused.index(False)], hidden))
    attention = _guess_attention(layers[0], getattr(model.config, heads), hidden)
    for parts in itertools.product(attention, dense, experts):
        yield Architecture(layers=path, heads=heads, lm_head=_lm_head(model), **parts[0], **parts[1], **parts[2])


def _guess_attention(layer: nn.Module, heads: int, hidden: int) -> Iterator[dict[str, Any]]:
    projections = {path: module for path, module in _projections(layer).items() if "att" in path.lower()}
    for out in _outputs(projections, hidden, ATTENTION_OUT):
        width, rest = divmod(features_of(projections[out])[0], heads)
        if rest:
            continue
        fitting = {
            path: list(_fitting(features_of(module)[1], heads, width))
            for path, module in projections.items()
            if path != out
        }
        norms = tuple(
            path
            for path, module in layer.named_modules()
            if "att" in path.rpartition(".")[0].lower() and "norm" in path.lower() and _runs_over_heads(module, width)
        )
        for layouts in itertools.product(*fitting.values()):
            for shared in dict.fromkeys([(), norms]):
                yield {
                    "attention_in": dict(zip(fitting, layouts, strict=True)),
                    "attention_out": out,
                    "shared_norms": shared,
                }


def _runs_over_heads(norm: nn.Module, width: int) -> bool:
    weight = getattr(norm, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 1 and len(weight) > width


def _fitting(rows: int, heads: int, width: int) -> Iterator[str]:
    """Layouts that a projection of so many rows can have, without those that say the same."""
    seen: list[torch.Tensor] = []
    for layout in ATTENTION_LAYOUTS:
        try:
            owners = head_owners(layout, heads, width, rows, "")
        except UserError:
            continue
        whole = "kv" in layout or rows % (len(layout.split()) * heads * width) == 0  # heads of the same width
        if whole and not any(owners.shape == other.shape and torch.equal(owners, other) for other in seen):
            seen.append(owners)
            yield layout


def _guess_ffn(layer: nn.Module, hidden: int) -> Iterator[dict[str, Any]]:
    projections = {path: module for path, module in _projections(layer).items() if "att" not in path.lower()}
    for out in _outputs(projections, hidden, FFN_OUT):
        neurons = features_of(projections[out])[0]
        rows = {path: features_of(module)[1] for path, module in projections.items() if path != out}
        if any(count not in (neurons, 2 * neurons) for count in rows.values()):
            continue
        layouts = [("neuron",) if count == neurons else ("neuron neuron", "neuron") for count in rows.values()]
        for chosen in itertools.product(*layouts):
            yield {"ffn_in": dict(zip(rows, chosen, strict=True)), "ffn_out": out}


def _guess_experts(layer: nn.Module, hidden: int) -> Iterator[dict[str, Any]]:
    """The block, or the experts in it alone, and the parameters whose output features are the model's."""
    fused = {path: one for path, one in layer.named_parameters() if one.ndim == 3}
    block, inside = next(iter(fused)).split(".")[0], next(iter(fused)).rpartition(".")[0]
    out = {
        path: axis
        for path, parameter in layer.named_parameters()
        if path.startswith(f"{inside}.") and FFN_OUT.search(path)
        for axis in range(1, parameter.ndim)
        if parameter.shape[axis] == hidden
    }
    for path, module in _projections(layer).items():
        if path.startswith(f"{block}.") and FFN_OUT.search(path) and features_of(module)[1] == hidden:
            out[f"{path}.weight"] = 1 if is_transposed(module) else 0
    yield {"moe_block": block, "moe_out": out}
    yield {"moe_block": inside, "moe_out": {path: axis for path, axis in out.items() if path.startswith(f"{inside}.")}}


def _projections(layer: nn.Module) -> dict[str, nn.Module]:
    return {
        path: module
        for path, module in layer.named_modules()
        if isinstance(module, nn.Linear) or is_transposed(module)
    }


def _outputs(projections: dict[str, nn.Module], hidden: int, name: re.Pattern) -> Iterable[str]:
    """Projections back to the model's width, those with a telling name first, and later ones before earlier ones."""
    fitting = [path for path, module in projections.items() if features_of(module)[1] == hidden]
    return sorted(reversed(fitting), key=lambda path: name.search(path) is None)


def _lm_head(model: nn.Module) -> str:
    """What follows the base model: the first of the model's own modules that is not in it."""
    return next(name for name, module in model.named_children() if module is not model.base_model)
