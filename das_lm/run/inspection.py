"""`das-lm units`: the map of a model's units, and whether it keeps its contract."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.markup import escape
from torch import nn

from das_lm.data.built_in import MODELS
from das_lm.errors import UserError, as_user_error, did_you_mean, one_line
from das_lm.units.architectures import ARCHITECTURES, Architecture
from das_lm.units.contract import PROPERTIES, check_contract, randomize
from das_lm.units.discovery import Group, Slice, Units
from das_lm.units.proposal import as_yaml, find_layers, propose

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

#: What a copy for the contract need not have in full: name in the config -> enough of it.
ENOUGH = {
    "vocab_size": 256,
    "num_experts": 8,
    "num_local_experts": 8,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "ffn_dim": 64,
    "ffn_hidden_size": 64,
    "n_inner": 64,
}
KINDS = {"head": "heads", "intermediate": "intermediate neurons", "output": "output neurons"}


@dataclass
class Inspection:
    """
    What is known of a model's units.

    Args:
        units: of the whole model, without its weights (they are on the `meta` device).
        source: where the entry comes from: `"table"`, `"given"` or `"proposed"`.
        problems: property of the contract -> what breaks it, as [`check_contract`] gives it.
        checked_layers: how many layers the copy had that the contract was checked on.
    """

    units: Units
    source: str
    problems: dict[str, list[str]]
    checked_layers: int

    @property
    def holds(self) -> bool:
        return not any(self.problems.values())

    def print(self, console: Console) -> None:
        """The entry if it was proposed; units and slices of every kind of layer; what no unit owns; the contract."""
        from das_lm.report.table import Table

        units, entry = self.units, self.units.architecture
        model = units.model
        source = {"table": "in the table", "given": "with the entry given", "proposed": "not in the table"}[
            self.source
        ]
        console.print(
            f"[bold]{escape(units.model_type)}[/bold], {source}: {type(model).__name__}, {len(units.layers)} layers"
        )
        if self.source == "proposed":
            console.print("\nProposed entry, for a recipe or for --entry:\n")
            console.print(escape(as_yaml(entry)))
        for layers in _kinds(units.layers):
            console.print()
            first = f"layers.{layers[0]}."
            groups = [group for key, group in units.groups.items() if key.startswith(first)]
            paths = {id(module): path for path, module in units.layers[layers[0]].named_modules()}
            rows = [["units", "number", "a gate multiplies"]]
            rows += [[KINDS[g.kind], f"{g.size:,}", f"the {g.side} of {paths[id(g.module)]}"] for g in groups]
            console.print(Table(_title(layers), rows, ["a gate multiplies"]).console())
            rows = [["parameter", "shape", "axis", "owners, for example"]]
            names = {id(one): name for name, one in units.layers[layers[0]].named_parameters()}
            parameters = dict(model.named_parameters())
            for piece in units.slices:
                if piece.group.startswith(first):
                    parameter = parameters[piece.parameter]
                    shape = " × ".join(map(str, parameter.shape))
                    owners = _describe(piece, units.groups[piece.group])
                    rows.append([names[id(parameter)], shape, str(piece.axis), owners])
            console.print(Table("", rows, ["shape", "owners, for example"]).console())
        self._print_rest(console)
        self._print_contract(console)

    def _print_rest(self, console: Console) -> None:
        units = self.units
        owned, total, others = units.owned_parameters(), 0, {}
        for name, parameter in units.model.named_parameters():
            total += parameter.numel()
            if name not in owned:
                pattern = re.sub(r"\.\d+\.", ".*.", name)
                others[pattern] = others.get(pattern, 0) + parameter.numel()
        rest = sum(others.values())
        console.print(f"\n{total - rest:,} of {total:,} parameters belong to units ({1 - rest / total:.1%}); to none:")
        for pattern, count in sorted(others.items(), key=lambda item: -item[1]):
            console.print(f"  {count:>15,}  {escape(pattern)}")
        if units.architecture.shared_norms:
            norms = " and ".join(units.architecture.shared_norms)
            console.print(f"\n{escape(norms)} run over all heads, which move each other through their denominators.")
        experts = [i for i in range(len(units.layers)) if f"layers.{i}.intermediate" not in units.groups]
        if experts:
            console.print(
                f"\n{_title(experts)}: a mixture of experts. Its heads and output neurons are units; the neurons of "
                "its experts are not covered."
            )

    def _print_contract(self, console: Console) -> None:
        console.print(f"\nContract, on {self.checked_layers} layers with random weights:")
        for name, promise in PROPERTIES.items():
            problems = self.problems[name]
            console.print(f"  {'[red]✗[/red]' if problems else '[green]✓[/green]'} {promise}", soft_wrap=True)
            for problem in problems[:5]:
                console.print(f"      {escape(problem)}", soft_wrap=True)
            if len(problems) > 5:
                console.print(f"      and {len(problems) - 5} more")


def inspect(name: str, entry: Architecture | None = None, trust_remote_code: bool = False) -> Inspection:
    """
    Find a model's units and check their contract. No weights are read: the map is made from the config, and the
    contract is checked on a copy with random weights, of the model's width and as many layers as it takes to have one
    of each kind.

    Args:
        name: a model type such as `llama`, a directory with `config.json`, or a model of the hub.
        entry: where the units are; by default what the table says, or a proposal.
        trust_remote_code: run the code that comes with a model of the hub.

    Raises:
        UserError: no such model, none with an LM head, an entry that does not fit, or none was found.
    """
    with _quiet():
        config = load_config(name, trust_remote_code)
        if not isinstance(getattr(config, "num_hidden_layers", None), int):
            raise UserError(f"the config of model type '{config.model_type}' has no number num_hidden_layers")
        source = "table" if entry is None else "given"
        entry = entry or ARCHITECTURES.get(config.model_type)
        with torch.device("meta"):
            whole = build_model(config, trust_remote_code)
        layers = whole.base_model.get_submodule(find_layers(whole)) if entry is None else Units(whole, entry).layers
        part = build_model(reduced(config, max(kind[0] for kind in _kinds(layers)) + 1), trust_remote_code)
        randomize(part.eval())
        if entry is None:
            source, entry = "proposed", propose(part)
        units = Units(part, entry)
        return Inspection(Units(whole, entry), source, check_contract(units), len(units.layers))


def load_entry(path: str) -> Architecture:
    """
    Read an entry from a YAML file: the entry itself, or a file such as a recipe that has it under `units`.

    Raises:
        UserError: no such file, no YAML, or no entry.
    """
    from das_lm.run.recipe_file import read_yaml

    data, _ = read_yaml(Path(path))
    data = data.get("units", data)
    if not isinstance(data, dict):
        raise UserError(f"--entry {path}: expected a mapping with layers, attention_in, …, or one under 'units'")
    return Architecture.from_dict(data)


def load_config(name: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """
    The config of a model type (as its authors set it by default), of a directory, of a model of the hub, or of a
    built-in one.

    Raises:
        UserError: it is none of these.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    from das_lm.model.loading import read_config

    name = str(MODELS.get(name, name))
    if name in CONFIG_MAPPING_NAMES and not Path(name).exists():
        return AutoConfig.for_model(name)
    try:
        return read_config(name, trust_remote_code)
    except UserError as error:
        raise UserError(
            f"'{name}' is no model type, no directory with a config.json, and no model of the hub that can be had "
            f"({one_line(error.__cause__ or error)}).{did_you_mean(name, CONFIG_MAPPING_NAMES)}"
        ) from None


