"""Batches of views by step number, and every sample once for evaluation."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from fastmoco.config.encoder import PerChannel
from fastmoco.config.recipe import Recipe, View
from fastmoco.core.distributed import World
from fastmoco.core.rng import Ids, Stream, uniforms
from fastmoco.dataset.reader import READERS, CorruptSamples, Reader
from fastmoco.dataset.shard_set import ConcatShardSets, ShardSet
from fastmoco.errors import DataError, UsageError
from fastmoco.load.executor import (
    DecodedBatch,
    EnabledOps,
    EncodedBatch,
    Executor,
    PipelineSpec,
    Settings,
    Source,
)
from fastmoco.load.pixel_cache import PixelCache, open_cache
from fastmoco.load.sampler import Plan, make_plan
from fastmoco.load.view_params import ViewParams, central, draw

_AHEAD = 3  # batches that are read before they are asked for


@dataclass(frozen=True)
class Batch:
    """One rank's share of a step.

    Attributes:
        ids: (n,) int64 sample ids.
        views: for each view an (n, C, size, size) normalized channels-last tensor on the device,
            fp32 on CPU and fp16 on GPU.
        step: the step that it belongs to.
    """

    ids: Ids
    views: tuple[torch.Tensor, ...]
    step: int


class Loader:
    """The training stream: batch `step` is a function of the plan's seed and the step alone.

    Args:
        data: the sets.
        plan: order and batch size.
        views: how each view is drawn.
        size: side of the views, pixels.
        mean, std: of the channels, in 0..1 units.
        settings: how batches are made.
        rank, ranks: this process draws its contiguous slice of every global batch.
        max_bad: damaged samples to go on without; the next good one stands in for each.

    Attributes:
        settings: how batches are made, the decoder decided.
        bad: ids of the damaged samples met so far.
    """

    def __init__(
        self,
        data: ConcatShardSets,
        plan: Plan,
        views: Sequence[View],
        *,
        size: int,
        mean: PerChannel,
        std: PerChannel,
        settings: Settings,
        rank: int = 0,
        ranks: int = 1,
        max_bad: int = 0,
    ) -> None:
        check_channels(data.sets, len(mean))
        self.data, self.plan, self.views = data, plan, tuple(views)
        self._look = PipelineSpec(size, mean, std, tuple(get_enabled_ops(view) for view in views))
        self._rank, self._ranks = rank, ranks
        self._reader = Reader(data)
        self.settings = _decided(settings, self._reader, self._look)
        self._max_bad = max_bad
        self.bad: set[int] = set()

    @classmethod
    def of(
        cls, recipe: Recipe, data: ConcatShardSets, settings: Settings, world: World = World()
    ) -> "Loader":
        """Return the training stream of a resolved recipe.

        Raises:
            DataError: the subset does not fit the data.
            UsageError: the batch is larger than the data.
        """
        assert recipe.encoder.mean and recipe.encoder.std, "the recipe is not resolved"
        return cls(
            data,
            make_plan(recipe, data),
            recipe.views,
            size=recipe.encoder.image_size,
            mean=recipe.encoder.mean,
            std=recipe.encoder.std,
            settings=settings,
            rank=world.rank,
            ranks=world.size,
            max_bad=recipe.data.max_bad_images,
        )

    @property
    def ids(self) -> Ids:
        """The (N,) ids of the samples that take part, ascending."""
        chosen = self.plan.chosen
        return np.arange(len(self.data)) if chosen is None else chosen

    @cached_property
    def _images(self) -> PixelCache | Reader:
        return open_cache(self.data, self.settings) or self._reader

    def numbers(self, positions: Ids, ids: Ids) -> list[ViewParams]:
        """Return each view's numbers at consecutive `positions`, which hold `ids`."""
        u = uniforms(self.plan.seed, int(positions[0]), len(positions), len(self.views))
        sizes = _sizes(self.data, ids)
        return [draw(view, u[i], sizes) for i, view in enumerate(self.views)]

    def work(self, step: int, pool: ThreadPoolExecutor | None = None) -> EncodedBatch:
        """Return what this rank has to draw at `step`.

        Args:
            step: its number.
            pool: see `Reader.fetch`.

        Raises:
            CorruptSamples: a shard is missing or was cut short.
        """
        positions = self.plan.positions(step, self._rank, self._ranks)
        ids = self.plan.order(positions, self.bad)
        images = self._images.fetch(ids, pool)
        return EncodedBatch(ids, images, self.numbers(positions, ids))

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of steps start, start + 1, ... without end, each read ahead by threads.

        What a batch holds depends on seed, step and the damage of the data alone: not on when, or
        by which rank, a damaged sample was met first.

        Raises:
            DataError: more samples are damaged than `max_bad`; names those of this batch.
        """
        step = start
        while True:
            try:
                for batch in self._drawn(step):
                    yield batch
                    step = batch.step + 1
            except CorruptSamples as failure:
                self.avoid(failure.ids)
                if len(self.bad) > self._max_bad:
                    raise DataError(_told(failure, self.data)) from failure

    def avoid(self, ids: Iterable[int]) -> None:
        """Show other samples instead of these from the next batch that is drawn on."""
        self.bad = self.bad.union(ids)  # not in place: threads that read ahead look at it

    def _drawn(self, start: int) -> Iterator[Batch]:
        share = self.plan.batch // self._ranks
        _ = self._images  # which may decode the sets, before threads ask for them
        with _read_ahead(lambda number, pool: self.work(start + number, pool)) as ahead:

            def source(number: int) -> EncodedBatch | None:
                work = ahead(number)
                if work and not self.bad.isdisjoint(work.ids.tolist()):
                    return self.work(start + number)  # it was read before they were known
                return work

            drawn = _draw_all(source, self._look, share, self.settings)
            for step, rendered in enumerate(drawn, start):
                yield Batch(rendered.work.ids, rendered.views, step)


def evaluation_batches(
    data: ConcatShardSets,
    *,
    ids: slice | Ids,
    size: int,
    mean: PerChannel,
    std: PerChannel,
    share: float,
    batch: int,
    settings: Settings,
) -> Iterator[Batch]:
    """Yield samples once, in the order given, as one central view.

    Args:
        data: the sets.
        ids: start and stop of a range of ids, or (n,) int64 ids.
        size: side of the view, pixels.
        mean, std: of the channels, in 0..1 units.
        share: of the short side that the central square spans, see `augment.central`.
        batch: samples a batch; the last one may hold fewer.
        settings: how batches are made.

    Raises:
        DataError: images are missing or damaged; names the samples.
    """

    def numbers(place: int, chunk: Ids) -> list[ViewParams]:
        return [central(_sizes(data, chunk), share)]

    look = PipelineSpec(size, mean, std, (EnabledOps(),))
    yield from _once(data, ids, numbers, look, batch, settings)


def drawn_batches(
    data: ConcatShardSets,
    *,
    ids: Ids,
    views: Sequence[View],
    seed: int,
    first: int,
    stream: Stream = Stream.VIEWS,
    size: int,
    mean: PerChannel,
    std: PerChannel,
    batch: int,
    settings: Settings,
) -> Iterator[Batch]:
    """Yield samples once, in the order given, as views that are drawn; else as above.

    Args:
        data, size, mean, std, batch, settings: see `evaluation_batches`.
        ids: (n,) int64.
        views: how each view is drawn.
        seed, stream: of the draws.
        first: the position of the first sample: the same position, the same views.
    """

    def numbers(place: int, chunk: Ids) -> list[ViewParams]:
        u = uniforms(seed, first + place, len(chunk), len(views), stream)
        sizes = _sizes(data, chunk)
        return [draw(view, u[i], sizes) for i, view in enumerate(views)]

    look = PipelineSpec(size, mean, std, tuple(get_enabled_ops(view) for view in views))
    yield from _once(data, ids, numbers, look, batch, settings)


def _once(
    data: ConcatShardSets,
    ids: slice | Ids,
    numbers: Callable[[int, Ids], list[ViewParams]],
    look: PipelineSpec,
    batch: int,
    settings: Settings,
) -> Iterator[Batch]:
    """Yield samples once; `numbers` draws the views of those from a place in `ids` on."""
    check_channels(data.sets, look.channels)
    reader = Reader(data)
    settings = _decided(settings, reader, look)
    whole = len(ids) if not isinstance(ids, slice) else ids.stop - ids.start
    images = open_cache(data, settings, build=whole == len(data)) or reader

    def work(number: int, pool: ThreadPoolExecutor) -> EncodedBatch | None:
        chunk = _part(ids, number * batch, batch)
        if not len(chunk):
            return None
        return EncodedBatch(chunk, images.fetch(chunk, pool), numbers(number * batch, chunk))

    try:
        with _read_ahead(work) as source:
            for step, rendered in enumerate(_draw_all(source, look, batch, settings)):
                yield Batch(rendered.work.ids, rendered.views, step)
    except CorruptSamples as failure:
        raise DataError(_told(failure, data)) from failure


def _part(ids: slice | Ids, start: int, count: int) -> Ids:
    """Return up to `count` ids from position `start` on."""
    if isinstance(ids, slice):
        first = ids.start + start
        return np.arange(first, min(first + count, ids.stop), dtype=np.int64)
    return ids[start : start + count]


def get_enabled_ops(view: View) -> EnabledOps:
    """Return the operators that a view needs."""
    jitters = any(view.jitter) and view.jitter_p > 0
    return EnabledOps(jitters or view.grayscale > 0, view.blur > 0, view.solarize > 0)


def _sizes(data: ConcatShardSets, ids: Ids) -> npt.NDArray[np.int64]:
    """Return (n, 2) height and width of the images."""
    rows = data.rows(ids)
    return np.stack([rows["height"], rows["width"]], axis=1).astype(np.int64)


def check_channels(sets: Iterable[ShardSet], channels: int) -> None:
    """Refuse sets of other images than an encoder takes.

    Raises:
        UsageError: naming the first.
    """
    for one in sets:
        if (found := one.manifest.channels) != channels:
            gray = "pack it anew with --gray" if channels == 1 else "pack it anew without --gray"
            keys = f"encoder.channels={found} encoder.mean=null encoder.std=null"
            raise UsageError(
                f"{one.root} is a set of images of {found} channel{'s' * (found > 1)}, the encoder "
                f"takes {channels}: {gray}, or train with {keys}."
            )


def _decided(settings: Settings, reader: Reader, look: PipelineSpec) -> Settings:
    """Return the settings with all that is `auto` decided, the same for all batches of a set."""
    if look.channels == 1:
        settings = replace(settings, executor="fused")  # DALI draws three
    if settings.decode != "auto" or settings.device.type == "cpu":
        return settings
    return replace(settings, decode="mixed" if reader.holds_large_jpegs() else "cpu")


@contextmanager
def _read_ahead(
    work: Callable[[int, ThreadPoolExecutor], EncodedBatch | None],
) -> Iterator[Source]:
    """Have the next batches read by threads, so that training does not wait for the storage.

    Args:
        work: makes the work of a batch, reading its images by the pool.
    """
    made: dict[int, Future[EncodedBatch | None]] = {}
    batches, readers = ThreadPoolExecutor(_AHEAD), ThreadPoolExecutor(READERS)

    def source(number: int) -> EncodedBatch | None:
        for later in range(number, number + _AHEAD + 1):
            if later not in made:
                made[later] = batches.submit(work, later, readers)
        return made.pop(number).result()

    try:
        yield source
    finally:
        readers.shutdown(cancel_futures=True)  # first, since the others wait for them
        batches.shutdown(cancel_futures=True)


def _draw_all(
    source: Source, look: PipelineSpec, batch: int, settings: Settings
) -> Iterator[DecodedBatch]:
    """Draw what a source asks for, and all that comes before a failure of it.

    Raises:
        CorruptSamples: images that are missing or damaged.
    """
    failures: list[CorruptSamples] = []

    def until_failure(number: int) -> EncodedBatch | None:
        try:
            return source(number)
        except CorruptSamples as failure:
            failures.append(failure)
            return None

    yield from _executor(settings.executor)(until_failure, look, batch, settings)
    if failures:
        raise failures[0]


def _executor(name: str) -> Executor:
    if name == "fused":
        from fastmoco.load import fused_executor as fused

        return fused.render
    try:
        from fastmoco.load import dali_executor as dali
    except ImportError as error:
        raise UsageError(
            "DALI is not installed: `pip install 'fastmoco[cuda13]'` (Linux; [cuda12] for a driver "
            "older than 580), or set runtime.executor=fused."
        ) from error
    return dali.render


def _told(failure: CorruptSamples, data: ConcatShardSets) -> str:
    named = "; ".join(data.describe(sample) for sample in failure.ids[:5])
    return (
        f"{len(failure.ids)} image(s) of a batch cannot be read: {named}. The shard was damaged "
        "after packing: copy the set again, or pack it anew. Training goes on without up to N "
        "damaged images if told so by data.max_bad_images=N."
    )
