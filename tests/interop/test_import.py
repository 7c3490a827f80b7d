"""Files in the layouts of others, taken in full."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from fastmoco.config.encoder import EncoderSpec
from fastmoco.core.files import hash_file
from fastmoco.dataset.shard_set import ShardSet
from fastmoco.errors import CheckpointError, UsageError
from fastmoco.interop.detect import ARCHS, match
from fastmoco.interop.importer import import_weights
from fastmoco.models.encoder import Encoder
from fastmoco.runs.run_folder import RunFolder

from .conftest import Run, build, moco, named, other, parts, prefixed, same, saved

# Each builds a file as the program writes it, around both encoders and whatever else it saves.


def moco_without_module(encoder: Encoder) -> Any:
    state = moco(encoder)["state_dict"]
    return {"state_dict": {name.removeprefix("module."): value for name, value in state.items()}}


def moco_notebook(encoder: Encoder) -> Any:
    """Children in a row without the max-pool, and a Flatten before the fc."""
    children = [m for name, m in named(encoder).named_children() if name != "maxpool"]
    net = nn.Sequential(*children[:-1], nn.Flatten(1), encoder.head)
    query = prefixed("net.", net.state_dict())
    return {
        "epoch": 3,
        "state_dict": prefixed("encoder_q.", query) | prefixed("encoder_k.", other(query)),
    }


def moco_v3(encoder: Encoder) -> Any:
    backbone, _ = parts(encoder)
    mlp = nn.Sequential(
        nn.Linear(512, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 16, bias=False)
    )
    base = backbone | prefixed("fc.", mlp.state_dict())
    state = prefixed("module.base_encoder.", base)
    state |= prefixed("module.momentum_encoder.", other(base))
    state |= prefixed("module.predictor.", mlp.state_dict())
    return {"epoch": 300, "state_dict": state}


def solo(encoder: Encoder) -> Any:
    backbone, _ = parts(encoder)
    wide = nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 256))
    projector = (
        encoder.head.state_dict() if len(encoder.head.state_dict()) == 4 else wide.state_dict()
    )
    state = prefixed("backbone.", backbone) | prefixed("momentum_backbone.", other(backbone))
    state |= prefixed("projector.", projector) | prefixed(
        "classifier.", nn.Linear(512, 10).state_dict()
    )
    return {"state_dict": state | {"queue": torch.zeros(2, 256, 8)}, "epoch": 9}


def solo_older(encoder: Encoder) -> Any:
    return {"state_dict": prefixed("encoder.", encoder.backbone.state_dict())}


def lightly(encoder: Encoder) -> Any:
    rows = nn.Sequential(*list(named(encoder).children())[:-1]).state_dict()
    state = prefixed("backbone.", rows) | prefixed("backbone_momentum.", other(rows))
    return state | prefixed("projection_head.layers.", encoder.head.state_dict())


def lightly_benchmark(encoder: Encoder) -> Any:
    """There `backbone` is the momentum encoder."""
    backbone, head = parts(encoder)
    state = prefixed("backbone.", other(backbone)) | prefixed("query_backbone.", backbone)
    state |= prefixed("projection_head.layers.", other(head))
    return {"state_dict": state | prefixed("query_projection_head.layers.", head)}


def lightly_bare(encoder: Encoder) -> Any:
    return nn.Sequential(*list(named(encoder).children())[:-1]).state_dict()


def vissl(encoder: Encoder) -> Any:
    model = {
        "trunk": prefixed("_feature_blocks.", encoder.backbone.state_dict()),
        "heads": {"0.clf.0.weight": torch.zeros(16, 512), "0.clf.0.bias": torch.zeros(16)},
    }
    return {"classy_state_dict": {"base_model": {"model": model, "meta": {}}}, "phase_idx": 5}


def plain(encoder: Encoder) -> Any:
    classifier = prefixed("fc.", nn.Linear(512, 1000).state_dict())
    return dict(encoder.backbone.state_dict()) | classifier


def dino(encoder: Encoder) -> Any:
    """The options of its script lie beside the weights."""
    backbone, head = parts(encoder)
    student = prefixed("module.backbone.", backbone) | prefixed("module.head.mlp.", head)
    teacher = prefixed("backbone.", other(backbone)) | prefixed("head.mlp.", other(head))
    return {"student": student, "teacher": teacher, "args": argparse.Namespace(arch="resnet10")}


def openselfsup(encoder: Encoder) -> Any:
    """The query's backbone is there a second time."""
    backbone, head = parts(encoder)
    query = prefixed("encoder_q.0.", backbone) | prefixed("encoder_q.1.mlp.", head)
    return {
        "meta": {"epoch": 200},
        "state_dict": prefixed("encoder_k.0.", other(backbone))
        | prefixed("backbone.", backbone)
        | query
        | prefixed("encoder_k.1.mlp.", other(head)),
    }


def swav(encoder: Encoder) -> Any:
    """Head and prototypes lie beside the first convolution."""
    wide = nn.Sequential(nn.Linear(512, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 16))
    state = prefixed("module.", encoder.backbone.state_dict())
    state |= prefixed("module.projection_head.", wide.state_dict())
    return state | {"module.prototypes.weight": torch.zeros(30, 16)}


