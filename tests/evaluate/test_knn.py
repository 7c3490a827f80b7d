"""kNN: scikit-learn's classifier with the same weights is the reference."""

from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda import NEEDS_FAKES
from threads import on_ranks
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from fastmoco.core.distributed import World
from fastmoco.evaluate import knn
from fastmoco.evaluate.features import Stopped
from fastmoco.evaluate.knn import KNNClassifier
from fastmoco.evaluate.predictions import Predictions

CLASSES, DIM = 5, 16
Features = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def features() -> Features:
    """A bank of 300 and 120 queries in overlapping clusters; lengths vary, as in a backbone."""
    random = np.random.default_rng(0)
    centers = random.normal(size=(CLASSES, DIM))

    def sample(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = random.integers(0, CLASSES, n)
        points = centers[labels] + 1.5 * random.normal(size=(n, DIM))
        points *= random.uniform(0.1, 10, (n, 1))
        return torch.tensor(points, dtype=torch.float32), torch.tensor(labels)

    return *sample(300), *sample(120)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """21 queries and 32 rows of the bank at a time; neither divides what the ranks hold."""
    monkeypatch.setattr(knn, "_CHUNK", 21)
    monkeypatch.setattr(knn, "_BLOCK", 32)


def theirs(bank: torch.Tensor, labels: torch.Tensor, k: int, t: float) -> Any:
    from sklearn.neighbors import KNeighborsClassifier  # a machine with a GPU may lack it

    # Their metric is 1 - similarity; the constant factor exp(1 / t) cancels in the vote.
    model = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp(-d / t))
    return model.fit(bank.double().numpy(), labels.numpy())


@pytest.mark.parametrize("k", [1, 7, 50])
@pytest.mark.parametrize("t", [0.02, 0.1, 1.0])
def test_votes_are_scikit_learns(features: Features, k: int, t: float) -> None:
    bank, labels, queries, wanted = features
    model = theirs(bank, labels, k, t)
    ours = KNNClassifier(bank, labels, CLASSES, k, t)
    votes = torch.cat(list(ours.scores(queries)))
    shares = (votes / votes.sum(dim=1, keepdim=True)).numpy()
    expected = model.predict_proba(queries.double().numpy())
    np.testing.assert_allclose(shares, expected, atol=2e-4)
    accuracy = 100 * model.score(queries.double().numpy(), wanted.numpy())
    assert ours.accuracy(queries, wanted) == pytest.approx(accuracy, abs=1e-4)
    assert 40 < accuracy < 95  # neither trivial nor chance


def test_a_k_beyond_the_bank_lets_all_of_it_vote(features: Features) -> None:
    bank, labels, queries, _ = features
    model = theirs(bank[:30], labels[:30], 30, 0.5)
    ours = KNNClassifier(bank[:30], labels[:30], CLASSES, 200, 0.5)
    votes = torch.cat(list(ours.scores(queries)))
    assert ours.k == 30
    assert np.array_equal(votes.argmax(1).numpy(), model.predict(queries.double().numpy()))


def test_a_bank_with_fewer_rows_than_are_asked_for_gives_them_all(features: Features) -> None:
    bank, labels, queries, _ = features
    similarity, rows = KNNClassifier(bank[:5], labels[:5], CLASSES).nearest(queries, 8)
    assert rows.sort(dim=1).values.tolist() == [list(range(5))] * len(queries)
    assert similarity.isfinite().all()


def test_chunks_do_not_matter(
    features: Features, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, labels, queries, _ = features
    neighbors = KNNClassifier(bank, labels, CLASSES, 50)
    (whole,) = neighbors.scores(queries)
    nearest = neighbors.nearest(queries, 40)
    request.getfixturevalue("small_chunks")
    parts = list(neighbors.scores(queries))
    assert [len(part) for part in parts] == [21] * 5 + [15]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)
    similarity, rows = neighbors.nearest(queries, 40)
    assert torch.equal(rows, nearest[1])
    torch.testing.assert_close(similarity, nearest[0])


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("bank_size", "asked", "k"), [(300, 120, 20), (9, 4, 3), (9, 50, 20)])
@pytest.mark.parametrize("size", [2, 3, 7])
def test_ranks_do_not_matter(
    features: Features, size: int, bank_size: int, asked: int, k: int
) -> None:
    """Nor where some hold fewer rows or queries than others, or none of either."""
    bank, labels, queries, wanted = (
        part[:n] for part, n in zip(features, [bank_size] * 2 + [asked] * 2, strict=True)
    )
    alone = KNNClassifier(bank, labels, CLASSES, k).predict(queries, wanted)

    def work(ranks: World) -> tuple[Predictions, int]:
        held, own = ranks.share(bank_size), ranks.share(asked)
        calls: list[None] = []
        neighbors = KNNClassifier(bank[held], labels[held], CLASSES, k, world=ranks)
        found = neighbors.predict(queries[own], wanted[own], lambda: bool(calls.append(None)))
        return found, len(calls)

    results = on_ranks(size, work)
    assert len({calls for _, calls in results}) == 1  # whoever asks more often waits for ever
    for found, _ in results:
        assert torch.equal(found.labels, wanted)
        assert torch.equal(found.predicted, alone.predicted)
        assert torch.equal(found.place, alone.place)
        torch.testing.assert_close(found.confidence, alone.confidence)


