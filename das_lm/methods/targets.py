"""What a teacher says at every prediction of remembered rows, and how far a model is from it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from das_lm.data.blocks import TrainingBlocks
from das_lm.data.masking import IGNORED
from das_lm.methods.base import Engine, Tensors
from das_lm.model.objective import Output

#: Predictions whose distributions are in memory at once, where the loss is computed in chunks.
AT_ONCE = 1024


class CachedTargets:
    """
    Tokens drawn from a teacher's distribution, so many at each prediction of some rows: of the teacher, all that is
    needed later. The mean over draws of log p_T − log p_θ is an unbiased estimate of KL(p_T ‖ p_θ), and so is its
    gradient (random-sampling distillation, Anshumann et al., arXiv 2503.16870); top-k targets would be biased.

    A row is predicted under a few fixed masks, its *variants*; a causal one has a single variant.

    Args:
        tokens: the drawn tokens, int32, [predictions, draws], row by row, variant by variant.
        log_p: the mean over the draws of their log p_T, [predictions].
        starts: the first prediction of each (row, variant), and their number at last, int64, [rows · variants + 1].
        variants: of each row.
        digest: of the rows, see [`digest_of`].
    """

    kinds = ("tokens", "log_p", "starts")

    def __init__(self, tokens: torch.Tensor, log_p: torch.Tensor, starts: torch.Tensor, variants: int, digest: int):
        self.tokens, self.log_p, self.starts, self.variants, self.digest = tokens, log_p, starts, variants, digest

    @classmethod
    @torch.no_grad()
    def of(cls, trainer: Engine, masked: RowsAsMasked, variants: int, draws: int) -> CachedTargets:
        """Those of the model as it is now, dropout off; its draws are a function of (seed, domain, name)."""
        args, model = trainer.args, trainer.model
        was_training = model.training
        model.eval()
        tokens, log_p, counts = [], [], []
        numbers = [(row, variant) for row in range(len(masked.rows)) for variant in range(variants)]
        with trainer.private_randomness("targets", masked.name):
            for start in range(0, len(numbers), args.importance_batch_size):
                batch = masked.batch(numbers[start : start + args.importance_batch_size])
                counts.append((batch["labels"] >= 0).sum(1).cpu())
                with trainer.accelerator.autocast():
                    output = trainer.criterion(model, batch)
                for logits in output.logits.split(AT_ONCE):
                    known = logits.float().log_softmax(-1)
                    drawn = torch.multinomial(known.exp(), draws, replacement=True)
                    tokens.append(drawn.int().cpu())
                    log_p.append(known.gather(1, drawn).mean(1).cpu())
        model.train(was_training)
        starts = F.pad(torch.cat(counts).cumsum(0), (1, 0))
        return cls(torch.cat(tokens), torch.cat(log_p), starts, variants, digest_of(masked.rows))

    def at(self, numbers: Sequence[tuple[int, int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """`tokens` and `log_p` of some (row, variant), in their order."""
        places = [row * self.variants + variant for row, variant in numbers]
        spans = [slice(int(self.starts[place]), int(self.starts[place + 1])) for place in places]
        parts = (torch.cat([kind[span] for span in spans]) for kind in (self.tokens, self.log_p))
        tokens, log_p = (part.to(device) for part in parts)
        return tokens.long(), log_p

    def __len__(self) -> int:
        return (len(self.starts) - 1) // self.variants

    def state_dict(self) -> Tensors:
        numbers = {name: torch.tensor(getattr(self, name)) for name in ("variants", "digest")}
        return {**numbers, **{kind: getattr(self, kind) for kind in self.kinds}}

    @classmethod
    def from_state(cls, state: Tensors, vocabulary: int) -> CachedTargets:
        """Raises `ValueError` for what [`state_dict`] did not give, or not of a model of this vocabulary."""
        tokens, log_p, starts = (state[kind].cpu() for kind in cls.kinds)
        if not (starts[-1] == len(tokens) == len(log_p) and 0 <= tokens.min() <= tokens.max() < vocabulary):
            raise ValueError(f"targets of {len(tokens)} predictions that are not whole, or of another vocabulary")
        return cls(tokens, log_p, starts, int(state["variants"]), int(state["digest"]))


def digest_of(rows: Any) -> int:
    """A hash of the token ids of rows, in their order, that fits int64."""
    ids = (np.asarray(rows[index]["input_ids"], dtype=np.int64).tobytes() for index in range(len(rows)))
    digest = hashlib.blake2b(b"|".join(ids), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


class RowsAsMasked:
    """
    Remembered rows of one past, as a model is trained on them.

    Args:
        name: of the past.
        rows: data set of blocks.
        trainer: whose masks, batches and device they get.
        opening: token ids that a row may begin with which nobody wrote, such as the system prompt of a chat: no
            predictions of them are looked at.
    """

    def __init__(
        self,
        name: str,
        rows: Any,
        trainer: Engine,
        blocks: TrainingBlocks,
        collator: Any,
        opening: Sequence[int] = (),
    ):
        self.name, self.rows, self.trainer, self.blocks, self.collator = name, rows, trainer, blocks, collator
        self.opening = np.array(opening, dtype=np.int64)

    def batch(self, numbers: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `labels` of some (row, variant), each [rows, tokens]."""
        batch = self.collator([self.row(row, variant) for row, variant in numbers])
        return {key: value.to(self.trainer.args.device) for key, value in batch.items()}

    def row(self, number: int, variant: int) -> dict[str, np.ndarray]:
        """`input_ids` and `labels` of one, each [tokens]."""
        row = self.blocks.row(self.rows, ("remembered", self.name), number, variant)
        ids, labels, length = row["input_ids"], row["labels"], len(self.opening)
        if length and np.array_equal(ids[:length], self.opening):
            labels = labels.copy()
            labels[: length - 1] = IGNORED  # a label is the token that follows
        return {"input_ids": ids, "labels": labels}


