"""What tests of several rooms share."""

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file


def rewrite_importance(path: Path, target: Path, **changes: str | None) -> None:
    """Write an importance file with other metadata; without a key where the value is `None`."""
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, target, {key: value for key, value in {**metadata, **changes}.items() if value is not None})
