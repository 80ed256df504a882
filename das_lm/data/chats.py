"""Documents that are conversations: kept as their messages, and made text by the chat template of a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from das_lm.errors import UserError

#: What the text of such a document begins with, before its messages as JSON; ASCII calls it the group separator.
CHAT = "\x1d"


def chat_of(value: Any) -> str | None:
    """The text that stands for a list of messages, `[{"role": …, "content": …}, …]`; `None` for anything else."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not len(value):
        return None
    if not all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in value):
        return None
    messages = [{key: cell for key, cell in message.items() if cell is not None} for message in value]
    return CHAT + json.dumps(messages, ensure_ascii=False)


def as_read(texts: Iterable[str], tokenizer: Any) -> list[str]:
    """
    Texts as a model reads them: of a conversation what the chat template makes of it.

    Raises:
        UserError: the tokenizer has no chat template, or it fails.
    """
    return [_templated(text, tokenizer) if text.startswith(CHAT) else text for text in texts]


def in_words(text: str) -> str:
    """What is said in a document: of a conversation the contents of its messages."""
    if not text.startswith(CHAT):
        return text
    return "\n".join(str(message["content"]) for message in json.loads(text.removeprefix(CHAT)))


def chat_opening(tokenizer: Any) -> tuple[list[int], set[int]]:
    """
    Of a chat template, what stands before a user's first word, and its special tokens; empty without one.

    Raises:
        UserError: the template fails.
    """
    if not getattr(tokenizer, "chat_template", None):
        return [], set()
    word = "MAGPIE"
    text = _rendered([{"role": "user", "content": word}], tokenizer, add_generation_prompt=True)
    ids = tokenizer(text.replace(word, ""), add_special_tokens=False)["input_ids"]
    opening = tokenizer(text.partition(word)[0], add_special_tokens=False)["input_ids"]
    return opening, set(ids) & set(tokenizer.all_special_ids)


def _templated(text: str, tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "the text holds messages, and the tokenizer has no chat template; give a column of text, or the tokenizer "
            "of an instruct model"
        )
    return _rendered(json.loads(text.removeprefix(CHAT)), tokenizer)


def _rendered(messages: Sequence[Mapping[str, Any]], tokenizer: Any, **options: Any) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template raises what it likes
        raise UserError(f"the chat template of the tokenizer fails on {messages}: {error}") from error
