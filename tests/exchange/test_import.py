"""Files in the layouts of others, taken in full or refused by the names of what is wrong."""

import argparse
import json
import pickle
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
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
    assert (found.recipe.arch, found.recipe.stem) == ("resnet10", "imagenet")
    assert found.recipe.head == head
    assert json.loads((out / "origin.json").read_text())["prefix"] == prefix
    run = RunFolder(out)
    state, step = run.latest() or ({}, -1)
    whole = encoder.state_dict()
    wanted = {k: v for k, v in whole.items() if head != "none" or k.startswith("backbone.")}
    assert step == 0 and run.recipe() == found.recipe
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
    """Values do not matter here: all tensors are views of one."""
    with torch.device("meta"):
        shapes = Encoder(arch, "small", "linear", 4).backbone.state_dict()
    values = torch.zeros(3 * 2048 * 2048)
    found = match({name: values[: like.numel()].view(like.shape) for name, like in shapes.items()})
    assert (found.arch, found.stem, found.naming.name) == (arch, "small", "torchvision")


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
    (lambda s: s.pop(KEY), r"1 tensors keep .* a resnet10 by the names of torchvision: "
     r"state_dict\.encoder_q\.layer3\.0\.conv1\.weight is missing\."),
    (rename, r"encoder_q\.layer3\.0\.conv1\.weight is missing: did you mean "
     r"'state_dict\.encoder_q\.layer3\.0\.convA\.weight'\?"),
    (cut, r"encoder_q\.layer3\.0\.conv1\.weight is \(256, 127, 3, 3\), "
     r"wanted \(256, 128, 3, 3\)"),
    (widen, r"it is not a resnet10 .* lacks 1 of its tensors: "
     r"state_dict\.encoder_q\.layer1\.0\.se\.fc1\.weight\."),
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


def test_what_is_no_resnet(tmp_path: Path) -> None:
    state = prefixed("backbone.", nn.TransformerEncoderLayer(8, 2).state_dict())
    with pytest.raises(
        CheckpointError,
        match=r"tensors \(backbone\.self_attn\..*, \.\.\.\) are those of no ResNet\.$",
    ):
        import_weights(saved(state, tmp_path / "theirs.pth"), tmp_path / "run")


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


