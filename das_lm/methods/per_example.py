"""
Sums over examples of the square, or the absolute value, of each example's own gradient: what the diagonal Fisher of
EWC (arXiv 1612.00796), the sensitivity of MAS (1711.09601) and the scores of RWalk (1801.10112) are made of. The
gradient of a batch does not give them: its square shrinks as the batch grows.

One backward pass yields the gradients of the modules' outputs, which belong to one example each; with the modules'
inputs they make the per-example gradients of the parameters (Goodfellow, arXiv 1510.01799).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from das_lm.errors import UserError
from das_lm.units.sharding import is_sharded, local, named_parameters, own_slice, recording

STATISTICS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"square": torch.square, "absolute": torch.abs}
EXACT_ROWS = 8  # examples per backward pass of the slow way, which takes so many times the memory of an ordinary one


class PerExample:
    """
    Sums over examples of the square or the absolute value of each example's own gradient.

    Linear, embedding, normalisation and plain 2-d convolution modules take the fast way. The first [`add`] compares a
    random combination of its per-example gradients with what autograd gives; each parameter that does not agree (used
    by an unknown module, outside its module, or without an axis of examples) takes the slow way from then on, which
    is exact too: one backward pass of the batch per example, vectorised. Where [`exact`] names parameters, batches of
    one example are the fastest. A use that only later batches have is not compared.

    All is of one run of the model: where it is random (dropout, sampled labels), of what was drawn; for a Fisher turn
    dropout off. Batch normalisation in training mode couples the examples: what stands before it takes the slow way,
    with the gradient of each example's loss through all examples. Use it in evaluation mode.

    Under FSDP2 the sums are of each process's slices and over the examples of all processes, each of which holds no
    more than one parameter's sum whole at a time. The slow way does not exist there.

    Args:
        model: parameters that are frozen now are left out; the others may be shared by modules.
        statistic: `"square"` or `"absolute"`.
        max_elements: how many numbers of the per-example gradients of a parameter to hold at once (those of one
            example at least).

    Attributes:
        sums: parameter -> Σ_n g_n² or Σ_n |g_n|, named and shaped as in `named_parameters` (or as the slice), fp32.
        examples: how many were added.
        exact: names of the parameters that take the slow way.

    Raises:
        ValueError: an unknown statistic.
        UserError: the parameters are sharded, and some would have to take the slow way.
    """

    def __init__(self, model: nn.Module, statistic: str = "square", max_elements: int = 1 << 22):
        if statistic not in STATISTICS:
            raise ValueError(f"statistic '{statistic}' is none of {', '.join(STATISTICS)}")
        self.model, self.statistic, self.max_elements = model, STATISTICS[statistic], max_elements
        self.is_sharded = is_sharded(model)
        self.parameters = {name: p for name, p in named_parameters(model).items() if p.requires_grad}
        self.sums = {n: torch.zeros_like(local(p), dtype=torch.float32) for n, p in self.parameters.items()}
        self.examples = 0
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        owned = {
            module: {own: names[id(p)] for own, p in module._parameters.items() if id(p) in names}
            for module in model.modules()
            if _kind(module) is not None
        }
        self._owned = {module: own for module, own in owned.items() if own}
        self.exact = self.parameters.keys() - {name for owned in self._owned.values() for name in owned.values()}
        self._compared = False

    def add(
        self,
        rows: int,
        losses: Callable[[], torch.Tensor],
        flattened: tuple[nn.Module, torch.Tensor] | None = None,
        counts: bool = True,
    ) -> None:
        """
        Take in a batch. Parameters, their `grad` and `requires_grad`, and hooks are left as they were.

        Args:
            rows: number of examples: the length of the first axis of what the modules see.
            losses: runs the model and returns the loss of each example, shape [rows]. It is called once, or again
                if the batch shows that further parameters must take the slow way.
            flattened: a module, and the example that each of its inputs comes from, shape [predictions]. From the call
                of this module on, the first axis are predictions, of all examples together: the LM head in
                `das_lm.model.objective.run_language_model`.
            counts: whether the batch does, or is run only because other processes run one; see
                `das_lm.units.sharding.in_step`.

        Raises:
            ValueError: the losses are not of shape [rows].
        """
        recorded = set(self.exact) if self._compared else set(self.parameters)
        calls = _Calls(self._owned, rows, *(flattened or (None, None)))
        with torch.enable_grad(), recording(self.model, recorded):
            with calls.kept():
                values = losses()
            if values.shape != (rows,):
                raise ValueError(f"the losses have shape {list(values.shape)}, not one for each of {rows} examples")
            self.exact |= calls.misfits
            if self.is_sharded:
                self._refuse_the_slow_way()
            if not self.exact <= recorded:  # the slow way needs them in the graph
                return self.add(rows, losses, flattened)
            gradients = calls.gradients(values, {k: v.shape for k, v in self.parameters.items()}, bool(recorded))
            if not self._compared:
                self.exact |= self._disagreeing(gradients, values, tolerance=5e-2 if calls.half else 1e-3)
                self._compared = True
            with _full_precision(values):
                if self.is_sharded:
                    self._refuse_the_slow_way()
                    self._add_slices(gradients, counts)
                else:
                    for name in gradients.keys() - self.exact:
                        self.sums[name] += gradients[name].total(self.statistic, self.max_elements)
            self._add_exactly(values)
        self.examples += rows if counts else 0

    def _add_slices(self, gradients: dict[str, _Gradients], counts: bool) -> None:
        """The sums of all processes, parameter by parameter, in the same order everywhere."""
        for name, parameter in self.parameters.items():
            total = torch.zeros(parameter.shape, device=parameter.device)
            if counts and name in gradients:
                total = gradients[name].total(self.statistic, self.max_elements).contiguous()
            dist.all_reduce(total)
            self.sums[name] += own_slice(total, parameter)

    def _refuse_the_slow_way(self) -> None:
        if self.exact:
            raise UserError(
                f"fsdp: the gradients of single examples cannot be had from one backward pass for {len(self.exact)} "
                f"parameters, first '{min(self.exact)}', and sharded parameters have no slower way: use DDP, or a "
                "method that needs none (das, replay, si, l2, ema)"
            )

    def _disagreeing(self, gradients: dict[str, _Gradients], values: torch.Tensor, tolerance: float) -> set[str]:
        """Names of the parameters for which Σ_n w_n g_n is not the gradient of Σ_n w_n L_n. The weights differ, so
        that a gradient which was given to another example shows, too."""
        weights = (torch.rand(len(values), generator=torch.Generator().manual_seed(0)) + 0.5).to(values)
        if self.is_sharded:
            return self._disagreeing_slices(gradients, values, weights, tolerance)
        parameters = list(self.parameters.values())
        found = torch.autograd.grad((weights * values).sum(), parameters, retain_graph=True, allow_unused=True)
        wrong = set()
        with _full_precision(values):
            for name, expected in zip(self.parameters, found, strict=True):
                if name in gradients:
                    ours = gradients[name].combined(weights)
                    total = ours.total(lambda value: value, self.max_elements)
                    difference = total if expected is None else total - expected.float()
                    agrees = difference.norm() <= tolerance * (total.norm() + ours.scale())
                else:
                    agrees = expected is None or not expected.any()
                if not agrees:
                    wrong.add(name)
        return wrong

    def _disagreeing_slices(
        self, gradients: dict[str, _Gradients], values: torch.Tensor, weights: torch.Tensor, tolerance: float
    ) -> set[str]:
        """The same under FSDP2, whose backward pass leaves the mean over the processes in `grad`, in slices."""
        kept = [parameter.grad for parameter in self.parameters.values()]
        for parameter in self.parameters.values():
            parameter.grad = None
        (weights * values).sum().backward()
        found = [parameter.grad for parameter in self.parameters.values()]
        for parameter, gradient in zip(self.parameters.values(), kept, strict=True):
            parameter.grad = gradient
        agreed, names = [], list(self.parameters)
        with _full_precision(values):
            for name, expected in zip(names, found, strict=True):
                total, scale = torch.zeros(self.parameters[name].shape, device=values.device), 0.0
                if name in gradients:
                    ours = gradients[name].combined(weights)
                    total, scale = ours.total(lambda value: value, self.max_elements).contiguous(), ours.scale()
                dist.all_reduce(total)
                total = own_slice(total, self.parameters[name]) / dist.get_world_size()
                difference = total if expected is None else total - local(expected).float()
                agreed.append(difference.norm() <= tolerance * (total.norm() + scale))
        disagreeing = (~torch.stack(agreed)).float()
        dist.all_reduce(disagreeing)
        return {name for name, number in zip(names, disagreeing.tolist(), strict=True) if number}

    def _add_exactly(self, values: torch.Tensor) -> None:
        parameters = {name: self.parameters[name] for name in sorted(self.exact)}
        if not parameters:
            return

        def gradients(weights: torch.Tensor, batched: bool) -> tuple[torch.Tensor | None, ...]:
            options = {"retain_graph": True, "allow_unused": True, "is_grads_batched": batched}
            return torch.autograd.grad(values, list(parameters.values()), weights, **options)

        for weights in torch.eye(len(values), dtype=values.dtype, device=values.device).split(EXACT_ROWS):
            try:
                parts = gradients(weights, batched=True)
            except RuntimeError:  # some operation cannot be vectorised, or memory does not suffice
                single = zip(*(gradients(weight, batched=False) for weight in weights), strict=True)
                parts = [None if part[0] is None else torch.stack(part) for part in single]
            for name, part in zip(parameters, parts, strict=True):
                if part is not None:
                    self.sums[name] += self.statistic(part.float()).sum(dim=0)


@dataclass
class _Gradients:
    """
    The per-example gradients of a parameter of any shape, as a matrix: Σ_positions left ⊗ right, over all its uses.

    Args:
        shape: of the parameter.
        parts: one for each use. left has shape [rows, positions, m], or [rows, positions, 1] and integers: the indices
            of the ones in one-hot vectors. right has shape [rows, positions, n].
    """

    shape: torch.Size
    parts: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def combined(self, weights: torch.Tensor) -> _Gradients:
        """The sum over examples, weighted, shape [rows], as the gradient of a single one."""
        parts = [(left, right * weights.float()[:, None, None]) for left, right in self.parts]
        return _Gradients(self.shape, [tuple(x.flatten(0, 1)[None] for x in part) for part in parts])

    def scale(self) -> float:
        """Root of the sum of squares of all terms: what rounding errors are small against, also where the terms
        cancel, as in the gradient of the keys' biases."""
        squares = [right.square().sum(dim=-1) for _, right in self.parts]
        for square, (left, _) in zip(squares, self.parts, strict=True):
            if left.is_floating_point():
                square *= left.square().sum(dim=-1)
        return sum(square.sum().item() for square in squares) ** 0.5

    def total(self, statistic: Callable[[torch.Tensor], torch.Tensor], max_elements: int) -> torch.Tensor:
        """Sum over examples of a statistic with f(ab) = f(a) f(b), in the parameter's shape."""
        dense = [part for part in self.parts if part[0].is_floating_point()]
        lookups = [part for part in self.parts if not part[0].is_floating_point()]
        m, n = self.shape[0], self.shape[1:].numel()
        if lookups:
            indices, looked_up = _joined(lookups)
            rows = len(indices)
            indices = indices[..., 0] + m * torch.arange(rows, device=indices.device)[:, None]  # in [rows × m, n]
        if not dense:  # do not spell out the many zeros
            entries, inverse = indices.unique(return_inverse=True)
            gradient = looked_up.new_zeros(len(entries), n)
            gradient.index_add_(0, inverse.flatten(), looked_up.flatten(0, 1))
            return gradient.new_zeros(self.shape).index_add_(0, entries % m, statistic(gradient))
        left, right = _joined(dense)
        if left.shape[1] == 1 and not lookups:
            return (statistic(left[:, 0]).T @ statistic(right[:, 0])).view(self.shape)
        total = left.new_zeros(m, n)
        step = max(1, max_elements // total.numel())
        for start in range(0, len(left), step):
            chunk = slice(start, start + step)
            gradient = left[chunk].mT @ right[chunk]
            if lookups:
                places = indices[chunk].flatten() - start * m
                gradient.view(-1, n).index_add_(0, places, looked_up[chunk].flatten(0, 1))
            total += statistic(gradient).sum(dim=0)
        return total.view(self.shape)


@dataclass
class _Calls:
    """
    The calls of modules while a model runs once.

    Args:
        owned: module of a known kind -> its own name of a parameter -> the parameter's name in the model.
        rows, head, index: see [`PerExample.add`].
        flat: whether the head has been called: the first axis are predictions.
        calls: of each, the module, its input, the place of its output in the graph, and `flat`.
        half: whether some gradients were computed in half precision.
        misfits: names of the parameters of modules whose first axis are neither examples nor predictions.
    """

    owned: Mapping[nn.Module, Mapping[str, str]]
    rows: int
    head: nn.Module | None
    index: torch.Tensor | None
    flat: bool = False
    calls: list[tuple[nn.Module, torch.Tensor, GradientEdge, bool]] = field(default_factory=list)
    half: bool = False
    misfits: set[str] = field(default_factory=set)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the calls, before any other hook: a gate on an output, for one, does not belong to the module."""
        handles = [module.register_forward_hook(self._keep, prepend=True, with_kwargs=True) for module in self.owned]
        if self.head is not None:
            handles.append(self.head.register_forward_pre_hook(lambda *_: setattr(self, "flat", True)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> torch.Tensor | None:
        if not torch.is_grad_enabled():
            return None
        fits = len(args) == 1 and not kwargs and isinstance(output, torch.Tensor) and output.ndim > 1
        if fits:
            inputs, kind, length = args[0], _kind(module), len(self.index) if self.flat else self.rows
            if kind == "embedding" and len(inputs) == 1 and not self.flat:  # positions, the same for all examples
                inputs, output = (tensor.expand(self.rows, *tensor.shape[1:]) for tensor in (inputs, output))
            fits = len(inputs) == len(output) == length
            fits &= kind != "elementwise" or output.shape[-1] == len(module.weight)
        if not fits:
            self.misfits.update(self.owned[module].values())
            return None
        first = not output.requires_grad
        if first:
            output = output.detach().requires_grad_()
        self.calls.append((module, inputs.detach(), get_gradient_edge(output), self.flat))
        return output.clone() if first else output  # a leaf must not be changed in place, as an activation may

    def gradients(self, values: torch.Tensor, shapes: Mapping[str, torch.Size], retain: bool) -> dict[str, _Gradients]:
        """Parameter -> its per-example gradients, from one backward pass of the losses."""
        if not self.calls:
            return {}
        edges = [edge for _, _, edge, _ in self.calls]
        deltas = torch.autograd.grad(values.sum(), edges, retain_graph=retain, allow_unused=True)
        gradients: dict[str, _Gradients] = {}
        with _full_precision(values):
            padded = _positions if self.index is None else _padding(self.index, self.rows)
            for (module, inputs, _, flat), delta in zip(self.calls, deltas, strict=True):
                if delta is None:  # the output was not used
                    continue
                self.half |= delta.dtype.itemsize < 4
                for own, left, right in _parts(module, inputs, delta.float(), padded if flat else _positions):
                    if own in self.owned[module]:
                        name = self.owned[module][own]
                        gradients.setdefault(name, _Gradients(shapes[name])).parts.append((left, right))
        return gradients


def _kind(module: nn.Module) -> str | None:
    """How a module uses its parameters, if that is known."""
    if isinstance(module, nn.Linear):
        return "linear"
    if type(module).__name__ == "Conv1D":  # of transformers: a linear module that keeps its weight as [in, out]
        return "transposed"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Conv2d):
        plain = module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return "convolution" if plain else None
    weight, known = module._parameters.get("weight"), module._parameters.keys() <= {"weight", "bias"}
    vector = weight is not None and weight.ndim == 1 and not module._buffers
    return "elementwise" if vector and known else None  # LayerNorm, RMSNorm and their like


def _parts(
    module: nn.Module,
    inputs: torch.Tensor,
    delta: torch.Tensor,
    arranged: Callable[[torch.Tensor], torch.Tensor],
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """The module's own name of each parameter, with what [`_Gradients`] has of one call. `delta`: ∂L/∂output."""
    kind = _kind(module)
    if kind == "convolution":
        options = (module.kernel_size, module.dilation, module.padding, module.stride)
        inputs, delta = F.unfold(inputs.float(), *options).mT, delta.flatten(2).mT  # [rows, places, features]
    delta = arranged(delta)
    ones = torch.ones_like(delta[..., :1])
    yield "bias", delta, ones
    if kind == "embedding":
        indices = arranged(inputs[..., None])
        yield "weight", indices, delta if module.padding_idx is None else delta * (indices != module.padding_idx)
    elif kind == "elementwise":
        yield "weight", delta * arranged(_slope(module, inputs.float())), ones
    else:
        inputs = arranged(inputs.float())
        yield ("weight", inputs, delta) if kind == "transposed" else ("weight", delta, inputs)


def _slope(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """∂output/∂weight of a module that is affine in its weight, feature by feature: the normalised inputs."""

    # Without hooks: those of FSDP would gather the parameters that are replaced here.
    bare = object.__new__(type(module))
    bare.__dict__.update(module.__dict__, _forward_pre_hooks=OrderedDict(), _forward_hooks=OrderedDict())

    def run(weight: float) -> torch.Tensor:
        shapes = {name: p.shape for name, p in module.named_parameters(recurse=False)}
        values = {name: torch.zeros(shape, dtype=inputs.dtype, device=inputs.device) for name, shape in shapes.items()}
        values["weight"] += weight
        return torch.func.functional_call(bare, values, inputs)

    return run(1) - run(0)


def _positions(tensor: torch.Tensor) -> torch.Tensor:
    """[rows, …, features] -> [rows, positions, features]."""
    return tensor[:, None] if tensor.ndim == 2 else tensor.flatten(1, -2)


def _padding(index: torch.Tensor, rows: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """[predictions, …, features] -> [rows, positions, features], 0 where a row has fewer predictions than others."""
    counts = torch.bincount(index, minlength=rows)
    longest, order = int(counts.max()), index.argsort(stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    places = index * longest + rank - (counts.cumsum(0) - counts)[index]

    def padded(tensor: torch.Tensor) -> torch.Tensor:
        tensor = _positions(tensor)
        padded = tensor.new_zeros(rows * longest, *tensor.shape[1:]).index_copy_(0, places, tensor)
        return padded.view(rows, longest * tensor.shape[1], tensor.shape[2])

    return padded


def _joined(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """All positions of all parts; nothing is copied where there is one."""
    if len(parts) == 1:
        return parts[0]
    left, right = (torch.cat(sides, dim=1) for sides in zip(*parts, strict=True))
    return left, right


@contextmanager
def _full_precision(values: torch.Tensor) -> Iterator[None]:
    with torch.no_grad(), torch.autocast(values.device.type, enabled=False):
        yield
