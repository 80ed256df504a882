"""Self-generated replay: the base model writes what it was trained on (arXiv 2605.26097)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from das_lm.data.masking import IGNORED
from das_lm.data.packing import special_tokens, start_token
from das_lm.errors import UserError
from das_lm.methods.arguments import Batches, Count, knob
from das_lm.methods.base import Engine
from das_lm.methods.replay import Replay, ReplayArguments
from das_lm.methods.teacher import Teacher
from das_lm.model.objective import Output

GROUPS = 7  # of a block's tokens, drawn anew one after the other: about as much is masked at a time as in training


@dataclass
class SelfReplayArguments(ReplayArguments, Batches):
    self_replay_target: Literal["tokens", "distributions"] = knob(
        "tokens", "What the base model's text teaches: its tokens, or the base model's output distributions."
    )
    self_replay_sweeps: Count = knob(8, "Gibbs sweeps over each block that the base model writes.")


class SelfReplay(Replay):
    """
    Before the first domain the model writes `memory_size` blocks, at temperature 1: a causal one token by token from
    its start token, a masked one by Gibbs sampling from its own masked-token distributions. They are replayed in every
    domain as [`Replay`] does. Needs no old data, as DAS.

    With `self_replay_target="distributions"` a replayed token teaches the base model's distribution in place of the
    token that was drawn.

    Memory: `memory_size` blocks; with distributions one copy of the model, and a forward pass on the replayed rows.
    """

    needs_domain_ends = False
    protects_base = True
    arguments = SelfReplayArguments
    search_grid = None
    language_models_only = True
    name = "self_replay"
    holds_training_text = False

    def __init__(self):
        super().__init__()
        self.teacher: Teacher | None = None

    def attach(self, trainer: Engine) -> None:
        """Raises `UserError` for a module that writes no text."""
        if trainer.units is None:
            raise UserError("method: 'self_replay' needs a language model, which can write text; use 'replay'")
        super().attach(trainer)
        if trainer.is_sharded and self.args.self_replay_target == "distributions":
            raise UserError(
                "self_replay_target: 'distributions' keeps a copy of the model, and a sharded one cannot be copied: "
                "use 'tokens', or DDP"
            )

    def begin_domain(self) -> None:
        if not len(self.memory):
            if self.args.self_replay_target == "distributions":
                self.teacher = Teacher(self.trainer)
            self.memory.add([{"input_ids": block} for block in self._written()])
        super().begin_domain()

    def change_losses(self, batch: Mapping[str, torch.Tensor], outputs: Output, losses: torch.Tensor) -> torch.Tensor:
        """Cross-entropy with the base model's distribution where a row is replayed from this memory."""
        if self.teacher is None:
            return losses
        written = batch["replayed_from"] == self.trainer.train_dataset.number_of(type(self).__name__)  # [rows]
        if not written.any():
            return losses
        chosen = written[outputs.rows[: len(losses)]]  # [predictions]
        rows = {name: batch[name][written] for name in ("input_ids", "attention_mask", "labels")}
        taught = self.teacher(rows).logits.float().softmax(-1)
        ours = F.cross_entropy(outputs.logits[: len(losses)][chosen].float(), taught, reduction="none")
        return losses.masked_scatter(chosen, ours)

    def end_domain(self) -> None:
        """The memory stays what the base model wrote."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {**super().state_dict(), **(self.teacher.state_dict() if self.teacher else {})}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        super().load_state_dict(state)
        if any(name.startswith("teacher.") for name in state):
            self.teacher = Teacher(self.trainer, state, self.file_name)

    # ---- writing ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _written(self) -> Iterator[torch.Tensor]:
        """`memory_size` blocks of `max_length` token ids."""
        trainer, args = self.trainer, self.args
        model, was_training = trainer.model, trainer.model.training
        model.eval()
        starts = range(0, args.memory_size, args.importance_batch_size)
        hidden = args.disable_tqdm or not trainer.is_world_process_zero()
        blocks: list[torch.Tensor] = []
        with trainer.private_randomness("self_replay"):
            for start in tqdm(starts, desc="writing text to replay", unit="batch", disable=hidden):
                rows = min(args.importance_batch_size, args.memory_size - start)
                blocks.extend((self._sampled if trainer.criterion.causal else self._gibbs)(rows).cpu())
        model.train(was_training)
        return blocks

    def _sampled(self, rows: int) -> torch.Tensor:
        """Token ids, shape [rows, max_length], each drawn from what stands before it; a text may end, and another
        begin, as in the packed blocks of training."""
        args, tokenizer = self.args, self.trainer.processing_class
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
        args, tokenizer = self.args, self.trainer.processing_class
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
