"""Labelled images: the 8×8 digits of scikit-learn, MNIST and its relatives from IDX files, or the Hugging Face hub."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from das_lm.errors import UserError
from das_lm.randomness import addressed_seed

DIGITS = "digits"
HUB = "hub:"
#: Share of the images that becomes the test split where the data set has none of its own.
TEST_SHARE = 0.2


class LabelledImages(NamedTuple):
    """Images and what they show, row by row."""

    pixels: torch.Tensor  # [images, pixels], float32 in [0, 1]
    labels: torch.Tensor  # [images], int64


class Images(NamedTuple):
    """
    A data set in three disjoint parts, the same ones in every run: no seed of a run moves an image from one part to
    another. What is searched for (a learning rate, a λ) is chosen on `development` and reported on `test`.
    """

    train: LabelledImages
    development: LabelledImages
    test: LabelledImages


def load_images(data: str | Path | Sequence[str | Path] = DIGITS) -> Images:
    """
    Read a data set of labelled images.

    The test split is the data set's own. Where there is none, it is a stratified fifth of the images. The development
    split is taken from the training images, stratified: as many as there are test images, a quarter at most. The 8×8
    digits come out as 60 %, 20 % and 20 %, MNIST as 50,000, 10,000 and 10,000.

    Args:
        data: `"digits"`, the 1,797 images of 8×8 pixels of `sklearn.datasets.load_digits`; a directory with IDX files
            under MNIST's names (`train-images-idx3-ubyte`, `t10k-labels.idx1-ubyte`, …, each also as `.gz`; one of
            the two parts is enough); two IDX files, images and labels; or `"hub:ORGANISATION/NAME"`, a data set of
            the Hugging Face hub with the columns `image` (colours become grey) and `label`.

    Raises:
        UserError: no such data, or not what it should be; with the file.
    """
    if data == DIGITS:
        from sklearn.datasets import load_digits

        digits = load_digits()
        parts = [_labelled(digits.data / 16, digits.target)]
    elif isinstance(data, str) and data.startswith(HUB):
        parts = _read_hub(data.removeprefix(HUB))
    elif isinstance(data, str | Path):
        parts = _read_directory(Path(data).expanduser())
    elif len(data) == 2:
        parts = [read_idx_images(*data)]
    else:
        raise UserError(f"data: {len(data)} files; name two, the images and their labels, or a directory")

    if len(parts) == 1:
        (images,) = parts
        parts = _split_off(images, round(TEST_SHARE * len(images.labels)), "test")
    train, test = parts
    if train.pixels.shape[1] != test.pixels.shape[1]:
        sizes = f"{train.pixels.shape[1]} and {test.pixels.shape[1]} pixels"
        raise UserError(f"data: {data}: the training and the test images differ in size, {sizes}")
    train, development = _split_off(train, min(len(test.labels), len(train.labels) // 4), "development")
    return Images(train, development, test)


def spread(values: np.ndarray, count: int, *address: object) -> np.ndarray:
    """
    Choose positions evenly along the sorted values: classes in proportion, or numbers over their whole range.

    Args:
        values: shape [rows]; classes or numbers.
        count: how many positions, at most [rows].
        address: what the choice among equal values depends on, and nothing else.

    Returns:
        Which rows are chosen, booleans of shape [rows], exactly `count` of them true.
    """
    shuffled = np.random.Generator(np.random.Philox(addressed_seed(*address))).permutation(len(values))
    by_value = shuffled[np.argsort(values[shuffled], kind="stable")]
    chosen = np.zeros(len(values), dtype=bool)
    middles = (2 * np.arange(count) + 1) * len(values) // (2 * max(count, 1))  # of `count` stretches of equal length
    chosen[by_value[middles]] = True
    return chosen


def _split_off(images: LabelledImages, count: int, name: str) -> list[LabelledImages]:
    """What remains, and `count` images as the split `name`, stratified by label."""
    if not 0 < count < len(images.labels):
        raise UserError(f"data: {len(images.labels)} images are too few to split off some for {name}")
    chosen = torch.from_numpy(spread(images.labels.numpy(), count, "images", name))
    return [LabelledImages(images.pixels[rows], images.labels[rows]) for rows in (~chosen, chosen)]


def _labelled(pixels: np.ndarray, labels: np.ndarray) -> LabelledImages:
    """Images of any shape [images, …] with values in [0, 1], and their labels."""
    flat = pixels.reshape(len(pixels), -1).astype(np.float32)
    return LabelledImages(torch.from_numpy(flat), torch.from_numpy(labels.astype(np.int64)))


# ---- IDX files -----------------------------------------------------------------------------------------------------


def read_idx(path: str | Path) -> np.ndarray:
    """
    Read an IDX file of unsigned bytes, gzip-compressed or not (which its first bytes tell, not its name).

    The format, as the MNIST page defines it: two zero bytes, the type (8 for unsigned bytes), the number of
    dimensions, each dimension's size as a big-endian 32-bit integer, then the data.

    Returns:
        An array of dtype uint8.

    Raises:
        UserError: no such file, another format or type, or more or less data than the header says.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: cannot be read ({reason}); it should be an IDX file") from error
    if len(content) < 4 or content[:2] != b"\0\0":
        raise UserError(f"{path}: is no IDX file: it begins with '{content[:4].hex(' ')}' instead of '00 00 08 …'")
    kind, dimensions = content[2], content[3]
    if kind != 8:
        raise UserError(f"{path}: holds IDX type {kind:#04x}; only unsigned bytes (0x08) are read")
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise UserError(f"{path}: ends within its header; fetch it again")
    shape = tuple(np.frombuffer(content[4:start], dtype=">u4").tolist())
    missing = start + math.prod(shape) - len(content)
    if missing:
        sizes = " × ".join(f"{size:,}" for size in shape)
        amount = f"{abs(missing):,} too {'few' if missing > 0 else 'many'}"
        raise UserError(f"{path}: its header announces {sizes} bytes, but there are {amount}; fetch it again")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def read_idx_images(images: str | Path, labels: str | Path) -> LabelledImages:
    """
    Read two IDX files: images of shape [images, rows, columns], and labels of shape [images].

    Raises:
        UserError: a file that cannot be read, of other dimensions, or images without labels.
    """
    pixels, classes = read_idx(images), read_idx(labels)
    for path, array, dimensions, what in ((images, pixels, 3, "images"), (labels, classes, 1, "labels")):
        if array.ndim != dimensions:
            raise UserError(f"{path}: has {array.ndim} dimensions; {what} have {dimensions}. Are the files swapped?")
    if len(pixels) != len(classes):
        raise UserError(f"{images} holds {len(pixels):,} images, but {labels} {len(classes):,} labels")
    return _labelled(pixels / np.float32(255), classes)


