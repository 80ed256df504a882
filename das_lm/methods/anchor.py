"""Anchor: output distributions are held on text that stands for the past (arXiv 2605.26097, arXiv 2509.04259)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import nn
from torch.utils.data import Subset

from das_lm.data.blocks import TrainingBlocks
from das_lm.data.chats import chat_opening
from das_lm.data.collating import PaddingCollator
from das_lm.data.masking import labeling
from das_lm.errors import UserError
from das_lm.methods.arguments import Batches, Count, NotNegative, knob
from das_lm.methods.base import Engine, Method, Tensors
from das_lm.methods.budget import Budget
from das_lm.methods.memory import Reservoir, check_tokens
from das_lm.methods.remembered import Drawing, Source, apart
from das_lm.methods.targets import (
    CachedTargets,
    RowsAsMasked,
    digest_of,
    divergence_from_draws,
    divergence_from_teacher,
    selected,
)
from das_lm.methods.teacher import AdapterOff, Teacher
from das_lm.methods.writing import Writer, WritingArguments
from das_lm.model.objective import Output
from das_lm.randomness import permutation


@dataclass
class AnchorArguments(WritingArguments, Batches):
    anchor_weight: NotNegative = knob(
        1.0, "λ of the KL divergence on remembered text; a nat of it costs as much as λ nats of the domain's loss."
    )
    anchor_share: Annotated[float, Interval(ge=0.01, le=1)] = knob(
        0.25, "Remembered rows per row of the domain. They come beside it: the domain is not seen less."
    )
    anchor_teacher: Literal["auto", "copy", "adapter", "cached"] = knob(
        "auto",
        "Who knows the base model's distributions: a frozen 'copy', the model with its LoRA 'adapter' off, or tokens "
        "that were drawn from them once, 'cached'; 'auto': 'adapter' with one, 'cached' under FSDP2, else 'copy'.",
    )
    drift_budget: Annotated[float, Interval(ge=1e-6)] | None = knob(
        None,
        "How much may be lost, in nats per predicted token, of everything that is remembered; a source may have a "
        "budget of its own. anchor_weight is where λ begins then. In a walk each domain may take an equal part of it.",
    )
    anchor_refresh: Annotated[int, Interval(ge=0)] = knob(
        0,
        "Every so many steps the base model writes its text anew, so that no row of it is seen often; 0: once. For a "
        "teacher that is a copy.",
    )
    anchor_draws: Count = knob(64, "Tokens that are drawn from a distribution where it is cached.")
    anchor_variants: Count = knob(4, "Masks of each remembered row, of a masked model, where targets are cached.")
    keep_text: bool = knob(
        True,
        "Whether rows of a finished domain's text are kept to hold on to it; if not, rows that the model writes then.",
    )


class Anchor(Method):
    """
    loss + λ E KL(p_T(·|x) ‖ p_θ(·|x)) over the predicted tokens x of remembered rows, forward KL at temperature 1. T
    is the model that knew them: of `remember` the base model, of a finished domain's rows the model at its end, so
    that what is lost does not add up. On text that the base model wrote, the KL is how much its loss rises, in nats
    per token; `drift_budget` bounds it.

    Remembered rows come beside the domain's, in the same forward pass: each row of the domain brings one along with a
    chance of `anchor_share`, a pure function of (seed, domain, epoch, row), so that a step is the same on any number
    of processes and batches. All that is remembered before the first domain is drawn as often as any one finished
    domain. The mean is over as many predictions as are expected, `anchor_share` × the domain's; the opening of a chat,
    which nobody wrote, counts as predictions without divergence.

    Memory: `memory_size` rows of every finished domain, with `anchor_draws` tokens for each of their predictions, and
    of the base model a copy ('copy'), or such tokens of at most `memory_size` rows of each given text ('cached').
    """

    #: Before `das`, whose gates then know how many rows there are.
    order = -1
    protects_base = True
    draws_remembered = needs_remembered = True
    holds_training_text = True
    language_models_only = True
    arguments = AnchorArguments

    def __init__(self):
        self.finished: dict[str, Any] = {}  # domain -> its rows
        self.targets: dict[str, CachedTargets] = {}  # of a past
        self.teacher: Teacher | AdapterOff | None = None  # of the base model
        self._budget = Budget(self)

    def attach(self, trainer: Engine) -> None:
        """Raises `UserError` for a module, and for a teacher that the model cannot have."""
        if trainer.units is None:
            raise UserError(
                "method: 'anchor' needs a language model; for another use 'replay', or 'ewc' with remember"
            )
        teacher = trainer.args.anchor_teacher
        if teacher == "adapter" and not trainer.has_adapter:
            raise UserError("anchor_teacher: 'adapter' needs a LoRA adapter to turn off: give peft, or write copy")
        if teacher == "copy" and trainer.is_sharded:
            raise UserError("anchor_teacher: a sharded model cannot be copied; write cached")
        super().attach(trainer)
        if trainer.args.anchor_refresh and (kind := self._kind_of_teacher()) != "copy":
            raise UserError(f"anchor_refresh: the teacher '{kind}' cannot write; write anchor_teacher: copy")

    def parts(self, trainer: Engine) -> Sequence[Method]:
        bounds = [trainer.args.drift_budget]
        if trainer.remembered is not None:
            bounds += [source.budget for source in trainer.remembered.sources.values()]
        return () if bounds.count(None) == len(bounds) else (self._budget,)

    # ---- what is remembered ----------------------------------------------------------------------------------------

    def begin_domain(self) -> None:
        """Before the first domain, take down what the base model says of what is remembered."""
        trainer, args = self.trainer, self.args
        masking = labeling(trainer.processing_class, trainer.criterion.causal, args.mlm_probability)
        self._blocks = TrainingBlocks({}, masking, args.seed)
        self._collator = PaddingCollator(trainer.processing_class)
        self.base = {name: source for name, source in trainer.remembered.sources.items() if source.weight}
        if trainer.domain in self.base:
            raise UserError(f"remember: '{trainer.domain}' is the name of the domain that is learned; write another")
        kind = self._kind_of_teacher()
        if kind == "copy" and self.teacher is None:
            self.teacher = Teacher(trainer)
        elif kind == "adapter" and not self.finished:
            self.teacher = AdapterOff(trainer)
        total, base = sum(source.weight for source in self.base.values()), {}
        for name, source in self.base.items():
            rows = source.rows if kind == "copy" else self._few(source)
            if kind != "copy":
                self._take_targets(name, rows)
            base[name] = (rows, source.weight / total)
        self._budget.controllers = {}  # those of a domain before
        self.pasts = base | {name: (rows, 1.0) for name, rows in self.finished.items()}
        self._noted: dict[str, list[float]] = {}
        self._draw = Drawing(self.pasts, args.seed)
        self._masked = {name: self._as_masked(name, rows) for name, (rows, _) in self.pasts.items()}

    def _kind_of_teacher(self) -> str:
        if self.args.anchor_teacher != "auto":
            return self.args.anchor_teacher
        return "adapter" if self.trainer.has_adapter else "cached" if self.trainer.is_sharded else "copy"

    def _as_masked(self, name: str, rows: Any) -> RowsAsMasked:
        is_written = self.base[name].is_written if name in self.base else not self.args.keep_text
        has_opening = is_written and self.trainer.criterion.causal
        opening = chat_opening(self.trainer.processing_class)[0] if has_opening else ()
        return RowsAsMasked(name, rows, self.trainer, self._blocks, self._collator, opening)

    def _few(self, source: Source) -> Any:
        """The rows of a source whose targets are cached: of given text `memory_size` at most, the same every time."""
        count, most = len(source.rows), self.args.memory_size
        if source.is_written or count <= most:
            return source.rows
        return Subset(source.rows, permutation(count, self.args.seed, "anchor")[:most].tolist())

    def _take_targets(self, name: str, rows: Any) -> None:
        """What the model says now of the rows of a past, unless that is known. Raises `UserError` where it is known of
        other rows."""
        if name in self.targets and self.targets[name].digest != digest_of(rows):
            raise UserError(
                f"remember: '{name}' is not the text of which the base model's targets are kept; give the same text, "
                "or another name"
            )
        if name not in self.targets:
            variants = 1 if self.trainer.criterion.causal else self.args.anchor_variants
            masked = self._as_masked(name, rows)
            self.targets[name] = CachedTargets.of(self.trainer, masked, variants, self.args.anchor_draws)

    def end_domain(self) -> None:
        """The finished domain joins what is remembered."""
        trainer, args = self.trainer, self.args
        if args.keep_text:
            memory = Reservoir(args.memory_size, args.seed)
            for rows in trainer.train_dataset.domains.values():
                memory.add(rows)
            rows = memory.rows
        else:
            rows = Writer(trainer).rows(args.memory_size, "finished")
        self.targets.pop(trainer.domain, None)  # of an earlier time that it was learned
        self._take_targets(trainer.domain, rows)
        self.finished[trainer.domain] = rows

    def after_step(self) -> None:
        """Every `anchor_refresh` steps, let the base model write its text anew."""
        step, every = self.trainer.state.global_step + 1, self.args.anchor_refresh
        if every and step % every == 0:
            for name, source in self.base.items():
                if source.write:
                    writer = Writer(self.trainer, self.teacher.model)
                    source.rows = writer.rows(source.write, name, self.trainer.domain, step)
                    self.pasts[name] = (source.rows, self.pasts[name][1])
                    self._masked[name] = self._as_masked(name, source.rows)

    # ---- a batch ---------------------------------------------------------------------------------------------------

    def add_rows(self, batch: dict[str, torch.Tensor], until_backward: ExitStack) -> dict[str, torch.Tensor]:
        """Append the remembered rows that this batch's rows bring along: first those whose targets are cached."""
        self._first, drawn = len(batch["input_ids"]), self._drawn(batch["example_id"].tolist())
        self._cached = [one for one in drawn if self._is_cached(one[0])]
        live = [one for one in drawn if not self._is_cached(one[0])]
        self._live = None
        self.appended = [name for name, *_ in (*self._cached, *live)]
        if not drawn:
            return batch
        rows = [self._masked[name].row(row, variant) for name, row, variant in (*self._cached, *live)]
        added = {key: value.to(self.args.device) for key, value in self._collator(rows).items()}
        if live:
            self._live = {key: value[len(self._cached) :] for key, value in added.items()}
        return {**batch, **self._together(batch, added)}

    def _drawn(self, examples: list[int]) -> list[tuple[str, int, int]]:
        """The (past, row, variant) that go with rows of the domain; a live teacher sees new masks every time."""
        args, epoch, drawn = self.args, int(self.trainer.state.epoch or 0), []
        for example in examples if args.anchor_weight else ():
            found = self._draw(args.anchor_share, "anchor", self.trainer.domain, epoch, example)
            if found:
                name, row, other = found
                drawn.append((name, row, other % self.targets[name].variants if self._is_cached(name) else other))
        return drawn

    def _is_cached(self, name: str) -> bool:
        return name in self.finished or self.teacher is None

    def _together(self, batch: dict[str, torch.Tensor], added: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rows of two batches one after the other, padded to the longest."""
        length, padding = max(len(part["input_ids"][0]) for part in (batch, added)), self._collator.padding
        return {
            name: torch.cat(
                [F.pad(part[name], (0, length - part[name].shape[1]), value=value) for part in (batch, added)]
            )
            for name, value in padding.items()
        }

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor], outputs: Output) -> dict[str, torch.Tensor]:
        """λ times the divergence of each prediction in the remembered rows, [predictions], over their share."""
        divergence, owner = self._divergence(outputs)
        if self._budget.controllers:
            weights = divergence.new_tensor([self._budget.controllers[name].weight for name in self.appended])[owner]
            self._note(divergence.detach(), self.appended, owner)
        else:
            weights = self.args.anchor_weight
        return {"anchor": weights / self.args.anchor_share * divergence}

    def _divergence(self, outputs: Output) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each prediction in the remembered rows, and their row among these; both [predictions]."""
        ours = outputs.rows - self._first
        parts = [outputs.hidden.new_zeros(0, dtype=torch.float32)]
        cached, live = len(self._cached), 0 if self._live is None else len(self._live["input_ids"])
        if cached:
            known = [self.targets[name].at([(row, variant)], ours.device) for name, row, variant in self._cached]
            tokens, log_p = (torch.cat(part) for part in zip(*known, strict=True))
            parts.append(divergence_from_draws(selected(outputs, (ours >= 0) & (ours < cached)), tokens, log_p))
        if live:
            chosen = (ours >= cached) & (ours < cached + live)
            parts.append(divergence_from_teacher(selected(outputs, chosen), self.teacher(self._live)))
        return torch.cat(parts), ours[(ours >= 0) & (ours < cached + live)]

    # ---- for the budget --------------------------------------------------------------------------------------------

    def _note(self, divergence: torch.Tensor, names: Sequence[str], owner: torch.Tensor) -> None:
        """Add a batch's divergence to that of the step: past -> (sum, predictions, rows)."""
        totals = divergence.new_zeros(len(names)).index_add(0, owner, divergence).tolist()
        counts = torch.bincount(owner, minlength=len(names)).tolist()
        for name, *added in zip(names, totals, counts, [1] * len(names), strict=True):
            self._noted[name] = [a + b for a, b in zip(self._noted.get(name, [0, 0, 0]), added, strict=True)]

    def take_divergence(self, names: Sequence[str]) -> torch.Tensor:
        """Of this process's part of the step: its sum, predictions and rows, for every past, [pasts, 3]."""
        noted, self._noted = self._noted, {}
        rows = [noted.get(name, [0, 0, 0]) for name in names]
        return torch.tensor(rows, dtype=torch.float64 if self.args.device.type != "mps" else None).to(self.args.device)

    def rows_apart(self, name: str) -> range:
        """Numbers of the rows of a past that are never trained on."""
        return apart(len(self.pasts[name][0]))

    @torch.no_grad()
    def divergence_apart(self, name: str) -> torch.Tensor:
        """The divergence of each of these rows, mean over its predictions, [rows], dropout off."""
        trainer, model = self.trainer, self.trainer.model
        was_training = model.training
        model.eval()
        found = []
        numbers = [(row, 0) for row in self.rows_apart(name)]
        for start in range(0, len(numbers), self.args.importance_batch_size):
            some = numbers[start : start + self.args.importance_batch_size]
            batch = self._masked[name].batch(some)
            with trainer.accelerator.autocast():
                outputs = trainer.criterion(model, batch, self.args.chunked_cross_entropy)
            if self._is_cached(name):
                tokens, log_p = self.targets[name].at(some, self.args.device)
                divergence = divergence_from_draws(outputs, tokens, log_p)
            else:
                divergence = divergence_from_teacher(outputs, self.teacher(batch))
            totals = divergence.new_zeros(len(some)).index_add(0, outputs.rows, divergence)
            found.append(totals / torch.bincount(outputs.rows, minlength=len(some)).clamp(min=1))
        model.train(was_training)
        return torch.cat(found)

    # ---- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> Tensors:
        """Targets of every past, rows of finished domains, and the copy of the base model, if there is one."""
        state = dict(self.teacher.state_dict()) if self.teacher else {}
        for name, targets in self.targets.items():
            state |= {f"{name}/{key}": tensor for key, tensor in targets.state_dict().items()}
        for name, rows in self.finished.items():
            memory = Reservoir(len(rows), self.args.seed)
            memory.rows, memory.seen = rows, len(rows)
            state |= {f"{name}/{key}": tensor for key, tensor in memory.state_dict().items()}
        return state

    def load_state_dict(self, state: Tensors) -> None:
        """Raises `ValueError` for what is no such state, `UserError` for a teacher of another model."""
        if any(key.startswith("teacher.") for key in state):
            self.teacher = Teacher(self.trainer, state, self.file_name)
        self.targets, self.finished = {}, {}
        vocabulary = len(self.trainer.units.model.get_input_embeddings().weight)
        for name in dict.fromkeys(key.rpartition("/")[0] for key in state if "/" in key):
            own = {key.rpartition("/")[2]: tensor for key, tensor in state.items() if key.rpartition("/")[0] == name}
            self.targets[name] = CachedTargets.from_state(own, vocabulary)
            if "memory.seen" in own:
                memory = Reservoir(len(self.targets[name]), self.args.seed)
                memory.load_state_dict(own)
                check_tokens(memory.rows, self.trainer)
                self.finished[name] = memory.rows
