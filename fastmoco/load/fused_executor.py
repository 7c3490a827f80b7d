"""Views on the CPU, one pass per image: a thread decodes it and draws its views into the batch."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count

import numpy as np
import numpy.typing as npt
import torch

from fastmoco.core.malloc import keep_freed_memory
from fastmoco.dataset.reader import CorruptSamples
from fastmoco.load.decode import decode
from fastmoco.load.executor import (
    DecodedBatch,
    EncodedBatch,
    Images,
    PipelineSpec,
    ResidentImages,
    Settings,
    Source,
)
from fastmoco.load.fused_views import Table, render_gray_views, render_views, table

_CHUNK_IMAGES, _CHUNK_BYTES = 64, 128 * 1024  # one small image a task loses half in hand-overs


def render(
    source: Source, look: PipelineSpec, batch: int, settings: Settings
) -> Iterator[DecodedBatch]:
    """Draw batches ahead of their use, fp32 on every device; see `executor.Executor`.

    Raises:
        CorruptSamples: images cannot be decoded, or have another size than their set says.
    """
    keep_freed_memory(settings.device)  # or each batch's pages are filled with zeros first
    ahead: deque[_Drawing] = deque()
    with ThreadPoolExecutor(settings.threads, "views") as pool:
        try:
            for number in count():
                work = source(number)
                if work is None:
                    break
                ahead.append(_Drawing(work, look, pool, settings))
                if len(ahead) > settings.prefetch:
                    yield ahead.popleft().wait()
            while ahead:
                yield ahead.popleft().wait()
        finally:
            pool.shutdown(cancel_futures=True)


class _Drawing:
    """A batch in the making.

    Args:
        work: what to draw.
        look: what all batches have in common.
        pool: draws it.
        settings: where the views end up, and the threads of the pool.
    """

    def __init__(
        self, work: EncodedBatch, look: PipelineSpec, pool: ThreadPoolExecutor, settings: Settings
    ) -> None:
        self._work, self._device = work, settings.device
        shape = len(work.ids), look.size, look.size, look.channels
        self._views = [_empty(shape, settings.device) for _ in work.numbers]
        arrays = [view.numpy() for view in self._views]
        scale = (1 / (255 * np.array(look.std))).astype(np.float32)
        shift = (-np.array(look.mean) / look.std).astype(np.float32)
        tables = [table(params) for params in work.numbers]
        self._parts: list[tuple[slice, Future[None]]] = []
        for rows in _chunks(work.images, settings.threads):
            given = [params[rows] for params in tables], [array[rows] for array in arrays]
            part = pool.submit(_draw, work.images[rows], *given, scale, shift)
            self._parts.append((rows, part))

    def wait(self) -> DecodedBatch:
        """Return the batch once it is drawn."""
        corrupt: list[int] = []
        for rows, part in self._parts:
            try:
                part.result()
            except _NotAsPacked as failure:
                corrupt += self._work.ids[rows][failure.places].tolist()
        if corrupt:
            raise CorruptSamples(corrupt)
        views = (view.to(self._device, non_blocking=True) for view in self._views)
        return DecodedBatch(self._work, tuple(view.permute(0, 3, 1, 2) for view in views))


def _empty(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    if device.type == "cuda":  # torch keeps such memory until the copy out of it is done
        return torch.empty(shape, pin_memory=True)
    # numpy asks for huge pages where torch does not: fewer page faults in a new batch.
    return torch.from_numpy(np.empty(shape, np.float32))


def _chunks(images: Images, threads: int) -> Iterator[slice]:
    """Cut a batch into tasks: some small images, or one photograph."""
    most = max(1, min(_CHUNK_IMAGES, -(-len(images) // threads)))
    start = size = 0
    for place in range(len(images)):
        bytes_ = 0 if isinstance(images, ResidentImages) else len(images[place])
        if place > start and (place - start == most or size + bytes_ > _CHUNK_BYTES):
            yield slice(start, place)
            start, size = place, 0
        size += bytes_
    yield slice(start, len(images))


class _NotAsPacked(Exception):
    def __init__(self, places: list[int]) -> None:
        self.places = places


def _draw(
    images: Images,
    tables: list[Table],
    views: list[npt.NDArray[np.float32]],
    scale: npt.NDArray[np.float32],
    shift: npt.NDArray[np.float32],
) -> None:
    channels = views[0].shape[3]
    resident = images if isinstance(images, ResidentImages) else _in_memory(images, channels)
    render = render_views if channels == 3 else render_gray_views
    # A crop beyond the edge, of an image that is not the one of the table, would read elsewhere.
    inside = [(p[:, :2] + p[:, 2:4] <= resident.sizes).all(axis=1) for p in tables]
    if not np.all(inside):
        raise _NotAsPacked(np.flatnonzero(~np.all(inside, axis=0)).tolist())
    for number in np.unique(resident.which):
        places = np.flatnonzero(resident.which == number)
        lies = resident.files[number], resident.starts, resident.sizes
        for params, view in zip(tables, views, strict=True):
            render(*lies, params, places, scale, shift, view)


def _in_memory(encoded: list[npt.NDArray[np.uint8]], channels: int) -> ResidentImages:
    """Decode images; one that cannot be has no pixels."""
    images = [decode(image, channels) for image in encoded]
    sizes = np.array([(0, 0) if image is None else image.shape[:2] for image in images], np.int64)
    none = np.zeros((0, 0, channels), np.uint8 if channels == 3 else np.uint16)
    flat = [(none if image is None else image).reshape(-1) for image in images]
    starts = np.cumsum([0, *map(len, flat)], dtype=np.int64)[:-1]
    pixels = flat[0] if len(flat) == 1 else np.concatenate(flat)
    return ResidentImages([pixels], np.zeros(len(images), np.int64), starts, sizes)
