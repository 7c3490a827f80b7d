"""The loaders that people train MoCo with, as arms of `benchmarks/compare.py loader`.

Each draws two views with the augmentation of MoCo v2, and normalizes them by ImageNet's statistics.
"""

import random
from collections.abc import Generator, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from harness.arm import Section
from harness.view_timing import MEAN, STD, WARM_UP, Views, measured
from torch.utils.data import DataLoader, RandomSampler

BUFFER = 1000  # samples that the webdataset pipeline shuffles among


class _TwoCrops:
    """Applies a transform twice."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __call__(self, image: Any) -> list[torch.Tensor]:
        return [self.transform(image), self.transform(image)]


class _PilBlur:
    """The blur of the official code: PIL's, with a random radius."""

    def __call__(self, image: Any) -> Any:
        from PIL import ImageFilter

        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def _augmentation(of: ModuleType, size: int) -> list[Any]:
    """Return the operations of MoCo v2 on PIL images, of torchvision's transforms or of its v2."""
    return [
        of.RandomResizedCrop(size, scale=(0.2, 1.0)),
        of.RandomApply([of.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        of.RandomGrayscale(p=0.2),
        of.RandomApply([_PilBlur()], p=0.5),
        of.RandomHorizontalFlip(),
    ]


def imagefolder(
    section: Section, root: str, size: int, batch: int, batches: int, workers: int
) -> dict[str, Any]:
    """Draw as the official code does: ImageFolder, PIL, torchvision's transforms."""
    import torchvision  # noqa: F401  # its import is not what is measured

    count = WARM_UP + batches
    return measured(section, lambda: official_views(root, size, batch, count, workers), batches)


def official_views(root: str, size: int, batch: int, count: int, workers: int) -> Generator[Views]:
    """Yield `count` batches of two views of the images of a folder, as the official code does."""
    from torchvision import datasets, transforms

    transform = transforms.Compose(
        [
            *_augmentation(transforms, size),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    folder = datasets.ImageFolder(root, _TwoCrops(transform))
    return _views(_loader(folder, batch, count, workers))


def lightly(
    section: Section, root: str, size: int, batch: int, batches: int, workers: int
) -> dict[str, Any]:
    """Draw with lightly's `MoCoV2Transform`."""
    import lightly.transforms  # noqa: F401  # its import is not what is measured

    count = WARM_UP + batches
    return measured(section, lambda: lightly_views(root, size, batch, count, workers), batches)


def lightly_views(root: str, size: int, batch: int, count: int, workers: int) -> Generator[Views]:
    """Yield `count` batches of two views of the images of a folder, by lightly's transform."""
    from lightly.transforms.moco_transform import MoCoV2Transform
    from torchvision import datasets

    folder = datasets.ImageFolder(root, MoCoV2Transform(input_size=size))
    return _views(_loader(folder, batch, count, workers))


def webdataset(
    section: Section, root: str, size: int, batch: int, batches: int, workers: int
) -> dict[str, Any]:
    """Draw from our shards with webdataset and torchvision's second transforms.

    On PIL images: on tensors they take 1.7 times as long on a CPU.
    """
    import webdataset as wds
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            *_augmentation(v2, size),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    two = _TwoCrops(transform)

    def open_batches() -> Generator[Views]:
        shards = [str(path) for path in sorted(Path(root).glob("*.tar"))]
        # Every worker reads all shards: there may be fewer shards than workers.
        stream = wds.WebDataset(shards, shardshuffle=False, nodesplitter=None, workersplitter=None)
        pairs = stream.shuffle(BUFFER).decode("pil").to_tuple("jpg;png;webp").map_tuple(two)
        each = -(-(WARM_UP + batches) // workers)
        epoch = pairs.repeat().batched(batch, collation_fn=_stacked).with_epoch(each)
        yield from DataLoader(epoch, batch_size=None, num_workers=workers)

    return measured(section, open_batches, batches)


def _stacked(samples: list[tuple[list[torch.Tensor]]]) -> Views:
    pairs = [pair for (pair,) in samples]
    return tuple(torch.stack(views) for views in zip(*pairs, strict=True))


def _loader(folder: Any, batch: int, count: int, workers: int) -> "DataLoader[Any]":
    # As many samples as are asked for: workers shall not go on behind the last one.
    sampler = RandomSampler(folder, num_samples=count * batch)
    return DataLoader(folder, batch, sampler=sampler, num_workers=workers, drop_last=True)


def _views(batches: Iterable[Any]) -> Generator[Views]:
    for views, _ in batches:
        yield tuple(views)


def dali_operators(
    section: Section, root: str, size: int, batch: int, batches: int, workers: int
) -> dict[str, Any]:
    """Draw with DALI's own reader and random operators, in the list that solo-learn made known.

    Every operator runs on every image in uint8, and a coin chooses between before and after.
    """
    from nvidia.dali import fn, pipeline_def
    from nvidia.dali import types as T

    def chance(p: float, changed: Any, unchanged: Any) -> Any:
        coin = fn.cast(fn.random.coin_flip(probability=p), dtype=T.BOOL)
        return coin * changed + (coin ^ True) * unchanged

    def factor(strength: float) -> Any:
        return fn.random.uniform(range=(1 - strength, 1 + strength))

    def view(images: Any) -> Any:
        x = fn.random_resized_crop(
            images, size=size, random_area=(0.2, 1.0), interp_type=T.INTERP_CUBIC
        )
        hue = fn.random.uniform(range=(-36.0, 36.0))
        factors = {name: factor(0.4) for name in ("brightness", "contrast", "saturation")}
        x = chance(0.8, fn.color_twist(x, hue=hue, **factors), x)
        gray = fn.color_space_conversion(x, image_type=T.RGB, output_type=T.GRAY)
        x = chance(0.2, fn.cat(gray, gray, gray, axis=2), x)
        sigma = fn.random.uniform(range=(0.1, 2.0))
        x = chance(0.5, fn.gaussian_blur(x, window_size=(23, 23), sigma=sigma), x)
        return fn.crop_mirror_normalize(
            x,
            mirror=fn.random.coin_flip(),
            mean=[255 * m for m in MEAN],
            std=[255 * s for s in STD],
            dtype=T.FLOAT,
            output_layout="CHW",
        )

    @pipeline_def(batch_size=batch, num_threads=workers, device_id=None, seed=12)  # type: ignore[untyped-decorator]
    def graph() -> Any:
        encoded, _ = fn.readers.file(file_root=root, random_shuffle=True)
        images = fn.decoders.image(encoded, device="cpu", output_type=T.RGB)
        return view(images), view(images)

    def open_batches() -> Generator[Views]:
        pipeline = graph()
        while True:
            outputs = pipeline.run()
            yield tuple(torch.utils.dlpack.from_dlpack(output.as_tensor()) for output in outputs)

    return measured(section, open_batches, batches)


def ffcv(
    section: Section, root: str, size: int, batch: int, batches: int, workers: int
) -> dict[str, Any]:
    """Draw with FFCV, from a file of JPEGs. It has no workers, but a thread for each core."""
    from baselines import ffcv_loader as beton

    def open_batches() -> Generator[Views]:
        return beton.views(root, size, batch, WARM_UP + batches)

    return measured(section, open_batches, batches)


ffcv_raw = ffcv  # from a file of pixels
