"""The text of a recipe as its models read it: blocks to learn from, held-out windows to measure, new words."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

from accelerate import PartialState
from rich.markup import escape

from das_lm.data.added_tokens import add_words, find_new_words
from das_lm.data.blocks import HeldOutWindows
from das_lm.data.masking import labeling
from das_lm.data.packing import pack, windows
from das_lm.errors import UserError
from das_lm.methods import METHODS
from das_lm.model.loading import is_causal
from das_lm.run.directory import Stage
from das_lm.terminal import Console
from das_lm.training.inputs import data_seed
from das_lm.units.sharding import is_sharded

if TYPE_CHECKING:
    from das_lm.data.domains import Documents
    from das_lm.run.recipe import Recipe


class HeldOutText(NamedTuple):
    """Windows by domain: those that are measured, and others to choose something by."""

    measured: dict[str, HeldOutWindows]
    chosen_by: dict[str, HeldOutWindows] | None


class Reader:
    """The text as a tokenizer reads it; done again only for a tokenizer that has new words."""

    def __init__(self, recipe: Recipe, text: dict[str, Documents], args: Any, halves: bool, state: PartialState):
        self.recipe, self.text, self.args, self.halves, self.state = recipe, text, args, halves, state
        self.tokenizer: Any = None

    def packed(self, tokenizer: Any, names: list[str]) -> dict[str, Any]:
        """Blocks of domains."""
        self._use(tokenizer)
        with self.state.main_process_first():
            for name in names:
                if name not in self._packed:
                    self._packed[name] = _pack(self.text[name].train, tokenizer, self.args.max_length)
        return {name: self._packed[name] for name in names}

    def held_out(self, tokenizer: Any) -> HeldOutText:
        """What [`held_out_windows`] gives."""
        self._use(tokenizer)
        if self._held_out is None:
            with self.state.main_process_first():
                documents = {name: one.held_out for name, one in self.text.items() if len(one.held_out)}
                self._held_out = held_out_windows(self.recipe, documents, tokenizer, self.args, self.halves)
        return self._held_out

    def _use(self, tokenizer: Any) -> None:
        if self.tokenizer is None or len(tokenizer) != len(self.tokenizer):
            self.tokenizer, self._packed, self._held_out = tokenizer, {}, None


def held_out_windows(
    recipe: Recipe, text: dict[str, Any], tokenizer: Any, args: Any, halves: bool = False
) -> HeldOutText:
    """Held-out documents by domain, in two halves where something is chosen by a score."""
    masking = labeling(tokenizer, is_causal(recipe), args.mlm_probability)
    held_out = {
        name: HeldOutWindows(windows(documents, tokenizer, args.max_length), masking, data_seed(args))
        for name, documents in text.items()
    }
    if not halves and not (args.interpolation_alpha == "auto" and "interpolate" in recipe.method):
        return HeldOutText(held_out, None)
    chosen_by, measured = ({name: one.half(half) for name, one in held_out.items()} for half in (0, 1))
    return HeldOutText(measured, chosen_by)


def with_new_words(model: Any, tokenizer: Any, stage: Stage, text: dict[str, Documents], recipe: Recipe) -> Any:
    """The tokenizer with the words that the domains of a stage bring; the model's embeddings grow with it."""
    for domain in stage.domains:
        if domain.add_tokens:
            if not all(METHODS[name].works_with_adapters for name in recipe.method):
                raise UserError(
                    f"domain '{domain.name}': add_tokens: {', '.join(recipe.method)} remembers single parameters, and "
                    "the embeddings grow; leave add_tokens out, or use another method, such as das, replay or lwf"
                )
            if is_sharded(model):
                raise UserError(
                    f"domain '{domain.name}': add_tokens: fsdp has cut the embeddings into slices, which cannot grow; "
                    "leave add_tokens out, or use DDP"
                )
            words = find_new_words(text[domain.name].train, tokenizer, domain.add_tokens)
            tokenizer = add_words(model, tokenizer, words)
    return tokenizer


def load_text(recipe: Recipe, console: Console) -> dict[str, Documents]:
    """The text of all domains by name; what is odd in it is printed."""
    text = recipe.load_text()
    for documents in text.values():
        for warning in documents.warnings:
            console.print("[yellow]warning:[/yellow]", escape(warning), soft_wrap=True)
    return text


def _pack(documents: Any, tokenizer: Any, max_length: int) -> Any:
    """Blocks of a domain; large domains are tokenized by as many processes as there are cores."""
    return pack(documents, tokenizer, max_length, num_proc=os.cpu_count() if len(documents) > 100_000 else None)
