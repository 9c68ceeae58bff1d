"""Estimates: known answers, coverage of the intervals, invariances."""

from __future__ import annotations

import math

import numpy as np
import pytest

from compile_sparse.compiler.verify.statistics import percentiles, perplexity_ratio, ratio_of_rounds, t_quantile_975


def test_t_quantiles_join_smoothly():
    assert t_quantile_975(1) == 12.706
    assert t_quantile_975(4) == 2.776
    assert t_quantile_975(31) == pytest.approx(2.0395, abs=2e-3)
    assert t_quantile_975(120) == pytest.approx(1.9799, abs=1e-3)
    assert t_quantile_975(10**9) == pytest.approx(1.959964, abs=1e-6)
    with pytest.raises(ValueError, match="two values"):
        t_quantile_975(0)


def test_known_speed_ratio():
    # logs of the ratios are 0.1, 0.2, 0.3: mean 0.2, s = 0.1, half width 4.303 * 0.1 / sqrt(3)
    found = ratio_of_rounds([100.0] * 3, [100 * math.exp(x) for x in (0.1, 0.2, 0.3)])
    half = 4.303 * 0.1 / math.sqrt(3)
    assert found.value == pytest.approx(math.exp(0.2))
    assert (found.low, found.high) == (pytest.approx(math.exp(0.2 - half)), pytest.approx(math.exp(0.2 + half)))
    assert found.as_dict() == {"value": found.value, "ci95": [found.low, found.high]}


def test_drift_of_the_machine_cancels():
    drift = np.linspace(1.0, 0.5, 6)  # half the speed by the last round
    found = ratio_of_rounds(100 * drift, 130 * drift)
    assert found.low == pytest.approx(1.3)
    assert found.high == pytest.approx(1.3)


@pytest.mark.parametrize(
    "pair", [([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([1.0, 0.0], [1.0, 1.0]), ([1, 2], [1, math.inf])]
)
def test_bad_rounds(pair):
    with pytest.raises(ValueError, match="round"):
        ratio_of_rounds(*pair)


def test_speed_interval_covers_the_truth():
    """A 95 % interval misses about 5 %: over 2,000 experiments the standard error is 0.5 %, so 3.5 to 6.5 % is 3 sigma."""
    rng = np.random.default_rng(1)
    noise = np.exp(rng.normal(0, 0.05, size=(2_000, 2, 5)))
    missed = sum(not found.low <= 1.2 <= found.high for found in (ratio_of_rounds(a, 1.2 * b) for a, b in noise))
    assert 0.035 <= missed / 2_000 <= 0.065


def test_perplexity_is_token_weighted():
    # 10 tokens lose 0.1 nat each, 90 tokens lose nothing: exp(1.0 / 100)
    found = perplexity_ratio([20.0, 180.0], [21.0, 180.0], [10, 90])
    assert found.value == pytest.approx(math.exp(0.01))


def test_perplexity_of_a_model_with_itself_is_exactly_one():
    nll = list(np.random.default_rng(0).gamma(5, 20, size=30))
    found = perplexity_ratio(nll, nll, [64] * 30)
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)


def test_perplexity_bootstrap_is_paired_and_covers():
    """Windows differ a lot, models little: an unpaired interval would be wide. The pairing makes it narrow and it still covers
    the true log ratio 0.02 in at least 90 % of 300 experiments (percentile bootstrap of 40 windows is slightly short)."""
    rng = np.random.default_rng(2)
    covered = 0
    for index in range(300):
        tokens = rng.integers(32, 256, size=40)
        baseline = rng.gamma(4, 0.8, size=40) * tokens
        compiled = baseline + tokens * rng.normal(0.02, 0.05, size=40)
        found = perplexity_ratio(baseline, compiled, tokens, resamples=400, seed=index)
        assert found.high / found.low < 1.1
        covered += found.low <= math.exp(0.02) <= found.high
    assert covered >= 270


def test_bootstrap_is_reproducible():
    arguments = ([1.0, 2.0, 3.0], [1.1, 2.0, 3.3], [1, 2, 3])
    assert perplexity_ratio(*arguments, seed=5) == perplexity_ratio(*arguments, seed=5)


@pytest.mark.parametrize("windows", [([], [], []), ([1.0], [1.0], [0]), ([1.0], [1.0, 2.0], [1, 1])])
def test_bad_windows(windows):
    with pytest.raises(ValueError, match=r"window|broadcast"):
        perplexity_ratio(*windows)


def test_percentiles():
    assert percentiles(range(101)) == {"p50": 50.0, "p95": 95.0, "p99": 99.0}
    with pytest.raises(ValueError, match="nothing"):
        percentiles([])
