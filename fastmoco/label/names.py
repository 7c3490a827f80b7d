"""Which sample of a set a written name means."""

import hashlib
import os
import posixpath
import shlex
import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from fastmoco.core.rng import Ids
from fastmoco.dataset.classes import parse_number
from fastmoco.dataset.manifest import CHUNK
from fastmoco.dataset.shard_set import ShardSet
from fastmoco.pack.listing import tidied

_DIGEST = 16  # bytes of a name's hash: among 10^9 names, two agree with probability 10^-21
_UNMATCHED = 127


class Names(Sequence[str]):
    """Many names one after the other in one buffer: a tenth of the memory of a list of texts."""

    def __init__(self) -> None:
        self._bytes, self._ends = bytearray(), array("q", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, row: int) -> str:  # type: ignore[override]
        stored = bytes(self._bytes[self._ends[row] : self._ends[row + 1]])
        return stored.decode("utf-8", "surrogateescape")

    def append(self, name: str) -> None:
        """Add a name."""
        self._bytes += name.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._bytes))


def find_samples(shard_set: ShardSet, names: Sequence[str], folder: str | None) -> tuple[Ids, Ids]:
    """Find the sample of each name, in one pass over the names of the set.

    Args:
        shard_set: the set.
        names: as they are written.
        folder: what stands before the names of the set in them.

    Returns:
        (n,) ids, -1 for none; and (n,) of another sample that fits as well, -1 for none.
    """
    wanted = _Wanted(names, folder)
    for some, start in _names(shard_set):
        wanted.offer(some, start)
    return wanted.ids, wanted.other


def is_name_of(name: str, stored: bytes) -> bool:
    """Whether a written name fits that of a sample."""
    forms = {form.encode("utf-8", "surrogateescape") for form in _forms(name, ())}
    return any(key in forms for key, _ in _keys(stored))


class _Wanted:
    """Written names, and the sample that each one means.

    A name is the whole name of a sample, that without the extension, its last part, or that
    without the extension; the first of these that fits counts, and must fit one sample alone. In
    each it may be as it is written, tidied, or normalized.
    """

    def __init__(self, names: Sequence[str], folder: str | None) -> None:
        roots = [] if folder is None else [tidied(folder), tidied(os.path.abspath(folder))]
        hashes, rows, forms = [], array("q"), array("b")
        for row, written in enumerate(names):
            for form, name in enumerate(_forms(written, roots)):
                hashes.append(_hash(name.encode("utf-8", "surrogateescape")))
                rows.append(row)
                forms.append(form)
        found = np.array(hashes, dtype=f"S{_DIGEST}")
        order = np.argsort(found, kind="stable")
        self.hashes, self.rows = found[order], np.array(rows)[order]
        self.forms = np.array(forms)[order]
        self.ids = np.full(len(names), -1, dtype=np.int64)
        self.other = np.full(len(names), -1, dtype=np.int64)  # another sample that fits as well
        self.rank = np.full(len(names), _UNMATCHED, dtype=np.int8)

    def offer(self, names: Sequence[bytes], start: int) -> None:
        """Look at the names of the samples from `start` on."""
        keys = [
            (key, rank, start + row) for row, name in enumerate(names) for key, rank in _keys(name)
        ]
        hashes = np.array([_hash(key) for key, _, _ in keys], dtype=f"S{_DIGEST}")
        first, last = (np.searchsorted(self.hashes, hashes, side) for side in ("left", "right"))
        for place in np.flatnonzero(last > first).tolist():
            _, rank, sample = keys[place]
            for at in range(first[place], last[place]):
                self._match(int(self.rows[at]), sample, max(rank, rank // 3 * 3 + self.forms[at]))

    def _match(self, row: int, sample: int, rank: int) -> None:
        if rank < self.rank[row]:
            self.rank[row], self.ids[row], self.other[row] = rank, sample, -1
        elif rank == self.rank[row] and sample != self.ids[row]:
            self.other[row] = sample


def _forms(name: str, roots: Sequence[str]) -> Iterator[str]:
    yield name
    tidy = tidied(name)
    tidy = next((tidy[len(root) + 1 :] for root in roots if tidy.startswith(f"{root}/")), tidy)
    normal = unicodedata.normalize("NFC", tidy)
    if tidy != name or normal != tidy:
        yield tidy
    if normal != tidy:
        yield normal


def _keys(name: bytes) -> Iterator[tuple[bytes, int]]:
    """Yield what a sample may be called, with 3 x how far that is from its name, + 2 if normal."""
    member = name.partition(b".tar!")[2] or name  # of a shard that was adopted
    base = member.rpartition(b"/")[2]
    stems = (posixpath.splitext(member)[0], base, posixpath.splitext(base)[0])
    seen = set()
    for level, key in enumerate((name, member, *stems)):
        if key in seen:
            continue
        seen.add(key)
        yield key, 3 * level
        if not key.isascii():
            text = unicodedata.normalize("NFC", key.decode("utf-8", "surrogateescape"))
            yield text.encode("utf-8", "surrogateescape"), 3 * level + 2


def _hash(name: bytes) -> bytes:
    return hashlib.blake2b(name, digest_size=_DIGEST).digest()


def _names(shard_set: ShardSet) -> Iterator[tuple[list[bytes], int]]:
    for start in range(0, len(shard_set), CHUNK):
        yield shard_set.names(start, min(start + CHUNK, len(shard_set))), start


def get_left_out(shard_set: ShardSet) -> set[str]:
    """Return what the rejects of a set may be called."""
    found: set[str] = set()
    for name in shard_set.rejects():
        keys = _keys(name.encode("utf-8", "surrogateescape"))
        found |= {key.decode("utf-8", "surrogateescape") for key, _ in keys}
    return found


def guess_meaning(shard_set: ShardSet, column: str, name: str) -> Iterable[str]:
    """Yield what may be meant by a column that holds `name`, which no sample has."""
    if column == "id" and parse_number(name.strip()) is not None:
        yield "If these are the numbers of samples in the set, call the column `sample`."
    parts = tidied(name).split("/")
    tails = {
        "/".join(parts[cut:]).encode("utf-8", "surrogateescape"): cut
        for cut in range(1, len(parts))
    }
    for names, _ in _names(shard_set):
        for found in tails.keys() & set(names):
            root = "/".join(parts[: tails[found]]) or "/"
            yield f"If the names of the set begin behind {root}, pass --root {shlex.quote(root)}."
            return
