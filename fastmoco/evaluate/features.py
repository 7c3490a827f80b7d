"""Features of the samples of a set, in id order, on any number of ranks."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fastmoco.config.encoder import EncoderSpec, PerChannel
from fastmoco.config.recipe import Runtime, View
from fastmoco.core.distributed import World
from fastmoco.core.precision import native_precision
from fastmoco.core.rng import Ids
from fastmoco.dataset.labels import Labelled
from fastmoco.dataset.shard_set import ConcatShardSets
from fastmoco.errors import DivergedError
from fastmoco.load.executor import Settings, get_settings
from fastmoco.load.loader import drawn_batches, evaluation_batches
from fastmoco.models.encoder import Encoder

Feature = Literal["head", "backbone"]
Pair = tuple[torch.Tensor, torch.Tensor]
"""(n, width) fp32 features and (n,) int64 labels, on one device."""
Samples = tuple[torch.Tensor, ...]
"""Features or images, labels, and unless all count the same (n, ...) fp32 weights."""

_BATCH = 128  # stays in the cache of a CPU core at 32 px; a GPU does not care


class Stopped(Exception):
    """Whoever asked for features or neighbors asked to stop before they were complete."""


def never() -> bool:
    """Return False: nobody asks to stop."""
    return False


@dataclass(frozen=True)
class Preprocessing:
    """How images are shown to a trained encoder: as in training, without augmentation.

    Attributes:
        size: side, pixels.
        mean, std: of the channels, in 0..1 units.
        precision: of the encoder's forward pass, "bf16", "fp32" (fp16 too) or "fp64".
        settings: how batches are made.
    """

    size: int
    mean: PerChannel
    std: PerChannel
    precision: str
    settings: Settings

    @property
    def drawn(self) -> dict[str, Any]:
        """The arguments by which a loader draws such images."""
        return {"size": self.size, "mean": self.mean, "std": self.std, "settings": self.settings}

    @property
    def share(self) -> float:
        """The central share of the short side: 224 / 256 from 160 px on, all of a small image."""
        return 224 / 256 if self.size >= 160 else 1.0

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context that the encoder computes in."""
        enabled = self.precision == "bf16"
        return torch.autocast(self.settings.device.type, torch.bfloat16, enabled=enabled)

    def cast(self, images: torch.Tensor) -> torch.Tensor:
        """Return images in the dtype of the encoder's weights."""
        return images.to(torch.float64 if self.precision == "fp64" else torch.float32)


def embed(
    encoder: Encoder,
    data: ConcatShardSets,
    feature: Feature | Literal["both"],
    preprocessing: Preprocessing,
    world: World = World(),
    ids: Ids | None = None,
    stop: Callable[[], bool] = never,
) -> torch.Tensor:
    """Return the (n, width) fp32 features of this rank's share of the samples, on the device.

    Args:
        encoder: in evaluation mode.
        data: the sets.
        feature: the head's output or the backbone's; neither is normalized. "both": of each
            sample the backbone's, then the head's.
        preprocessing: how images are shown.
        world: each embeds its share, see `World.share`.
        ids: int64, of the samples; None: all, in id order.
        stop: whether to give up, the same on all ranks; asked before each batch, equally often
            on every rank.

    Raises:
        Stopped: `stop` was true.
        DivergedError: on all ranks alike, if a feature is not a finite number; names its sample.
    """
    return _embed(encoder, data, feature, preprocessing, world, ids, stop)[:, 0]


def embed_views(
    encoder: Encoder,
    data: ConcatShardSets,
    views: Sequence[View],
    seed: int,
    preprocessing: Preprocessing,
    world: World,
    ids: Ids,
    stop: Callable[[], bool] = never,
) -> torch.Tensor:
    """Return (n, V, dim) fp32 outputs of the head for V views of each sample; else as `embed`.

    Args:
        views: how each is drawn: a function of the seed and the sample's place in `ids`.
        seed: of the draws.
    """
    return _embed(encoder, data, "head", preprocessing, world, ids, stop, (views, seed))


