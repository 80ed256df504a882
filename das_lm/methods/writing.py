"""Text that the model writes: what it was trained on, as far as it knows (arXiv 2605.26097)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from das_lm.data.masking import IGNORED
from das_lm.data.packing import special_tokens, start_token
from das_lm.methods.arguments import Batches, Count, MemoryArguments, knob
from das_lm.methods.base import Engine
from das_lm.signals import check_signals

GROUPS = 7  # of a block's tokens, drawn anew one after the other: about as much is masked at a time as in training


@dataclass
class WritingArguments(MemoryArguments, Batches):
    self_replay_sweeps: Count = knob(8, "Gibbs sweeps over each block that a masked model writes.")


class Writer:
    """
    Writes blocks at temperature 1: a causal model token by token from its start token, a masked one by Gibbs sampling
    from its own masked-token distributions. Of one seed and domain the text is always the same.

    Args:
        trainer: whose model writes, as it is now.
    """

    def __init__(self, trainer: Engine):
        self.trainer = trainer

    @torch.no_grad()
    def rows(self, count: int, *address: Any) -> list[dict[str, torch.Tensor]]:
        """
        Return `count` rows, each with `input_ids`, [max_length], on the CPU.

        Args:
            count: how many.
            address: of the draws; what is written elsewhere is other text.
        """
        trainer, args = self.trainer, self.trainer.args
        model, was_training = trainer.model, trainer.model.training
        model.eval()
        starts = range(0, count, args.importance_batch_size)
        hidden = args.disable_tqdm or not trainer.is_world_process_zero()
        rows: list[dict[str, torch.Tensor]] = []
        with trainer.private_randomness("self_replay", *address):
            for start in tqdm(starts, desc="writing text to remember", unit="batch", disable=hidden):
                check_signals()
                size = min(args.importance_batch_size, count - start)
                written = (self._sampled if trainer.criterion.causal else self._gibbs)(size).cpu()
                rows.extend({"input_ids": block} for block in written)
        model.train(was_training)
        return rows

    def _sampled(self, rows: int) -> torch.Tensor:
        """Token ids, shape [rows, max_length], each drawn from what stands before it; a text may end, and another
        begin, as in the packed blocks of training."""
        args, tokenizer = self.trainer.args, self.trainer.processing_class
        prefix, _ = special_tokens(tokenizer)
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        ids = torch.tensor([prefix or [start_token(tokenizer)]], device=args.device).repeat(rows, 1)
        first = 0 if prefix else 1  # what a block does not begin with
        forbidden = sorted(set(tokenizer.all_special_ids) - {tokenizer.eos_token_id})
        newest, past = ids, None
        while ids.shape[1] < args.max_length + first:
            with self.trainer.accelerator.autocast():
                output = model(input_ids=newest, past_key_values=past, use_cache=True)
            logits, past = output.logits[:, -1].float(), output.past_key_values
            logits[:, forbidden] = -torch.inf
            logits[:, len(tokenizer) :] = -torch.inf
            newest = torch.multinomial(logits.softmax(-1), 1)
            ids = torch.cat([ids, newest], dim=1)
        return ids[:, first:]

    def _gibbs(self, rows: int) -> torch.Tensor:
        """Token ids, shape [rows, max_length]: all masked, then drawn group by group from what stands around."""
        args, tokenizer = self.trainer.args, self.trainer.processing_class
        ids = torch.full((rows, args.max_length), tokenizer.mask_token_id, device=args.device)
        empty = tokenizer("")["input_ids"]  # what stands around every text
        ids[:, 0], ids[:, -1] = empty[0], empty[-1]
        inner = ids == tokenizer.mask_token_id
        forbidden = torch.tensor(sorted(tokenizer.all_special_ids), device=args.device)
        for _ in range(args.self_replay_sweeps):
            group = torch.rand(ids.shape, device=args.device).argsort(1).remainder(GROUPS)
            for index in range(GROUPS):
                drawn = inner & (group == index)
                ids[drawn] = tokenizer.mask_token_id
                labels = torch.where(drawn, ids, IGNORED)
                batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
                with self.trainer.accelerator.autocast():
                    logits = self.trainer.criterion(self.trainer.model, batch).logits.float()
                logits[:, forbidden] = -torch.inf
                logits[:, len(tokenizer) :] = -torch.inf
                ids[drawn] = torch.multinomial(logits.softmax(-1), 1).squeeze(-1)
        return ids
