"""Mixtures within a domain: the documents of several sources, interleaved by weight."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from das_lm.errors import UserError
from das_lm.plain_words import in_plain_words

#: The column that says which part a document comes from.
PART = "part"


@in_plain_words
@dataclass(config=ConfigDict(extra="forbid"))
class Part:
    """
    A part of a mixture.

    Args:
        path: A path or glob, or a list of them; `"hub:ORGANISATION/NAME"`; or `"built-in:NAME"`.
        weight: How often a document of it comes, beside the other parts.
        column: Column that holds the text, if it is another than the domain's.

    Raises:
        UserError: A wrong key, type or combination.
    """

    path: str | list[str]
    weight: float = Field(default=1.0, gt=0, le=1e6)
    column: str | None = None


def parts_of(data: Any) -> Any:
    """
    A list of mappings as the parts of a mixture; other data as it is.

    Raises:
        ValueError: An entry is no part.
    """
    if not isinstance(data, list) or not any(isinstance(entry, dict | Part) for entry in data):
        return data
    parts = []
    for index, entry in enumerate(data):
        if isinstance(entry, str):
            raise ValueError(f"[{index}]: '{entry}' stands among parts with a weight; write {{path: '{entry}'}}")
        if isinstance(entry, dict):
            unknown = [str(key) for key in entry if key not in ("path", "weight", "column")]
            if unknown or "path" not in entry:
                what = f"unknown key '{unknown[0]}'" if unknown else "no path"
                raise ValueError(f"[{index}]: {what}; a part has path, weight and column")
            try:
                entry = Part(**entry)
            except UserError as error:
                raise ValueError(f"[{index}]: {str(error).removeprefix('Part: ')}") from None
        parts.append(entry)
    return parts


def weights_of(parts: Sequence[Part]) -> dict[str, float]:
    """Part, by number and file name -> how large a share of the documents come from it; they sum to 1."""
    total = sum(part.weight for part in parts)
    paths = (part.path if isinstance(part.path, str) else part.path[0] for part in parts)
    names = (f"{number}. {os.path.basename(path)}" for number, path in enumerate(paths, 1))
    return {name: part.weight / total for name, part in zip(names, parts, strict=True)}


def characters_of(documents: Any, parts: Sequence[Part]) -> dict[str, float]:
    """Part -> what share of the characters of a mixture, with a column [`PART`], come from it; they sum to 1."""
    characters = np.zeros(len(parts))
    for batch in documents.select_columns(["text", PART]).with_format("arrow").iter(batch_size=1000):
        np.add.at(characters, batch[PART].to_numpy(), pc.utf8_length(batch["text"]).to_numpy())
    return dict(zip(weights_of(parts), (characters / max(1, characters.sum())).tolist(), strict=True))


def interleaved(data_sets: list[Any], parts: Sequence[Part], stopping_strategy: str) -> Any:
    """Data sets, or streams, mixed at random by the weights of their parts; the same on every machine."""
    import datasets

    chances = list(weights_of(parts).values())
    return datasets.interleave_datasets(data_sets, chances, seed=0, stopping_strategy=stopping_strategy)