def _read_directory(directory: Path) -> list[LabelledImages]:
    """The training and the test images, or the only part that there is."""
    if not directory.is_dir():
        raise UserError(
            f"data: there is no directory '{directory}'. Write '{DIGITS}', a directory with IDX files, two IDX files "
            f"(images and labels), or '{HUB}organisation/name'"
        )
    parts = []
    for part in ("train", "t10k"):
        images = _find(directory, f"{part}-images", "idx3-ubyte")
        labels = _find(directory, f"{part}-labels", "idx1-ubyte")
        if images and labels:
            parts.append(read_idx_images(images, labels))
        elif images or labels:
            absent = f"{part}-labels-idx1-ubyte" if images else f"{part}-images-idx3-ubyte"
            raise UserError(f"{directory}: {(images or labels).name} stands there without {absent}")
    if not parts:
        raise UserError(
            f"{directory}: holds neither train-images-idx3-ubyte nor t10k-images-idx3-ubyte (also as .gz); for files "
            "with other names give the two files"
        )
    return parts


def _find(directory: Path, stem: str, kind: str) -> Path | None:
    names = (f"{stem}{separator}{kind}{suffix}" for suffix in ("", ".gz") for separator in "-.")
    return next((directory / name for name in names if (directory / name).is_file()), None)


# ---- Hugging Face hub ----------------------------------------------------------------------------------------------


def _read_hub(source: str) -> list[LabelledImages]:
    """The splits `train` and `test`, or the first alone."""
    import datasets

    where = f"data: hub data set '{source}'"
    try:
        splits = datasets.load_dataset(source)
    except Exception as error:  # whatever the library and the network raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{where} could not be loaded: {reason}. Check its name and the network") from error
    if "train" not in splits:
        raise UserError(f"{where} has no split 'train', but {', '.join(splits)}")
    parts = []
    for name in ("train", "test"):
        if name in splits:
            rows = splits[name]
            for column in ("image", "label"):
                if column not in rows.column_names:
                    raise UserError(f"{where} has no column '{column}', but {', '.join(rows.column_names)}")
            pixels = [np.asarray(image.convert("L")) for image in rows["image"]]
            if len({image.shape for image in pixels}) != 1:
                raise UserError(f"{where}, split '{name}': the images differ in size, or there are none")
            parts.append(_labelled(np.stack(pixels) / np.float32(255), np.asarray(rows["label"])))
    return parts
