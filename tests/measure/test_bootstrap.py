"""The paired bootstrap: against a naive loop, its coverage, and that pairing narrows a difference."""

import numpy as np
import pytest

from das_lm.measure.bootstrap import interval, resampled_ratios
from das_lm.measure.held_out import HeldOut
from das_lm.measure.results import Results, summarize
from das_lm.randomness import addressed_seed


def documents(generator, count, shift=0.0):
    """Documents of different lengths and difficulty: nats and tokens; the true loss per token is 2 + shift."""
    tokens = generator.integers(1, 30, count)
    return tokens * generator.gamma(4.0, (2.0 + shift) / 4.0, count), tokens


def test_equals_a_loop_over_resamples():
    nats, tokens = documents(np.random.default_rng(0), 7)
    found = resampled_ratios([nats, 2 * nats], [tokens, tokens], "bio", resamples=5)
    draws = np.random.Generator(np.random.Philox(addressed_seed("bootstrap", "bio"))).integers(7, size=(5, 7))
    expected = [nats[drawn].sum() / tokens[drawn].sum() for drawn in draws]
    np.testing.assert_allclose(found, [expected, 2 * np.array(expected)])


def test_chunks_bound_memory_and_change_nothing():
    nats, tokens = documents(np.random.default_rng(0), 3000)
    found = resampled_ratios([nats], [tokens], "bio", resamples=1000)  # in chunks of 666
    draws = np.random.Generator(np.random.Philox(addressed_seed("bootstrap", "bio"))).integers(3000, size=(1000, 3000))
    np.testing.assert_allclose(found[0], nats[draws].sum(1) / tokens[draws].sum(1))
    assert np.std(found) == pytest.approx(np.sqrt(np.var(nats - 2 * tokens) * 3000) / tokens.sum(), rel=0.1)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """95 %, of 400 worlds of 60 documents: within three standard errors, a little under for so few documents."""
    generator, covered = np.random.default_rng(1), 0
    for world in range(400):
        nats, tokens = documents(generator, 60)
        low, high = interval(resampled_ratios([nats], [tokens], world, resamples=400)[0])
        covered += low <= 2.0 <= high
    assert 0.90 < covered / 400 < 0.98


def test_a_difference_is_paired():
    """The same documents a little worse: the interval of the drift is much narrower than those of the losses."""
    nats, tokens = documents(np.random.default_rng(2), 200)
    worse = nats + 0.1 * tokens + np.random.default_rng(3).normal(0, 0.05, 200) * tokens
    before, after = resampled_ratios([nats, worse], [tokens, tokens], "general")
    low, high = interval(after - before)
    assert low < 0.1 < high and high - low < (interval(before)[1] - interval(before)[0]) / 5


def test_intervals_of_the_figures():
    """Every figure is that of the resampled matrix; what is never learned and what is resample by their own names."""
    generator = np.random.default_rng(4)
    names = {"general": None, "bio": 1, "cs": 2}
    tokens = {name: generator.integers(1, 30, 50) for name in names}
    stages, kept = [], []
    for stage in ("base", "bio", "cs"):
        one = {name: HeldOut(tokens[name] * generator.gamma(4.0, 0.5, 50), tokens[name]) for name in names}
        one = {name: HeldOut(h.nats, h.tokens, np.floor(h.tokens * generator.random(50))) for name, h in one.items()}
        kept.append(one)
        stages.append({"name": stage, "scores": {name: h.measures() for name, h in one.items()}})
    results = Results(names, stages)
    results.add_held_out_intervals(kept)
    ratios = np.stack(
        [resampled_ratios([s[n].nats for s in kept], [s[n].tokens for s in kept], n) for n in names], axis=1
    )
    single = [summarize(ratios[..., draw], list(names.values()), True) for draw in range(ratios.shape[-1])]
    for figure, (low, high) in results.intervals["loss"].items():
        assert [low, high] == pytest.approx(np.quantile([one[figure] for one in single], [0.025, 0.975]).tolist())
    assert set(results.intervals) == {"loss", "accuracy"} and len(results.intervals["loss"]) == 7
    low, high = results.stages[1]["intervals"]["bio"]["loss"]
    assert low < results.stages[1]["scores"]["bio"]["loss"] < high
    assert results.stages[2]["intervals"]["cs"]["accuracy"] == pytest.approx(
        interval(resampled_ratios([s["cs"].correct for s in kept], [s["cs"].tokens for s in kept], "cs")[2])
    )