def test_the_remedy_for_more_than_tensors_works_when_typed(
    run: Run, r10: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arrays = {name: tensor.numpy() for name, tensor in r10.backbone.state_dict().items()}
    extras = {"args": Path("x"), "best_acc": np.float64(3), "lrs": [np.float32(0.1), None]}
    odd = 'it\'s $HOME "a".pth'
    saved({"model": arrays, "net": named(r10), **extras}, tmp_path / odd)
    code, _, err = run("import", odd, "run")
    assert code == 4 and "reading that could run code" in err
    remedy = err[err.index('python -c "') :].replace("python", shlex.quote(sys.executable), 1)
    subprocess.run(["bash", "-c", remedy], check=True)
    plain_file = torch.load("plain.pth", weights_only=True)
    same(plain_file["model"], plain_file["net"])
    code, _, err = run("import", "plain.pth", "run")
    assert code == 0, err
    state = RunFolder(tmp_path / "run").latest()[0]["encoder_q"]  # type: ignore[index]
    same(state, prefixed("backbone.", r10.backbone.state_dict()))


def one_value(state: Tensors, key: str, value: float) -> Tensors:
    state = dict(state)
    state[key] = state[key].clone(memory_format=torch.contiguous_format)
    state[key].view(-1)[3] = value
    return state


def floats(state: Tensors, change: Callable[[torch.Tensor], torch.Tensor]) -> Tensors:
    return {k: change(v) if v.is_floating_point() else v for k, v in state.items()}


HOSTILE = [
    (lambda s: one_value(s, "layer2.0.conv1.weight", float("nan")),
     "layer2.0.conv1.weight holds 1 values that are not finite"),
    (lambda s: one_value(s, "layer2.0.bn1.running_var", float("inf")),
     "layer2.0.bn1.running_var holds 1 values that are not finite"),
    (lambda s: one_value({k: v.double() for k, v in s.items()}, "bn1.weight", 1e300),
     "bn1.weight holds 1 values that are not finite"),
    (lambda s: one_value(s, "bn1.running_var", -1), "bn1.running_var holds a negative variance"),
    (lambda s: floats(s, torch.Tensor.bool), "holds torch.bool, wanted floating-point"),
    (lambda s: floats(s, torch.Tensor.int), "holds torch.int32, wanted floating-point"),
    (lambda s: floats(s, lambda v: v.to(torch.complex64)), "holds torch.complex64, wanted float"),
    (lambda s: floats(s, torch.Tensor.to_sparse), "is no plain tensor"),
    (lambda s: floats(s, lambda v: v.to("meta")), "is no plain tensor"),
    (lambda s: floats(s, lambda v: torch.zeros(1).expand(v.shape)),
     "shows more values than the file stores"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), HOSTILE)
def test_weights_that_are_no_finite_numbers_are_refused_by_name(
    change: Callable[[Tensors], Tensors], message: str, run: Run, r10: Encoder, tmp_path: Path
) -> None:
    file = saved({"model": change(r10.backbone.state_dict())}, tmp_path / "theirs.pth")
    code, _, err = run("import", file, tmp_path / "run")
    assert code == 4 and message in err and not (tmp_path / "run").exists()


def test_heads_of_no_size_or_of_any_are_left_out(run: Run, r10: Encoder, tmp_path: Path) -> None:
    """Rows that the file does not store would be asked of memory: 20 TB here."""
    query = prefixed("encoder_q.", r10.backbone.state_dict())
    wide, none = torch.zeros(1).expand(10**10, 512), torch.zeros(0, 512)
    heads = (
        (wide, wide[:, 0]), (none, none[:, 0]), (torch.zeros(16, 512), torch.tensor(1.0)),
        (one_value({"w": torch.zeros(16, 512)}, "w", float("nan"))["w"].int(), torch.zeros(16)),
    )  # fmt: skip
    for number, (weight, bias) in enumerate(heads):
        state = query | {"encoder_q.fc.weight": weight, "encoder_q.fc.bias": bias}
        file = saved({"state_dict": state}, tmp_path / "theirs.pth")
        code, out, err = run("import", file, tmp_path / str(number))
        assert code == 0 and "no head" in out and "2 tensors under" in out, err


def test_containers_without_end(run: Run, r10: Encoder, tmp_path: Path) -> None:
    loop: dict[str, Any] = dict(r10.backbone.state_dict())
    loop["model"] = loop["again"] = loop
    twice: Any = []
    deep: dict[str, Any] = {}
    for _ in range(60):
        twice, deep = [twice, twice], {"a": deep}
    code, _, err = run("import", saved(loop, tmp_path / "a.pth"), tmp_path / "run")
    assert code == 0, err
    for content in (twice, deep):
        code, _, err = run("import", saved(content, tmp_path / "b.pth"), tmp_path / "other")
        assert code == 4 and "nests its tensors too deeply" in err


def test_a_file_that_unpacks_to_more_is_refused(run: Run, r10: Encoder, tmp_path: Path) -> None:
    file = saved(r10.backbone.state_dict(), tmp_path / "theirs.pth")
    with (
        zipfile.ZipFile(file) as plain_file,
        zipfile.ZipFile(tmp_path / "small.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain_file.namelist():
            packed.writestr(name, plain_file.read(name))
    code, _, err = run("import", tmp_path / "small.pth", tmp_path / "run")
    assert code == 4 and "is a compressed archive" in err


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
    with pytest.raises(CheckpointError, match=r"holds a str, no state dict"):
        import_weights(saved("weights", tmp_path / "b.pth"), tmp_path / "run")
    with pytest.raises(UsageError, match=r"There is no file"):
        import_weights(tmp_path / "none.pth", tmp_path / "run")


def test_the_origin_is_written_down(r10: Encoder, tmp_path: Path) -> None:
    file = saved(plain(r10), tmp_path / "theirs.pth")
    found = import_weights(file, tmp_path / "run")
    origin = json.loads((tmp_path / "run" / "origin.json").read_text())
    assert (origin["file"], origin["names"]) == ("theirs.pth", "torchvision")
    assert origin["sha256"] == sha256_of(file) and origin["notes"] == list(found.notes)
    with pytest.raises(UsageError, match=r"exists: choose another folder"):
        import_weights(file, tmp_path / "run")


def test_the_3x3_stem_and_what_solo_learn_pads(small: Encoder, tmp_path: Path) -> None:
    found = import_weights(saved(solo_older(small), tmp_path / "a.pth"), tmp_path / "a")
    assert (found.recipe.stem, found.recipe.image_size) == ("small", 32)
    assert any("solo-learn pads by 2" in note for note in found.notes)
    other_size = import_weights(
        saved(plain(small), tmp_path / "b.pth"), tmp_path / "b", stem="small-stride2", image_size=48
    )
    assert (other_size.recipe.image_size, other_size.recipe.stem) == (48, "small-stride2")
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
        assert code == 0 and "100.00 %" in out, err  # each image is its own nearest neighbour
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


def test_refusals_end_in_their_exit_codes(run: Run, r10: Encoder, tmp_path: Path) -> None:
    file = saved(changed(r10, rename), tmp_path / "theirs.pth")
    code, _, err = run("import", file, tmp_path / "run")
    assert code == 4 and err.startswith(f"error: {file}: 1 tensors keep") and "Traceback" not in err
    assert run("import", tmp_path / "none.pth", tmp_path / "run")[0] == 2


def test_an_imported_run_is_not_trained_on_by_accident(r10: Encoder, tmp_path: Path) -> None:
    import_weights(saved(plain(r10), tmp_path / "a.pth"), tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"is of another run: seed was None"):
        RunFolder(tmp_path / "run").latest({"seed": 0})