def divergence_from_draws(outputs: Output, tokens: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """
    An unbiased estimate of KL(p_T ‖ p_θ) at each prediction, shape [predictions]: below 0 here and there.

    Args:
        outputs: the student's. Where it has no logits, they are computed in chunks.
        tokens: drawn from p_T, [predictions, draws].
        log_p: the mean of their log p_T, [predictions].
    """
    if outputs.logits is not None:
        logits = outputs.logits.float()
        return log_p - (logits.gather(1, tokens).mean(1) - logits.logsumexp(1))
    # Cross-entropy of the first draw, in chunks; for the others, the mean of their logits takes the place of its own.
    first = Output(None, tokens[:, 0], outputs.rows, head=outputs.head, features=outputs.features).losses()
    head, features = outputs.head, outputs.features.float()
    mean = F.embedding_bag(tokens, head.weight.float(), mode="mean") - head.weight[tokens[:, 0]].float()
    change = (features * mean).sum(1)
    if head.bias is not None:
        change = change + head.bias.float()[tokens].mean(1) - head.bias.float()[tokens[:, 0]]
    return log_p + first - change


def divergence_from_teacher(outputs: Output, taught: Output) -> torch.Tensor:
    """KL(p_T ‖ p_θ) at each prediction, exact, shape [predictions]; in chunks where there are no logits."""
    if outputs.logits is not None:
        return _divergence(outputs.logits, taught.logits)
    chunks = zip(outputs.features.split(AT_ONCE), taught.features.split(AT_ONCE), strict=True)
    parts = [
        checkpoint(_divergence_of_features, ours, outputs.head, theirs, taught.head, use_reentrant=False)
        for ours, theirs in chunks
    ]
    return torch.cat(parts) if parts else outputs.features.new_zeros(0, dtype=torch.float32)


def _divergence_of_features(
    ours: torch.Tensor, head: nn.Linear, theirs: torch.Tensor, their_head: nn.Linear
) -> torch.Tensor:
    return _divergence(head(ours), their_head(theirs))


def _divergence(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    ours, theirs = (logits.float().log_softmax(-1) for logits in (ours, theirs))
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)


def selected(outputs: Output, chosen: torch.Tensor) -> Output:
    """The predictions of an output for which `chosen`, bool, [predictions], is true."""
    parts = {name: getattr(outputs, name) for name in ("logits", "targets", "rows", "features")}
    return Output(**{name: part if part is None else part[chosen] for name, part in parts.items()}, head=outputs.head)
