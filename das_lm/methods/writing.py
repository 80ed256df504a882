"""Text that the model writes: what it was trained on, as far as it knows (arXiv 2605.26097)."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from tqdm.auto import tqdm

from das_lm.data.chats import chat_opening
from das_lm.data.masking import IGNORED
from das_lm.data.packing import separator_of, special_tokens, start_token
from das_lm.errors import UserError, as_user_error
from das_lm.files import write_tensors
from das_lm.methods.arguments import Count, MemoryArguments, knob
from das_lm.methods.base import Engine
from das_lm.signals import check_signals
from das_lm.terminal import is_watched

Row = dict[str, torch.Tensor]
FORMAT = "das_lm.self_text"
GROUPS = 7  # of a block's tokens, drawn anew one after the other: about as much is masked at a time as in training


@dataclass
class WritingArguments(MemoryArguments):
    self_replay_sweeps: Count = knob(8, "Gibbs sweeps over each block that a masked model writes.")


class Writer:
    """
    Writes rows at temperature 1: a causal model token by token, from its start token, or from where a user begins to
    speak if its tokenizer has a chat template (Magpie, arXiv 2406.08464); a masked one by Gibbs sampling from its own
    masked-token distributions. What is written is a function of the model, (seed, domain, address) and `batch_size`.

    Args:
        trainer: whose model writes, as it is now.
        model: that writes instead: a copy of it, as it was.
    """

    #: Rows that are written at once.
    batch_size = 64

    def __init__(self, trainer: Engine, model: nn.Module | None = None):
        self.trainer = trainer
        self.model = trainer.model if model is None else model

    def rows(self, count: int, *address: Any, written: Sequence[Row] = ()) -> list[Row]:
        """
        Return `count` rows, each with `input_ids`, [max_length], on the CPU.

        Args:
            count: how many.
            address: of the draws; what is written elsewhere is other text.
            written: whole batches of them that there are already.
        """
        return list(itertools.chain(written, *self.batches(count, *address, begin=len(written))))

    @torch.no_grad()
    def batches(self, count: int, *address: Any, begin: int = 0) -> Iterator[list[Row]]:
        """Yield the rows from number `begin` on, in batches of `batch_size`, behind a progress bar."""
        trainer, args = self.trainer, self.trainer.args
        model, was_training = self.model, self.model.training
        model.eval()
        hidden = args.disable_tqdm or not trainer.is_world_process_zero() or not is_watched()
        with tqdm(total=count, initial=begin, desc="writing text to remember", unit="row", disable=hidden) as bar:
            for start in range(begin, count, self.batch_size):
                check_signals()
                size = min(self.batch_size, count - start)
                with trainer.private_randomness("written", *address, start):
                    blocks = (self._sampled if trainer.criterion.causal else self._gibbs)(size)
                yield [{"input_ids": block} for block in blocks.cpu()]
                bar.update(size)
        model.train(was_training)

    def _sampled(self, rows: int) -> torch.Tensor:
        """
        Token ids, shape [rows, max_length], each drawn from what stands before it; a text may end, and another begin,
        as in the packed blocks of training. Where these are read as separate documents (`separate_documents`), the
        second token of a new text is the first that sees nothing of the text before.
        """
        args, tokenizer, separator = self.trainer.args, self.trainer.processing_class, self.trainer.criterion.separator
        prefix, _ = special_tokens(tokenizer)
        before, of_chats = chat_opening(tokenizer)
        if len(before) >= args.max_length:
            raise UserError(
                f"max_length: {args.max_length} leaves no room for text beside the {len(before)} tokens with which "
                "the tokenizer's chat template begins; write more"
            )
        model = self.trainer.accelerator.unwrap_model(self.model)
        ids = torch.tensor([before or prefix or [start_token(tokenizer)]], device=args.device).repeat(rows, 1)
        first = 0 if before or prefix else 1  # what a block does not begin with
        forbidden = sorted(set(tokenizer.all_special_ids) - {separator_of(tokenizer), *prefix, *of_chats})
        newest, past, seen = ids, None, torch.ones_like(ids)
        place = torch.arange(ids.shape[1], device=args.device).repeat(rows, 1)
        while ids.shape[1] < args.max_length + first:
            inputs = {"input_ids": newest, "attention_mask": seen, "position_ids": place}
            with self.trainer.accelerator.autocast():
                output = model(**inputs, past_key_values=past, use_cache=True)
            logits, past = output.logits[:, -1].float(), output.past_key_values
            logits[:, forbidden] = -torch.inf
            logits[:, len(tokenizer) :] = -torch.inf
            begins = newest[:, -1:] == (-1 if separator is None else separator)
            newest = torch.multinomial(logits.softmax(-1), 1)
            ids = torch.cat([ids, newest], dim=1)
            seen = torch.cat([seen.masked_fill(begins, 0), torch.ones_like(newest)], dim=1)
            place = torch.where(begins, 0, place[:, -1:] + 1)
        return ids[:, first : first + args.max_length]

    def _gibbs(self, rows: int) -> torch.Tensor:
        """Token ids, shape [rows, max_length]: all masked, then drawn group by group from what stands around."""
        args, tokenizer = self.trainer.args, self.trainer.processing_class
        ids = torch.full((rows, args.max_length), tokenizer.mask_token_id, device=args.device)
        empty = tokenizer("")["input_ids"]  # what stands around every text
        ids[:, 0], ids[:, -1] = empty[0], empty[-1]
        inner = ids == tokenizer.mask_token_id
        forbidden = torch.tensor(sorted(tokenizer.all_special_ids), device=args.device)
        criterion = self.trainer.criterion.of(self.trainer.accelerator.unwrap_model(self.model))
        for _ in range(args.self_replay_sweeps):
            group = torch.rand(ids.shape, device=args.device).argsort(1).remainder(GROUPS)
            for index in range(GROUPS):
                drawn = inner & (group == index)
                ids[drawn] = tokenizer.mask_token_id
                labels = torch.where(drawn, ids, IGNORED)
                batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
                with self.trainer.accelerator.autocast():
                    logits = criterion(self.model, batch).logits.float()
                logits[:, forbidden] = -torch.inf
                logits[:, len(tokenizer) :] = -torch.inf
                ids[drawn] = torch.multinomial(logits.softmax(-1), 1).squeeze(-1)
        return ids


# ---- files -----------------------------------------------------------------------------------------------------


def vocabulary_of(tokenizer: Any) -> str:
    """A hash of the tokens and their numbers."""
    return hashlib.blake2b(repr(sorted(tokenizer.get_vocab().items())).encode(), digest_size=8).hexdigest()


def facts_of(trainer: Engine, model: str) -> dict[str, str]:
    """
    Who writes, and how: the same facts, the same text.

    Args:
        model: a fingerprint of its weights.
    """
    args, causal = trainer.args, trainer.criterion.causal
    facts = {"model_fingerprint": model, "max_length": str(args.max_length), "seed": str(args.seed)}
    if not causal:
        facts["sweeps"] = str(args.self_replay_sweeps)
    about = repr((sorted(facts.items()), vocabulary_of(trainer.processing_class)))
    return {**facts, "fingerprint": hashlib.blake2b(about.encode(), digest_size=16).hexdigest()}


def save_written(path: Path, rows: Sequence[Row], tokenizer: Any, facts: dict[str, str]) -> None:
    """Write rows to a safetensors file, with facts of who wrote them and how."""
    about = {"format": FORMAT, "version": "1", "vocabulary": vocabulary_of(tokenizer), **facts}
    write_tensors(path, {"input_ids": torch.stack([row["input_ids"] for row in rows]).int()}, about)


def load_written(path: Path, tokenizer: Any) -> tuple[list[Row], dict[str, str]]:
    """
    Return the rows of a file and its facts.

    Raises:
        UserError: it is no such file, or of another tokenizer.
    """
    with as_user_error(f"{path} cannot be read"), safe_open(path, "pt") as file:
        facts, names = file.metadata() or {}, list(file.keys())
        if facts.get("format") != FORMAT or names != ["input_ids"]:
            raise UserError(f"{path}: no text that `das-lm self-text` wrote")
        ids = file.get_tensor("input_ids")
    if facts.get("vocabulary") != vocabulary_of(tokenizer):
        raise UserError(
            f"{path}: written with another tokenizer than the model's; write it anew with das-lm self-text"
        )
    return [{"input_ids": row} for row in ids.long()], facts
