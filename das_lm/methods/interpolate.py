"""Interpolation: between the weights before and after a domain (WiSE-FT, Wortsman et al., arXiv 2109.01903)."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from das_lm.errors import UserError
from das_lm.methods.arguments import Arguments, NotNegative, knob
from das_lm.methods.base import Engine, Method, Tensors
from das_lm.units.soft_mask import check_fresh

logger = logging.getLogger(__name__)

GRID = [step / 10 for step in range(11)]  # of `interpolation_alpha="auto"`


@dataclass
class InterpolateArguments(Arguments):
    interpolation_alpha: str = knob(
        "0.5",
        "α of θ ← α θ_new + (1 - α) θ_old after a domain (WiSE-FT, 2109.01903), in [0, 1]; 'auto' chooses it on one "
        "half of the held-out documents of the domains learned so far, the other half of which is what is reported, "
        "and on what is remembered.",
    )
    interpolation_slope: NotNegative = knob(
        0.0,
        "b of LiNeS (2410.17146): layer l of L interpolates by α + b l / (L - 1), at most 1, so that the last layers "
        "keep more of what they learned; 0 is one α for all.",
    )
    interpolation_domains: list[str] = knob(
        [],
        "Further domains, such as one of measure, on which 'auto' chooses too. Without one, nothing speaks for the "
        "base model in the first domain.",
    )

    def check(self) -> None:
        """Raises `ValueError` for what is no α."""
        if self.interpolation_alpha != "auto":
            try:
                inside = 0 <= float(self.interpolation_alpha) <= 1
            except ValueError:
                inside = False
            if not inside:
                raise ValueError(
                    f"interpolation_alpha: '{self.interpolation_alpha}' is neither a number in [0, 1] nor 'auto'"
                )


class Interpolate(Method):
    """
    θ ← α θ_new + (1 − α) θ_old once a domain has been learned, θ_new the average where `ema` makes one; α = 1 is
    `naive`, α = 0 the model before. `"auto"` takes the α in {0, 0.1, …, 1} with the lowest mean loss over the
    trainer's development data: in a walk, one half of the held-out text of the domains learned so far, and of those
    that `interpolation_domains` names. Rows that are remembered of the base model, and were never trained on, count
    as a domain more for every source.

    A LoRA adapter begins at B = 0, so that α B A, with A as it was learned, is that of the merged weights.

    Memory: one copy of the trainable parameters.
    """

    needs_domain_ends = True
    protects_base = True
    draws_remembered = True
    arguments = InterpolateArguments
    search_grid = ("interpolation_alpha", ("0.3", "0.5", "0.7", "0.9"))
    order = 2
    kept = ("old",)

    def __init__(self):
        self.old: Tensors = {}
        self.alpha: float | None = None
        self.chosen_on: list[str] = []

    def attach(self, trainer: Engine) -> None:
        """Raises `UserError` for an adapter that is no fresh one, and where α has nothing to be chosen by."""
        super().attach(trainer)
        self.draws_remembered = self.args.interpolation_alpha == "auto"
        check_fresh(self.parameters(), "only then is α B A the interpolation of the weights")
        if self.args.interpolation_alpha == "auto":
            if not trainer.development_dataset:
                raise UserError(
                    "interpolation_alpha: 'auto' needs held-out data to choose by: give the trainer a "
                    "development_dataset"
                )
            missing = [one for one in self.args.interpolation_domains if one not in trainer.development_dataset]
            if missing:
                raise UserError(
                    f"interpolation_domains: there is no held-out text of '{missing[0]}'; name domains that are "
                    "learned or measured"
                )

    def begin_domain(self) -> None:
        if not self.old:
            self.old = {name: value.clone() for name, value in self.values().items()}

    @torch.no_grad()
    def finish_weights(self) -> None:
        """θ ← α θ_new + (1 − α) θ_old."""
        new = {name: value.clone() for name, value in self.values().items()}
        if self.args.interpolation_alpha == "auto":
            losses = []
            for alpha in GRID:
                self._set(new, alpha)
                losses.append(self.trainer.development_loss())
            past = self.trainer.remembered.rows_apart() if self.trainer.remembered is not None else {}
            self.alpha = GRID[losses.index(min(losses))]
            self.chosen_on = [*self.trainer.development_dataset, *(f"{name}, remembered" for name in past)]
            logger.info("interpolation_alpha %s, chosen on %s", self.alpha, ", ".join(self.chosen_on))
        else:
            self.alpha = float(self.args.interpolation_alpha)
        self._set(new, self.alpha)
        self.old = {}

    def _set(self, new: Tensors, alpha: float) -> None:
        between(self, self.old, new, alpha, self.args.interpolation_slope)

    def state(self) -> dict[str, Any]:
        if self.alpha is None:
            return {}
        chosen_on = {"interpolation_chosen_on": self.chosen_on} if self.chosen_on else {}
        return {"interpolation_alpha": self.alpha, **chosen_on}


def between(method: Method, old: Tensors, new: Tensors, alpha: float, slope: float = 0.0) -> None:
    """
    Set the weights to α new + (1 − α) old; of an adapter that began at B = 0, to A as it is and α B.

    Args:
        slope: how much larger α is in the last layer than in the first. What stands in no layer is as the first; an
            LM head of its own as the last.
    """
    values = method.values()
    depth = layers_of(values) if slope else {}
    last = max(depth.values(), default=0)
    for name, value in values.items():
        share = min(1.0, alpha + slope * depth.get(name, 0) / max(last, 1))
        value.copy_(torch.lerp(old[name], new[name], 1.0 if ".lora_A." in name else share))


def layers_of(names: Iterable[str]) -> dict[str, int]:
    """Name of a parameter -> number of its layer, the first number in the name; embeddings stand in the first, what
    follows the layers in the last."""
    found = {name: int(match[1]) for name in names if (match := re.search(r"\.(\d+)\.", name))}
    last, begun = max(found.values(), default=0), False
    layers = {}
    for name in names:
        begun = begun or name in found
        layers[name] = found.get(name, last if begun else 0)
    return layers
