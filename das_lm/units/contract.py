"""What the units of a model promise, checked by computing: each head and neuron is where its entry says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from das_lm.errors import UserError
from das_lm.units.discovery import Group, Slice, Units, input_axis
from das_lm.units.gates import gated
from das_lm.units.soft_mask import SoftMask

#: What is promised, in the order in which it is checked.
PROPERTIES = {
    "rows": "a unit's rows change that unit, and no other but those that the entry says share them",
    "complete": "no other weight of the layer takes part in a unit",
    "gate": "a gate at 0 does what zeros in the unit's weights do, in its own row of the batch",
    "mask": "importance 1 leaves exactly a unit's slices unchanged, importance 0 leaves none",
    "lm_head": "the LM head on chosen positions gives their logits",
    "checkpoint": "what is saved loads with transformers alone and computes the same",
}
ROWS, TOKENS = 2, 16
TOLERANCE = 1e-4  # of the largest value; what really moves does so by about as much as it is large


def check_contract(units: Units) -> dict[str, list[str]]:
    """
    Check all that [`PROPERTIES`] says, on the first two and the last unit of every group (of those that are not
    silent, as a neuron before a ReLU may be).

    Args:
        units: of a model in evaluation mode whose weights differ from each other, such as [`randomize`] gives it. What
            is changed on the way is put back.

    Returns:
        property -> what breaks it, in words; nothing where it holds.

    Raises:
        UserError: what a gate would multiply is no tensor [rows, tokens, features].
    """
    problems: dict[str, list[str]] = {name: [] for name in PROPERTIES}
    for name, problem in find_problems(units):
        problems[name].append(problem)
    return problems


def find_problems(units: Units) -> Iterator[tuple[str, str]]:
    """The same one by one, as (property, problem): who needs no more than the first can stop there."""
    probe = _Probe(units)
    for group in units.groups.values():
        yield from (("rows", problem) for problem in _check_rows(probe, group))
    yield from (("rows", problem) for problem in _check_shared_norms(probe))
    for index in range(len(units.layers)):
        yield from (("complete", problem) for problem in _check_completeness(probe, index))
    for group in units.groups.values():
        yield from (("gate", problem) for problem in _check_gate(probe, group))
    yield from (("mask", problem) for problem in _check_mask(probe))
    yield from (("lm_head", problem) for problem in _check_lm_head(probe))
    yield from (("checkpoint", problem) for problem in _check_checkpoint(probe))


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> None:
    """Give every parameter random values, biases and norms too, such that attention is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        else:
            parameter.add_(0.1 * noise)


# ---- looking at a model ------------------------------------------------------------------------------------------


@dataclass
class _Seen:
    """One forward pass: group key -> activations [rows × tokens, units, width] where the gates act, and the logits."""

    activations: dict[str, torch.Tensor]
    logits: torch.Tensor


class _Probe:
    """A model with one batch of random tokens."""

    def __init__(self, units: Units):
        self.units = units
        self.parameters = dict(units.model.named_parameters())
        self.generator = torch.Generator().manual_seed(0)
        vocabulary = units.model.get_input_embeddings().weight.shape[0]
        ids = torch.randint(vocabulary, (ROWS, TOKENS), generator=self.generator)
        self.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        self.open = self.run()

    @torch.no_grad()
    def run(self, gates: Mapping[str, torch.Tensor] | None = None, free_norms: tuple[str, ...] | None = None) -> _Seen:
        """One pass; the norms at `free_norms`, by default all that heads share, do nothing meanwhile."""
        seen: dict[str, torch.Tensor] = {}
        free_norms = self.units.architecture.shared_norms if free_norms is None else free_norms
        with ExitStack() as stack:
            for layer in self.units.layers:
                for path in free_norms:
                    stack.enter_context(layer.get_submodule(path).register_forward_hook(_pass_through))
            for group in self.units.groups.values():
                if group.side == "input":
                    handle = group.module.register_forward_pre_hook(partial(_keep_input, seen, group))
                else:
                    handle = group.module.register_forward_hook(partial(_keep_output, seen, group))
                stack.enter_context(handle)
            stack.enter_context(gated(self.units, gates or {}))  # after the hooks above, which see no gate
            return _Seen(seen, self.units.model(**self.inputs).logits)

    @contextmanager
    def changed(self, name: str, axis: int, index: torch.Tensor, zero: bool = False) -> Iterator[None]:
        """Add noise, of the size of the parameter, to entries of it (or put zeros there) for a while."""
        parameter = self.parameters[name].data
        before = parameter.index_select(axis, index)
        noise = torch.randn(before.shape, generator=self.generator) * before.std(correction=0).clamp(min=0.01)
        parameter.index_copy_(axis, index, torch.zeros_like(before) if zero else before + noise)
        try:
            yield
        finally:
            parameter.index_copy_(axis, index, before)

    def gate(self, group: Group, closed: torch.Tensor, rows: int = ROWS) -> dict[str, torch.Tensor]:
        """A gate that is 0 for the units `closed`, in the first `rows` rows."""
        gate = torch.ones(ROWS, group.size)
        gate[:rows, closed] = 0
        return {group.key: gate}

    def chosen(self, group: Group) -> list[int]:
        """The first two and the last unit that are not silent on the first row."""
        alive = self.open.activations[group.key][:TOKENS].abs().amax(dim=(0, 2)).nonzero()[:, 0].tolist()
        return sorted({*alive[:2], *alive[-1:]})

    def slices(self, group: Group) -> list[Slice]:
        return [piece for piece in self.units.slices if piece.group == group.key]

    def reads(self, group: Group, piece: Slice) -> bool:
        """Whether a slice is the heads' columns of the projection that reads them, and no part of what makes them."""
        return group.side == "input" and self.parameters[piece.parameter] is group.module.weight


