"""The training and adapter arguments of a recipe: each is converted to the type of its field, or refused in words."""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import typing
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from das_lm.errors import did_you_mean
from das_lm.plain_words import describe_type, describe_value, key_path

KeyPath = tuple[str | int, ...]

NO_SECRET = "a recipe is no place for a secret; leave it out, and log in with `hf auth login`"
#: Training arguments that have another place.
ELSEWHERE = {
    "output_dir": "belongs to the top level of the recipe",
    "resume_from_checkpoint": "is not for recipes; continue a run with --resume",
}


def secrets_in(data: Any, at: KeyPath = ()) -> Iterator[KeyPath]:
    """Where keys of secrets stand: `hub_token` and its like."""
    entries = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in entries:
        if str(key).endswith("token"):
            yield (*at, key)
        yield from secrets_in(value, (*at, key))


@functools.cache
def _training_hints() -> dict[str, Any]:
    from das_lm.training.config import ContinualConfig

    hints = typing.get_type_hints(ContinualConfig)
    return {field.name: hints[field.name] for field in dataclasses.fields(ContinualConfig)}


def check_training(training: dict[str, Any], at: KeyPath) -> tuple[dict[str, Any], list[tuple[KeyPath, str]]]:
    """Convert training arguments to the types of their fields; (path, message) of those that do not fit."""
    problems = [((*at, key), ELSEWHERE[key]) for key in training if key in ELSEWHERE]
    problems += [((*at, *path), NO_SECRET) for path in secrets_in(training) if len(path) > 1]
    converted, wrong = _converted({k: v for k, v in training.items() if k not in ELSEWHERE}, _training_hints(), at)
    measures = converted.get("eval_strategy", "no") != "no"
    without_effect = {
        "do_train": (False, "training is what this does; to measure only, use das-lm evaluate"),
        "do_eval": (not measures, "eval_strategy decides whether to measure while training; write it alone"),
        "do_predict": (True, "predicts nothing here; leave it out"),
    }
    for key, (value, message) in without_effect.items():
        if converted.get(key) is value:
            wrong.append(((*at, key), f"{describe_value(value)} has no effect: {message}"))
    return converted, problems + wrong


def check_peft(peft: dict[str, Any]) -> dict[str, Any]:
    """Convert what a recipe says of adapters to the types of [`LoraConfig`]'s fields, with `adapters` spelled out.

    Raises:
        ValueError: All that does not fit.
    """
    from peft import LoraConfig

    from das_lm.model.adapters import ADAPTERS, LORA_ARGUMENTS

    hints = typing.get_type_hints(LoraConfig)
    hints = {"adapters": Literal[ADAPTERS], "load_in_4bit": bool} | {name: hints[name] for name in LORA_ARGUMENTS}
    converted, problems = _converted({"adapters": "merge", **peft}, hints, ())
    if problems:
        raise ValueError("; ".join(f"{key_path(path)}: {message}" for path, message in problems))
    if converted.get("load_in_4bit") and converted["adapters"] != "apart":
        raise ValueError(
            f"load_in_4bit: an adapter cannot be added to weights of 4 bits without loss, so that no domain can start "
            f"from the one before; write adapters: apart, not {converted['adapters']}, or leave load_in_4bit out"
        )
    return converted


def _converted(
    given: dict[str, Any], hints: dict[str, Any], at: KeyPath
) -> tuple[dict[str, Any], list[tuple[KeyPath, str]]]:
    """Arguments converted to their types; (path, message) of those that do not fit."""
    converted, problems = {}, []
    for key, value in given.items():
        if key not in hints:
            problems.append(((*at, str(key)), f"unknown key.{did_you_mean(str(key), hints)}"))
        else:
            try:
                converted[key] = _convert(value, hints[key])
            except ValueError as error:
                problems.append(((*at, key), str(error)))
    return converted, problems


def _convert(value: Any, hint: Any) -> Any:
    kinds = typing.get_args(hint) or (hint,)
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, enum.Enum) and isinstance(value, str):
            choices = [str(choice.value) for choice in kind]
            if value not in choices:
                near = did_you_mean(value, choices) or f" Valid: {', '.join(choices)}."
                raise ValueError(f"there is no '{value}'.{near}")
    misread = isinstance(value, bool) and bool not in kinds  # a number to pydantic, a slip in a recipe
    try:
        if not misread:
            converted = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
            if not isinstance(converted, float) or math.isfinite(converted):
                return converted
    except ValidationError:
        pass
    raise ValueError(f"expected {describe_type(hint)}, not {describe_value(value)}")