def build_model(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """
    A language model with the initial weights of its config, in fp32: causal or masked, whichever it was saved as, or
    else the one its type is made for.

    Raises:
        UserError: it is neither, or cannot be built.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    names = {
        AutoModelForMaskedLM: MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        AutoModelForCausalLM: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }
    saved_as, code = set(config.architectures or ()), getattr(config, "auto_map", {})
    fitting = [auto for auto, mapping in names.items() if saved_as & set(mapping.values())]
    fitting += [auto for auto, mapping in names.items() if config.model_type in mapping or auto.__name__ in code]
    if not fitting:
        raise UserError(f"model type '{config.model_type}' has no masked and no causal language model")
    with as_user_error(f"no model of type '{config.model_type}' can be built"):
        return fitting[0].from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)


def reduced(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """A copy with so many layers (two at least, where there are two), few tokens, few experts and few neurons; heads
    and widths stay."""
    small = copy.deepcopy(config)
    every = config.num_hidden_layers
    layers = min(max(layers, 2), every)
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == every:  # such as layer_types
            setattr(small, name, value[:layers])
    small.num_hidden_layers = layers
    for name, enough in ENOUGH.items():
        if isinstance(getattr(config, name, None), int):
            setattr(small, name, min(getattr(config, name), enough))
    for name, value in vars(config).items():
        if name.endswith("_token_id") and value is not None:
            setattr(small, name, 0 if isinstance(value, list) or value >= small.vocab_size else value)
    return small


# ---- how it is said ----------------------------------------------------------------------------------------------


def _kinds(layers: nn.ModuleList) -> list[list[int]]:
    """Indices of the layers, those with the same parameters together."""
    kinds: dict[Any, list[int]] = {}
    for index, layer in enumerate(layers):
        shapes = tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())
        kinds.setdefault(shapes, []).append(index)
    return list(kinds.values())


def _title(layers: list[int]) -> str:
    return f"{'Layer' if len(layers) == 1 else 'Layers'} {_runs(layers)}"


def _runs(indices: list[int]) -> str:
    """`[0, 1, 2, 5]` as "0–2, 5", with no more than four of them."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    texts = [str(low) if low == high else f"{low}–{high}" for low, high in runs[:4]]
    return ", ".join(texts) + (", …" if len(runs) > 4 else "")


def _describe(piece: Slice, group: Group) -> str:
    """What the first unit has along the axis: "head 0: 0–63; heads 0–3 share 256–319"."""
    kind = {"head": "head", "intermediate": "neuron", "output": "neuron"}[group.kind]
    entries: dict[tuple[int, ...], list[int]] = {}
    for index in (piece.owners == 0).any(dim=1).nonzero()[:, 0].tolist():
        entries.setdefault(tuple(sorted(set(piece.owners[index].tolist()))), []).append(index)
    return "; ".join(
        f"{kind} 0: {_runs(where)}" if owners == (0,) else f"{kind}s {_runs(list(owners))} share {_runs(where)}"
        for owners, where in entries.items()
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers says about building, saving and loading models."""
    from transformers.utils import logging as library

    verbosity, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity(logging.CRITICAL)
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(verbosity)
        if bars:
            library.enable_progress_bar()
