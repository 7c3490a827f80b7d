"""What shuffling is for: no key is normalized in the company of its query."""

import numpy as np

from fastmoco.train.objectives.shuffle_bn import permutation


def test_with_32_samples_a_rank_every_group_of_keys_holds_rows_of_both_ranks():
    for seed in range(20):
        for step in range(20):
            groups = permutation(seed, step, batch=64, blocks=1).reshape(2, 32)
            owners = groups // 32
            assert all(len(set(group)) == 2 for group in owners)


def test_without_a_shuffle_they_hold_rows_of_one():
    groups = permutation(0, 0, batch=64, blocks=64).reshape(2, 32)
    assert [set(group // 32) for group in groups] == [{0}, {1}]


def test_a_place_is_as_likely_as_any_other():
    """Mean place of each row over many steps: uniform within 5 sigma."""
    places = np.stack([np.argsort(permutation(1, step, 64, 1)) for step in range(4000)])
    sigma = np.sqrt((64**2 - 1) / 12 / len(places))
    assert np.abs(places.mean(axis=0) - 31.5).max() < 5 * sigma
