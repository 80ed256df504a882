"""Cloze questions: what a language model knows, asked with a text that has one blank and candidates to fill it."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.progress import track
from torch.nn.utils.rnn import pad_sequence

from das_lm.data import built_in
from das_lm.data.packing import longest_input, start_token
from das_lm.errors import UserError, did_you_mean
from das_lm.measure.rows import read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: What may stand for the blank in a text.
BLANK = re.compile(r"_{3,}|\[BLANK\]|\[MASK\]|<mask>")


@dataclass(frozen=True)
class Question:
    """
    A text with one blank.

    Args:
        before: the text before the blank.
        after: the text after it.
        answer: what belongs there.
        choices: what to choose from, the answer among it; empty: the answers to all questions.
    """

    before: str
    after: str
    answer: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Questions:
    """
    What a source of questions holds.

    Args:
        usable: those that can be asked.
        skipped: why others cannot -> how many.
    """

    usable: list[Question]
    skipped: dict[str, int]


@dataclass(frozen=True)
class Cloze:
    """
    Which questions a model answered.

    Args:
        right: of every question that was asked, in their order, shape [asked].
        candidates: how many each had to choose from, shape [asked].
        skipped: why others were not asked -> how many.
    """

    right: np.ndarray
    candidates: np.ndarray
    skipped: dict[str, int]

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return float(self.right.mean())

    @property
    def chance(self) -> float:
        """What guessing gives: the mean of 1 / candidates."""
        return float((1 / self.candidates).mean())

    def measures(self) -> dict[str, Any]:
        """What is reported; `candidates` is their mean number."""
        return {
            "accuracy": self.accuracy,
            "chance": self.chance,
            "right": int(self.right.sum()),
            "asked": len(self.right),
            "skipped": self.skipped,
            "candidates": float(self.candidates.mean()),
        }


def load_questions(source: str) -> Questions:
    """
    Read cloze questions.

    Args:
        source: `"built-in:NAME"`, the questions about a built-in domain, or a file of JSON lines with `text`, in which
            the blank is written `___` (three underscores or more), `[BLANK]`, `[MASK]` or `<mask>`; `answer`; and, if
            they are given, `choices`, a list that holds the answer. Without them the candidates are the answers to all
            questions of the file.

    Raises:
        UserError: no such questions, a broken line, or not one question that can be asked.
    """
    kind, _, name = source.partition(":")
    if kind == "built-in":
        if name not in built_in.DOMAINS:
            raise UserError(f"there are no built-in questions '{name}'.{did_you_mean(name, built_in.DOMAINS)}")
        rows: Iterable[dict[str, Any]] = built_in.cloze(name)
    else:
        rows = (row for _, row in read_rows(Path(source)))
    usable, skipped = [], Counter()
    for row in rows:
        question = _question(row)
        if isinstance(question, Question):
            usable.append(question)
        else:
            skipped[question] += 1
    if not usable:
        raise UserError(f"{source} has no question that can be asked{_reasons(skipped)}")
    return Questions(usable, dict(skipped))


def _question(row: dict[str, Any]) -> Question | str:
    """The question in a row, or why there is none."""
    text, answer, choices = row.get("text"), row.get("answer"), row.get("choices") or []
    if not isinstance(text, str):
        return "no text"
    parts = BLANK.split(text)
    if len(parts) != 2:
        return "no blank" if len(parts) == 1 else "several blanks"
    if not isinstance(answer, str) or not answer.strip():
        return "no answer"
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        return "choices that are no list of texts"
    answer = answer.strip()
    choices = tuple(dict.fromkeys(choice.strip() for choice in choices))
    if choices and answer not in choices:
        return "answer not among the choices"
    if len(choices) == 1:
        return "a single choice"
    return Question(*parts, answer, choices)


def _reasons(skipped: dict[str, int]) -> str:
    return f" (skipped: {', '.join(f'{count:,} {reason}' for reason, count in skipped.items())})" if skipped else ""


@torch.no_grad()
def cloze_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Questions,
    batch_size: int = 32,
    progress: str | None = None,
) -> Cloze:
    """
    Ask a language model cloze questions, as LAMA does (Petroni et al., 1909.01066), dropout off. An answer is right if
    no other candidate has as high a score. The tokens of a candidate are those that the tokenizer makes of it where it
    stands in the text.

    A masked language model scores a candidate by the mean of log p(token) over its tokens, each predicted from the
    text and the candidate's tokens before it, with itself and those after it masked: the pseudo-log-likelihood
    (Salazar et al., 1910.14659) of the candidate alone, from left to right (Kauf and Ivanova, 2305.10588; a token
    that sees the rest of its own word is too easy), and its mean, as a sum would favour few tokens. A causal one
    (`model.can_generate()`) scores it by log p of the whole text with the candidate in its place.

    Args:
        model: on any device. Several processes share the questions out, and all get all answers.
        tokenizer: a fast one.
        questions: what to ask. Skipped and counted are those with a candidate that has no token, that holds a word
            which the tokenizer does not know, or with which the text is longer than the model reads.
        batch_size: texts per forward pass.
        progress: caption of a progress bar.

    Raises:
        UserError: no question can be asked, or the tokenizer lacks what it takes.
    """
    causal = model.can_generate()
    if not tokenizer.is_fast:
        raise UserError(
            "cloze questions: the tokenizer does not say which characters a token stands for (no fast one)"
        )
    if not causal and tokenizer.mask_token_id is None:
        raise UserError("cloze questions: the tokenizer of this masked language model has no mask token")
    scores_of = _causal_scores if causal else _masked_scores
    limit = longest_input(model, tokenizer) - causal  # a causal model reads a first token as well

    def filled(question: Question, candidates: Iterable[str]) -> list[Filled] | str:
        """The texts with the candidates, or why the question cannot be asked."""
        texts = [_fill(tokenizer, question, candidate) for candidate in candidates]
        for ids, where in texts:
            if not where:
                return "answer or choice without a token"
            if any(ids[position] == tokenizer.unk_token_id for position in where):
                return "answer or choice with a word that the tokenizer does not know"
            if len(ids) > limit:
                return "longer than the model reads"
        return texts

    own = [filled(question, [question.answer]) for question in questions.usable]
    answers = tuple(
        dict.fromkeys(q.answer for q, texts in zip(questions.usable, own, strict=True) if isinstance(texts, list))
    )
    state = PartialState(cpu=not torch.cuda.is_available())
    asked = list(enumerate(zip(questions.usable, own, strict=True)))[state.process_index :: state.num_processes]
    outcomes: list[tuple[int, bool, int] | tuple[int, str]] = []  # right or not, of how many; or why not asked
    was_training = model.training
    model.eval()
    hidden = progress is None or not state.is_main_process
    for number, (question, texts) in track(asked, progress or "", transient=True, disable=hidden):
        choices = question.choices or answers
        if isinstance(texts, list):
            texts = filled(question, choices) if len(choices) > 1 else "a single choice"
        if isinstance(texts, str):
            outcomes.append((number, texts))
            continue
        scores = scores_of(model, tokenizer, texts, batch_size)
        answer = choices.index(question.answer)
        outcomes.append((number, bool(scores[answer] > np.delete(scores, answer).max()), len(choices)))
    outcomes = sorted(gather_object(outcomes))
    right = [outcome[1] for outcome in outcomes if len(outcome) == 3]
    candidates = [outcome[2] for outcome in outcomes if len(outcome) == 3]
    skipped = Counter(questions.skipped) + Counter(outcome[1] for outcome in outcomes if len(outcome) == 2)
    model.train(was_training)
    if not right:
        raise UserError(f"cloze questions: not one can be asked{_reasons(skipped)}")
    return Cloze(np.array(right), np.array(candidates), dict(skipped))


#: Token ids of a text with a candidate in its place, and the positions of the candidate's tokens.
Filled = tuple[list[int], list[int]]


def _fill(tokenizer: PreTrainedTokenizerBase, question: Question, candidate: str) -> Filled:
    begin = len(question.before)
    end = begin + len(candidate)
    encoded = tokenizer(question.before + candidate + question.after, return_offsets_mapping=True, verbose=False)
    where = [
        position
        for position, (first, last) in enumerate(encoded["offset_mapping"])
        if first < last and first < end and last > begin  # special tokens stand for no character
    ]
    return encoded["input_ids"], where


def _masked_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Filled], batch_size: int
) -> np.ndarray:
    """Mean log p of each candidate's tokens, from left to right, shape [candidates]."""
    asked: dict[tuple, list[tuple[int, int]]] = defaultdict(list)  # (ids with masks, position) -> [(candidate, token)]
    for number, (ids, where) in enumerate(texts):
        masked = [tokenizer.mask_token_id if position in where else token for position, token in enumerate(ids)]
        for position in where:
            asked[tuple(masked), position].append((number, ids[position]))
            masked[position] = ids[position]
    rows = list(asked)  # candidates with equally many tokens share some
    sums = np.zeros(len(texts))
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        logits = _logits(model, tokenizer, [ids for ids, _ in batch])
        log_probs = logits[range(len(batch)), [position for _, position in batch]].float().log_softmax(-1).cpu()
        for row, key in zip(log_probs, batch, strict=True):
            for number, token in asked[key]:
                sums[number] += row[token].item()
    return sums / [len(where) for _, where in texts]


def _causal_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Filled], batch_size: int
) -> np.ndarray:
    """Log p of each text, shape [candidates]; its first token is predicted from the tokenizer's `bos_token`, or from
    `eos_token` where it has none."""
    start_id = start_token(tokenizer)
    rows = [ids if ids[0] == start_id else [start_id, *ids] for ids, _ in texts]
    sums = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        log_probs = _logits(model, tokenizer, batch).float().log_softmax(-1)
        for row, ids in zip(log_probs, batch, strict=True):
            sums.append(row[range(len(ids) - 1), ids[1:]].double().sum().item())
    return np.array(sums)


def _logits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits of texts of any lengths, padded on the right, shape [rows, tokens, vocabulary]."""
    padding = tokenizer.pad_token_id or 0  # nothing attends to it
    input_ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=padding)
    attention_mask = (torch.arange(input_ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]).long()
    return model(input_ids=input_ids.to(model.device), attention_mask=attention_mask.to(model.device)).logits