def _pass_through(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    return args[0]


def _keep_input(seen: dict[str, torch.Tensor], group: Group, module: nn.Module, args: tuple) -> None:
    _keep_output(seen, group, module, args, args[0])


def _keep_output(seen: dict[str, torch.Tensor], group: Group, module: nn.Module, args: tuple, output: Any) -> None:
    if not isinstance(output, torch.Tensor) or output.shape[:-1].numel() != ROWS * TOKENS:
        what = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise UserError(
            f"units: the {group.side} of {type(module).__name__}, where {group.key} would be gated, is no tensor "
            f"[rows, tokens, features] but {what}"
        )
    seen[group.key] = output.reshape(ROWS * TOKENS, group.size, -1)


def _moved(before: torch.Tensor, after: torch.Tensor) -> set[int]:
    """The units whose activations [tokens, units, width] differ."""
    difference = (after - before).abs().amax(dim=(0, 2))
    return set((difference > TOLERANCE * before.abs().max()).nonzero()[:, 0].tolist())


def _differ(first: torch.Tensor, second: torch.Tensor) -> bool:
    return bool((first - second).abs().max() > TOLERANCE * second.abs().max())


def _entries(piece: Slice, unit: int) -> torch.Tensor:
    """Where along the slice's axis the unit has a part."""
    return (piece.owners == unit).any(dim=1).nonzero()[:, 0]


def _listed(units: set[int]) -> str:
    ordered = sorted(units)
    return ", ".join(map(str, ordered[:4])) + (f" and {len(ordered) - 4} more" if len(ordered) > 4 else "")


# ---- properties --------------------------------------------------------------------------------------------------


def _check_rows(probe: _Probe, group: Group) -> Iterator[str]:
    """With a unit (and those that share a slice with it) closed, its slices can be anything; what they change before
    the gate is that unit."""
    for unit in probe.chosen(group):
        pieces = [(piece, _entries(piece, unit)) for piece in probe.slices(group)]
        readers = {piece.parameter: set(piece.owners[index].flatten().tolist()) for piece, index in pieces}
        gate = probe.gate(group, torch.tensor(sorted(set().union({unit}, *readers.values()))))
        before = probe.run(gate)
        for piece, index in pieces:
            if len(index) == 0:
                yield f"{piece.parameter}: {group.kind} {unit} has no part in it"
                continue
            with probe.changed(piece.parameter, piece.axis, index):
                after = probe.run(gate)
            moved = _moved(before.activations[group.key], after.activations[group.key])
            expected = set() if probe.reads(group, piece) else readers[piece.parameter]
            where = f"{piece.parameter}: what belongs to {group.kind} {unit}"
            if moved - expected:
                yield f"{where} changes {group.kind} {_listed(moved - expected)}"
            elif expected - moved and probe.parameters[piece.parameter].ndim > 1:
                yield f"{where} does not change {group.kind} {_listed(expected - moved)}"  # a key's bias may not
            elif _differ(after.logits, before.logits):
                yield f"{where} reaches the logits past its gate"


def _check_shared_norms(probe: _Probe) -> Iterator[str]:
    """A norm that is said to be shared is: through it a head's rows move heads that do not share them."""
    norms = probe.units.architecture.shared_norms
    for path in norms:
        others = tuple(other for other in norms if other != path)
        before = probe.run(free_norms=others)
        for group in probe.units.groups.values():
            if group.kind != "head":
                continue
            moved: set[int] = set()
            for piece in probe.slices(group):
                index = _entries(piece, 0)
                with probe.changed(piece.parameter, piece.axis, index):
                    after = probe.run(free_norms=others)
                readers = set(piece.owners[index].flatten().tolist())
                moved |= _moved(before.activations[group.key], after.activations[group.key]) - readers
            if not moved:
                yield f"{path} of layer {group.layer} is in shared_norms, but no head moves another through it"


def _check_completeness(probe: _Probe, index: int) -> Iterator[str]:
    """Weights (norms aside) that are no unit's leave the heads and neurons of their layer alone, and hold no output
    neuron's row."""
    units, layer = probe.units, probe.units.layers[index]
    groups = {group.kind: group for group in units.groups.values() if group.layer == index}
    owners: dict[str, set[str]] = {}
    for piece in units.slices:
        owners.setdefault(piece.parameter, set()).add(units.groups[piece.group].kind)
    names = {id(parameter): name for name, parameter in probe.parameters.items()}
    before = probe.open
    weights = [
        parameter
        for module in layer.modules()
        if "Norm" not in type(module).__name__
        for parameter in module.parameters(recurse=False)
        if parameter.ndim > 1
    ]
    for parameter in weights:
        name = names[id(parameter)]
        kinds = owners.get(name, set())
        if "head" in kinds:  # these may well change what comes after the heads
            continue
        with probe.changed(name, 0, torch.arange(parameter.shape[0])):
            after = probe.run()
        for kind in ("head", "intermediate"):
            if kind in groups and kind not in kinds:
                key = groups[kind].key
                if _moved(before.activations[key], after.activations[key]):
                    yield f"{name} belongs to no {kind}, and yet changes them"
                    break
        else:
            output = groups["output"]
            for axis, length in enumerate(parameter.shape):
                if kinds or length != output.size:
                    continue
                with probe.changed(name, axis, torch.tensor([0])):
                    after = probe.run()
                if _moved(before.activations[output.key], after.activations[output.key]) == {0}:
                    yield f"{name} makes output neurons along axis {axis}, and belongs to none"


def _check_gate(probe: _Probe, group: Group) -> Iterator[str]:
    before = probe.open.logits
    if not probe.chosen(group):
        yield f"{group.key}: no unit does anything"
    for unit in probe.chosen(group):
        closed = probe.run(probe.gate(group, torch.tensor([unit]), rows=1)).logits
        with ExitStack() as stack:
            if group.side == "input":
                axis = input_axis(group.module)
                width = group.module.weight.shape[axis] // group.size
                name = next(n for n, p in probe.parameters.items() if p is group.module.weight)
                columns = torch.arange(unit * width, (unit + 1) * width)
                stack.enter_context(probe.changed(name, axis, columns, zero=True))
            else:
                for piece in probe.slices(group):
                    stack.enter_context(probe.changed(piece.parameter, piece.axis, _entries(piece, unit), zero=True))
            zeroed = probe.run().logits
        if _differ(closed[0], zeroed[0]):
            yield f"{group.key}: unit {unit} closed is not its weights at 0"
        elif _differ(closed[1], before[1]):
            yield f"{group.key}: unit {unit}, closed in one row of the batch, is felt in another"
        elif not _differ(zeroed[0], before[0]):
            yield f"{group.key}: unit {unit} does nothing"


@torch.no_grad()
def _check_mask(probe: _Probe) -> Iterator[str]:
    """Every entry of every parameter takes the same step; where it stays must be the unit's, and all of it."""
    units = probe.units
    for importance_of in (None, 0):
        importance = {key: torch.zeros(size) for key, size in units.sizes.items()}
        if importance_of is not None:
            for values in importance.values():
                values[importance_of] = 1
        before = {name: parameter.detach().clone() for name, parameter in probe.parameters.items()}
        mask = SoftMask(units, importance)
        mask.before_step()
        for parameter in probe.parameters.values():
            parameter.add_(1)
        mask.mask_step()
        for name, parameter in probe.parameters.items():
            frozen = torch.zeros(parameter.shape, dtype=torch.bool)
            for piece in units.slices:
                if piece.parameter == name and importance_of is not None:
                    frozen.index_fill_(piece.axis, _entries(piece, importance_of), True)
            if not torch.equal(parameter, torch.where(frozen, before[name], before[name] + 1)):
                yield f"{name}: importance {0 if importance_of is None else 1} leaves the wrong entries unchanged"
            parameter.copy_(before[name])


@torch.no_grad()
def _check_lm_head(probe: _Probe) -> Iterator[str]:
    model, path = probe.units.model, probe.units.architecture.lm_head
    chosen = torch.arange(ROWS * TOKENS).view(ROWS, TOKENS) % 3 == 0
    seen: list[torch.Size] = []

    def select(module: nn.Module, args: tuple) -> tuple:
        seen.append(args[0].shape)
        return (args[0][chosen], *args[1:])

    expected = model(**probe.inputs).logits[chosen]
    try:
        with probe.units.lm_head.register_forward_pre_hook(select):
            logits = model(**probe.inputs).logits
    except (RuntimeError, IndexError, ValueError) as error:
        yield f"{path} cannot run on [positions, features]: {error}"
        return
    if len(seen) != 1 or len(seen[0]) != 3:
        yield f"{path} does not run once on the last hidden state [rows, tokens, features]"
    elif logits.shape != expected.shape or _differ(logits, expected):
        yield f"{path} gives chosen positions other logits"


def _check_checkpoint(probe: _Probe) -> Iterator[str]:
    model = probe.units.model
    with TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        loaded, info = type(model).from_pretrained(directory, output_loading_info=True)
        if info["missing_keys"] or info["unexpected_keys"]:
            yield f"missing {sorted(info['missing_keys'])}, unexpected {sorted(info['unexpected_keys'])}"
            return
        with torch.no_grad():
            logits = [one(**probe.inputs).logits for one in (model, loaded.eval())]
    if not torch.equal(*logits):
        yield "the loaded model computes something else"
