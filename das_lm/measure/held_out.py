"""Held-out data: loss and accuracy of every document, exact under any batch size and number of processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from das_lm.errors import UserError
from das_lm.model.objective import Output
from das_lm.signals import check_signals
from das_lm.terminal import is_watched

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class HeldOut:
    """
    Sums over the predictions of each document (a row, where there are no documents), shape [documents].

    Args:
        nats: the losses: cross-entropy, or squared errors.
        tokens: number of predictions.
        correct: number of those whose most likely class is the right one; `None` if they are no classes.
        values: the targets of a regression, otherwise `None`.
        bytes: UTF-8 bytes of the text that is predicted; `None` where it is not known.
    """

    nats: np.ndarray
    tokens: np.ndarray
    correct: np.ndarray | None = None
    values: np.ndarray | None = None
    bytes: np.ndarray | None = None

    @property
    def loss(self) -> float:
        """Loss per prediction, over all documents."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy over all predictions."""
        return float(self.correct.sum() / self.tokens.sum())

    @property
    def r2(self) -> float:
        """Coefficient of determination, 1 − squared errors / squared deviations from the mean target."""
        return float(1 - self.nats.sum() / np.square(self.values - self.values.mean()).sum())

    def measures(self, causal: bool = False) -> dict[str, float | int]:
        """What is reported: `loss`, `accuracy` or `r2`, and the counts; of a causal language model, whose loss is a
        likelihood of the text, `perplexity` and `bits_per_byte` too."""
        scores: dict[str, float | int] = {"loss": self.loss}
        if self.correct is not None:
            scores["accuracy"] = self.accuracy
        if self.values is not None:
            scores["r2"] = self.r2
        scores |= {"tokens": int(self.tokens.sum()), "documents": len(self.tokens)}
        if self.bytes is not None:
            scores |= {"bytes": int(self.bytes.sum()), "loss_per_byte": float(self.nats.sum() / self.bytes.sum())}
        if causal:
            scores["perplexity"] = float(np.exp(self.loss))
            if self.bytes is not None:
                scores["bits_per_byte"] = scores["loss_per_byte"] / math.log(2)
        return scores

    def tensors(self) -> dict[str, torch.Tensor]:
        """The sums, for a file."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: torch.from_numpy(np.asarray(value)) for name, value in columns.items() if value is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> HeldOut:
        """What [`tensors`] gave."""
        return cls(**{name: tensor.numpy() for name, tensor in tensors.items()})


class Predictions:
    """
    Logits and labels of a whole data set, for `predict` and `compute_metrics`.

    Args:
        accelerator: of the trainer.
        smaller: what to keep of a batch's logits, called with them and their labels, such as their argmax.
    """

    def __init__(self, accelerator: Accelerator, smaller: Callable[..., torch.Tensor] | None = None):
        self.accelerator, self.smaller = accelerator, smaller
        self._rows: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, output: Output, rows: int) -> None:
        """
        Keep those of a batch of `rows` rows, of all processes.

        Raises:
            UserError: the model returns no logits, or what is kept has not one row for each prediction.
        """
        if output.logits is None or output.targets is None:
            raise UserError(
                "compute_metrics and predict need logits and labels: let the module's forward take 'labels' and "
                "return a mapping with 'loss' and 'logits'"
            )
        logits = output.logits if self.smaller is None else self.smaller(output.logits, output.targets)
        if not isinstance(logits, torch.Tensor) or logits.shape[:1] != output.targets.shape[:1]:
            raise UserError(
                "preprocess_logits_for_metrics: return a tensor with one row for each of the "
                f"{len(output.targets)} predictions, such as logits.argmax(-1)"
            )
        logits = logits.float() if logits.is_floating_point() else logits
        counts = torch.bincount(output.rows, minlength=rows).tolist()
        parts = (part.cpu().split(counts) for part in (logits, output.targets))
        mine = [(one.numpy(), labels.numpy()) for one, labels in zip(*parts, strict=True)]
        self._rows += self.accelerator.gather_for_metrics(mine, use_gather_object=True)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Logits, shape [predictions, …], and labels, shape [predictions, …]; row by row."""
        logits, labels = zip(*self._rows, strict=True)
        return np.concatenate(logits), np.concatenate(labels)


@torch.no_grad()
def held_out_losses(
    model: nn.Module,
    objective: Callable[[nn.Module, Mapping[str, torch.Tensor]], Output],
    dataloader: Iterable[Mapping[str, torch.Tensor]],
    accelerator: Accelerator,
    progress: str | None = None,
    predictions: Predictions | None = None,
) -> HeldOut:
    """
    Evaluate a model, dropout off.

    Args:
        objective: what a batch asks of the model.
        dataloader: batches, prepared by `accelerator`, which shares them out among the processes. A column `document`,
            [rows], names the document of each row; without it, each row is one. A column `bytes`, [rows], counts the
            bytes of the predicted text.
        progress: caption of a progress bar, shown by the main process.
        predictions: collects logits and labels.
    """
    was_training = model.training
    model.eval()
    columns: list[torch.Tensor] = []  # each [rows, 5]: document, losses, predictions, correct ones (or value), bytes
    hidden = progress is None or not accelerator.is_main_process or not is_watched()
    classifies = predicts = True
    for batch in tqdm(dataloader, desc=progress, unit="batch", leave=False, disable=hidden):
        check_signals()
        with accelerator.autocast():
            output = objective(model, batch)
        predicts = output.logits is not None and output.targets is not None
        classifies = predicts and output.classifies
        losses = output.losses() if predicts else output.loss.expand(len(output.rows))
        if classifies:
            last = output.logits.argmax(dim=-1) == output.targets
        else:
            last = output.targets.reshape(len(losses), -1)[:, 0] if predicts else torch.zeros_like(losses)
        per_prediction = torch.stack([losses.double(), torch.ones_like(losses).double(), last.double()], 1)
        rows = len(next(iter(batch.values())))
        sums = per_prediction.new_zeros(rows, 3).index_add(0, output.rows, per_prediction)
        document = batch.get("document", torch.zeros(rows, device=sums.device)).double().unsqueeze(1)
        size = batch.get("bytes", torch.zeros(rows, device=sums.device)).double().unsqueeze(1)
        if predictions is not None:
            predictions.add(output, rows)
        columns.append(accelerator.gather_for_metrics(torch.cat([document, sums, size], dim=1)).cpu())
        by_document, knows_bytes = "document" in batch, "bytes" in batch
    model.train(was_training)
    documents, *sums = torch.cat(columns).numpy().T
    if by_document:
        documents = documents.astype(np.int64)
        sums = [np.bincount(documents, weights=column) for column in sums]
    nats, tokens, last, size = sums
    return HeldOut(
        nats,
        tokens,
        correct=last if classifies else None,
        values=last if predicts and not classifies else None,
        bytes=size if knows_bytes else None,
    )
