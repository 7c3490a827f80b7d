"""The finished shards of a set in the making: what an interrupted pack goes on from."""

import hashlib
import json
import os
from array import array
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastmoco.core.files import hash_file, new_file
from fastmoco.dataset.manifest import Shard
from fastmoco.dataset.shard_set import SAMPLE_DTYPE
from fastmoco.pack.levels import SAMPLE, Span
from fastmoco.pack.shard_layout import TAR_RECORD
from fastmoco.pack.worker import TAR_BLOCK, ChannelStats, Fragment, make_key


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard.

    Attributes:
        shard: its entry in the manifest.
        index_sha256: of its index.
        rows: `SAMPLE_DTYPE` of its samples; the shard number is not set yet.
        positions: (len(rows),) int64 of the samples in the shuffled order.
        rejects: (position, reason) of the images left out.
        totals: over its samples.
        spans: of the first `SAMPLE` of its samples that had more than 8 bits.
    """

    shard: Shard
    index_sha256: str
    rows: npt.NDArray[np.void]
    positions: npt.NDArray[np.int64]
    rejects: list[tuple[int, str]]
    totals: ChannelStats
    spans: list[Span]


class Journal:
    """Writes shards into a folder, each with its index and a record beside it.

    A record may reach the disk before its shard does: then their hashes differ after a power cut,
    and the shard is made again.
    """

    def __init__(self, folder: Path, gray: bool) -> None:
        self.folder, self.gray = folder, gray

    def finished(self, number: int) -> ShardRecord | None:
        """Return the record of a shard if its bytes are those of the record, else None."""
        path = self.folder / f"{_stem(number)}.tar"
        try:
            record = self.read(number)
            hashes = hash_file(path), hash_file(path.with_suffix(".idx"))
        except (OSError, ValueError, KeyError):
            return None
        return record if hashes == (record.shard.sha256, record.index_sha256) else None

    def write(self, number: int, fragments: Iterable[Fragment]) -> None:
        """Write a shard from its fragments; the record comes last and makes it count."""
        path = self.folder / f"{_stem(number)}.tar"
        parts, digest, at = _Parts(self.gray), hashlib.sha256(), 0
        with path.open("wb") as tar:
            for fragment in fragments:
                members = Path(fragment.tar).read_bytes()
                os.unlink(fragment.tar)
                tar.write(members)
                digest.update(members)
                parts.add(fragment, at)
                at += len(members)
            end = bytes(-(at + 2 * TAR_BLOCK) % TAR_RECORD + 2 * TAR_BLOCK)
            tar.write(end)
            digest.update(end)
            # Has the kernel begin to write, so that the sync at the end finds little left.
            tar.flush()
            os.posix_fadvise(tar.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        shard = Shard(
            name=path.name,
            samples=len(parts.positions),
            bytes=at + len(end),
            sha256=digest.hexdigest(),
        )
        index_sha256 = parts.write_index(path.with_suffix(".idx"))
        parts.write_record(self._record(number), shard, index_sha256)

    def read(self, number: int) -> ShardRecord:
        """Return the record of a finished shard.

        Raises:
            OSError, ValueError, KeyError: there is none, or it is damaged.
        """
        with np.load(self._record(number), allow_pickle=False) as stored:
            about = json.loads(str(stored["about"]))
            return ShardRecord(
                shard=Shard(**about["shard"]),
                index_sha256=about["index_sha256"],
                rows=stored["rows"],
                positions=stored["positions"],
                rejects=[(position, reason) for position, reason in about["rejects"]],
                totals=ChannelStats(**about["totals"]),
                spans=[
                    Span(kind, full and tuple(full), *ends) for kind, full, *ends in about["spans"]
                ],
            )

    def forget(self, number: int) -> None:
        """Remove a record: the set is whole."""
        self._record(number).unlink()

    def _record(self, number: int) -> Path:
        return self.folder / f".{_stem(number)}.record"


def _stem(number: int) -> str:
    return f"shard-{number:06d}"


class _Parts:
    """What the fragments of a shard say: as bytes, for it may be of a hundred thousand images."""

    def __init__(self, gray: bool) -> None:
        self.rows, self.positions, self.index = bytearray(), array("q"), bytearray()
        self.rejects: list[tuple[int, str]] = []
        self.totals = ChannelStats.of(gray)
        self.spans: list[Span] = []

    def add(self, fragment: Fragment, at: int) -> None:
        """Add a fragment whose members begin at a place of the tar."""
        rows = np.array(fragment.rows, dtype=SAMPLE_DTYPE)
        rows["offset"] += at
        self.rows += rows.tobytes()
        self.positions.extend(fragment.positions)
        self.index += "".join(f"{line}\n" for line in _index_lines(fragment, rows)).encode()
        self.rejects += fragment.rejects
        self.totals.add(fragment.totals)
        self.spans += fragment.spans[: SAMPLE - len(self.spans)]

    def write_index(self, path: Path) -> str:
        """Write the index; return its SHA-256."""
        with path.open("wb") as stream:
            stream.write(b"v1.2 %d\n" % len(self.positions))
            stream.write(self.index)
        return hash_file(path)

    def write_record(self, path: Path, shard: Shard, index_sha256: str) -> None:
        """Write what `Journal.read` reads."""
        about = {
            "shard": shard.model_dump(),
            "index_sha256": index_sha256,
            "rejects": self.rejects,
            "totals": asdict(self.totals),
            "spans": [astuple(span) for span in self.spans],
        }
        with new_file(path) as aside, aside.open("wb") as stream:
            np.savez(
                stream,
                rows=np.frombuffer(self.rows, dtype=SAMPLE_DTYPE),
                positions=np.frombuffer(self.positions, dtype=np.int64),
                about=np.array(json.dumps(about)),
            )


def _index_lines(fragment: Fragment, rows: npt.NDArray[np.void]) -> list[str]:
    """Return the lines of DALI's index (v1.2): `extension offset size name` for each member."""
    lines = []
    columns = (rows[name].tolist() for name in ("offset", "size", "label"))
    samples = zip(fragment.positions, fragment.extensions, *columns, strict=True)
    for position, extension, offset, size, label in samples:
        key = make_key(position)
        line = f"{extension} {offset} {size} {key}.{extension}"
        if label >= 0:  # its member lies before the image's: header, one block, the image's header
            before = offset - 2 * TAR_BLOCK
            line = f"cls {before} {len(str(label))} {key}.cls {line}"
        lines.append(line)
    return lines
