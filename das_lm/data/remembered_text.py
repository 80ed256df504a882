"""Text that stands for what a model knew: an entry of `remember` in a recipe."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, Field, ValidationInfo, field_validator
from pydantic.dataclasses import dataclass

from das_lm.data.domains import Domain, data_kind
from das_lm.plain_words import in_plain_words


@in_plain_words
@dataclass(config=ConfigDict(extra="forbid"))
class RememberedText(Domain):
    """
    Text that stands for what a model knew before its first domain: an entry of `remember` in a recipe, with the keys
    of a [`Domain`]. What is held out of a domain is not held out of it.

    Args:
        data: as for a domain; or `"self"`, text that the model writes itself before the first domain, or
            `"self:PATH"`, such text that `das-lm self-text` has written to a file. In a recipe `- self: 4096` and
            `- self: PATH` stand for these.
        weight: How often it is drawn, beside the other entries.
        rows: How many rows of `max_length` tokens the model writes; `memory_size` if unset.
        budget: How far the model may drift from what it said of this text, nats per predicted token, in place of
            `drift_budget`.

    Raises:
        UserError: A wrong key, type or combination.
    """

    max_documents: int | None = Field(default=None, validate_default=True)
    weight: float = Field(default=1.0, ge=0, le=1e6)
    rows: int | None = Field(default=None, ge=1)
    budget: float | None = Field(default=None, ge=1e-6)

    @field_validator("data")
    @classmethod
    def _check_data(cls, data: str | list[str], info: ValidationInfo) -> str | list[str]:
        return data if is_self(data) else super()._check_data(data, info)

    @field_validator("streaming")
    @classmethod
    def _check_streaming(cls, streaming: bool, info: ValidationInfo) -> bool:
        if streaming and is_self(info.data.get("data", "")):
            raise ValueError("is for text that is read; the model writes this, leave it out")
        return super()._check_streaming(streaming, info)

    @field_validator("max_documents")
    @classmethod
    def _check_end(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is None and info.data.get("streaming"):
            raise ValueError("how much of a stream is remembered? Write max_documents, such as 1000")
        return value

    @field_validator("training")
    @classmethod
    def _check_no_training(cls, training: dict[str, Any]) -> dict[str, Any]:
        if training:
            raise ValueError("is for domains that are learned; leave it out")
        return training

    @field_validator("rows")
    @classmethod
    def _check_rows(cls, rows: int | None, info: ValidationInfo) -> int | None:
        if rows is not None and info.data.get("data") != "self":
            raise ValueError("is for text that the model writes; leave it out, or write max_documents")
        return rows

    @classmethod
    def expanded(cls, entry: Any) -> Any:
        """What `self`, `{self: 4096}` and `{self: PATH}` stand for; another entry as it is."""
        if entry == "self":
            entry = {"self": None}
        if not isinstance(entry, dict) or "self" not in entry:
            return entry
        what = entry["self"]
        given = {"data": f"self:{what}"} if isinstance(what, str) else {"data": "self", "rows": what}
        return {"name": "self", **given, **{key: value for key, value in entry.items() if key != "self"}}


def paths_of(data: Any) -> list[Any]:
    """The entries of `data` or `held_out`: paths, and what stands for a data set; those of a mixture part by part."""
    if data_kind(data) == "mixture":
        return [path for part in data for path in paths_of(part.path)]
    return data if isinstance(data, list) else [data.removeprefix("self:") if is_self(data) else data]


def is_self(data: str | list[str]) -> bool:
    """Whether `data` stands for text that a model writes, or wrote."""
    return isinstance(data, str) and (data == "self" or data.startswith("self:"))
