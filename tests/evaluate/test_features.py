"""Features: against a loop over the source images with PIL, torchvision and nothing else."""

import copy
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from fastmoco.config.encoder import EncoderSpec
from fastmoco.core.distributed import World
from fastmoco.dataset.shard_set import ConcatShardSets, ShardSet
from fastmoco.evaluate import features as station
from fastmoco.evaluate.features import Preprocessing, embed
from fastmoco.load.executor import Settings
from fastmoco.models.encoder import Encoder

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
EXECUTORS = pytest.mark.parametrize("executor", ["dali", "fused"])


def preprocessing(size: int = 16, precision: str = "fp32", executor: str = "dali") -> Preprocessing:
    return Preprocessing(size, MEAN, STD, precision, Settings(executor, threads=1))


def original(data: ShardSet, row: int) -> Path:
    return data.root.parent / "source" / data.get_name(row)


def shown(path: Path, resized: int, size: int) -> torch.Tensor:
    """Return an image as torchvision's usual evaluation transforms show it.

    They resize to whole pixels first, ours cuts whole pixels first: up to half a pixel apart. The
    sides of the sets here come out whole in both.
    """
    image = F.center_crop(F.resize(Image.open(path), resized), [size, size])
    levels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    return (levels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@EXECUTORS
@pytest.mark.parametrize("feature", ["head", "backbone"])
def test_features_are_those_of_a_plain_loop(
    trained: Encoder, small_set: ShardSet, unseen_set: ShardSet, feature: str, executor: str
) -> None:
    network = trained if feature == "head" else trained.backbone
    paths = [original(one, row) for one in (small_set, unseen_set) for row in range(len(one))]
    with torch.no_grad():
        expected = torch.cat([network(shown(path, 16, 16)[None]) for path in paths])
    found = embed(
        trained, ConcatShardSets([small_set, unseen_set]), feature, preprocessing(executor=executor)
    )
    assert found.shape == (39, 8 if feature == "head" else 512)
    # Decoding and resizing differ by a level here and there; images differ by far more.
    distances = torch.cdist(found, expected)
    assert torch.equal(distances.argmin(dim=1), torch.arange(39))
    assert distances.diagonal().max() < 0.1 * distances.median()


def test_some_samples_have_the_features_that_they_have_among_all(
    trained: Encoder, small_set: ShardSet
) -> None:
    data, ids = ConcatShardSets([small_set]), np.array([20, 3, 11])
    everything = embed(trained, data, "head", preprocessing())
    torch.testing.assert_close(
        embed(trained, data, "head", preprocessing(), ids=ids),
        everything[ids],
        rtol=1e-4,
        atol=1e-4,
    )
    assert embed(trained, data, "head", preprocessing(), ids=ids[:0]).shape == (0, 8)


def test_batches_do_not_matter(
    trained: Encoder, small_set: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ConcatShardSets([small_set])
    whole = embed(trained, data, "head", preprocessing())
    monkeypatch.setattr(station, "_BATCH", 7)
    torch.testing.assert_close(
        embed(trained, data, "head", preprocessing()), whole, rtol=1e-4, atol=1e-5
    )


def _refuse(*graph: object) -> NoReturn:
    raise AssertionError("compiled")


def test_what_training_compiled_is_not_compiled_again(
    trained: Encoder, small_set: ShardSet
) -> None:
    """A last batch of another size would have it compiled anew, for sizes that vary: minutes."""
    data, compiled = ConcatShardSets([small_set]), copy.deepcopy(trained)
    compiled.compile(backend=_refuse)
    features = embed(compiled, data, "head", preprocessing())
    assert torch.equal(features, embed(trained, data, "head", preprocessing()))


@pytest.mark.parametrize("size", [2, 5, 7, 24])
def test_ranks_embed_their_shares_and_ask_equally_often(
    trained: Encoder,
    small_set: ShardSet,
    unseen_set: ShardSet,
    size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """39 samples divide unevenly; the last of 24 ranks have none."""
    data = ConcatShardSets([small_set, unseen_set])
    whole = embed(trained, data, "head", preprocessing())
    monkeypatch.setattr(station, "_BATCH", 3)
    monkeypatch.setattr(World, "union", lambda ranks, values: values)  # the others are not here
    parts, calls = [], []
    for rank in range(size):
        asked: list[None] = []
        ranks = World(rank, size)
        parts.append(
            embed(
                trained,
                data,
                "head",
                preprocessing(),
                ranks,
                stop=lambda a=asked: bool(a.append(None)),
            )
        )
        calls.append(len(asked))
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)
    assert len(set(calls)) == 1


def test_large_images_are_cut_as_on_imagenet() -> None:
    assert preprocessing(224).share == 224 / 256 and preprocessing(96).share == 1


def test_bf16_and_fp64_give_fp32_features_that_are_near(
    trained: Encoder, small_set: ShardSet
) -> None:
    data = ConcatShardSets([small_set])
    exact = embed(trained, data, "backbone", preprocessing())
    half = embed(trained, data, "backbone", preprocessing(precision="bf16"))
    assert half.dtype == torch.float32
    assert 1e-4 < (half - exact).norm() / exact.norm() < 0.03
    double = (
        Encoder(EncoderSpec(arch="resnet10", stem="small-stride2", head="linear", dim=8))
        .double()
        .eval()
    )
    double.load_state_dict(trained.state_dict())
    found = embed(double, data, "backbone", preprocessing(precision="fp64"))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-4)
