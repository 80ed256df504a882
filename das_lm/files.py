"""Files that are whole or absent: written under a temporary name, then renamed; checkpoints end with a manifest."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

MANIFEST = "manifest.json"

logger = logging.getLogger(__name__)


def partial_path(path: Path, *parts: Any) -> Path:
    """A name beside a file or directory for what is not whole yet."""
    return path.with_name(".".join(map(str, ("", path.name, *parts, "partial"))))


def is_partial(path: Path) -> bool:
    """Whether a file or directory is what a killed process was writing."""
    return path.name.startswith(".") and path.name.endswith(".partial")


def remove_partial(directory: Path | str) -> None:
    """Remove what a killed process was writing in a directory."""
    for path in filter(is_partial, Path(directory).glob(".*")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """Write a text file atomically."""
    path = Path(path)
    temporary = partial_path(path, os.getpid())
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path | str, data: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_tensors(path: Path | str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically."""
    from safetensors.torch import save_file

    path = Path(path)
    temporary = partial_path(path, os.getpid())
    try:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, dict(metadata)
        )
        share(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def share(path: Path) -> None:
    """Give a file the rights that the umask leaves; safetensors leaves none to anybody but the owner."""
    umask = os.umask(0o077)
    os.umask(umask)
    with suppress(OSError):  # a file system without rights
        path.chmod(0o666 & ~umask)


def copy_whole(source: Path, target: Path) -> None:
    """Copy a directory, whole or not at all; what had its name is gone."""
    partial = partial_path(target)
    for old in (partial, target):
        shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(source, partial)
    os.replace(partial, target)


def seal(directory: Path | str) -> None:
    """Write the manifest, the last file of a checkpoint: every other file's size and SHA-256."""
    directory = Path(directory)
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST)
    for path in files:
        if path.suffix == ".safetensors":
            share(path)
    entries = {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in files
    }
    write_json(directory / MANIFEST, {"version": 1, "files": entries})


def manifest_of(directory: Path | str) -> dict[str, tuple[int, str]]:
    """Name -> size and SHA-256 of the files in the manifest of a directory; none of one without."""
    try:
        entries = json.loads(Path(directory, MANIFEST).read_text(encoding="utf-8"))["files"]
        return {name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def broken_file(directory: Path | str) -> str | None:
    """The first file in which a directory differs from its manifest (the manifest itself if it has none), or `None`
    for a checkpoint that is whole."""
    expected = manifest_of(directory)
    if not expected:
        return MANIFEST
    for name, (size, digest) in expected.items():
        path = Path(directory, name)
        if not path.is_file() or path.stat().st_size != size or _sha256(path) != digest:
            return name
    return None


def _checkpoints(directory: Path | str) -> list[tuple[int, Path]]:
    """(Step, path) of the `checkpoint-<step>` directories, in their order."""
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(directory).glob("checkpoint-*"))
    return sorted((int(match[1]), path) for match, path in found if match)


def rotate_checkpoints(directory: Path | str, step: int, limit: int | None, best: str | None) -> None:
    """Remove checkpoints before the one that was just saved at `step`, the earliest first, until `limit` of them are
    left; never the one with the `best` score. Later ones, which a resumed run has passed over, do not count."""
    if limit is None or limit <= 0:
        return
    paths = [path for at, path in _checkpoints(directory) if at <= step]
    kept = {paths[-1], Path(best or paths[-1])}
    removable = [path for path in paths if path not in kept]
    for path in removable[: max(0, len(paths) - max(limit, len(kept)))]:
        shutil.rmtree(path, ignore_errors=True)


def newest_checkpoint(directory: Path | str) -> Path | None:
    """The `checkpoint-<step>` directory of the highest step that is whole, or `None`; warns of newer ones that are
    not."""
    for _, path in reversed(_checkpoints(directory)):
        broken = broken_file(path)
        if broken is None:
            return path
        how = "it was not saved to its end" if broken == MANIFEST else f"{broken} is damaged"
        logger.warning("%s is passed over: %s", path, how)
    return None


def is_about_disk(error: BaseException) -> bool:
    """Whether something could not be written (or read) for want of space, of a right, or of a working disk."""
    numbers = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT, errno.EFBIG, errno.EIO)
    if isinstance(error, OSError) and error.errno in numbers:
        return True
    words = [os.strerror(number) for number in numbers]  # of safetensors; torch.save says less
    words += ["PytorchStreamWriter", "inline_container", "No usable temporary directory"]
    return any(word in str(error) for word in words)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def recipe_folders() -> list[Path]:
    """Where recipes with a name are: those of the package, within it where a wheel was installed, beside it in a
    source checkout; and `recipes/` of the working directory."""
    package = Path(str(resources.files("das_lm")))
    shipped = package / "recipes"
    return [shipped if shipped.is_dir() else package.with_name("recipes"), Path("recipes")]