def compiled_in_parts(encoder: Encoder) -> Any:
    state = {k.replace("layer1.", "layer1._orig_mod."): v for k, v in parts(encoder)[0].items()}
    return {"anything": [{"net": prefixed("_orig_mod.module.model.", state)}], "best_acc": 9.0}


def supcontrast(encoder: Encoder) -> Any:
    state = {k.replace("downsample", "shortcut"): v for k, v in parts(encoder)[0].items()}
    return {"model": prefixed("encoder.module.", state), "opt": argparse.Namespace(model="r")}


FILES: list[tuple[Callable[[Encoder], Any], str, str]] = [
    (moco, "state_dict.encoder_q.", "linear"),
    (moco, "state_dict.encoder_q.", "mlp"),
    (moco_without_module, "state_dict.encoder_q.", "linear"),
    (moco_notebook, "state_dict.encoder_q.net.", "linear"),
    (moco_v3, "state_dict.base_encoder.", "none"),
    (solo, "state_dict.backbone.", "none"),
    (solo, "state_dict.backbone.", "mlp"),
    (solo_older, "state_dict.encoder.", "none"),
    (lightly, "backbone.", "mlp"),
    (lightly_benchmark, "state_dict.query_backbone.", "mlp"),
    (lightly_bare, "", "none"),
    (vissl, "classy_state_dict.base_model.model.trunk._feature_blocks.", "none"),
    (plain, "", "none"),
    (dino, "student.backbone.", "mlp"),
    (openselfsup, "state_dict.encoder_q.0.", "mlp"),
    (swav, "", "none"),
    (compiled_in_parts, "anything.0.net.model.", "none"),
    (supcontrast, "model.encoder.", "none"),
]


@pytest.mark.parametrize(("make", "prefix", "head"), FILES, ids=lambda x: getattr(x, "__name__", x))
def test_each_file_gives_the_trained_encoder_bit_by_bit(
    make: Callable[[Encoder], Any],
    prefix: str,
    head: str,
    r10: Encoder,
    r10_mlp: Encoder,
    tmp_path: Path,
) -> None:
    encoder = r10_mlp if head == "mlp" else r10
    file = saved(make(encoder), tmp_path / "theirs.pth.tar")
    out = tmp_path / "run"
    found = import_weights(file, out)
    assert (found.spec.arch, found.spec.stem) == ("resnet10", "imagenet")
    assert found.spec.head == head
    assert json.loads((out / "origin.json").read_text())["prefix"] == prefix
    run = RunFolder(out)
    state, step = run.latest() or ({}, -1)
    whole = encoder.state_dict()
    wanted = {k: v for k, v in whole.items() if head != "none" or k.startswith("backbone.")}
    assert step == 0 and run.spec() == found.spec and run.recipe() is None
    same(state["encoder_q"], wanted)


def test_the_moving_average_is_taken_if_asked_for(r10_mlp: Encoder, tmp_path: Path) -> None:
    file = saved(dino(r10_mlp), tmp_path / "theirs.pth")
    found = import_weights(file, tmp_path / "a")
    assert any("behind teacher.backbone there are other weights" in n for n in found.notes)
    import_weights(file, tmp_path / "b", prefix="module.teacher.module.backbone.")
    state = RunFolder(tmp_path / "b").latest()[0]["encoder_q"]  # type: ignore[index]
    assert torch.equal(state["backbone.bn1.bias"], r10_mlp.backbone.bn1.bias + 1)
    assert torch.equal(state["head.2.bias"], r10_mlp.head[2].bias + 1)


def test_of_two_networks_that_nothing_tells_apart_the_user_chooses(
    run: Run, r10: Encoder, tmp_path: Path
) -> None:
    backbone, _ = parts(r10)
    two = prefixed("left.", backbone) | prefixed("right.", other(backbone))
    file = saved(two, tmp_path / "theirs.pth")
    code, _, err = run("import", file, tmp_path / "run")
    assert code == 4 and "choose by --prefix left or --prefix right" in err
    code, out, err = run("import", file, tmp_path / "run", "--prefix", "right")
    assert code == 0 and "behind right." in out, err
    state = RunFolder(tmp_path / "run").latest()[0]["encoder_q"]  # type: ignore[index]
    assert torch.equal(state["backbone.bn1.bias"], r10.backbone.bn1.bias + 1)
    code, _, err = run("import", file, tmp_path / "other", "--prefix", "middle")
    assert code == 4 and "no ResNet behind 'middle'; there are some behind left, right." in err


def test_heads_that_do_not_fit_are_left_out_in_words(r10: Encoder, tmp_path: Path) -> None:
    for make, prefix, count in (
        (moco_v3, "state_dict.base_encoder.fc.", 7),
        (solo, "state_dict.projector.", 4),
    ):
        file = saved(make(r10), tmp_path / f"{prefix}pth")
        found = import_weights(file, tmp_path / f"{prefix}run")
        assert any(f"left out: {count} tensors under {prefix}" in n for n in found.notes)
        assert found.spec.dim == 512


