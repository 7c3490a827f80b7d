"""Leaving out images whose bytes came before."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial

import numpy as np
import numpy.typing as npt

from fastmoco.pack.inputs import Input, Pixels, Unreadable
from fastmoco.pack.parallel import ordered_map
from fastmoco.pack.sources.base import Reject, Source

CHUNK = 64  # images a task
DIGEST = 16  # bytes: enough that equal digests mean equal images


def without_duplicates(sources: dict[str, Source], limit: int, workers: int) -> dict[str, Source]:
    """Return the sources without the images that came before, in the same source or another.

    Args:
        sources: by split.
        limit: bytes above which an image is not read (and will be refused anyway).
        workers: processes that read.
    """
    tasks = (chunk for source in sources.values() for chunk in _chunks(source))
    with closing(ordered_map(partial(_digests, limit=limit), tasks, workers)) as results:
        digests = np.concatenate([np.frombuffer(found, dtype=f"V{DIGEST}") for found in results])
    _, firsts, inverse = np.unique(digests, return_index=True, return_inverse=True)
    earlier: npt.NDArray[np.int64] = firsts[inverse]
    starts = np.cumsum([0, *map(len, sources.values())])
    named = list(sources.values())
    unique = {}
    for number, (split, source) in enumerate(sources.items()):
        mine = earlier[starts[number] : starts[number + 1]]
        rows = np.arange(len(source)) + starts[number]
        again = np.flatnonzero(mine != rows)
        left_out = [
            Reject(source.names[row], f"has the same bytes as {_name(named, starts, mine[row])!r}")
            for row in again.tolist()
        ]
        unique[split] = source.pick(np.flatnonzero(mine == rows), left_out)
    return unique


def _name(sources: list[Source], starts: npt.NDArray[np.int64], row: int) -> str:
    number = int(np.searchsorted(starts, row, side="right")) - 1
    return sources[number].names[int(row - starts[number])]


def _chunks(source: Source) -> Iterator[list[Input]]:
    for start in range(0, len(source), CHUNK):
        stop = min(start + CHUNK, len(source))
        yield [source.inputs[row] for row in range(start, stop)]


def _digests(inputs: Sequence[Input], limit: int) -> bytes:
    return b"".join(_digest(source, limit) for source in inputs)


def _digest(source: Input, limit: int) -> bytes:
    try:
        content = source.array.tobytes() if isinstance(source, Pixels) else source.read(limit)
    except Unreadable:
        content = repr(source).encode()  # like no other: the check will refuse it by name
    return hashlib.sha256(content).digest()[:DIGEST]
