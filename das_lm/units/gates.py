"""Virtual gates: factors on the units' activations, one per row of the batch, applied by forward hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn

from das_lm.units.discovery import Group, Units


@contextmanager
def gated(units: Units, gates: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """
    Multiply the activations of units by their gates, in every forward pass inside the context.

    A gate has a row per row of the batch, so that the gradient of one backward pass with respect to it is the gradient
    of every single example (METHODS of DAS, equation 3). Leave the context only after the backward pass: gradient
    checkpointing runs the forward again, and must find the same gates.

    Args:
        units: the model's units.
        gates: group key -> gate, shape [batch, units]; groups that are not named are left alone.
    """
    with ExitStack() as hooks:
        for key, gate in gates.items():
            group = units.groups[key]
            if group.side == "input":
                hooks.enter_context(group.module.register_forward_pre_hook(partial(_gate_input, gate)))
            else:
                hooks.enter_context(group.module.register_forward_hook(partial(_gate_output, gate)))
        yield


def ones(groups: Mapping[str, Group], batch: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Open gates that record gradients: group key -> ones, shape [batch, units], fp32."""
    return {key: torch.ones(batch, group.size, device=device, requires_grad=True) for key, group in groups.items()}


def _gate_input(gate: torch.Tensor, module: nn.Module, args: tuple) -> tuple:
    return (_scale(args[0], gate), *args[1:])


def _gate_output(gate: torch.Tensor, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    return _scale(output, gate)


def _scale(activation: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """`activation`, shape [batch, tokens, units × width] (or flattened to [batch × tokens, …], as OPT's FFN sees it),
    times `gate`, shape [batch, units]."""
    width = activation.shape[-1] // gate.shape[-1]
    gate = gate.to(activation.dtype).repeat_interleave(width, dim=1) if width > 1 else gate.to(activation.dtype)
    return (activation.reshape(len(gate), -1, gate.shape[-1]) * gate[:, None, :]).view_as(activation)
