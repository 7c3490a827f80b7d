"""What is written, loaded by the programs it is for: their outputs on the same images are ours."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file

from fastmoco.cli import models as exchange
from fastmoco.config.encoder import EncoderSpec
from fastmoco.errors import CheckpointError, UsageError
from fastmoco.interop import exporter as exporting
from fastmoco.interop.exporter import export
from fastmoco.interop.formats import TARGETS
from fastmoco.interop.importer import import_weights
from fastmoco.interop.initial import read_initial
from fastmoco.models.encoder import Encoder
from fastmoco.runs.run_folder import RunFolder

from .conftest import Run, build, same, spec_for

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))
NEEDS = "pip install 'fastmoco[exchange]'"


def near(found: torch.Tensor, encoder: Encoder) -> None:
    with torch.inference_mode():
        wanted = encoder.backbone(IMAGES)
    assert wanted.std() > 0.01, "the features tell images apart"
    torch.testing.assert_close(found.detach(), wanted, rtol=1e-5, atol=1e-5)


def written(encoder: Encoder, arch: str, head: str, out: Path, to: str) -> str:
    done = export(encoder, spec_for(encoder, arch, "imagenet", head), out, to)
    assert [p.name for p in out.parent.iterdir()] == [out.name], "nothing is left beside it"
    return f"{done.checked}\n{done.note}"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_torchvision_lacks_only_its_classifier(r18: Encoder, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"weights{suffix}"
    said = written(r18, "resnet18", "linear", out, "torchvision")
    assert "loaded in torchvision, features differ by" in said and "only fc is missing" in said
    net = torchvision.models.resnet18()
    state = load_file(out) if suffix == ".safetensors" else torch.load(out)
    told = net.load_state_dict(state, strict=False)
    assert sorted(told.missing_keys) == ["fc.bias", "fc.weight"] and not told.unexpected_keys
    net.fc = torch.nn.Identity()
    near(net.eval()(IMAGES), r18)


@pytest.mark.parametrize(("arch", "stem"), [("resnet10", "small"), ("resnet18", "small-stride2")])
def test_the_code_for_a_small_stem_is_stated_and_works(
    arch: str, stem: str, tmp_path: Path
) -> None:
    encoder = build(arch, stem, "linear", 8)
    out = tmp_path / "weights.pth"
    done = export(encoder, spec_for(encoder, arch, stem, "linear"), out, "torchvision")
    assert "model.maxpool = torch.nn.Identity()" in done.note
    scope: dict[str, Any] = {"torch": torch, "torchvision": torchvision}
    exec(done.note.replace("'weights.pth'", repr(str(out))), scope)
    scope["model"].fc = torch.nn.Identity()
    near(scope["model"].eval()(IMAGES), encoder)
    found = import_weights(out, tmp_path / "run").spec
    assert (found.stem, found.image_size) == (stem, 32), "no tensor tells the stride"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_timm_loads_it_strictly(r18: Encoder, tmp_path: Path, suffix: str) -> None:
    timm = pytest.importorskip("timm", reason=NEEDS)
    out = tmp_path / f"weights{suffix}"
    assert "loaded in timm" in written(r18, "resnet18", "linear", out, "timm")
    net = timm.create_model("resnet18", num_classes=0)
    net.load_state_dict(load_file(out) if suffix == ".safetensors" else torch.load(out))
    near(net.eval()(IMAGES), r18)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_transformers_loads_the_folder(
    arch: str, r18: Encoder, r50: Encoder, tmp_path: Path
) -> None:
    """Of both kinds of block; stride and shortcut must be where torchvision has them."""
    transformers = pytest.importorskip("transformers", reason=NEEDS)
    encoder, head = (r18, "linear") if arch == "resnet18" else (r50, "mlp")
    out = tmp_path / "folder"
    assert "loaded in transformers" in written(encoder, arch, head, out, "huggingface")
    net, told = transformers.ResNetModel.from_pretrained(str(out), output_loading_info=True)
    assert not any(told.values()), told
    near(net.eval()(IMAGES).pooler_output.flatten(1), encoder)


def test_transformers_shows_images_as_we_do(r18: Encoder, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason=NEEDS)
    written(r18, "resnet18", "linear", tmp_path / "folder", "huggingface")
    processor = transformers.AutoImageProcessor.from_pretrained(str(tmp_path / "folder"))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    shown = processor(image, return_tensors="pt")["pixel_values"]
    levels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    mean, std = ([[[[v]] for v in vs]] for vs in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = (levels - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    torch.testing.assert_close(shown, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("default")  # of torch's exporter about its own parts
@pytest.mark.parametrize("head", ["linear", "none"])
def test_onnxruntime_runs_the_graph(head: str, r18: Encoder, tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason=NEEDS)
    pytest.importorskip("onnxscript", reason=NEEDS)
    onnxruntime = pytest.importorskip("onnxruntime", reason=NEEDS)
    encoder = r18
    if head == "none":
        encoder = Encoder(
            EncoderSpec(arch="resnet18", stem="imagenet", head="none", dim=512)
        ).eval()
        encoder.backbone.load_state_dict(r18.backbone.state_dict())
    out = tmp_path / "graph.onnx"
    said = written(encoder, "resnet18", head, out, "onnx")
    assert "loaded in onnxruntime" in said and "opset 18" in said
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    features, *projection = session.run(None, {"images": IMAGES.numpy()})  # 3 images, made with 2
    near(torch.from_numpy(features), encoder)
    assert len(projection) == (head == "linear")
    for found in projection:
        with torch.inference_mode():
            torch.testing.assert_close(torch.from_numpy(found), r18(IMAGES), rtol=1e-5, atol=1e-5)


def test_detectron2_by_its_structure(r50: Encoder, tmp_path: Path) -> None:
    """It is not on the package index: its names are written out here, its loader reads pickles."""
    out = tmp_path / "weights.pkl"
    said = written(r50, "resnet50", "mlp", out, "detectron2")
    assert "not loaded for a check" in said and "STRIDE_IN_1X1: False" in said
    assert "[123.675, 116.28, 103.53]" in said and "DEPTH: 50" in said
    content = pickle.loads(out.read_bytes())
    assert content["matching_heuristics"] is True and content["__author__"] == "fastmoco"
    norm = ("weight", "bias", "running_mean", "running_var")
    wanted = {"stem.conv1.weight"} | {f"stem.conv1.norm.{n}" for n in norm}
    for stage, blocks in ((2, 3), (3, 4), (4, 6), (5, 3)):
        for block in range(blocks):
            for conv in ("conv1", "conv2", "conv3") + (("shortcut",) if block == 0 else ()):
                at = f"res{stage}.{block}.{conv}"
                wanted |= {f"{at}.weight"} | {f"{at}.norm.{n}" for n in norm}
    assert content["model"].keys() == wanted
    ours = r50.backbone
    pairs = (
        ("stem.conv1.norm.bias", ours.bn1.bias),
        ("res4.5.conv2.norm.running_var", ours.layer3[5].bn2.running_var),
        ("res3.0.shortcut.weight", ours.layer2[0].downsample[0].weight),
        ("res5.0.shortcut.norm.running_mean", ours.layer4[0].downsample[1].running_mean),
    )
    for name, tensor in pairs:
        assert np.array_equal(content["model"][name], tensor.detach().numpy()), name


@pytest.mark.parametrize("head", ["linear", "mlp", "none"])
def test_safetensors_come_back_bit_by_bit(head: str, tmp_path: Path) -> None:
    encoder = build("resnet10", "small-stride2", head, 512 if head == "none" else 24)
    recipe = spec_for(encoder, "resnet10", "small-stride2", head, size=40)
    recipe = recipe.model_copy(update={"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)})
    export(encoder, recipe, tmp_path / "weights.safetensors", "safetensors")
    found = import_weights(tmp_path / "weights.safetensors", tmp_path / "run").spec
    for name in ("arch", "stem", "head", "dim", "image_size", "mean", "std"):
        assert getattr(found, name) == getattr(recipe, name), name
    same(RunFolder(tmp_path / "run").latest()[0]["encoder_q"], encoder.state_dict())  # type: ignore[index]


@pytest.mark.parametrize("to", ["torchvision", "timm", "safetensors", "onnx"])
def test_one_channel_goes_out_and_comes_back(to: str, tmp_path: Path) -> None:
    pytest.importorskip("timm", reason=NEEDS)
    pytest.importorskip("onnxruntime", reason=NEEDS)
    torch.manual_seed(0)
    spec = EncoderSpec(arch="resnet18", channels=1, dim=16, image_size=32, mean=(0.4,), std=(0.1,))
    encoder, out = Encoder(spec).eval(), tmp_path / ("out.onnx" if to == "onnx" else "out")
    out = out if to != "safetensors" else out.with_suffix(".safetensors")
    done = export(encoder, spec, out, to)
    assert "features differ by" in done.checked
    if to == "timm":
        assert "in_chans=1" in done.note
    if to == "onnx":
        assert "(n, 1, 32, 32)" in done.note
        return
    found = import_weights(out, tmp_path / "run").spec
    assert (found.channels, found.mean, found.std) == (1, (0.4,), (0.1,))
    state = RunFolder(tmp_path / "run").latest()[0]["encoder_q"]  # type: ignore[index]
    same(state, {name: t for name, t in encoder.state_dict().items() if name in state})
    with pytest.raises(UsageError, match=r"encoder.channels 1, the recipe 3: name other"):
        read_initial(out, EncoderSpec(arch="resnet18", dim=16))


@pytest.mark.parametrize("to", ["huggingface", "detectron2"])
def test_one_channel_is_refused_where_images_have_three(to: str, tmp_path: Path) -> None:
    spec = EncoderSpec(arch="resnet18", channels=1, dim=16)
    with pytest.raises(UsageError, match=r"three channels.*: export to one of torchvision"):
        export(Encoder(spec), spec, tmp_path / "out", to)


@pytest.mark.parametrize("to", ["torchvision", "safetensors", "huggingface"])
def test_attention_is_refused_where_it_has_no_place(to: str, tmp_path: Path) -> None:
    spec = EncoderSpec(arch="resnet10", attention="dot", dim=16)
    with pytest.raises(UsageError, match=r"no place for encoder.attention dot: export to one of o"):
        export(Encoder(spec), spec, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["torchvision", "huggingface"])
def test_what_others_load_comes_back_bit_by_bit(to: str, r18: Encoder, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason=NEEDS)
    out = tmp_path / "out"
    export(r18, spec_for(r18, "resnet18", "imagenet", "linear"), out, to)
    file = out / "model.safetensors" if to == "huggingface" else out
    assert import_weights(file, tmp_path / "run").source.endswith(f" {to}")
    state = RunFolder(tmp_path / "run").latest()[0]["encoder_q"]  # type: ignore[index]
    same(state, {f"backbone.{k}": v for k, v in r18.backbone.state_dict().items()})


@pytest.mark.parametrize("to", ["timm", "huggingface", "detectron2"])
def test_what_a_program_cannot_hold_is_refused(to: str, small: Encoder, tmp_path: Path) -> None:
    recipe = spec_for(small, "resnet18", "small", "linear")
    with pytest.raises(UsageError, match=r"3x3 stem.*: export to one of torchvision, safe"):
        export(small, recipe, tmp_path / "out", to)
    wide = recipe.model_copy(update={"arch": "wide_resnet50_2", "stem": "imagenet"})
    assert (TARGETS[to].refusal(wide) is None) == (to != "huggingface")
    ten = recipe.model_copy(update={"arch": "resnet10", "stem": "imagenet"})
    assert (TARGETS[to].refusal(ten) is None) == (to == "huggingface")
    assert not list(tmp_path.iterdir())


def test_a_result_that_computes_otherwise_is_not_left_behind(
    small: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = spec_for(small, "resnet18", "small", "linear")
    target = type(TARGETS["torchvision"])
    honest = target.features
    for fault in (0.01, float("nan")):
        monkeypatch.setattr(target, "features", lambda *a, fault=fault: honest(*a) + fault)
        with pytest.raises(CheckpointError, match=r"torchvision computes other features.*nothing"):
            export(small, recipe, tmp_path / "weights.pth", "torchvision")
    assert not list(tmp_path.iterdir())


def test_packages_that_are_not_installed(
    r18: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    recipe = spec_for(r18, "resnet18", "imagenet", "linear")
    with pytest.raises(UsageError, match=r"onnx, onnxscript missing: pip install"):
        export(r18, recipe, tmp_path / "graph.onnx", "onnx")
    done = export(r18, recipe, tmp_path / "weights.pth", "timm")
    assert done.checked == "not loaded for a check: timm is not installed"


def test_the_command(run: Run, make_run: Callable[..., RunFolder], tmp_path: Path) -> None:
    root, out = make_run().root, tmp_path / "weights.pth"
    code, said, err = run("export", root, out, "--to", "torchvision")
    assert code == 0 and "resnet10 of step 12 for torchvision; loaded in torchvision" in said, err
    code, _, err = run("export", root, out, "--to", "torchvision")
    assert code == 2 and "exists: choose another name" in err
    assert run("export", root, tmp_path / "x", "--to", "timm")[0] == 2
    assert run("export", tmp_path, tmp_path / "x", "--to", "timm")[0] == 2


def test_the_command_knows_every_target() -> None:
    assert list(get_args(get_type_hints(exchange.export)["to"])) == list(TARGETS)


def test_what_is_written_for_transformers_is_plain_json(r18: Encoder, tmp_path: Path) -> None:
    written(r18, "resnet18", "linear", tmp_path / "folder", "huggingface")
    names = sorted(p.name for p in (tmp_path / "folder").iterdir())
    assert names == ["config.json", "model.safetensors", "preprocessor_config.json"]
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert (config["layer_type"], config["hidden_sizes"]) == ("basic", [64, 128, 256, 512])
