"""How far a figure would move had other documents been held out: the paired bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from das_lm.randomness import addressed_seed

RESAMPLES = 2000


def resampled_ratios(
    numerators: Sequence[np.ndarray], denominators: Sequence[np.ndarray], *address: Any, resamples: int = RESAMPLES
) -> np.ndarray:
    """
    Ratios of sums, such as the loss per token, over documents that are drawn with replacement. All stages see the same
    draws, so that their differences are paired (Efron and Tibshirani, 1993, chapter 13).

    Args:
        numerators: per stage, one number per document, such as its nats.
        denominators: the same, such as its tokens.
        address: of the draws: the same address gives the same draws.
        resamples: how many.

    Returns:
        the ratios, shape [stages, resamples].
    """
    sums = np.stack([*numerators, *denominators], axis=1)  # [documents, 2 × stages]
    documents = len(sums)
    draws = np.random.Generator(np.random.Philox(addressed_seed("bootstrap", *address)))
    chunk = max(1, 2_000_000 // documents)  # bounds memory
    totals = []
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn = draws.integers(documents, size=(rows, documents)) + documents * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * documents).reshape(rows, documents)
        totals.append(times @ sums)
    upper, lower = np.split(np.concatenate(totals).T, 2)
    with np.errstate(invalid="ignore", divide="ignore"):  # a draw of documents without a prediction says nothing
        return upper / lower


def interval(values: np.ndarray) -> list[float]:
    """The central 95 % of resampled values, shape [resamples]: `[low, high]`."""
    return [float(end) for end in np.nanquantile(values, [0.025, 0.975])]
