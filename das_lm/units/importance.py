"""How much each unit matters to what a model knows (DAS, arXiv 2302.03241, section 3.1)."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from das_lm.errors import UserError
from das_lm.files import write_tensors
from das_lm.units.discovery import Units
from das_lm.units.gates import gated, ones
from das_lm.units.sharding import in_step, recording

FILE_NAME = "importance.safetensors"
FORMAT_VERSION = 1
Normalization = Literal["paper", "rank", "positive"]
Accumulation = Literal["absolute", "signed"]


def measure_importance(
    units: Units,
    batches: Iterable[Mapping[str, torch.Tensor]],
    losses: Callable[[Mapping[str, torch.Tensor]], torch.Tensor],
    *,
    views: int = 1,
    drops: Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]] | None = None,
    accumulation: str = "absolute",
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda total: total,
) -> dict[str, torch.Tensor]:
    """
    Raw importance I_l = 1/N Σ_n |∂L_imp(x_n)/∂g_l|, equation 3: the absolute gradient of every single example, from
    one backward pass per batch through gates that have a row per example. Parameters record no gradient meanwhile.

    Args:
        units: the model's units.
        batches: batches with at least `input_ids`, shape [batch, tokens].
        losses: batch -> the importance loss of each example, shape [batch]. It runs the model on `views` × batch rows,
            the views one after the other; the views of an example share its gate.
        views: how often an example stands in the rows that `losses` runs.
        drops: batch -> factors on the gates, group key -> [views × batch, units]; none if not given.
        accumulation: `"absolute"` (equation 3), or `"signed"`, which averages the gradients themselves.
        reduce: sums a tensor over all processes.

    Returns:
        group key -> raw importance, shape [units], fp32, on the model's device.
    """
    device = next(units.model.parameters()).device
    totals = {key: torch.zeros(group.size, device=device) for key, group in units.groups.items()}
    examples = torch.zeros((), device=device)
    with recording(units.model):
        for batch, counts in in_step(batches, units.model):
            rows = len(batch["input_ids"])
            gates = ones(units.groups, rows, device)
            per_row = {key: gate.repeat(views, 1) for key, gate in gates.items()}  # [views × batch, units]
            if drops is not None:
                factors = drops(batch)
                per_row = {key: gate * factors[key] for key, gate in per_row.items()}
            with gated(units, per_row):
                gradients = torch.autograd.grad(losses(batch).sum(), list(gates.values()))
            if not counts:
                continue
            for total, gradient in zip(totals.values(), gradients, strict=True):
                total += (gradient.abs() if accumulation == "absolute" else gradient).sum(dim=0)
            examples += rows
    examples = reduce(examples)
    return {key: reduce(total) / examples for key, total in totals.items()}


def normalize(raw: torch.Tensor, how: str) -> torch.Tensor:
    """
    Raw importance of one layer and kind, shape [units], as importance in [0, 1]. A constant vector becomes zeros.

    `"paper"` is |tanh(z)| of the standardised values (equation 4). Where raw importance is not negative, units far
    *below* the mean get a large value too. `"positive"`, max(0, tanh z), and `"rank"`, the rank over units − 1 (ties
    share their mean rank), keep the order of |raw|: of signed gradients, a strong negative one is important.
    """
    if how != "paper":
        raw = raw.abs()
    if raw.max() == raw.min():
        return torch.zeros_like(raw)
    if how == "rank":
        ordered = raw.sort().values
        below, up_to = torch.searchsorted(ordered, raw), torch.searchsorted(ordered, raw, right=True)
        return (below + up_to - 1).to(raw.dtype) / 2 / (len(raw) - 1)
    tanh = torch.tanh((raw - raw.mean()) / raw.std())
    return tanh.abs() if how == "paper" else tanh.clamp(min=0)


@dataclass
class Importance:
    """
    What a model knows, as importance of its units, accumulated over the domains so far.

    Args:
        values: group key -> accumulated importance I^(≤t) in [0, 1], shape [units].
        by_domain: the same of every domain alone, I^(0), I^(1), …
        domains: what was accumulated, in order; the proxy before the first domain is called `"general"`.
        normalization: how raw importance became importance.
        accumulation: how gradients became raw importance; `None` if a file does not say.
    """

    normalization: str
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    by_domain: list[dict[str, torch.Tensor]] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)
    accumulation: str | None = "absolute"

    def accumulate(self, domain: str, raw: Mapping[str, torch.Tensor]) -> None:
        """Take in a domain: I^(≤t) = max(I^(≤t−1), I^(t)), element-wise (equation 7, EMax)."""
        own = {key: normalize(value, self.normalization) for key, value in raw.items()}
        self.values = {key: torch.maximum(self.values.get(key, value), value) for key, value in own.items()}
        self.by_domain.append(own)
        self.domains.append(domain)

    def to(self, device: torch.device) -> None:
        """Move all values."""
        for part in (self.values, *self.by_domain):
            part.update({key: value.to(device) for key, value in part.items()})

    def saturation(self) -> dict[str, float]:
        """Kind of unit -> mean accumulated importance: near 1, nothing of that kind can learn any more."""
        kinds: dict[str, list[torch.Tensor]] = {}
        for key, value in self.values.items():
            kinds.setdefault(key.rsplit(".", 1)[1], []).append(value)
        return {kind: torch.cat(values).mean().item() for kind, values in kinds.items()}

    def maps(self, bins: int = 48) -> dict[str, Any]:
        """
        What people look at: importance by layer, and how much the domains have in common.

        Args:
            bins: a layer with more units is shown by the means of as many bins of neighbours.

        Returns:
            `domains`; `maps`: kind -> domain or `"accumulated"` -> layers -> importance, at most `bins` numbers each;
            `overlap`: kind -> Spearman's ρ over all units of the kind between the domains, [domains][domains].
        """
        parts = {**dict(zip(self.domains, self.by_domain, strict=True)), "accumulated": self.values}
        kinds: dict[str, list[str]] = {}
        for key in self.values:
            kinds.setdefault(key.rsplit(".", 1)[1], []).append(key)
        maps = {
            kind: {
                name: [
                    [round(chunk.mean().item(), 4) for chunk in part[key].tensor_split(min(bins, len(part[key])))]
                    for key in keys
                ]
                for name, part in parts.items()
            }
            for kind, keys in kinds.items()
        }
        overlap = {}
        for kind, keys in kinds.items():
            values = torch.stack([torch.cat([part[key] for key in keys]) for part in self.by_domain]).cpu()
            overlap[kind] = _rank_correlation(values)
        return {"domains": self.domains, "maps": maps, "overlap": overlap}

    def save(self, path: Path | str, units: Units) -> None:
        """Write a safetensors file with what is needed to see whether it fits a model."""
        parts = {"values": self.values, **dict(enumerate(self.by_domain))}
        tensors = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.items()}
        metadata = {
            "format": "das_lm.importance",
            "version": str(FORMAT_VERSION),
            "model_type": units.model_type,
            "units": json.dumps(units.sizes),
            "domains": json.dumps(self.domains),
            "normalization": self.normalization,
            **({"accumulation": self.accumulation} if self.accumulation else {}),
        }
        write_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: Path | str, units: Units) -> Importance:
        """
        Read what [`save`] wrote; `path` may be the file or its directory.

        Raises:
            UserError: no such file, not an importance file, of a newer version, or of a model with other units (the
                message names the first layer that differs).
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        if path.exists() and not path.is_file():
            raise UserError(f"importance: {path} is a pipe or a device; give a file")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except FileNotFoundError:
            raise UserError(f"importance: there is no file {path}; use 'proxy' to compute it") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"importance: {path} cannot be read ({error}); use 'proxy' to compute it anew") from None
        if metadata.get("format") != "das_lm.importance":
            raise UserError(f"importance: {path} is no importance file")
        try:
            if int(metadata["version"]) > FORMAT_VERSION:
                raise UserError(
                    f"importance: {path} has version {metadata['version']}; this release reads {FORMAT_VERSION}"
                )
            _check_fit(path, metadata["model_type"], json.loads(metadata["units"]), units)
            device = next(units.model.parameters()).device
            parts: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
            for name, tensor in tensors.items():
                part, key = name.split(".", 1)
                fits = tensor.is_floating_point() and tensor.shape == (units.sizes[key],)
                if not fits or not ((tensor >= 0) & (tensor <= 1)).all():
                    raise ValueError(f"'{name}' is no importance in [0, 1] of {units.sizes[key]} units")
                parts[part][key] = tensor.float().to(device)
            values = parts.pop("values")
            by_domain = [parts[number] for number in sorted(parts, key=int)]
            domains = list(json.loads(metadata["domains"]))
            if any(part.keys() != units.sizes.keys() for part in (values, *by_domain)):
                raise ValueError("the importance of some units is missing")
            if by_domain and len(by_domain) != len(domains):
                raise ValueError(f"there are {len(domains)} domains, and importance of {len(by_domain)}")
            if metadata["normalization"] not in get_args(Normalization):
                raise ValueError(f"there is no normalization '{metadata['normalization']}'")
            accumulation = metadata.get("accumulation")  # which the first files did not say
            if accumulation not in (None, *get_args(Accumulation)):
                raise ValueError(f"there is no accumulation '{accumulation}'")
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"importance: {path} is not as das-lm writes it ({error}); use 'proxy' instead") from None
        return cls(metadata["normalization"], values, by_domain, domains, accumulation)


def _rank_correlation(values: torch.Tensor) -> list[list[float]]:
    """Spearman's ρ between the rows of values, shape [rows, units]; a constant row correlates with nothing."""
    ranks = torch.stack([normalize(row, "rank") for row in values]).double()
    ranks = nn.functional.normalize(ranks - ranks.mean(1, keepdim=True), dim=1)
    return [[round(value, 4) for value in row] for row in (ranks @ ranks.T).tolist()]


def _check_fit(path: Path, model_type: str, sizes: Mapping[str, int], units: Units) -> None:
    if model_type != units.model_type:
        raise UserError(f"importance: {path} is of a '{model_type}' model, this one is '{units.model_type}'")
    for key in {**units.sizes, **sizes}:
        ours, theirs = units.sizes.get(key, 0), sizes.get(key, 0)
        if ours != theirs:
            raise UserError(
                f"importance: {path} is of another model: {key} has {theirs} units there and {ours} in this model"
            )
