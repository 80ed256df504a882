"""What a batch asks of a model: language modeling, masked or causal, whose LM head sees only the positions that
predict, or whatever loss a module returns."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from das_lm.data.masking import IGNORED
from das_lm.errors import UserError
from das_lm.units.discovery import Units

#: Columns of a batch that are no arguments of a model.
OWN_COLUMNS = ("example_id", "document", "bytes", "replayed_from", "from_domain")


@dataclass
class Output:
    """
    What one forward pass gives. A *prediction* is a predicted token of a language model, or a row of another model.

    Args:
        logits: of the predictions alone, row by row, shape [predictions, classes] (regression: the values); `None`
            where the loss is computed in chunks of them.
        targets: their labels: classes, shape [predictions], or values, shape [predictions, …].
        rows: the row of the batch that each comes from, shape [predictions].
        hidden: a language model's last hidden state, shape [rows, tokens, features].
        loss: what the module itself returned, a mean over the batch; `None` for a language model.
        head: the linear LM head, where there are no logits.
        features: what it reads, shape [predictions, features].
    """

    logits: torch.Tensor | None
    targets: torch.Tensor
    rows: torch.Tensor
    hidden: torch.Tensor | None = None
    loss: torch.Tensor | None = None
    head: nn.Linear | None = None
    features: torch.Tensor | None = None

    @property
    def classifies(self) -> bool:
        """Whether the targets are classes: then the loss is the cross-entropy, otherwise the squared error."""
        return not self.targets.is_floating_point()

    def of_first(self, rows: int) -> Output:
        """Return the same of the first rows alone."""
        count = int((self.rows < rows).sum())
        if count == len(self.rows):
            return self
        parts = {name: getattr(self, name) for name in ("logits", "targets", "rows", "features")}
        return replace(self, **{name: part if part is None else part[:count] for name, part in parts.items()})

    def losses(self, label_smoothing: float = 0.0) -> torch.Tensor:
        """
        Cross-entropy in nats, or squared error, of each prediction, shape [predictions].

        Read as −log p(y|x) of a Gaussian, the squared error has the variance ½.
        """
        if self.head is not None:
            dtype = self.features.dtype  # that of autocast, which the head's own forward would cast its weights to
            return F.linear_cross_entropy(
                self.features,
                self.head.weight.to(dtype),
                self.targets,
                linear_bias=None if self.head.bias is None else self.head.bias.to(dtype),
                reduction="none",
                options=nn.LinearCrossEntropyOptions(),
            ).float()
        if self.classifies:
            return F.cross_entropy(
                self.logits.float(), self.targets, reduction="none", label_smoothing=label_smoothing
            )
        errors = self.logits.float().reshape(self.targets.shape) - self.targets
        return errors.square().flatten(1).mean(1) if errors.ndim > 1 else errors.square()

    def row_sums(self, rows: int) -> torch.Tensor:
        """Loss summed over each row's own predictions: −log p of the row, shape [rows]."""
        losses = self.losses()
        return losses.new_zeros(rows).index_add(0, self.rows, losses)

    def row_means(self, rows: int) -> torch.Tensor:
        """Mean loss over each row's own predictions (0 for a row without any), shape [rows]."""
        return self.row_sums(rows) / torch.bincount(self.rows, minlength=rows).clamp(min=1)


