"""The bootstrap interval against scipy's."""

import numpy as np
import pytest
from harness.bootstrap import RESAMPLES, interval_of


@pytest.mark.parametrize("count", [5, 6, 10])
def test_it_is_the_percentile_interval_of_scipy(count):
    stats = pytest.importorskip("scipy.stats")
    ratios = np.random.default_rng(count).lognormal(0.7, 0.05, count)
    theirs = stats.bootstrap(
        (ratios,),
        np.median,
        n_resamples=RESAMPLES,
        method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval
    ours = interval_of(list(ratios))
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-12)
    assert ours.median == np.median(ratios)
    assert ours.low <= ours.median <= ours.high


def test_it_is_the_same_every_time():
    values = [1.0, 1.2, 0.9, 1.1, 1.05]
    assert interval_of(values) == interval_of(values)
    assert interval_of(values).half_width > 0
    assert interval_of([2.0]).half_width == 0
