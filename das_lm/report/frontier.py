"""What a reference loses at a gain: the lower envelope of its runs, and a convex curve between them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

import numpy as np


class Frontier:
    """
    The least that must be lost for a gain: no run lies below it, it never falls and never bends down.

    A run that gains more and loses less dominates. Between the runs that remain, the curve is the rational cubic of
    Delbourgo and Gregory (SIAM J. Sci. Stat. Comput. 6, 1985), which is convex whatever the runs are and exact for a
    parabola. Straight lines lie above a convex frontier and so flatter what is compared with it: by 1.5 % where the
    loss is the cube of the gain and the runs are 15 % of the gain apart. This curve errs there by 0.1 %. Only just
    below a peak of the gain, where a frontier turns upright, it is too high as well: by up to 6 % in the last 2 % of
    the gain if learning rates differ by a factor of √2.

    Args:
        runs: (gain, loss) of each, in any order; one or more.
    """

    def __init__(self, runs: Iterable[tuple[float, float]]):
        runs = list(runs)
        gains = sorted({gain for gain, _ in runs})
        self.ends = gains[0], gains[-1]
        corners: list[tuple[float, float]] = []
        for gain in gains:
            point = gain, min(loss for other, loss in runs if other >= gain)
            while corners and _slope(corners[-1], point) <= (_slope(*corners[-2:]) if corners[1:] else 0.0):
                corners.pop()
            corners.append(point)
        self._corners = corners
        self._slopes = _slopes(np.array(corners))

    def loss(self, gain: float) -> float | None:
        """The loss at a gain; `None` where no run gains as little, or none as much."""
        if not self.ends[0] <= gain <= self.ends[1]:
            return None
        right = bisect_left(self._corners, (gain,))
        if right == 0 or self._corners[right][0] == gain:
            return self._corners[right][1]
        (x0, y0), (x1, y1) = self._corners[right - 1 : right + 1]
        width, part, slope = x1 - x0, (gain - x0) / (x1 - x0), (y1 - y0) / (x1 - x0)
        d0, d1 = self._slopes[right - 1 : right + 1]
        below, above = slope - d0, d1 - slope
        if min(below, above) <= 1e-9 * slope:
            return y0 + part * (y1 - y0)
        bend, rest = 1 + below / above + above / below, 1 - part
        inner = part * (bend * y1 - width * d1) + rest * (bend * y0 + width * d0)
        return float((part**3 * y1 + part * rest * inner + rest**3 * y0) / (1 + (bend - 3) * part * rest))


def _slope(left: tuple[float, float], right: tuple[float, float]) -> float:
    return (right[1] - left[1]) / (right[0] - left[0])


def _slopes(corners: np.ndarray) -> np.ndarray:
    """
    Of the curve in its corners [corners, 2]: of the parabola through a corner and its neighbours. At both ends the
    steeper bend is taken, which lowers the curve: at the right one the slope grows by the same factor as before.
    """
    width = np.diff(corners[:, 0])
    straight = np.diff(corners[:, 1]) / width
    if len(straight) < 2:
        return np.repeat(straight, 2)
    inner = (width[1:] * straight[:-1] + width[:-1] * straight[1:]) / (width[1:] + width[:-1])
    return np.array([max(0.0, 2 * straight[0] - inner[0]), *inner, straight[-1] ** 2 / inner[-1]])
