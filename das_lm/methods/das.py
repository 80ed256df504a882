"""DAS: continual domain-adaptive pre-training with soft-masking (Ke et al., ICLR 2023, arXiv 2302.03241)."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import nn

from das_lm.data.masking import IGNORED
from das_lm.errors import UserError
from das_lm.methods.arguments import Measuring, NotNegative, SoftMasking, Temperature, knob
from das_lm.methods.base import Engine, Method
from das_lm.model.objective import Output, has_active_dropout, run_language_model
from das_lm.randomness import addressed_seed
from das_lm.units.contrast import contrastive_loss, mean_pool
from das_lm.units.gates import gated
from das_lm.units.importance import FILE_NAME, Accumulation, Importance, Normalization, measure_importance
from das_lm.units.soft_mask import SoftMask, check_adapter, check_optimizer

logger = logging.getLogger(__name__)

UNIT_KINDS = ("head", "intermediate", "output")
PROXY_EPOCH, GRADIENT_EPOCH = -1, -2  # addresses of the blocks that the two importance passes read


@dataclass
class DASArguments(SoftMasking, Measuring):
    importance: str = knob(
        "auto",
        "Where the importance of what the model already knows comes from: 'auto' takes importance.safetensors beside "
        "the model's weights and else computes the proxy; 'proxy' always computes it; 'remembered' takes the gradient "
        "on what stands for the past (remember); any other value is a path to an importance file or to a directory "
        "that holds one.",
    )
    importance_normalization: Normalization = knob(
        "paper",
        "How the raw importance of one layer and kind becomes a mask in [0, 1]: 'paper' is |tanh(z)| of the "
        "standardised values (equation 4), which also protects the least important units; 'rank' and 'positive' "
        "(max(0, tanh z)) keep the order of its absolute values.",
    )
    importance_accumulation: Accumulation = knob(
        "absolute", "'absolute' averages |∂L/∂g| per example (equation 3); 'signed' ∂L/∂g, as the authors' code."
    )
    proxy: Literal["hidden", "logits"] = knob(
        "hidden",
        "What the proxy KL before the first domain compares between two dropout draws: the last hidden state "
        "(equation 5), or the masked-token distributions.",
    )
    gate_dropout: Annotated[float, Interval(ge=0, le=0.9)] = knob(
        0.1,
        "Share of units dropped through the gates, where a model without active dropout needs two different views.",
    )
    soft_mask_units: list[str] = knob([*UNIT_KINDS], f"The kinds of units that are masked: {' '.join(UNIT_KINDS)}.")
    contrast_weight: NotNegative = knob(
        1.0, "λ of the contrastive loss (equation 9); 0 leaves the loss and its views out."
    )
    contrast_temperature: Temperature = knob(0.05, "τ of the contrastive loss (equation 8).")
    contrast_prior_gradient: bool = knob(
        True,
        "Whether gradient flows through the view of the prior knowledge, as in the authors' code. Without, that view "
        "costs a third.",
    )

    def check(self) -> None:
        """Raise `ValueError` for kinds of units that there are not."""
        unknown = sorted(set(self.soft_mask_units) - set(UNIT_KINDS))
        if unknown:
            raise ValueError(f"soft_mask_units: '{unknown[0]}' is none of {', '.join(UNIT_KINDS)}")


class DAS(Method):
    """
    Importance of every head and neuron to what is known, soft-masks that hold them back in proportion, and a
    contrastive loss that sets what is learned apart from it.

    Memory: one copy of the masked parameters with `soft_mask_target="update"`, none with `"gradient"`; two numbers per
    unit; with the contrast, activations of four times the rows (three without gradient through the prior view).
    """

    needs_domain_ends = True
    protects_base = True
    arguments = DASArguments
    language_models_only = True

    def __init__(self):
        self.importance: Importance | None = None
        self.mask: SoftMask | None = None

    def attach(self, trainer: Engine) -> None:
        """Raises `UserError` for a model without units, and an optimizer or adapter that masks cannot act on."""
        super().attach(trainer)
        if trainer.units is None:
            raise UserError("method: 'das' acts on the heads and neurons of a language model; for another use 'spg'")
        self.units = trainer.units
        check_optimizer(self.args.optim.value, self.args.soft_mask_target)
        if self.args.soft_mask_strength > 0:
            check_adapter(self.units, self.args.soft_mask_units)
        self.drops_units = not has_active_dropout(self.units.model)
        where = self.args.importance
        if where == "auto":
            where = str(self.beside(FILE_NAME) or "proxy")
        if where == "remembered" and trainer.remembered is None:
            raise UserError("importance: 'remembered' needs text that stands for the past: give remember")
        if where not in ("proxy", "remembered") and self.importance is None:
            self.importance = Importance.load(where, self.units)
        self._check_importance()
        if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in self.units.model.parameters()):
            logger.warning(
                "the model has half-precision parameters, in which small masked updates are lost: load it with "
                "dtype=torch.float32 and set bf16=True for speed"
            )

    # ---- one domain ----------------------------------------------------------------------------------------------

    def begin_domain(self) -> None:
        """Find out what matters to what the model knows, and mask it."""
        if self.importance is None:
            self.importance = self._known_importance()
        self.importance.to(self.args.device)  # where the model was when it was read may have been elsewhere
        args = self.args
        logger.info("importance of %s, mean per kind: %s", self.importance.domains, self.importance.saturation())
        self.mask = SoftMask(
            self.units, self.importance.values, args.soft_mask_target, args.soft_mask_units, args.soft_mask_strength
        )

    def add_rows(self, batch: dict[str, torch.Tensor], until_backward: ExitStack) -> dict[str, torch.Tensor]:
        """Append the views of the contrast: the text without masks, twice, and once as prior knowledge sees it."""
        if self.args.contrast_weight == 0:
            return batch
        views = 3 if self.args.contrast_prior_gradient else 2
        count, self._before_views = len(batch["example_id"]), len(batch["input_ids"])  # others may have added rows
        own = {name: batch[name][:count] for name in ("input_ids", "attention_mask", "labels")}
        self.prior_view = None if views == 3 else self._prior_view(own)  # before the gates below are in place
        gates = self._view_gates(batch["example_id"], views)
        if gates:
            until_backward.enter_context(gated(self.units, gates))
        added = {
            "input_ids": self.trainer.criterion.unmasked(own),
            "attention_mask": own["attention_mask"],
            "labels": torch.full_like(own["labels"], IGNORED),
        }
        return {**batch, **{name: torch.cat([batch[name]] + [rows] * views) for name, rows in added.items()}}

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor], outputs: Output) -> dict[str, torch.Tensor]:
        """λ times the contrastive loss (equation 8)."""
        args = self.args
        if args.contrast_weight == 0:
            return {}
        views = outputs.hidden[self._before_views :].split(len(batch["input_ids"]))
        prior = views[2] if args.contrast_prior_gradient else self.prior_view
        mask = F.pad(batch["attention_mask"], (0, outputs.hidden.shape[1] - batch["attention_mask"].shape[1]))
        anchor, positive, prior = (mean_pool(view, mask[:, : view.shape[1]]) for view in (*views[:2], prior))
        return {
            "contrast": args.contrast_weight * contrastive_loss(anchor, positive, prior, args.contrast_temperature)
        }

    def before_step(self) -> None:
        self.mask.before_step()

    def mask_step(self) -> None:
        self.mask.mask_step()

    def end_domain(self) -> None:
        """Add the domain's own importance to what was known before (EMax)."""
        self.mask = None
        self.importance.accumulate(self.trainer.domain, self._domain_importance())
        logger.info("importance after %s, mean per kind: %s", self.trainer.domain, self.importance.saturation())

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def save(self, directory: Path) -> None:
        if self.importance is not None and self.args.should_save:
            self.importance.save(directory / FILE_NAME, self.units)

    def load(self, directory: Path) -> None:
        self.importance = Importance.load(directory, self.units)
        self._check_importance()

    def state(self) -> dict[str, Any]:
        if self.importance is None:
            return {}
        return {"importance_of": self.importance.domains, "mean_importance": self.importance.saturation()}

    # ---- importance ------------------------------------------------------------------------------------------------

    def _check_importance(self) -> None:
        """
        The importance of domains can be compared only if it was measured in one way.

        Raises:
            UserError: what is known was measured in another way than this run would.
        """
        for name in ("normalization", "accumulation"):
            known, ours = getattr(self.importance, name, None), getattr(self.args, f"importance_{name}")
            if self.importance is not None and known is None:
                logger.warning_once(
                    f"the importance that is loaded does not say its importance_{name}: '{ours}' is taken for it"
                )
                setattr(self.importance, name, ours)
            elif known not in (None, ours):
                anew = "take a new DAS" if self.args.importance == "proxy" else "importance: proxy"
                raise UserError(
                    f"importance: what is known ({', '.join(self.importance.domains)}) was measured with "
                    f"importance_{name} '{known}', and '{ours}' is asked for: write importance_{name}: {known}, or "
                    f"{anew} to measure it anew"
                )

    def _known_importance(self) -> Importance:
        importance = Importance(self.args.importance_normalization, accumulation=self.args.importance_accumulation)
        if self.args.importance == "remembered":
            with self.trainer.reading({"remembered": self.trainer.remembered.as_domain()}):
                importance.accumulate("general", self._domain_importance())
        else:
            importance.accumulate("general", self._proxy_importance())
        return importance

    def _proxy_importance(self) -> dict[str, torch.Tensor]:
        """Importance to general knowledge, whose data is gone: what makes two dropout draws differ (equation 5)."""
        hidden_states = self.args.proxy == "hidden"

        def losses(batch: dict[str, torch.Tensor]) -> torch.Tensor:
            """How far two drops of a text differ, [rows]."""
            rows, ids, labels = len(batch["input_ids"]), batch["input_ids"], batch["labels"]
            if hidden_states:
                ids, labels = self.trainer.criterion.unmasked(batch), torch.full_like(labels, IGNORED)
            output = self._run(ids.repeat(2, 1), batch["attention_mask"].repeat(2, 1), labels.repeat(2, 1))
            if hidden_states:
                first, second = output.hidden.split(rows)  # [batch, tokens, features]
                return mean_pool(_kl(first, second).unsqueeze(-1), batch["attention_mask"]).squeeze(-1)
            first, second = output.logits.chunk(2)  # [predicted, vocabulary]
            owner = output.rows[: len(first)]
            total = first.new_zeros(rows, dtype=torch.float32).index_add(0, owner, _kl(first, second))
            return total / torch.bincount(owner, minlength=rows).clamp(min=1)

        drops = (lambda batch: self._drops(batch["example_id"], views=2)) if self.drops_units else None
        return self._measure(losses, PROXY_EPOCH, training=True, views=2, drops=drops)

    def _domain_importance(self) -> dict[str, torch.Tensor]:
        """Importance to the domain just learned: the gradient of its own loss, dropout off (equation 3)."""

        def losses(batch: dict[str, torch.Tensor]) -> torch.Tensor:
            output = self._run(batch["input_ids"], batch["attention_mask"], batch["labels"])
            return output.row_means(len(batch["input_ids"]))

        return self._measure(losses, GRADIENT_EPOCH, training=False)

    def _measure(self, losses: Any, epoch: int, training: bool, **options: Any) -> dict[str, torch.Tensor]:
        trainer, model = self.trainer, self.units.model
        was_training = model.training
        model.train(training)
        with trainer.private_randomness(epoch), trainer.accelerator.autocast():
            raw = measure_importance(
                self.units,
                trainer.importance_batches(epoch),
                losses,
                **options,
                accumulation=self.args.importance_accumulation,
                reduce=lambda total: trainer.accelerator.reduce(total, "sum"),
            )
        model.train(was_training)
        trainer.check_finite(raw, f"importance ({'proxy' if epoch == PROXY_EPOCH else 'gradient'} pass)")
        return raw

    def _run(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> Output:
        inputs = self.trainer.criterion.inputs(input_ids, attention_mask)
        return run_language_model(self.units.model, self.units, inputs, labels)

    # ---- views -----------------------------------------------------------------------------------------------------

    def _view_gates(self, example_ids: torch.Tensor, views: int) -> dict[str, torch.Tensor]:
        """Gates of the domain's rows and the views: open, dropped where the model has no dropout, importance."""
        rows = len(example_ids)
        drops = self._drops(example_ids, views=2) if self.drops_units else {}
        if views == 2 and not drops:
            return {}
        gates = {}
        for key, importance in self.importance.values.items():
            ones = importance.new_ones(rows, len(importance))
            parts = [importance.new_ones(self._before_views, len(importance)), drops.get(key, ones.repeat(2, 1))]
            if views == 3:
                parts.append(importance.expand(rows, -1))
            gates[key] = torch.cat(parts)  # [all rows, units]
        return gates

    @torch.no_grad()
    def _prior_view(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        rows, labels = len(batch["input_ids"]), torch.full_like(batch["labels"], IGNORED)
        prior = {key: value.expand(rows, -1) for key, value in self.importance.values.items()}
        with gated(self.units, prior), self.trainer.accelerator.autocast():
            return self._run(self.trainer.criterion.unmasked(batch), batch["attention_mask"], labels).hidden

    def _drops(self, example_ids: torch.Tensor, views: int) -> dict[str, torch.Tensor]:
        """
        Gates that drop units, for views of a model without dropout: group key -> [views × examples, units]. The draw
        depends on (seed, step, example, view) alone, not on how examples are spread over processes.
        """
        keep, step = 1 - self.args.gate_dropout, self.trainer.state.global_step
        sizes = list(self.units.sizes.values())
        draws = []
        for view in range(views):
            for example in example_ids.tolist():
                generator = torch.Generator().manual_seed(addressed_seed(self.args.seed, step, example, view))
                draws.append(torch.rand(sum(sizes), generator=generator) < keep)
        kept = (torch.stack(draws).float() / keep).to(example_ids.device)  # [views × examples, all units]
        return dict(zip(self.units.sizes, kept.split(sizes, dim=1), strict=True))


def _kl(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """KL(p₁ ‖ p₂) of the softmax over the last dimension, in nats."""
    first, second = F.log_softmax(first.float(), dim=-1), F.log_softmax(second.float(), dim=-1)
    return F.kl_div(second, first, reduction="none", log_target=True).sum(dim=-1)
