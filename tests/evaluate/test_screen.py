"""The screened search: the same neighbours as fp32 finds, with fewer of them looked at."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

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
    found = Screen(bank).nearest(queries, K)
    assert found is not None
    similarity, index = found
    assert torch.equal(index.sort(dim=1).values, exact.indices.sort(dim=1).values)
    torch.testing.assert_close(
        similarity.sort(dim=1, descending=True).values.double(), exact.values, atol=1e-6, rtol=0
    )


def test_negative_similarities_only_are_left_to_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits of negative numbers do not order as the numbers do."""
    bank = rows(2000, 1)
    away = -normalize(bank.mean(dim=0, keepdim=True), dim=1)
    opposite = bank[(bank @ away.T)[:, 0] < 0][:150]
    exact = (away @ opposite.T).topk(2, dim=1)
    assert exact.values.max() < 0 and Screen(opposite).nearest(away, 2) is None
    monkeypatch.setattr(knn, "pays", lambda bank, k: True)
    (votes,) = Neighbours(opposite, torch.arange(len(opposite)), len(opposite), 2).scores(away)
    assert set(votes[0].nonzero()[:, 0].tolist()) == set(exact.indices[0].tolist())


def test_more_queries_than_before_find_room() -> None:
    bank, queries = rows(1000, 1), rows(70, 2)
    asked = Screen(bank)
    few, all_ = (asked.nearest(queries[:n], K) for n in (3, 70))
    assert few is not None and all_ is not None
    torch.testing.assert_close(few[0].sort().values, all_[0][:3].sort().values)


def test_neighbours_that_bfloat16_takes_for_equal_are_told_apart() -> None:
    """The k nearest differ by less than a step of bfloat16 from those that follow."""
    bank = rows(64 * K, 1)
    target = rows(1, 5)
    crowd = normalize(target + 0.02 * rows(60, 6), dim=1)
    bank[::9][:60] = crowd[: len(bank[::9])]
    exact = (target.double() @ bank.double().T).topk(K, dim=1).indices
    coarse = (target.bfloat16() @ bank.bfloat16().T).topk(K, dim=1).indices
    found = Screen(bank).nearest(target, K)
    assert found is not None
    assert set(found[1][0].tolist()) == set(exact[0].tolist()) != set(coarse[0].tolist())


def test_a_bank_that_is_all_equal_is_left_to_fp32() -> None:
    bank = rows(1, 1).repeat(8192, 1)
    near = normalize(bank[:4] + 0.1 * rows(4, 2), dim=1)
    assert Screen(bank).nearest(near, K) is None


def test_threads_do_not_disturb_each_other() -> None:
    bank, shares = rows(20_000, 1), rows(640, 2).split(16)
    asked = Screen(bank)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda share: asked.nearest(share, K), shares))
    for one, share in zip(found, shares, strict=True):
        assert one is not None
        exact = (share @ bank.T).topk(K, dim=1)
        torch.testing.assert_close(one[0].sort(descending=True).values, exact.values)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("spread", [1.0, 0.0])
def test_votes_do_not_depend_on_the_screen(
    spread: float,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
    torch_threads: Callable[[int], None],
) -> None:
    """Nor on how many threads look; later ones are not held to a worker's share."""
    bank, queries = rows(4096, 1), rows(300, 2)
    if not spread:
        bank[:4000] = bank[0]
    neighbours = (bank, torch.arange(4096) % 7 if spread else torch.zeros(4096).long(), 7, K)
    votes = []
    for count, swift in ((1, False), (threads, True)):
        monkeypatch.setattr(knn, "pays", lambda bank, k, swift=swift: swift)
        torch_threads(count)
        votes.append(torch.cat(list(Neighbours(*neighbours).scores(queries))))
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == count
    torch.testing.assert_close(*votes, rtol=1e-4, atol=1e-5)


def test_small_banks_are_not_screened() -> None:
    assert not screen.pays(rows(4 * 32 * K - 1, 1), K)
