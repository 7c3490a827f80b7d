"""Files in the layouts of others, taken in full or refused by the names of what is wrong."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from fastmoco.errors import CheckpointError, UsageError
from fastmoco.exchange.importing import import_weights
from fastmoco.exchange.matching import ARCHS, match
from fastmoco.files import sha256_of
from fastmoco.models.resnet import Encoder
from fastmoco.run import RunFolder
from fastmoco.shardset import ShardSet

from .conftest import Run, Tensors, build, same, saved


def parts(encoder: Encoder) -> tuple[Tensors, Tensors]:
    return encoder.backbone.state_dict(), encoder.head.state_dict()


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def other(tensors: Tensors) -> Tensors:
    """The same names with other values, as of the momentum encoder beside it."""
    return {name: tensor + 1 for name, tensor in tensors.items()}


def named(encoder: Encoder) -> nn.Module:
    """The encoder's backbone as torchvision's own module, for whatever takes its children."""
    net = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    net.fc = nn.Identity()
    net.load_state_dict(encoder.backbone.state_dict())
    return net


# Each builds a file as the program writes it, around both encoders and whatever else it saves.


def moco(encoder: Encoder) -> Any:
    backbone, head = parts(encoder)
    query = backbone | prefixed("fc.", head)
    state = prefixed("module.encoder_q.", query) | prefixed("module.encoder_k.", other(query))
    state |= {"module.queue": torch.zeros(16, 64), "module.queue_ptr": torch.zeros(1).long()}
    momentum = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.03}]}
    return {"epoch": 200, "arch": "resnet10", "state_dict": state, "optimizer": momentum}


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


FILES: list[tuple[Callable[[Encoder], Any], str, str]] = [
    (moco, "moco", "linear"),
    (moco, "moco", "mlp"),
    (moco_without_module, "moco", "linear"),
    (moco_notebook, "moco", "linear"),
    (moco_v3, "moco_v3", "none"),
    (solo, "solo", "none"),
    (solo, "solo", "mlp"),
    (solo_older, "solo", "none"),
    (lightly, "lightly", "mlp"),
    (lightly_benchmark, "lightly", "mlp"),
    (lightly_bare, "lightly", "none"),
    (vissl, "vissl", "none"),
    (plain, "torchvision", "none"),
]


@pytest.mark.parametrize(("make", "layout", "head"), FILES, ids=lambda x: getattr(x, "__name__", x))
@pytest.mark.parametrize("asked", ["auto", "named"])
def test_each_layout_gives_the_query_encoder_bit_by_bit(
    make: Callable[[Encoder], Any],
    layout: str,
    head: str,
    asked: str,
    r10: Encoder,
    r10_mlp: Encoder,
    tmp_path: Path,
) -> None:
    encoder = r10_mlp if head == "mlp" else r10
    file = saved(make(encoder), tmp_path / "theirs.pth.tar")
    out = tmp_path / "run"
    found = import_weights(file, out, "auto" if asked == "auto" else layout)
    assert (found.layout, found.recipe.head) == (layout, head)
    assert (found.recipe.arch, found.recipe.stem) == ("resnet10", "imagenet")
    run = RunFolder(out)
    state, step = run.latest() or ({}, -1)
    whole = encoder.state_dict()
    wanted = {k: v for k, v in whole.items() if head != "none" or k.startswith("backbone.")}
    assert step == 0 and run.recipe() == found.recipe
    same(state["encoder_q"], wanted)


def test_heads_that_do_not_fit_are_left_out_in_words(r10: Encoder, tmp_path: Path) -> None:
    for make, prefix, count in ((moco_v3, "base_encoder.fc.", 7), (solo, "projector.", 4)):
        file = saved(make(r10), tmp_path / f"{prefix}pth")
        found = import_weights(file, tmp_path / f"{prefix}run")
        assert any(f"left out: {count} tensors under {prefix}" in n for n in found.notes)
        assert found.recipe.dim == 512


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
    """Values do not matter here: one element stands for all of a tensor."""
    with torch.device("meta"):
        shapes = Encoder(arch, "small", "linear", 4).backbone.state_dict()
    one = {
        name: torch.zeros((), dtype=like.dtype).expand(like.shape) for name, like in shapes.items()
    }
    found = match(one)
    assert (found.arch, found.stem, found.layout.name) == (arch, "small", "torchvision")


def test_a_file_of_before_the_counts_of_batches(r10: Encoder, tmp_path: Path) -> None:
    state = {k: v for k, v in r10.backbone.state_dict().items() if "num_batches" not in k}
    import_weights(saved(state, tmp_path / "old.pth"), tmp_path / "run")
    found = RunFolder(tmp_path / "run").latest()[0]["encoder_q"]  # type: ignore[index]
    assert found["backbone.bn1.num_batches_tracked"].item() == 0


def changed(encoder: Encoder, change: Callable[[Tensors], None]) -> Any:
    content = moco(encoder)
    change(content["state_dict"])
    return content


KEY = "module.encoder_q.layer3.0.conv1.weight"


def rename(state: Tensors) -> None:
    state["module.encoder_q.layer3.0.convA.weight"] = state.pop(KEY)


def cut(state: Tensors) -> None:
    state[KEY] = state[KEY][:, :-1]


def widen(state: Tensors) -> None:
    """A squeeze-and-excitation block computes something else with the same other tensors."""
    state["module.encoder_q.layer1.0.se.fc1.weight"] = torch.zeros(4, 64, 1, 1)


REFUSALS = [
    (lambda s: s.pop(KEY), r"1 tensors keep .* a resnet10 in the layout of moco: "
     r"encoder_q\.layer3\.0\.conv1\.weight is missing\."),
    (rename, r"encoder_q\.layer3\.0\.conv1\.weight is missing: did you mean "
     r"'encoder_q\.layer3\.0\.convA\.weight'\?"),
    (cut, r"encoder_q\.layer3\.0\.conv1\.weight is \(256, 127, 3, 3\), "
     r"wanted \(256, 128, 3, 3\)"),
    (widen, r"it is not a resnet10 .* lacks 1 of its tensors: "
     r"encoder_q\.layer1\.0\.se\.fc1\.weight\."),
    (lambda s: s.pop("module.encoder_q.bn1.running_mean"),
     r"encoder_q\.bn1\.running_mean is missing"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSALS)
def test_what_does_not_fill_the_network_is_refused_by_name(
    change: Callable[[Tensors], None], message: str, r10: Encoder, tmp_path: Path
) -> None:
    file = saved(changed(r10, change), tmp_path / "theirs.pth")
    with pytest.raises(CheckpointError, match=message):
        import_weights(file, tmp_path / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["theirs.pth"]


def test_another_layout_than_the_one_asked_for(r10: Encoder, tmp_path: Path) -> None:
    file = saved(moco(r10), tmp_path / "theirs.pth")
    with pytest.raises(
        CheckpointError, match=r"are in no layout of a ResNet that is known: fastmoco"
    ):
        import_weights(file, tmp_path / "run", "solo")
    with pytest.raises(UsageError, match=r"no layout 'mocov9': use auto, fastmoco, moco, moco_v3"):
        import_weights(file, tmp_path / "run", "mocov9")


class Payload:
    """Unpickled by a careless reader, it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