def _embed(
    encoder: Encoder,
    data: ConcatShardSets,
    feature: Feature | Literal["both"],
    preprocessing: Preprocessing,
    world: World,
    ids: Ids | None,
    stop: Callable[[], bool],
    draws: tuple[Sequence[View], int] | None = None,
) -> torch.Tensor:
    """Return (n, V, width) features: of the views that are drawn, else of the central one."""
    count = len(data) if ids is None else len(ids)
    own = world.share(count)
    views = len(draws[0]) if draws else 1
    batch = max(1, _BATCH // views)
    shown = {**preprocessing.drawn, "ids": own if ids is None else ids[own], "batch": batch}
    if draws:
        batches = drawn_batches(data, views=draws[0], seed=draws[1], first=own.start, **shown)
    else:
        batches = evaluation_batches(data, share=preprocessing.share, **shown)
    widths = {"head": encoder.dim, "backbone": encoder.features}
    width = widths.get(feature, sum(widths.values()))
    rows = torch.empty(own.stop - own.start, views, width, device=preprocessing.settings.device)
    finite = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    longest = -(-count // world.size)  # of the shares: all ranks ask equally often
    for first in range(0, longest, batch):
        if stop():
            raise Stopped
        drawn = next(batches, None)
        if drawn is None:
            continue
        with torch.inference_mode(), preprocessing.autocast():
            features = _forward(encoder, feature, preprocessing.cast(torch.cat(drawn.views)))
        here = slice(first, first + len(drawn.ids))
        rows[here] = features.view(views, -1, width).transpose(0, 1)
        finite[here] = rows[here].isfinite().flatten(1).all(dim=1)  # not waited for
    _check(finite, own.start, data, ids, world)
    return rows


def _forward(
    encoder: Encoder, feature: Feature | Literal["both"], images: torch.Tensor
) -> torch.Tensor:
    # By its parts, not by the call that may be compiled: a last batch of another size would have it
    # compiled anew, for sizes that vary, and training with it.
    features: torch.Tensor = encoder.backbone(images)
    if feature == "backbone":
        return features
    head: torch.Tensor = encoder.head(features)
    return head if feature == "head" else torch.cat([features, head], dim=1)


def _check(
    finite: torch.Tensor, start: int, data: ConcatShardSets, ids: Ids | None, world: World
) -> None:
    """Refuse features that are no numbers, whichever rank has them."""
    places = (~finite).nonzero()[:, 0].tolist()
    bad = sorted(world.union({start + place for place in places}))
    if bad:
        sample = int(bad[0] if ids is None else ids[bad[0]])
        raise DivergedError(
            f"The network's output is not a finite number for {len(bad)} images, such as "
            f"{data.describe(sample)}: its weights or the image's normalization are too large."
        )


def embed_labelled(
    encoder: Encoder,
    one: Labelled,
    feature: Feature,
    preprocessing: Preprocessing,
    world: World = World(),
    stop: Callable[[], bool] = never,
) -> Pair:
    """Return features and labels of this rank's share of labelled samples; see `embed`."""
    features = embed(encoder, one.data, feature, preprocessing, world, one.ids, stop)
    labels = torch.from_numpy(one.labels[world.share(len(one.labels))])
    return features, labels.to(features.device)


def make_preprocessing(spec: EncoderSpec, precision: str, settings: Settings) -> Preprocessing:
    """Return how an encoder is shown images: as its training did."""
    mean, std = spec.normalization()
    return Preprocessing(spec.image_size, mean, std, precision, settings)


def frozen_preprocessing(
    spec: EncoderSpec, runtime: Runtime, device: torch.device, world: World = World()
) -> Preprocessing:
    """Return the same for frozen fp32 weights: bf16 stays where it is native, all else is fp32."""
    native = native_precision(device.type)
    precision = "bf16" if runtime.precision in ("auto", "bf16") and native == "bf16" else "fp32"
    return make_preprocessing(spec, precision, get_settings(runtime, world, device))
