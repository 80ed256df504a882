"""Which heads and neurons a model has, and which parameter slices belong to each (DAS, arXiv 2302.03241)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from das_lm.errors import UserError, did_you_mean
from das_lm.units.architectures import ARCHITECTURES, Architecture


@dataclass(frozen=True)
class Group:
    """
    The units of one kind in one layer.

    Args:
        key: `"layers.<layer>.<kind>"`.
        kind: `"head"`, `"intermediate"` (which a mixture of experts lacks) or `"output"`.
        size: number of units.
        module: the projection, or mixture of experts, at which a gate multiplies the units' activations.
        side: the `"input"` (heads, intermediate neurons) or the `"output"` (output neurons) of that module.
    """

    key: str
    kind: str
    layer: int
    size: int
    module: nn.Module = field(repr=False)
    side: str


@dataclass(frozen=True)
class Slice:
    """
    Which units own the entries of one parameter along one axis.

    Args:
        parameter: the parameter's name in the model.
        axis: the axis that the units lie along.
        group: key of the units' group.
        owners: unit indices, shape [length of the axis, readers]; more than one reader for shared key/value heads.
    """

    parameter: str
    axis: int
    group: str
    owners: torch.Tensor = field(repr=False)

    def spread(self, per_unit: torch.Tensor, ndim: int) -> torch.Tensor:
        """Values per unit, shape [units], as values per entry, broadcastable to a parameter of `ndim` dimensions.
        Entries with several readers take the largest."""
        values = per_unit[self.owners.to(per_unit.device)].amax(dim=1)
        return values.view([-1 if axis == self.axis else 1 for axis in range(ndim)])


class Units:
    """
    The units of a model: its groups, the parameter slices of each, and its LM head.

    Args:
        model: a Hugging Face model with an LM head; or such a model with a LoRA adapter (PEFT), whose rows belong to
            the units like those of the projection that carries it.
        architecture: the entry to use instead of the one that [`ARCHITECTURES`] has for the model's type.

    Raises:
        UserError: the model's type is not in the table, or the entry does not fit the model.
    """

    def __init__(self, model: nn.Module, architecture: Architecture | None = None):
        self.model = model = getattr(model, "get_base_model", lambda: model)()  # without PEFT's wrapper
        self.model_type: str = model.config.model_type
        self.groups: dict[str, Group] = {}
        self.slices: list[Slice] = []
        if architecture is None:
            if self.model_type not in ARCHITECTURES:
                raise UserError(
                    f"model type '{self.model_type}' is not in the table of architectures; supported: "
                    f"{', '.join(sorted(ARCHITECTURES))}. 'das-lm units MODEL' proposes an entry for it: "
                    "`architecture=Architecture(…)` in Python, `units:` in a recipe"
                )
            architecture = ARCHITECTURES[self.model_type]
        self.architecture = architecture
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        heads = self._count(architecture.heads)
        self.layers: nn.ModuleList = self._find(model.base_model, architecture.layers)
        if not isinstance(self.layers, nn.ModuleList):
            raise UserError(f"units: '{architecture.layers}' is no list of layers but {type(self.layers).__name__}")
        for index, layer in enumerate(self.layers):
            for path in architecture.shared_norms:
                self._find(layer, path)
            self._add_attention(index, layer, heads)
            if architecture.moe_out and all(_has(layer, path) for path in architecture.moe_out):
                self._add_experts(index, layer)
            else:
                self._add_ffn(index, layer)
        self.lm_head = self._find_lm_head()

    @property
    def sizes(self) -> dict[str, int]:
        """Group key -> number of units."""
        return {key: group.size for key, group in self.groups.items()}

    def owned_parameters(self) -> set[str]:
        """Names of the parameters that belong, at least in part, to units."""
        return {piece.parameter for piece in self.slices}

    def _add_attention(self, index: int, layer: nn.Module, heads: int) -> None:
        entry = self.architecture
        out = self._find_projection(layer, entry.attention_out)
        width, rest = divmod(features_of(out)[0], heads)
        if rest:
            raise UserError(
                f"units: {entry.attention_out} of layer {index} has {features_of(out)[0]} input features, no multiple "
                f"of the {heads} heads"
            )
        group = self._add_group(index, "head", heads, out, "input")
        for path, module, where in self._projections(index, layer, entry.attention_in):
            owners = head_owners(entry.attention_in[path], heads, width, features_of(module)[1], where)
            self._add_rows(group, module, owners)
        columns = torch.arange(heads).repeat_interleave(width)[:, None]
        self.slices.append(Slice(self._names[id(out.weight)], input_axis(out), group, columns))

    def _add_ffn(self, index: int, layer: nn.Module) -> None:
        entry = self.architecture
        if entry.ffn_out is None:
            raise UserError(
                f"units: layer {index} has no {' and '.join(entry.moe_out) or 'FFN'}; give ffn_in and ffn_out"
            )
        out = self._find_projection(layer, entry.ffn_out)
        neurons, features = features_of(out)
        group = self._add_group(index, "intermediate", neurons, out, "input")
        for path, module, where in self._projections(index, layer, entry.ffn_in):
            self._add_rows(group, module, _neuron_owners(entry.ffn_in[path], neurons, features_of(module)[1], where))
        group = self._add_group(index, "output", features, out, "output")
        self._add_rows(group, out, torch.arange(features)[:, None])

    def _add_experts(self, index: int, layer: nn.Module) -> None:
        entry = self.architecture
        parameters, sizes = dict(layer.named_parameters()), {}
        for path, axis in entry.moe_out.items():
            if path not in parameters or not 0 <= axis < parameters[path].ndim:
                raise UserError(f"units: moe_out: '{path}' of layer {index} is no parameter with an axis {axis}")
            sizes[path] = parameters[path].shape[axis]
        features = next(iter(sizes.values()))
        if set(sizes.values()) != {features}:
            raise UserError(f"units: the axes of moe_out have different lengths in layer {index}: {sizes}")
        group = self._add_group(index, "output", features, self._find(layer, entry.moe_block), "output")
        for path, axis in entry.moe_out.items():
            owners = torch.arange(features)[:, None]
            self.slices.append(Slice(self._names[id(parameters[path])], axis, group, owners))

    def _add_group(self, index: int, kind: str, size: int, module: nn.Module, side: str) -> str:
        key = f"layers.{index}.{kind}"
        self.groups[key] = Group(key, kind, index, size, module, side)
        return key

    def _projections(
        self, index: int, layer: nn.Module, layouts: Mapping[str, str]
    ) -> Iterator[tuple[str, nn.Module, str]]:
        for path in layouts:
            if path not in self.architecture.optional or _has(layer, path):
                yield path, self._find_projection(layer, path), f"{path} of layer {index}"

    def _add_rows(self, group: str, module: nn.Module, owners: torch.Tensor) -> None:
        self.slices.append(Slice(self._names[id(module.weight)], 1 - input_axis(module), group, owners))
        bias = getattr(module, "bias", None)
        if bias is not None:
            self.slices.append(Slice(self._names[id(bias)], 0, group, owners))
        for up in getattr(module, "lora_B", {}).values():  # ΔW = s · B A: rows of B are rows of ΔW
            self.slices.extend(Slice(self._names[id(parameter)], 0, group, owners) for parameter in up.parameters())

    def _count(self, name: str) -> int:
        count = getattr(self.model.config, name, None)
        if not isinstance(count, int):
            raise UserError(f"the config of model type '{self.model_type}' has no number '{name}'")
        return count

    def _find(self, root: nn.Module, path: str) -> Any:
        if not _has(root, path):
            raise UserError(
                f"the entry for model type '{self.model_type}' names '{path}', but {type(root).__name__} has no such "
                f"module{did_you_mean(path, (name for name, _ in root.named_modules() if name))}"
            )
        return root.get_submodule(path)

    def _find_projection(self, layer: nn.Module, path: str) -> nn.Module:
        module = self._find(layer, path)
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.ndim != 2:
            raise UserError(
                f"units: '{path}' is no projection: {type(module).__name__} has no weight of two dimensions"
            )
        return module

    def _find_lm_head(self) -> nn.Module:
        paths = self.architecture.lm_head
        paths = (paths,) if isinstance(paths, str) else tuple(paths)
        for path in paths:
            if _has(self.model, path):
                return self.model.get_submodule(path)
        raise UserError(
            f"{type(self.model).__name__} has no LM head ({' or '.join(paths)}): load the model with "
            "AutoModelForMaskedLM or AutoModelForCausalLM"
        )


def _has(root: nn.Module, path: str) -> bool:
    """Whether there is a module, or a parameter, at the path."""
    parent, _, name = path.rpartition(".")
    try:
        getattr(root.get_submodule(parent), name)
    except AttributeError:
        return False
    return True


def without_adapter(module: nn.Module) -> nn.Module:
    """The projection itself, of one that carries a LoRA adapter."""
    return getattr(module, "base_layer", module)


def is_transposed(module: nn.Module) -> bool:
    """Whether a projection keeps its weight as [in, out], as transformers' `Conv1D` does."""
    return type(without_adapter(module)).__name__ == "Conv1D"