def test_a_pickle_with_a_payload_is_refused_and_not_executed(r10: Encoder, tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    pickle.loads(pickle.dumps(Payload(trap)))
    assert trap.exists(), "the payload works"
    trap.unlink()
    file = saved(moco(r10) | {"args": Payload(trap)}, tmp_path / "theirs.pth")
    with pytest.raises(
        CheckpointError, match=r"more than tensors \(\S+\).*refused\.\n.*weights_only=False"
    ):
        import_weights(file, tmp_path / "run")
    assert not trap.exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("about", ["[1]", '{"stem": 3}', '{"image_size": "wide"}', "{"])
def test_metadata_that_is_not_ours_is_a_plain_error(r10, tmp_path, about):
    tensors = {name: tensor.contiguous() for name, tensor in r10.state_dict().items()}
    save_file(tensors, tmp_path / "odd.safetensors", {"fastmoco": about})
    with pytest.raises(CheckpointError, match=r"no whole safetensors file"):
        import_weights(tmp_path / "odd.safetensors", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_safetensors_name_does_not_lead_to_the_unpickler(tmp_path: Path) -> None:
    file = saved({"a": Payload(tmp_path / "executed")}, tmp_path / "theirs.safetensors")
    with pytest.raises(CheckpointError, match=r"no whole safetensors file"):
        import_weights(file, tmp_path / "run")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("keep", [0, 100, 50_000])
def test_damaged_files(keep: int, r10: Encoder, tmp_path: Path) -> None:
    file = saved(moco(r10), tmp_path / "theirs.pth")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"theirs.pth is damaged, or no checkpoint of torch"):
        import_weights(file, tmp_path / "run")


def test_files_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no tensors"):
        import_weights(saved({"epoch": 3}, tmp_path / "a.pth"), tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"holds a list, no state dict"):
        import_weights(saved([torch.zeros(1)], tmp_path / "b.pth"), tmp_path / "run")
    with pytest.raises(UsageError, match=r"There is no file"):
        import_weights(tmp_path / "none.pth", tmp_path / "run")


def test_the_origin_is_written_down(r10: Encoder, tmp_path: Path) -> None:
    file = saved(plain(r10), tmp_path / "theirs.pth")
    found = import_weights(file, tmp_path / "run")
    origin = json.loads((tmp_path / "run" / "origin.json").read_text())
    assert (origin["file"], origin["layout"]) == ("theirs.pth", "torchvision")
    assert origin["sha256"] == sha256_of(file) and origin["notes"] == list(found.notes)
    with pytest.raises(UsageError, match=r"exists: choose another folder"):
        import_weights(file, tmp_path / "run")


def test_the_3x3_stem_and_what_solo_learn_pads(small: Encoder, tmp_path: Path) -> None:
    found = import_weights(saved(solo_older(small), tmp_path / "a.pth"), tmp_path / "a")
    assert (found.recipe.stem, found.recipe.image_size) == ("small", 32)
    assert any("by 2 pixels" in note for note in found.notes)
    other_size = import_weights(
        saved(plain(small), tmp_path / "b.pth"), tmp_path / "b", image_size=48
    )
    assert other_size.recipe.image_size == 48
    assert not any("by 2 pixels" in note for note in other_size.notes)


def test_knn_probe_and_embed_work_on_an_imported_run(
    run: Run, small_set: ShardSet, tmp_path: Path
) -> None:
    encoder = build("resnet10", "small", "linear", 8)
    file = saved(prefixed("backbone.", encoder.backbone.state_dict()), tmp_path / "theirs.pth")
    imported = tmp_path / "run"
    code, out, err = run("import", file, imported, "--image-size", 16)
    assert (code, err) == (0, "") and "resnet10, small stem, no head, in the layout of" in out
    sets = ("--train", small_set.root, "--test", small_set.root, "--device", "cpu")
    for feature in ("backbone", "head"):
        code, out, err = run("knn", imported, *sets, "--feature", feature, "--k", 1)
        assert code == 0 and "100.00 %" in out, err  # each image is its own nearest neighbour
    code, out, err = run("probe", imported, *sets, "--cached", "--epochs", 2, "--lr", 0.1)
    assert code == 0 and "top-1" in out, err


def test_refusals_end_in_their_exit_codes(run: Run, r10: Encoder, tmp_path: Path) -> None:
    file = saved(changed(r10, rename), tmp_path / "theirs.pth")
    code, _, err = run("import", file, tmp_path / "run")
    assert code == 4 and err.startswith(f"error: {file}: 1 tensors keep") and "Traceback" not in err
    assert run("import", tmp_path / "none.pth", tmp_path / "run")[0] == 2


def test_an_imported_run_is_not_trained_on_by_accident(r10: Encoder, tmp_path: Path) -> None:
    import_weights(saved(plain(r10), tmp_path / "a.pth"), tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"is of another run: seed was None"):
        RunFolder(tmp_path / "run").latest({"seed": 0})
