"""What a model says at a few places of held-out text, so that people see what became of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from das_lm.data.masking import IGNORED

if TYPE_CHECKING:
    from das_lm.data.blocks import HeldOutWindows
    from das_lm.training.trainer import ContinualTrainer

PLACES, GUESSES, CONTEXT = 2, 3, 14  # of a domain, of a place, tokens on each side


@torch.no_grad()
def of(trainer: ContinualTrainer, held_out: Mapping[str, HeldOutWindows]) -> dict[str, list[dict[str, Any]]]:
    """
    The most probable tokens at the same few places of every domain, of a model that has been measured.

    Args:
        trainer: of the model. All processes take part, each with all of it.
        held_out: domain -> its windows.

    Returns:
        domain -> per place the text `before` and `after`, the `right` token, and `guesses`, [token, probability] each.
    """
    model, was_training = trainer.model, trainer.model.training
    model.eval()
    found = {
        name: [_at(trainer, windows[len(windows) * part // (PLACES + 1)]) for part in range(1, PLACES + 1)]
        for name, windows in held_out.items()
    }
    model.train(was_training)
    return found


def _at(trainer: ContinualTrainer, row: dict[str, Any]) -> dict[str, Any]:
    tokenizer, causal = trainer.processing_class, trainer.criterion.causal
    ids, labels = row["input_ids"], row["labels"]
    predicted = np.flatnonzero(labels != IGNORED)
    hidden = np.ones(len(predicted), bool) if causal else ids[predicted] == tokenizer.mask_token_id
    which = _which(tokenizer, labels[predicted].tolist(), hidden)
    place = int(predicted[which])
    batch = trainer.data_collator([row])
    with trainer.accelerator.autocast():
        output = trainer.criterion(trainer.model, {k: value.to(trainer.args.device) for k, value in batch.items()})
    top = output.logits[which].float().softmax(-1).topk(GUESSES)
    start, end = (place + 1, place + 1) if causal else (place, place + 1)
    return {
        "before": _text(tokenizer, ids[max(0, start - CONTEXT) : start]),
        "after": "" if causal else _text(tokenizer, ids[end : end + CONTEXT]),
        "right": _text(tokenizer, [labels[place]]),
        "guesses": [
            [_text(tokenizer, [token]), round(share, 3)]
            for share, token in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ],
    }


def _which(tokenizer: Any, right: list[int], hidden: np.ndarray) -> int:
    """Of the predictions of a row, the one nearest to its middle that asks for a word which the model does not see."""

    def order(number: int) -> tuple[bool, bool, int]:
        word = _text(tokenizer, [right[number]])
        return not hidden[number], not (len(word) > 3 and word.isalpha()), abs(number - len(right) // 2)

    return min(range(len(right)), key=order)


def _text(tokenizer: Any, ids: Any) -> str:
    """Token ids as text; what is masked is `…`, other special tokens are nothing."""
    special = {token: "" for token in tokenizer.all_special_tokens}
    text = tokenizer.decode(list(map(int, ids)))
    for token, shown in (special | {tokenizer.mask_token or "": "…"}).items():
        text = text.replace(token, f" {shown} ") if token else text
    return " ".join(text.split())
