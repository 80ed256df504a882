"""The reference's frontier: an envelope of its runs, convex and rising, near to the truth between them."""

import numpy as np
import pytest

from das_lm.report.frontier import Frontier


def errors(frontier: Frontier, gains: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Relative to the true losses."""
    return np.array([frontier.loss(gain) for gain in gains]) / losses - 1


@pytest.mark.parametrize("seed", range(20))
def test_no_run_lies_below_it_and_it_rises_and_bends_up(seed):
    draw = np.random.default_rng(seed)
    gains, losses = np.sort(draw.uniform(0.5, 4, 7)), np.sort(draw.normal(size=7)) + draw.normal(size=7) * (seed % 2)
    frontier = Frontier(draw.permutation(np.stack([gains, losses], 1)).tolist())
    assert all(frontier.loss(gain) <= loss + 1e-12 for gain, loss in zip(gains, losses, strict=True))
    curve = np.array([frontier.loss(gain) for gain in np.linspace(*frontier.ends, 1000)])
    assert np.diff(curve).min() >= -1e-12 and np.diff(curve, 2).min() >= -1e-12
    assert frontier.loss(gains[-1]) == losses[-1]
    assert frontier.loss(gains[-1] + 1e-9) is frontier.loss(gains[0] - 1e-9) is None


def test_what_gains_more_and_loses_less_dominates():
    frontier = Frontier([(1.0, 0.4), (1.5, 0.9), (1.5, 0.7), (2.0, 0.4), (3.0, 0.6)])
    assert [frontier.loss(gain) for gain in (1.0, 1.5, 2.0, 2.5, 3.0)] == pytest.approx([0.4, 0.4, 0.4, 0.5, 0.6])


def test_a_parabola_is_itself():
    """Worked out: through (1, 1), (2, 4), (3, 9) the slopes are 2, 4 and 25/4 for the parabola's 6."""
    frontier = Frontier([(3.0, 9.0), (1.0, 1.0), (2.0, 4.0)])
    assert frontier.loss(1.5) == pytest.approx(2.25) and frontier.loss(1.25) == pytest.approx(1.5625)
    assert 6.20 < frontier.loss(2.5) < 6.25


@pytest.mark.parametrize("power", [1.5, 2, 3, 4])
def test_it_errs_little_and_not_in_favour_of_what_is_compared(power):
    """Runs 15 % apart: at most 0.15 % above the truth, where straight lines are up to 3 %, and 0.6 % below it."""
    gains = 1.15 ** np.arange(5)
    between = np.linspace(gains[0], gains[-1], 101)
    found = errors(Frontier(zip(gains, gains**power, strict=True)), between, between**power)
    straight = np.interp(between, gains, gains**power) / between**power - 1
    assert found.min() > -0.006 and found.max() < 0.0015 and found.max() < straight.max() / 10
    assert found.mean() < 1e-4 < straight.mean()


def test_next_to_a_peak_it_is_too_high():
    """Gain is a parabola of the logarithm of the learning rate, which grows by √2; the last run is the peak."""
    knob = np.arange(-4, 1) * np.log(2) / 2
    gains, losses = 3.4 - 0.45 * knob**2, 2.2 * np.exp(0.75 * knob)
    frontier, fine = Frontier(zip(gains, losses, strict=True)), np.linspace(knob[0], 0, 401)
    found = errors(frontier, 3.4 - 0.45 * fine**2, 2.2 * np.exp(0.75 * fine))
    assert gains[-2] > 0.98 * gains[-1]
    assert found.max() < 0.07 and found[fine < knob[-2]].max() < 0.01