def input_axis(module: nn.Module) -> int:
    """The axis of a projection's weight that its input features lie along."""
    return 0 if is_transposed(module) else 1


def features_of(module: nn.Module) -> tuple[int, int]:
    """Input and output features of a projection."""
    module = without_adapter(module)
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features  # a quantized weight has another shape
    rows, columns = module.weight.shape
    return (rows, columns) if is_transposed(module) else (columns, rows)


def head_owners(layout: str, heads: int, width: int, rows: int, where: str) -> torch.Tensor:
    """Heads of every row, shape [rows, readers], of a projection whose rows lie as `layout` says; each head reads
    `width` features of each kind."""
    bracketed = layout.startswith("(") and layout.endswith(")")
    words = layout[1:-1].split() if bracketed else layout.split()
    if not words or set(words) - {"head", "kv"}:
        raise UserError(f"units: layout '{layout}' of {where} is not made of head and kv")
    kv_heads = heads
    if "kv" in words:
        shared, rest = divmod(rows - words.count("head") * heads * width, words.count("kv") * width)
        if shared < 1 or rest or heads % shared:
            raise UserError(
                f"units: {where} has {rows} rows: with {heads} heads of {width} features its layout '{layout}' leaves "
                "no number of key/value heads that they could share"
            )
        kv_heads = shared
    total = sum(heads if word == "head" else kv_heads for word in words)
    if rows % total:
        raise UserError(f"units: {where} has {rows} rows, no multiple of the {total} units of its layout '{layout}'")
    readers = torch.arange(heads).view(kv_heads, -1)  # of each key/value head
    blocks = []
    for word in words:
        units = readers if word == "kv" else torch.arange(heads)[:, None]
        units = units.expand(-1, readers.shape[1]).repeat_interleave(rows // total, dim=0)
        blocks.append(units.view(kv_heads if bracketed else 1, -1, readers.shape[1]))
    return torch.cat(blocks, dim=1).flatten(0, 1)


def _neuron_owners(layout: str, neurons: int, rows: int, where: str) -> torch.Tensor:
    """Neurons of every row, shape [rows, 1]."""
    words = layout.split()
    if not words or set(words) != {"neuron"}:
        raise UserError(f"units: layout '{layout}' of {where} is not made of neuron")
    total = len(words) * neurons
    if rows % total:
        raise UserError(f"units: {where} has {rows} rows, no multiple of the {total} units of its layout '{layout}'")
    return torch.arange(neurons).repeat_interleave(rows // total).repeat(len(words))[:, None]
