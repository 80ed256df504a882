"""
Parameters that FSDP2 (`torch.distributed.fsdp.fully_shard`) has cut into slices, one in each process.

Such a parameter is a `DTensor`: it has the shape of the whole, and holds this process's rows. Everything that goes
element by element (masks, penalties, averages) works on the slices, as plain tensors. Only two things see a whole
parameter, one at a time: writing a file, and summing up the per-example gradients of a pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from das_lm.errors import UserError

T = TypeVar("T")

#: What wrappers of a layer (FSDP's activation checkpointing) add to the names of its parameters.
WRAPPER = "_checkpoint_wrapped_module."


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's parameters are slices."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def named_parameters(model: nn.Module, remove_duplicate: bool = True) -> dict[str, nn.Parameter]:
    """The parameters by the names that they have without sharding; of a sharded model the slices, never the whole
    parameters that a forward pass without a backward pass leaves in the outermost modules."""
    reshard(model)
    named = model.named_parameters(remove_duplicate=remove_duplicate)
    return {name.replace(WRAPPER, ""): parameter for name, parameter in named}


def reshard(model: nn.Module) -> None:
    """Free what a forward pass has gathered. What is set on parameters (`requires_grad`) counts from here on."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def recording(model: nn.Module, names: Iterable[str] = ()) -> Iterator[None]:
    """Only the named parameters record gradients meanwhile."""
    named = named_parameters(model)
    parameters, kept = list(named.values()), {id(named[name]) for name in names}
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(id(parameter) in kept)
        yield
    finally:
        reshard(model)
        for parameter, requires_grad in zip(parameters, before, strict=True):
            parameter.requires_grad_(requires_grad)


@torch.no_grad()
def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's slice of a parameter or its gradient, as a plain tensor that shares its memory; a plain tensor
    is its own slice."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor. All processes have to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_slice(whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """What belongs to this process's slice of a parameter, of a tensor that every process has whole: a view. Where the
    tensor only broadcasts to the parameter, the view broadcasts to the slice."""
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        for number, placement in enumerate(parameter.placements):
            if placement.is_shard() and whole.shape[placement.dim] == parameter.shape[placement.dim]:
                # As torch.chunk cuts, with nothing left for the last processes of a short axis.
                pieces, index = whole.chunk(mesh.size(number), placement.dim), mesh.get_local_rank(number)
                whole = pieces[index] if index < len(pieces) else whole.narrow(placement.dim, 0, 0)
    return whole


def whole(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The tensor whose [`own_slice`] each process has. All processes have to ask for it."""
    if not isinstance(parameter, DTensor):
        return tensor
    shape, stride = parameter.shape, torch.empty(parameter.shape, device="meta").stride()
    place = {"device_mesh": parameter.device_mesh, "placements": parameter.placements}
    return full(DTensor.from_local(tensor.contiguous(), **place, run_check=False, shape=shape, stride=stride))


def whole_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of a sharded model, whole, on the CPU of the main process; nothing in the others. All have to ask."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    first: dict[int, str] = {}
    for name, parameter in named_parameters(model, remove_duplicate=False).items():
        if name in state:  # what is tied is one tensor again, and saved once
            state[name] = state[first.setdefault(id(parameter), name)]
    return state


def tied_beyond(model: nn.Module, modules: Iterable[nn.Module | None]) -> bool:
    """Whether a parameter of these modules also belongs to a module that is none of them."""
    modules = [module for module in modules if module is not None]
    inside = {id(p) for module in modules for p in module.parameters(recurse=False)}
    others = (module for module in model.modules() if not any(module is one for one in modules))
    return any(id(p) in inside for module in others for p in module.parameters(recurse=False))


def over_slices(value: torch.Tensor, parameters: Iterable[torch.Tensor], how: str = "sum") -> torch.Tensor:
    """A figure of this process's slices as that of the whole parameters: their sum, or largest (`"max"`)."""
    sharded = next((parameter for parameter in parameters if isinstance(parameter, DTensor)), None)
    if sharded is not None:
        operation = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[how]
        for number, placement in enumerate(sharded.placements):
            if placement.is_shard():
                dist.all_reduce(value, operation, group=sharded.device_mesh.get_group(number))
    return value


def in_step(batches: Iterable[T], model: nn.Module) -> Iterator[tuple[T, bool]]:
    """
    Batches, and whether they count. To run a sharded model takes all processes, so that one that has no batch left
    goes along with its last one, for the others, as long as they have some.

    Raises:
        UserError: some process has no batch at all.
    """
    if not is_sharded(model):
        yield from ((batch, True) for batch in batches)
        return
    device = next(model.parameters()).device
    iterator, last = iter(batches), None
    while True:
        batch = next(iterator, None)
        last = last if batch is None else batch
        # How many have a batch, and how many have had none at all.
        numbers = torch.tensor([batch is not None, last is None], dtype=torch.float32, device=device)
        dist.all_reduce(numbers)
        have, without = numbers.tolist()
        if not have:
            return
        if without:
            raise UserError(
                f"fsdp: {int(without)} of {dist.get_world_size()} processes have nothing to measure importance on; "
                "there have to be at least as many blocks, and importance_samples, as processes"
            )
        yield last, batch is not None
