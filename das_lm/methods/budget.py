"""A bound on drift: the anchor's λ is found while training, and the weights land on the bound."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from scipy import stats

from das_lm.errors import UserError
from das_lm.methods.base import Engine, Method, Tensors
from das_lm.methods.interpolate import between, check_fresh

if TYPE_CHECKING:
    from das_lm.methods.anchor import Anchor

#: Remembered rows that the running mean of the divergence looks back on; of a short training, a quarter of all.
ROWS = 64
#: How fast λ follows: at a divergence of twice the bound, log λ rises by so much with every remembered row; or, if
#: that is more, by [`REACH`] over all rows of the training.
RATE = 1 / 64
REACH = 4.0
#: λ stays within this factor of its first value, above and below.
WIDEST = 1000.0
#: While the learning rate is high, so is the divergence: at the beginning it may be so many times the bound more.
SLACK = 0.5
#: Halvings of the way back to the weights before the domain.
HALVINGS = 7


class Controller:
    """
    Dual ascent for: the least loss at which K ≤ ε. After every step log λ ← log λ + η (K̂ − ε_t) / ε_t, where K̂ is a
    running mean of the divergence on remembered rows. The bound belongs to the end, and the divergence falls with the
    learning rate: ε_t = ε (1 + [`SLACK`] (1 − t)), where t in [0, 1] is the part of the training that is done.

    Args:
        bound: ε, nats per predicted token.
        weight: λ to begin with.
        rows: how many remembered rows the whole training will bring.
    """

    def __init__(self, bound: float, weight: float, rows: float = math.inf):
        self.bound, self.first, self.weight, self.mean = bound, weight, weight, 0.0
        self._rate, self._window = max(RATE, REACH / max(rows, 1)), max(1.0, min(ROWS, rows / 4))
        self._rows = 0.0  # that the mean is of, at most the window

    def step(self, divergence: float, rows: float, done: float) -> None:
        """
        A step is over.

        Args:
            divergence: mean over the predictions of the remembered rows.
            rows: how many of these there were.
            done: t.
        """
        self._rows = min(self._rows + rows, self._window)
        self.mean += min(1.0, rows / self._rows) * (divergence - self.mean) if rows else 0.0
        if math.isinf(self.bound):
            return
        bound = self.bound * (1 + SLACK * (1 - done))
        change = self._rate * rows * max(-1.0, min(1.0, (self.mean - bound) / bound))
        self.weight = max(self.first / WIDEST, min(self.first * WIDEST, self.weight * math.exp(change)))

    def state_dict(self) -> torch.Tensor:
        return torch.tensor([self.weight, self.mean, self._rows], dtype=torch.float64)

    def load_state_dict(self, state: torch.Tensor) -> None:
        self.weight, self.mean, self._rows = state.tolist()


class Budget(Method):
    """
    Holds the drift of each past, as its divergence on remembered rows, within `drift_budget`: while training, by the
    weight of each, λ ([`Controller`]); at the end by interpolation. Then the weights become those with the largest α
    between the ones before the domain (α = 0) and after training (α = 1) at which the mean divergence, on rows that
    were never trained on, is within the bound for every past: by construction, up to that sample's noise.

    Memory: one copy of the trainable parameters.

    Args:
        anchor: whose λ it is.
    """

    #: After all that changes the weights at the end of a domain.
    order = 3
    name = "drift_budget"
    kept = ("old",)

    def __init__(self, anchor: Anchor):
        self.anchor = anchor
        self.old: Tensors = {}
        self.controllers: dict[str, Controller] = {}
        self._loaded: Tensors = {}
        self.verdict: dict[str, Any] = {}

    def attach(self, trainer: Engine) -> None:
        """Raises `UserError` for an adapter that is no fresh one, and for what would move the weights too."""
        super().attach(trainer)
        check_fresh(self.parameters(), "only then is α B A the interpolation of the weights")
        if any(one.name == "interpolate" for one in trainer.methods):
            raise UserError("drift_budget: chooses the interpolation itself; leave the method interpolate out")
        if trainer.args.anchor_weight == 0:
            raise UserError("drift_budget: the weight of the anchor begins at anchor_weight, which is 0; write 1")

    def bound_of(self, past: str) -> float:
        """The bound for a past, infinite where it has none."""
        source = self.anchor.base.get(past)
        budget = self.args.drift_budget if source is None or source.budget is None else source.budget
        return math.inf if budget is None else budget

    def begin_domain(self) -> None:
        """Raises `UserError` where too few rows are remembered to keep some apart."""
        if not self.old:
            self.old = {name: value.clone() for name, value in self.values().items()}
        args, weights = self.args, {name: weight for name, (_, weight) in self.anchor.pasts.items()}
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        rows = self.trainer.state.max_steps * batch * args.anchor_share / sum(weights.values())
        for name, weight in weights.items():
            if not len(self.anchor.rows_apart(name)):
                raise UserError(f"drift_budget: too few rows of '{name}' to keep some apart; remember 8 or more")
            self.controllers[name] = Controller(self.bound_of(name), args.anchor_weight, rows * weight)
            if f"controller.{name}" in self._loaded:
                self.controllers[name].load_state_dict(self._loaded[f"controller.{name}"])
        self._loaded = {}

    def after_step(self) -> None:
        """The controllers see the divergence of the step, over all processes."""
        found = self.anchor.take_divergence(list(self.controllers))  # [pasts, (sum, predictions, rows)]
        found = self.trainer.accelerator.reduce(found, "sum").tolist()
        state = self.trainer.state
        done = (state.global_step + 1) / max(state.max_steps, 1)
        for controller, (total, predictions, rows) in zip(self.controllers.values(), found, strict=True):
            controller.step(total / max(predictions, 1), rows, min(done, 1.0))

    @torch.no_grad()
    def finish_weights(self) -> None:
        """Land on the bound."""
        new = {name: value.clone() for name, value in self.values().items()}
        alpha, after = 1.0, self._divergence()
        now = after
        if not self._within(after):
            low, high = 0.0, 1.0
            for _ in range(HALVINGS):
                alpha = (low + high) / 2
                between(self, self.old, new, alpha)
                low, high = (alpha, high) if self._within(self._divergence()) else (low, alpha)
            alpha = low
            between(self, self.old, new, alpha)
            now = self._divergence()
        landed = {name: _interval(rows) for name, rows in now.items()}
        self.verdict = {
            "drift_budget": {name: self.bound_of(name) for name in landed if math.isfinite(self.bound_of(name))},
            "divergence": landed,
            "divergence_before_landing": {name: float(rows.mean()) for name, rows in after.items()},
            "landed_at": alpha,
            "budget_holds": all(low <= self.bound_of(name) for name, (_, low, _) in landed.items()),
        }
        self.old = {}

    def _divergence(self) -> dict[str, torch.Tensor]:
        return {name: self.anchor.divergence_apart(name) for name in self.controllers}

    def _within(self, divergence: Mapping[str, torch.Tensor]) -> bool:
        return all(float(rows.mean()) <= self.bound_of(name) for name, rows in divergence.items())

    def logs(self) -> dict[str, float]:
        """λ, K̂ and ε of every past."""
        found: dict[str, float] = {}
        for name, one in self.controllers.items():
            found |= {f"budget_{name}_weight": one.weight, f"budget_{name}_divergence": one.mean}
        return found

    def state(self) -> dict[str, Any]:
        return self.verdict

    def state_dict(self) -> Tensors:
        controllers = {f"controller.{name}": one.state_dict() for name, one in self.controllers.items()}
        return {**super().state_dict(), **(controllers if self.old else {})}

    def load_state_dict(self, state: Tensors) -> None:
        super().load_state_dict(state)
        self._loaded = {name: tensor for name, tensor in state.items() if name.startswith("controller.")}


def _interval(rows: torch.Tensor) -> list[float]:
    """The mean of rows, [rows], and its 95 % interval (Student's t)."""
    mean, count = float(rows.mean()), len(rows)
    half = float(stats.t.ppf(0.975, count - 1) * rows.std() / count**0.5) if count > 1 else math.inf
    return [mean, mean - half, mean + half] if math.isfinite(half) else [mean, mean, mean]