class LanguageModeling:
    """
    Cross-entropy at the positions that have a label: of a masked language model the token that was masked there, of a
    causal one the token that follows.

    Args:
        units: of the model, which know its LM head.
        causal: which of the two it is.
        separator: of a causal model, the token that ends a document of a packed block, so that no token attends to
            another document (position ids that begin anew, which all attention implementations of transformers heed);
            `None`: a block is read as one text.
    """

    def __init__(self, units: Units, causal: bool, separator: int | None = None):
        self.units, self.causal, self.separator = units, causal, separator
        self.name = "clm" if causal else "mlm"
        if separator is not None:
            logging.getLogger("transformers.modeling_utils").addFilter(_padding_is_not_read)

    def __call__(self, model: nn.Module, batch: Mapping[str, torch.Tensor], in_chunks: bool = False) -> Output:
        """Run `model` (or what wraps it) on `input_ids`, `attention_mask` and `labels`, each [rows, tokens].
        `in_chunks`: see `run_language_model`."""
        inputs = self.inputs(batch["input_ids"], batch["attention_mask"])
        return run_language_model(model, self.units, inputs, batch["labels"], in_chunks)

    def inputs(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the model is called with; both have the shape [rows, tokens]. Padding on the right needs no mask in a
        causal model: what is predicted stands before it."""
        if self.separator is None:
            return {"input_ids": input_ids, "attention_mask": attention_mask}
        place = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        begins = F.pad(input_ids[:, :-1] == self.separator, (1, 0), value=True)
        return {"input_ids": input_ids, "position_ids": place - torch.where(begins, place, 0).cummax(dim=1).values}

    def unmasked(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The token ids of the text itself, [rows, tokens]: those before masking, which the labels remember."""
        if self.causal:
            return batch["input_ids"]
        return torch.where(batch["labels"] == IGNORED, batch["input_ids"], batch["labels"])

    def of(self, model: nn.Module) -> LanguageModeling:
        """The same for a copy of the model."""
        return LanguageModeling(Units(model, self.units.architecture), self.causal, self.separator)

    def flattened(self, batch: Mapping[str, torch.Tensor]) -> tuple[nn.Module, torch.Tensor]:
        """The module that sees predictions instead of rows, and the row of each: see `PerExample`."""
        return self.units.lm_head, (batch["labels"] != IGNORED).nonzero()[:, 0]


def _padding_is_not_read(record: logging.LogRecord) -> bool:
    """Drops transformers' warning of padding without an attention mask: here it stands on the right, after all that
    is predicted."""
    return "input_ids may be padded" not in record.getMessage()


class ModuleLoss:
    """
    The loss that a module itself returns.

    Args:
        model: its forward takes columns of the batch by name and returns a loss, a mean over the batch; or a mapping
            with `loss` and `logits`, or a tuple of the two, for the methods that look at predictions.
    """

    name, causal = "task", False

    def __init__(self, model: nn.Module):
        parameters = inspect.signature(model.forward).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        self.arguments = None if takes_all else set(parameters)

    def __call__(self, model: nn.Module, batch: Mapping[str, torch.Tensor], in_chunks: bool = False) -> Output:
        """
        Run `model` on the columns that it takes; `labels` has shape [rows] or [rows, …]. What it computes in
        chunks is its own affair.

        Raises:
            UserError: it returns no loss.
        """
        given = {
            name: value
            for name, value in batch.items()
            if (name not in OWN_COLUMNS if self.arguments is None else name in self.arguments)
        }
        output = model(**given)
        if isinstance(output, Mapping):
            loss, logits = output.get("loss"), output.get("logits")
        else:
            loss, logits = output[:2] if isinstance(output, tuple) else (output, None)
        if not isinstance(loss, torch.Tensor) or loss.ndim > 0:
            raise UserError(
                f"{type(model).__name__} returned no loss: with labels, its forward has to return a scalar, or a "
                "mapping with 'loss' and 'logits'"
            )
        rows = torch.arange(len(next(iter(given.values()))), device=loss.device)
        return Output(logits, batch.get("labels"), rows, loss=loss)

    def of(self, model: nn.Module) -> ModuleLoss:
        """The same for a copy of the model."""
        return ModuleLoss(model)

    def flattened(self, batch: Mapping[str, torch.Tensor]) -> None:
        """No module sees anything but rows."""


def run_language_model(
    model: nn.Module, units: Units, inputs: Mapping[str, Any], labels: torch.Tensor, in_chunks: bool = False
) -> Output:
    """
    Run a language model with an LM head on the positions that have a label only.

    Args:
        model: the model, or what wraps it for data parallelism; it is called once.
        units: the units of the model inside, which know its LM head.
        inputs: arguments of the model's forward, without labels; `input_ids` has shape [rows, tokens].
        labels: shape [rows, tokens], `IGNORED` where nothing is predicted.
        in_chunks: give no logits, but what the loss needs to compute them a chunk at a time, forward and backward, so
            that [predictions, vocabulary] is never in memory; see `check_head_in_chunks`.
    """
    predicted = labels != IGNORED
    seen: list[torch.Tensor] = []

    def select(module: nn.Module, args: tuple) -> tuple:
        features = args[0][predicted]
        seen.extend((args[0], features))
        return (features[:0] if in_chunks else features, *args[1:])

    handle = units.lm_head.register_forward_pre_hook(select)
    try:
        logits = model(**inputs)["logits"]
    finally:
        handle.remove()
    (hidden, features), targets, rows = seen, labels[predicted], predicted.nonzero()[:, 0]
    if in_chunks:
        return Output(None, targets, rows, hidden, head=units.lm_head, features=features)
    return Output(logits, targets, rows, hidden)


def check_head_in_chunks(units: Units) -> None:
    """
    Raises:
        UserError: the model's logits are not what one linear layer makes of its last hidden state, or torch cannot
            compute their loss in chunks.
    """
    if not hasattr(nn, "LinearCrossEntropyOptions"):
        raise UserError(f"chunked_cross_entropy: torch {torch.__version__} has none, torch 2.13 does; leave it off")
    changes = ("final_logit_softcapping", "logits_scaling", "logit_scale")
    if type(units.lm_head) is not nn.Linear or any(getattr(units.model.config, name, None) for name in changes):
        raise UserError(
            f"chunked_cross_entropy: the logits of {type(units.model).__name__} are more than one linear layer of its "
            "last hidden state; leave it off"
        )


#: What modules call the rates of a dropout that is a function, not a module.
DROPOUT_RATES = ("dropout", "hidden_dropout", "attention_dropout", "activation_dropout")


def has_active_dropout(model: nn.Module) -> bool:
    """Whether two passes in training mode differ: some dropout of the base model has a rate above 0. That of a LoRA
    adapter does not count: a fresh one adds nothing, whatever is dropped."""
    return any(
        (isinstance(module, nn.Dropout) and module.p > 0) or any(_rate(module, name) > 0 for name in DROPOUT_RATES)
        for name, module in model.base_model.named_modules()
        if "lora_dropout" not in name
    )


def _rate(module: nn.Module, name: str) -> float:
    value = getattr(module, name, 0)
    return value if isinstance(value, float) else 0.0
