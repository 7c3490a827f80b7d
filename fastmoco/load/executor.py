"""What the loader asks of an executor, whichever of the two it is."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from fastmoco.config.encoder import PerChannel
from fastmoco.config.recipe import Runtime
from fastmoco.core.cores import count_cores
from fastmoco.core.distributed import World
from fastmoco.errors import UsageError
from fastmoco.load.decode import Pixels
from fastmoco.load.view_params import ViewParams

_MOST_THREADS = 16  # more wait for each other: MLPerf feeds an H100 by 6


@dataclass(frozen=True)
class EnabledOps:
    """Which operators a view needs beside crop, flip and normalization."""

    color: bool = False
    blur: bool = False
    solarize: bool = False


@dataclass(frozen=True)
class PipelineSpec:
    """What all batches have in common.

    Attributes:
        size: side of the square views, pixels.
        mean, std: of the channels, three or one, in 0..1 units.
        views: the operators that each view needs.
    """

    size: int
    mean: PerChannel
    std: PerChannel
    views: tuple[EnabledOps, ...]

    @property
    def channels(self) -> int:
        """Of an image."""
        return len(self.mean)


@dataclass(frozen=True)
class Settings:
    """How batches are made; none of it changes what they hold, but for a decoder's rounding.

    Attributes:
        executor: "dali" or "fused".
        device: where the views end up.
        threads: decoding threads.
        prefetch: batches made ahead.
        decode, hw_decoder_load: see `config.Recipe`; without a GPU neither counts.
        pixels, cache: see `config.Recipe`.
    """

    executor: Literal["dali", "fused"] = "dali"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    threads: int = 2
    prefetch: int = 3
    decode: Literal["auto", "cpu", "mixed"] = "auto"
    hw_decoder_load: float = 0.65
    pixels: Literal["auto", "cached", "decoded"] = "decoded"
    cache: Path | None = None


def get_settings(runtime: Runtime, world: World, device: torch.device) -> Settings:
    """Return how batches are made here.

    Raises:
        UsageError: what it asks for needs a GPU and DALI.
    """
    executor = runtime.executor
    if executor == "auto":
        executor = "fused" if device.type == "cpu" else "dali"
    if runtime.decode == "mixed" and (device.type == "cpu" or executor != "dali"):
        raise UsageError(
            "runtime.decode: mixed needs a GPU and runtime.executor: dali. Set runtime.decode=auto."
        )
    threads = runtime.threads or min(_MOST_THREADS, count_cores(world.local_size))
    return Settings(
        executor,
        device,
        threads,
        runtime.prefetch,
        runtime.decode,
        runtime.hw_decoder_load,
        runtime.pixels,
        runtime.cache,
    )


@dataclass(frozen=True)
class ResidentImages:
    """Decoded images of a batch, in files that are mapped into memory.

    Attributes:
        files: flat pixels of each set, as `decode` gives them.
        which: (n,) the file of each image.
        starts: (n,) int64, where it begins there.
        sizes: (n, 2) int64 height and width.
    """

    files: list[Pixels]
    which: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]

    def __getitem__(self, rows: slice) -> "ResidentImages":
        return ResidentImages(self.files, self.which[rows], self.starts[rows], self.sizes[rows])

    def __len__(self) -> int:
        return len(self.which)


Images = list[npt.NDArray[np.uint8]] | ResidentImages
"""Encoded images, each its bytes; or decoded ones, for the fused executor alone."""


@dataclass(frozen=True)
class EncodedBatch:
    """One batch to render: images and, for each view, the numbers that draw it."""

    ids: npt.NDArray[np.int64]
    images: Images
    numbers: list[ViewParams]


@dataclass(frozen=True)
class DecodedBatch:
    """A batch that has been drawn: for each view an (n, C, size, size) channels-last tensor."""

    work: EncodedBatch
    views: tuple[torch.Tensor, ...]


Source = Callable[[int], EncodedBatch | None]
"""Gives the work of batch 0, 1, ...; None ends the stream."""

Executor = Callable[[Source, PipelineSpec, int, Settings], Iterator[DecodedBatch]]
"""Draws what a source asks for: (source, look, samples a batch at the most, settings)."""
