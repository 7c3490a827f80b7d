import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from waits import no_waits

from fastmoco.train.objectives.queue import KeyQueue

OK = torch.tensor(True)


@given(st.integers(1, 12), st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_any_batch_size_wraps_like_a_list(size, batches):
    queue = KeyQueue(size, 2, seed=0)
    plain = list(queue.keys.clone())
    pointer = total = 0
    for batch in batches:
        keys = torch.arange(total, total + batch).float()[:, None].repeat(1, 2)
        queue.enqueue(keys, OK)
        for key in keys:
            plain[pointer] = key
            pointer = (pointer + 1) % size
        total += batch
        assert torch.equal(queue.keys, torch.stack(plain))
        assert int(queue.pointer) == pointer
        assert int(queue.filled) == min(total, size)


def test_a_refused_batch_changes_nothing_even_if_it_is_nan():
    queue = KeyQueue(8, 2, seed=0)
    before = queue.keys.clone()
    queue.enqueue(torch.full((3, 2), torch.nan), torch.tensor(False))
    assert torch.equal(queue.keys, before)
    assert int(queue.pointer) == int(queue.filled) == 0


def test_it_starts_with_unit_vectors_of_its_seed():
    first, same, other = (KeyQueue(64, 8, seed) for seed in (1, 1, 2))
    assert torch.allclose(first.keys.norm(dim=1), torch.ones(64))
    assert torch.equal(first.keys, same.keys)
    assert not torch.equal(first.keys, other.keys)


def test_enqueue_writes_in_place():
    queue = KeyQueue(1024, 128, seed=0)
    place = queue.keys.data_ptr()
    queue.enqueue(torch.ones(100, 128), OK)
    assert queue.keys.data_ptr() == place


@pytest.mark.gpu
def test_enqueue_never_waits_for_the_gpu():
    queue = KeyQueue(1024, 128, seed=0).cuda()
    keys, ok = torch.ones(100, 128, device="cuda"), OK.cuda()
    with no_waits():
        queue.enqueue(keys, ok)