def test_of_equal_neighbors_the_first_ranks_vote() -> None:
    row = torch.ones(1, DIM)

    def work(ranks: World) -> torch.Tensor:
        bank = KNNClassifier(row, torch.tensor([ranks.rank]), classes=5, k=2, world=ranks)
        return torch.cat(list(bank.scores(row)))

    assert all(votes.tolist() == [[1, 1, 0, 0, 0]] for votes in on_ranks(5, work))


@pytest.mark.usefixtures("small_chunks")
def test_a_stop_is_heard_before_each_product(features: Features) -> None:
    bank, labels, queries, wanted = features
    calls: list[None] = []

    def stop() -> bool:
        calls.append(None)
        return len(calls) == 25

    neighbors = KNNClassifier(bank, labels, CLASSES)
    with pytest.raises(Stopped):
        neighbors.predict(queries, wanted, stop)
    assert len(calls) == 25  # of 6 chunks of the queries times 10 blocks of the bank


def test_the_length_of_a_feature_does_not_matter(features: Features) -> None:
    bank, labels, queries, _ = features
    plain = torch.cat(list(KNNClassifier(bank, labels, CLASSES, 20).scores(queries)))
    scaled = torch.cat(list(KNNClassifier(5 * bank, labels, CLASSES, 20).scores(0.2 * queries)))
    torch.testing.assert_close(scaled, plain, rtol=1e-4, atol=1e-4)


def test_a_class_without_a_vote_is_not_among_the_first_five() -> None:
    bank = torch.eye(6)
    found = KNNClassifier(bank, torch.arange(6), classes=6, k=2).predict(
        bank, torch.arange(6).roll(3)
    )
    assert found.top(1) == 0 and found.top(5) < 40  # two of six voted for; five of six by order
    assert KNNClassifier(bank, torch.arange(6), 6, k=2).predict(bank, torch.arange(6)).top(5) == 100


class Memory(TorchDispatchMode):
    """Counts the bytes of all tensors that live at a time.

    Attributes:
        peak: the most.
        live: bytes by storage.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.live: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.live[storage] = storage.nbytes()
        self.peak = max(self.peak, sum(self.live.values()))
        return result


class OneOfEight(World):
    """Takes all others to be as it is."""

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([rows] * 8)

    def gather_object(self, value: Any) -> list[Any]:
        return [value] * 8


@NEEDS_FAKES
def test_memory_of_a_rank_for_imagenet_on_eight() -> None:
    """At full size, on tensors that are never allocated: a share of the bank, twice while it is
    normalized, and 128 MiB of similarities with what is made of them. The whole bank: 10.5 GB."""
    ranks, width = OneOfEight(0, 8), 2048
    bank, asked = (len(range(n)[ranks.share(n)]) for n in (1_281_167, 2000))
    with FakeTensorMode(), Memory() as memory:
        labels = torch.zeros(bank, dtype=torch.int64, device="cuda")
        features = torch.zeros(bank, width, device="cuda")
        neighbors = KNNClassifier(features, labels, 1000, world=ranks)
        share = features.nbytes
        del features
        assert 2 * share < memory.peak < 2.01 * share < 2.65e9
        memory.peak = 0
        queries = torch.zeros(asked, width, device="cuda")
        votes = [len(part) for part in neighbors.scores(queries)]
    assert votes == [64, 64, 64, 58]
    block = 4 * 512 * 65_536
    assert share + block < memory.peak < share + 1.1 * block < 1.5e9


@pytest.mark.gpu
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_gpu_gives_the_numbers_of_the_cpu(
    features: Features, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also under the settings of a recipe with `deterministic: true`."""
    bank, labels, queries, wanted = features
    here = KNNClassifier(bank, labels, CLASSES, 20).predict(queries, wanted)
    neighbors = KNNClassifier(bank.cuda(), labels.cuda(), CLASSES, 20)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    try:
        there = neighbors.predict(queries.cuda(), wanted.cuda())
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(there.predicted, here.predicted) and there.summary() == here.summary()
    torch.testing.assert_close(there.confidence, here.confidence)
    assert all(votes.is_cuda for votes in neighbors.scores(queries.cuda()))
