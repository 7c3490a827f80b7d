"""Which image goes to which shard.

It is fixed before the first image is read, so that shards can be made, and made again, apart from
each other.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastmoco.core.rng import Stream, shuffled
from fastmoco.pack.image import Rules
from fastmoco.pack.sources.base import Source
from fastmoco.pack.worker import TAR_BLOCK, Run

TAR_RECORD = 10240  # a tar is padded to a multiple of this, after two empty blocks
RUN_IMAGES, RUN_BYTES = 256, 4 * 2**20  # the most that a worker gets at a time
RUNS = 64  # at least, of a set: small ones are shared out among the workers, too
SMALL_IMAGE = 20_000  # bytes on average, below which every image enters the statistics
MEASURED = 512  # images, at least, that enter the statistics of larger ones
BLOCK = 2**14  # images whose costs are held at a time
SHRUNK_BYTES = 0.5  # a guess of what a shrunk image takes, for each pixel of its short side squared


class Schedule:
    """The shuffled order of a source, cut into shards of nearly equal size.

    Args:
        source: the images.
        seed: of the shuffle.
        shard_bytes: that no shard exceeds, unless an image takes half of it or more, or images
            grow when they are re-encoded.
        rules: what is accepted.

    Attributes:
        order: (N,) int64 rows of the source.
        bounds: (shards + 1,) positions in `order` where shards begin and end.
    """

    def __init__(self, source: Source, seed: int, shard_bytes: int, rules: Rules) -> None:
        self.source, self.rules = source, rules
        self.order = shuffled(seed, Stream.ORDER, 0, len(source))
        self.bounds = self._cut(shard_bytes - TAR_RECORD - 2 * TAR_BLOCK)
        small = source.inputs.sizes.mean() < SMALL_IMAGE
        self._stride = 1 if small else max(1, len(source) // MEASURED)

    @property
    def shards(self) -> int:
        """The number of shards."""
        return len(self.bounds) - 1

    def name_at(self, position: int) -> str:
        """Return the original name of the image at a position of the shuffled order."""
        return self.source.names[int(self.order[position])]

    def runs(self, shard: int, scratch: Path) -> Iterator[Run]:
        """Yield the runs of a shard, in order; see `Run` for `scratch`."""
        start, stop = self.bounds[shard : shard + 2]
        while start < stop:
            end = self._run_end(start, stop)
            yield self._run(shard, str(scratch), start, end)
            start = end

    def _tar_costs(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Return the bytes that the members of each image take, for a range of positions."""
        rows = self.order[start:stop]
        sizes = self.source.inputs.sizes[rows]
        if self.rules.short_side:
            sizes = np.minimum(sizes, int(SHRUNK_BYTES * self.rules.short_side**2))
        if self.rules.square:
            sizes = np.full_like(sizes, int(SHRUNK_BYTES * self.rules.square**2))
        label = np.where(self.source.labels[rows] >= 0, 2 * TAR_BLOCK, 0)
        costs: npt.NDArray[np.int64] = TAR_BLOCK + -(-sizes // TAR_BLOCK) * TAR_BLOCK + label
        return costs

    def _cut(self, room: int) -> list[int]:
        # A cut falls behind the image that crosses it, so each shard may get one more.
        largest = total = 0
        for _, costs in self._blocks():
            largest, total = max(largest, int(costs.max())), total + int(costs.sum())
        count = max(1, -(-total // max(room - largest, largest)))
        wanted = total * np.arange(1, count) / count
        cuts, end = {0, len(self.order)}, 0
        for start, costs in self._blocks():
            ends = end + np.cumsum(costs)
            here = wanted[(wanted > end) & (wanted <= ends[-1])]
            cuts.update((start + 1 + np.searchsorted(ends, here)).tolist())
            end = int(ends[-1])
        return sorted(cuts)

    def _blocks(self) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """Yield positions and the costs from there on: those of all would be the peak of memory."""
        for start in range(0, len(self.order), BLOCK):
            yield start, self._tar_costs(start, start + BLOCK)

    def _run_end(self, start: int, stop: int) -> int:
        images = min(RUN_IMAGES, max(1, len(self.order) // RUNS))
        taken = np.cumsum(self._tar_costs(start, min(stop, start + images)))
        return start + max(1, int(np.searchsorted(taken, RUN_BYTES, side="right")))

    def _run(self, shard: int, scratch: str, start: int, end: int) -> Run:
        rows = self.order[start:end]
        return Run(
            shard=shard,
            scratch=scratch,
            first=start,
            inputs=[self.source.inputs[row] for row in rows.tolist()],
            labels=self.source.labels[rows].tolist(),
            measured=[position % self._stride == 0 for position in range(start, end)],
            rules=self.rules,
        )


def divided(source: Source, fractions: dict[str, float], seed: int) -> dict[str, Source]:
    """Divide a source at random into parts, each with the same share of every class.

    Args:
        source: the images.
        fractions: of each part; they sum to 1.
        seed: of the division.
    """
    chosen: dict[str, list[npt.NDArray[np.int64]]] = {name: [] for name in fractions}
    for label in np.unique(source.labels):
        rows = np.flatnonzero(source.labels == label)
        rows = rows[shuffled(seed, Stream.SPLIT, int(label), len(rows))]
        ends = np.round(np.cumsum([0.0, *fractions.values()]) * len(rows)).astype(int)
        for name, start, end in zip(fractions, ends, ends[1:], strict=False):
            chosen[name].append(rows[start:end])
    return source.parts({name: np.sort(np.concatenate(rows)) for name, rows in chosen.items()})
