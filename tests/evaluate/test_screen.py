"""The screened search: the same neighbours as fp32 finds, with fewer of them looked at."""

import pytest
import torch
from torch.nn.functional import normalize

from fastmoco.evaluate import knn, screen
from fastmoco.evaluate.knn import Neighbours
from fastmoco.evaluate.screen import Screen

K = 9


def rows(n: int, seed: int, spread: float = 1.0, dim: int = 24) -> torch.Tensor:
    """Return unit rows around five centres, or with a small spread nearly all in one place."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(5, dim, generator=torch.Generator().manual_seed(9))
    noise = torch.randn(n, dim, generator=generator)
    return normalize(centers[torch.randint(5, (n,), generator=generator)] + spread * noise, dim=1)


@pytest.mark.parametrize("size", [64 * K, 1000, 1151, 4096])
def test_the_neighbours_are_those_of_fp32(size: int) -> None:
    bank, queries = rows(size, 1), rows(70, 2)
    exact = (queries.double() @ bank.double().T).topk(K, dim=1)
    found = Screen(bank, 128).nearest(queries, K)
    assert found is not None
    similarity, index = found
    assert torch.equal(index.sort(dim=1).values, exact.indices.sort(dim=1).values)
    torch.testing.assert_close(
        similarity.sort(dim=1, descending=True).values.double(), exact.values, atol=1e-6, rtol=0
    )


def test_negative_similarities_only_are_found_too() -> None:
    """A column of the padding is at 0: it must not stand for a neighbour."""
    bank = rows(2000, 1)
    away = -normalize(bank.mean(dim=0, keepdim=True), dim=1)
    opposite = bank[(bank @ away.T)[:, 0] < 0][:150]
    exact = (away @ opposite.T).topk(2, dim=1)
    found = Screen(opposite, 1).nearest(away, 2)
    assert exact.values.max() < 0 and found is not None
    assert set(found[1][0].tolist()) == set(exact.indices[0].tolist())


def test_neighbours_that_bfloat16_takes_for_equal_are_told_apart() -> None:
    """The k nearest differ by less than a step of bfloat16 from those that follow."""
    bank = rows(64 * K, 1)
    target = rows(1, 5)
    crowd = normalize(target + 0.02 * rows(60, 6), dim=1)
    bank[::9][:60] = crowd[: len(bank[::9])]
    exact = (target.double() @ bank.double().T).topk(K, dim=1).indices
    coarse = (target.bfloat16() @ bank.bfloat16().T).topk(K, dim=1).indices
    found = Screen(bank, 1).nearest(target, K)
    assert found is not None
    assert set(found[1][0].tolist()) == set(exact[0].tolist()) != set(coarse[0].tolist())


def test_a_bank_that_is_all_equal_is_left_to_fp32() -> None:
    bank = rows(8192, 1, spread=0).mean(dim=0).repeat(8192, 1)
    assert Screen(normalize(bank, dim=1), 4).nearest(rows(4, 2), K) is None


@pytest.mark.parametrize("spread", [1.0, 0.0])
def test_votes_do_not_depend_on_the_screen(spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, queries = rows(4096, 1), rows(300, 2)
    if not spread:
        bank[:4000] = bank[0]
    neighbours = (bank, torch.arange(4096) % 7 if spread else torch.zeros(4096).long(), 7, K)
    votes = []
    for swift in (False, True):
        monkeypatch.setattr(knn, "pays", lambda bank, k, swift=swift: swift)
        votes.append(torch.cat(list(Neighbours(*neighbours).scores(queries))))
    torch.testing.assert_close(*votes, rtol=1e-4, atol=1e-5)


def test_small_banks_are_not_screened() -> None:
    assert not screen.pays(rows(2 * 64 * K - 1, 1), K)
