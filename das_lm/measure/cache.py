"""What has been measured, kept by (model, data, measure), so that nothing is measured twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from das_lm.files import write_tensors
from das_lm.measure.held_out import HeldOut
from das_lm.units.sharding import WRAPPER, full

if TYPE_CHECKING:
    from torch import nn

DIRECTORY = "measured"


def fingerprint(*parts: Any) -> str:
    """A short name that is a pure function of arrays, tensors, text and numbers."""
    return _digest(parts)


def _digest(parts: Iterable[Any]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, torch.Tensor):
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            part = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        else:
            part = repr(part).encode()
        digest.update(part)
    return digest.hexdigest()


def model_fingerprint(model: nn.Module) -> str:
    """What a model is: its architecture and every weight, wherever it was loaded from. All processes have to ask for
    that of a sharded one, whose weights are made whole one at a time."""
    weights = sorted((name.replace(WRAPPER, ""), tensor) for name, tensor in model.state_dict().items())
    parts = (part for name, tensor in weights for part in (name, full(tensor)))
    return _digest(chain([type(model).__name__.removeprefix("FSDP")], parts))


class Cache:
    """
    A directory with one safetensors file per measurement: tensors, facts as JSON, and a hash of both and of the key. A
    file that is not as it was written, or stands under another name, is as good as none.

    Args:
        directory: made with the first measurement.
    """

    def __init__(self, directory: Path):
        self.directory = directory

    def get(self, key: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Tensors and facts of a measurement, if it was made."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.directory / f"{key}.safetensors", framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            if metadata["hash"] == self._hash(key, tensors, metadata["facts"]):
                return tensors, json.loads(metadata["facts"])
        except (OSError, SafetensorError, KeyError):
            pass
        return None

    def put(self, key: str, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Keep a measurement."""
        self.directory.mkdir(parents=True, exist_ok=True)
        written = json.dumps(facts)
        metadata = {"format": "das_lm.measured", "version": "2", "facts": written}
        write_tensors(
            self.directory / f"{key}.safetensors", tensors, {**metadata, "hash": self._hash(key, tensors, written)}
        )

    @staticmethod
    def _hash(key: str, tensors: Mapping[str, torch.Tensor], facts: str) -> str:
        return fingerprint(key, facts, *chain.from_iterable(sorted(tensors.items())))

    def held_out(self, key: str) -> HeldOut | None:
        """A measurement of held-out text, if it was made."""
        found = self.get(key)
        return HeldOut.from_tensors(found[0]) if found else None
