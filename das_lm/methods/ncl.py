"""NCL: natural continual learning, steps in the metric of what is known (Kao et al., arXiv 2106.08085)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

from das_lm.data.masking import IGNORED
from das_lm.errors import UserError
from das_lm.methods.arguments import FisherArguments, Measuring, Positive, knob
from das_lm.methods.base import Engine, Method, Tensors
from das_lm.methods.ewc import FISHER_EPOCH, fisher, sampled_targets

CHANGE_A_STEP = ("change_gradient", "before_step", "mask_step")  # hooks of a method
COUNTED_ROWS = 100  # from which the predictions of a domain of text are estimated


@dataclass
class NCLArguments(FisherArguments, Measuring):
    ncl_curvature: Literal["diagonal", "kronecker"] = knob("diagonal", "Form of the precision of ncl.")
    ncl_prior: Positive = knob(1.0, "Precision of the prior before the first domain, Λ₀ = ncl_prior · I.")
    ncl_radius: Positive = knob(1.0, "Radius r of the trust region √(½ δᵀΛδ) ≤ r of a step.")


class NCL(Method):
    """
    What is known is a Gaussian over the parameters of mean μ and precision Λ, before the first domain the weights as
    they are and `ncl_prior` · I. The step is δ = Λ⁻¹∇ℓ(θ) − (θ − μ), ℓ the log-likelihood of all the domain's data: a
    gradient step towards the maximum of the posterior in the metric of Λ. Where it leaves the trust region
    √(½ δᵀΛδ) ≤ `ncl_radius` it is scaled down, and plain SGD takes θ ← θ + γδ, γ its learning rate. After a domain
    μ ← θ and Λ ← Λ + N F, N its rows and F the Fisher information of a row (a Laplace approximation).

    ∇ℓ is the mean gradient of a batch times the predictions in the domain: rows, or predicted tokens.

    Λ is diagonal, or with `ncl_curvature="kronecker"` a [`Kronecker`] for every called `nn.Linear` with parameters of
    its own, and diagonal elsewhere; the positions of a sequence count as independent. The paper keeps a sum of two
    Kronecker products one by minimising a KL divergence, here it is the nearest in Frobenius norm.

    Memory: two copies of the trainable parameters, and four more during a step; with a Kronecker precision two times
    (inputs + 1)² + outputs² numbers of double precision for every linear layer, in the place of one copy.
    """

    needs_domain_ends = True
    works_with_adapters = False
    works_sharded = False
    protects_base = True
    consolidates_base = True
    arguments = NCLArguments
    search_grid = ("ncl_radius", (0.03, 0.1, 0.3, 1.0, 3.0, 10.0))
    needs = {"optim": "sgd", "learning_rate": 0.1}  # it makes the step itself
    kept = ("mean", "precision")

    def __init__(self):
        self.mean: Tensors = {}
        self.precision: Tensors = {}  # of the parameters that are in no Kronecker product
        self.factors: dict[str, Kronecker] = {}  # name of a linear layer -> precision of its parameters

    def attach(self, trainer: Engine) -> None:
        """Raises `UserError` for whatever else would change the step."""
        given = {**vars(trainer.args), "optim": trainer.args.optim.value}
        needed = {"optim": "sgd", "optim_args": None, "weight_decay": 0.0, "max_grad_norm": 0.0, "fp16": False}
        wrong = [f"{name} is {given[name]}" for name, value in needed.items() if given[name] != value]
        if wrong:
            raise UserError(
                f"method: 'ncl' makes the step itself, but {', '.join(wrong)}; it needs optim 'sgd', no optim_args, "
                "weight_decay 0, max_grad_norm 0, and bf16 rather than fp16"
            )
        for other in trainer.methods:
            changes = any(getattr(type(other), one) is not getattr(Method, one) for one in CHANGE_A_STEP)
            if not isinstance(other, NCL) and changes:
                raise UserError(
                    f"method: 'ncl' makes the step itself, and {type(other).__name__} changes it; take one"
                )
        super().attach(trainer)

    def begin_domain(self) -> None:
        """Before the first domain, Λ₀ around the weights as they are."""
        if not self.mean:
            self.mean = {name: parameter.detach().clone() for name, parameter in self.parameters().items()}
            layers, prior = self._layers(), self.args.ncl_prior
            inside = {name for names in layers.values() for name in names}
            self.precision = {n: torch.full_like(p, prior) for n, p in self.parameters().items() if n not in inside}
            for layer in layers:
                sizes = self._sizes(layer)
                identity = [torch.eye(size, dtype=torch.float64, device=self.args.device) for size in sizes]
                self.factors[layer] = Kronecker(*(prior**0.5 * one for one in identity))
        self._predictions = self._count()

    def _count(self) -> float:
        """Predictions in the domain."""
        rows = self.trainer.train_dataset
        if self.trainer.units is None:
            return len(rows)
        rows, counted = rows.at(FISHER_EPOCH), min(len(rows), COUNTED_ROWS)
        return len(rows) / counted * sum((rows[index]["labels"] != IGNORED).sum().item() for index in range(counted))

    # ---- the step --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def before_step(self) -> None:
        """Replace every gradient by −δ."""
        parameters = self.parameters()
        gradient = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}
        natural = self._in_metric(gradient, inverse=True)
        step = {name: self.mean[name] - p - self._predictions * natural[name] for name, p in parameters.items()}
        dual = self._in_metric(step)
        length = (sum((step[name] * dual[name]).sum() for name in step) / 2).sqrt()
        scale = (self.args.ncl_radius / length).clamp(max=1)  # of no step at all: min(∞, 1)
        for name, parameter in parameters.items():
            parameter.grad = -scale * step[name]

    def _in_metric(self, tensors: Tensors, inverse: bool = False) -> Tensors:
        """Λ times what is given, or Λ⁻¹."""
        result = {n: tensors[n] / value if inverse else tensors[n] * value for n, value in self.precision.items()}
        for layer, names in self._layers().items():
            matrix = torch.cat([tensors[name].view(len(tensors[name]), -1) for name in names], dim=1)
            kronecker = self.factors[layer]
            matrix = kronecker.solve(matrix) if inverse else kronecker.times(matrix)
            columns = [tensors[name].shape[1:].numel() for name in names]
            for name, part in zip(names, matrix.split(columns, dim=1), strict=True):
                result[name] = part.view_as(tensors[name])
        return result

    # ---- the precision ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def end_domain(self) -> None:
        """Λ ← Λ + N F around the new weights."""
        trainer, rows = self.trainer, len(self.trainer.train_dataset)
        self.mean = {name: parameter.detach().clone() for name, parameter in self.parameters().items()}
        with trainer.private_randomness(FISHER_EPOCH):
            if self.precision:
                diagonal = fisher(trainer, trainer.importance_batches(FISHER_EPOCH), self.args.fisher)
                trainer.check_finite(diagonal, "Fisher information (ncl)")
                self.precision = {name: value + rows * diagonal[name] for name, value in self.precision.items()}
            if self.factors:
                new = self._kronecker_fisher()
                trainer.check_finite({layer: one.outputs for layer, one in new.items()}, "Fisher information (ncl)")
                self.factors = {
                    layer: value + Kronecker(rows * new[layer].inputs, new[layer].outputs)
                    for layer, value in self.factors.items()
                }

    def _kronecker_fisher(self) -> dict[str, Kronecker]:
        """F ≈ E[a aᵀ] ⊗ E[Σ δ δᵀ] of every layer, a its inputs at a position (and a 1 for the bias), δ the gradient of
        the row's log-likelihood at its outputs, summed over the row's positions. Dropout off."""
        trainer, model = self.trainer, self.model
        device = self.args.device
        sums = {
            layer: [torch.zeros(size, size, dtype=torch.float64, device=device) for size in self._sizes(layer)]
            for layer in self._layers()
        }
        positions = {layer: torch.zeros((), device=device) for layer in sums}
        rows = torch.zeros((), device=device)
        calls: list[tuple[str, Any]] = []

        def keep(layer: str, module: nn.Linear, inputs: torch.Tensor, output: torch.Tensor) -> None:
            """Add a layer's inputs to its factor."""
            inputs = inputs.detach().flatten(0, -2)
            if module.bias is not None:
                inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)
            sums[layer][0] += inputs.mT.double() @ inputs.double()
            positions[layer] += len(inputs)
            calls.append((layer, get_gradient_edge(output)))

        handles = [
            model.get_submodule(layer).register_forward_hook(
                lambda module, args, output, layer=layer: keep(layer, module, args[0], output), prepend=True
            )
            for layer in sums
        ]
        was_training = model.training
        model.eval()
        try:
            for batch in trainer.importance_batches(FISHER_EPOCH):
                count = len(next(iter(batch.values())))
                with torch.enable_grad(), trainer.accelerator.autocast():
                    output = trainer.criterion(model, batch)
                    if self.args.fisher == "true":
                        output.targets = sampled_targets(output)
                    loss = output.row_sums(count).sum()
                deltas = torch.autograd.grad(loss, [edge for _, edge in calls], allow_unused=True)
                for (layer, _), delta in zip(calls, deltas, strict=True):
                    if delta is not None:
                        delta = delta.flatten(0, -2).double()
                        sums[layer][1] += delta.mT @ delta
                calls.clear()
                rows += count
        finally:
            model.train(was_training)
            for handle in handles:
                handle.remove()
        reduce = trainer.accelerator.reduce
        rows = reduce(rows, "sum")
        return {
            layer: Kronecker(
                reduce(inputs, "sum") / reduce(positions[layer], "sum").clamp(min=1), reduce(outputs, "sum") / rows
            )
            for layer, (inputs, outputs) in sums.items()
        }

    # ---- parameters ------------------------------------------------------------------------------------------------

    def _layers(self) -> dict[str, list[str]]:
        """Layers with a Kronecker precision -> names of their weight (and bias), trainable and not shared."""
        if self.args.ncl_curvature == "diagonal":
            return {}
        model, trainable = self.model, self.parameters()
        uses: dict[int, int] = {}
        for _, parameter in model.named_parameters(remove_duplicate=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
        layers = {}
        for layer, module in model.named_modules():
            if type(module) is nn.Linear:
                own = dict(module.named_parameters())
                if all(f"{layer}.{name}" in trainable and uses[id(p)] == 1 for name, p in own.items()):
                    layers[layer] = [f"{layer}.{name}" for name in own]
        return layers

    def _sizes(self, layer: str) -> tuple[int, int]:
        """Of the two factors."""
        module = self.trainer.model.get_submodule(layer)
        return module.in_features + (module.bias is not None), module.out_features

    # ---- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> Tensors:
        """With both factors of every layer."""
        return {
            **super().state_dict(),
            **{f"inputs.{layer}": one.inputs for layer, one in self.factors.items()},
            **{f"outputs.{layer}": one.outputs for layer, one in self.factors.items()},
        }

    def load_state_dict(self, state: Tensors) -> None:
        """Raises `UserError` where `ncl_curvature` was another."""
        super().load_state_dict(state)
        saved = {n.removeprefix("inputs.") for n in state if n.startswith("inputs.")}
        if saved != set(self._layers()):
            raise UserError(
                f"{self.file_name} does not fit the model: it has a Kronecker precision for {len(saved)} layers, and "
                f"{len(self._layers())} need one; is ncl_curvature what it was?"
            )
        self.factors = {layer: Kronecker(state[f"inputs.{layer}"], state[f"outputs.{layer}"]) for layer in saved}


class Kronecker:
    """
    A precision A ⊗ G of the entries of a matrix W, shape [outputs, inputs]: Λ W = G W A.

    Args:
        inputs: A, symmetric, shape [inputs, inputs].
        outputs: G, symmetric, shape [outputs, outputs].
    """

    def __init__(self, inputs: torch.Tensor, outputs: torch.Tensor):
        self.inputs, self.outputs = inputs, outputs

    def times(self, matrix: torch.Tensor) -> torch.Tensor:
        """Λ W."""
        inputs, outputs = (factor.to(matrix.dtype) for factor in (self.inputs, self.outputs))
        return outputs @ matrix @ inputs

    def solve(self, matrix: torch.Tensor) -> torch.Tensor:
        """Λ⁻¹ W."""
        inputs, outputs = (factor.to(matrix.dtype) for factor in self._inverses)
        return outputs @ matrix @ inputs

    @cached_property
    def _inverses(self) -> list[torch.Tensor]:
        return [torch.cholesky_inverse(torch.linalg.cholesky(factor)) for factor in (self.inputs, self.outputs)]

    def __add__(self, other: Kronecker) -> Kronecker:
        """
        The Kronecker product nearest to the sum in Frobenius norm. Rearranged, A ⊗ G becomes vec(A) vec(G)ᵀ, and the
        sum a matrix of rank two, whose best approximation of rank one is in its singular vectors (Van Loan and
        Pitsianis, 1993); two QR decompositions leave a 2 × 2 matrix for that. If the sum is positive definite, so are
        both factors.
        """
        bases, triangles = [], []
        for factors in ((self.inputs, other.inputs), (self.outputs, other.outputs)):
            basis, triangle = torch.linalg.qr(torch.stack([factor.flatten() for factor in factors], dim=1))
            bases.append(basis)
            triangles.append(triangle)
        left, values, right = torch.linalg.svd(triangles[0] @ triangles[1].mT)
        nearest = []
        for basis, direction, like in zip(bases, (left[:, 0], right[0]), (self.inputs, self.outputs), strict=True):
            factor = values[0].sqrt() * (basis @ direction).view_as(like)
            factor = (factor + factor.mT) / 2
            nearest.append(factor if factor.trace() > 0 else -factor)
        return Kronecker(*nearest)