def test_safetensors_and_half_precision(r10: Encoder, tmp_path: Path) -> None:
    backbone = {name: tensor.contiguous() for name, tensor in r10.backbone.state_dict().items()}
    half = {k: v.half() if v.is_floating_point() else v for k, v in backbone.items()}
    save_file(half, tmp_path / "half.safetensors")
    import_weights(tmp_path / "half.safetensors", tmp_path / "run")
    state = RunFolder(tmp_path / "run").latest()[0]["encoder_q"]  # type: ignore[index]
    same(state, {f"backbone.{k}": v.to(backbone[k].dtype) for k, v in half.items()})


def test_torchvision_has_no_other_networks() -> None:
    families = ("resnet", "resnext", "wide_resnet")
    known = torchvision.models.list_models(torchvision.models)
    assert {"resnet10", *(name for name in known if name.startswith(families))} == set(ARCHS)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_network_is_known_by_its_shapes(arch: str, tmp_path: Path) -> None:
    """Values do not matter here: all tensors are views of one."""
    with torch.device("meta"):
        shapes = Encoder(
            EncoderSpec(arch=arch, stem="small", head="linear", dim=4)
        ).backbone.state_dict()
    values = torch.zeros(3 * 2048 * 2048)
    found = match({name: values[: like.numel()].view(like.shape) for name, like in shapes.items()})
    assert (found.arch, found.stem, found.naming.name) == (arch, "small", "torchvision")


def test_a_file_of_before_the_counts_of_batches(r10: Encoder, tmp_path: Path) -> None:
    state = {k: v for k, v in r10.backbone.state_dict().items() if "num_batches" not in k}
    import_weights(saved(state, tmp_path / "old.pth"), tmp_path / "run")
    found = RunFolder(tmp_path / "run").latest()[0]["encoder_q"]  # type: ignore[index]
    assert found["backbone.bn1.num_batches_tracked"].item() == 0


def test_the_origin_is_written_down(r10: Encoder, tmp_path: Path) -> None:
    file = saved(plain(r10), tmp_path / "theirs.pth")
    found = import_weights(file, tmp_path / "run")
    origin = json.loads((tmp_path / "run" / "origin.json").read_text())
    assert (origin["file"], origin["names"]) == ("theirs.pth", "torchvision")
    assert origin["sha256"] == hash_file(file) and origin["notes"] == list(found.notes)
    with pytest.raises(UsageError, match=r"exists: choose another folder"):
        import_weights(file, tmp_path / "run")


def test_the_3x3_stem_and_what_solo_learn_pads(small: Encoder, tmp_path: Path) -> None:
    found = import_weights(saved(solo_older(small), tmp_path / "a.pth"), tmp_path / "a")
    assert (found.spec.stem, found.spec.image_size) == ("small", 32)
    assert any("solo-learn pads by 2" in note for note in found.notes)
    other_size = import_weights(
        saved(plain(small), tmp_path / "b.pth"), tmp_path / "b", stem="small-stride2", image_size=48
    )
    assert (other_size.spec.image_size, other_size.spec.stem) == (
        48,
        "small-stride2",
    )
    assert not any("pads by 2" in note for note in other_size.notes)


def test_knn_probe_and_embed_work_on_an_imported_run(
    run: Run, small_set: ShardSet, tmp_path: Path
) -> None:
    encoder = build("resnet10", "small", "linear", 8)
    file = saved(prefixed("backbone.", encoder.backbone.state_dict()), tmp_path / "theirs.pth")
    imported = tmp_path / "run"
    code, out, err = run("import", file, imported, "--image-size", 16)
    assert (code, err) == (0, "") and "resnet10, small stem, no head, behind backbone." in out
    sets = ("--train", small_set.root, "--test", small_set.root, "--device", "cpu")
    for feature in ("backbone", "head"):
        code, out, err = run("knn", imported, *sets, "--feature", feature, "--k", 1)
        assert code == 0 and "100.00 %" in out, err  # each image is its own nearest neighbor
    code, out, err = run("probe", imported, *sets, "--cached", "--epochs", 2, "--lr", 0.1)
    assert code == 0 and "top-1" in out, err


def test_fine_tuned_weights_come_back_with_their_stem(
    run: Run, make_run: Callable[[], RunFolder], small_set: ShardSet, tmp_path: Path
) -> None:
    sets = ("--train", small_set.root, "--test", small_set.root, "--device", "cpu")
    steps = ("--steps", 1, "--batch", 8, "--size", 24, "--save", tmp_path / "tuned")
    code, _, err = run("finetune", make_run().root, *sets, *steps)
    assert code == 0, err
    code, out, err = run("import", tmp_path / "tuned" / "weights.pt", tmp_path / "back")
    assert code == 0 and "small-stride2 stem" in out and "shown at 24 px" in out, err


def test_an_imported_run_is_not_trained_on_by_accident(r10: Encoder, tmp_path: Path) -> None:
    import_weights(saved(plain(r10), tmp_path / "a.pth"), tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"is of another run: seed was None"):
        RunFolder(tmp_path / "run").latest({"seed": 0})
