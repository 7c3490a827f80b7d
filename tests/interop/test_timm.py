"""Runs of timm's networks: trained, loaded by timm, and taken back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmoco.config.loading import load_recipe
from fastmoco.core.distributed import World
from fastmoco.errors import CheckpointError
from fastmoco.interop.importer import import_weights
from fastmoco.interop.initial import read_initial
from fastmoco.pretrain import main
from fastmoco.runs.load_encoder import load_encoder
from fastmoco.runs.run_folder import RunFolder
from fastmoco.train.engine import Engine

from .conftest import Run, prefixed, same, saved

timm = pytest.importorskip("timm", reason="pip install 'fastmoco[timm]'")

SHORT = ["monitor=null", "schedule.epochs=null", "schedule.steps=3", "checkpoints.every=3"]
CPU = torch.device("cpu")


@pytest.fixture
def trained(recipe: Path, tmp_path: Path) -> Callable[..., RunFolder]:
    """A run of three steps."""

    def train(arch: str, stem: str = "imagenet") -> RunFolder:
        network = [f"encoder.arch={arch}", f"encoder.stem={stem}", "encoder.image_size=32"]
        assert main([str(recipe), *SHORT, *network]) == 0
        return RunFolder(tmp_path / "run")

    return train


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convnextv2_atto", "efficientnet_b0", "resnet50d"])
def test_what_was_trained_goes_to_timm_and_comes_back(
    name: str, trained: Callable[..., RunFolder], run: Run, tmp_path: Path, capsys: Any
) -> None:
    folder, out, again = trained(f"timm:{name}"), tmp_path / "weights.pth", tmp_path / "again"
    said = capsys.readouterr().out
    assert ("shuffling has nothing to hide" in said) == (name == "convnextv2_atto")
    assert "Nobody here has tried" not in said
    code, said, err = run("export", folder.root, out, "--to", "timm")
    assert code == 0 and "loaded in timm, features differ by" in said, err
    assert f"model = timm.create_model('{name}', num_classes=0)" in said
    encoder, _, _ = load_encoder(folder, CPU)
    net = timm.create_model(name, num_classes=0)
    net.load_state_dict(torch.load(out), strict=True)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3)).double()
    with torch.inference_mode():  # in float64: young statistics blow efficientnet's rounding up
        wanted, found = encoder.double().backbone(images), net.double().eval()(images)
    assert wanted.std() > 0.01, "the features tell images apart"
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    code, said, err = run("import", out, again, "--arch", f"timm:{name}")
    assert code == 0 and f"timm:{name}, imagenet stem, no head, by the names of timm" in said, err
    same(load_encoder(RunFolder(again), CPU)[0].backbone.state_dict(), torch.load(out))


@pytest.mark.slow
def test_a_small_stem_is_in_the_code_that_loads_it(
    trained: Callable[..., RunFolder], run: Run, tmp_path: Path
) -> None:
    folder, out = trained("timm:efficientnet_b0", "small"), tmp_path / "weights.safetensors"
    code, said, err = run("export", folder.root, out, "--to", "timm")
    assert code == 0 and "set_submodule('conv_stem', torch.nn.Conv2d(3, 32" in said, err
    found = import_weights(out, tmp_path / "again").spec
    assert (found.arch, found.stem, found.image_size) == ("timm:efficientnet_b0", "small", 32)
    code, said, err = run("export", folder.root, tmp_path / "x", "--to", "torchvision")
    assert code == 2 and "torchvision has no timm:efficientnet_b0: export to one of timm" in err
    both = tmp_path / "both.safetensors"
    assert run("export", folder.root, both, "--to", "safetensors")[0] == 0
    import_weights(both, tmp_path / "both")
    ours, theirs = (load_encoder(RunFolder(tmp_path / n), CPU)[0] for n in ("run", "both"))
    same(theirs.state_dict(), ours.state_dict())


@pytest.mark.parametrize("name", ["convnextv2_atto", "efficientnet_b0", "resnet50d"])
def test_timms_own_file_with_its_classifier(name: str, tmp_path: Path) -> None:
    state = timm.create_model(name, num_classes=7).state_dict()
    file = saved({"state_dict": prefixed("module.backbone.", state)}, tmp_path / "w.pth")
    found = import_weights(file, tmp_path / "run", arch=f"timm:{name}")
    assert found.source == "behind state_dict.backbone., by the names of timm"
    assert any(
        "2 tensors under state_dict.backbone." in note and "classifier" in note
        for note in found.notes
    )
    backbone = load_encoder(RunFolder(tmp_path / "run"), CPU)[0].backbone.state_dict()
    same(backbone, {n: t for n, t in state.items() if n in backbone})
    saved({n: t for n, t in state.items() if n != "bn1.bias" and n != "stem.1.bias"}, file)
    with pytest.raises(CheckpointError, match=f"1 tensors keep it from being a timm:{name}"):
        import_weights(file, tmp_path / "no", arch=f"timm:{name}")


def test_a_run_starts_from_timms_file(recipe: Path, tmp_path: Path) -> None:
    file = saved(timm.create_model("efficientnet_b0").state_dict(), tmp_path / "weights.pth")
    options = ["encoder.arch=timm:efficientnet_b0", "encoder.stem=imagenet"]
    spec = load_recipe(str(recipe), options).encoder
    assert "backbone of" in read_initial(file, spec).notes[0]
    with pytest.raises(CheckpointError, match="are those of no ResNet"):
        read_initial(file, load_recipe(str(recipe), []).encoder)


def test_nothing_is_shuffled_where_there_is_no_batch_norm(recipe: Path, run: Run) -> None:
    options = ["encoder.arch=timm:convnextv2_atto", "encoder.stem=imagenet", *SHORT]
    options.append("encoder.image_size=32")
    engines = [
        Engine(load_recipe(str(recipe), [*options, f"objective.shuffle={how}"]), World(), CPU)
        for how in ("global", "off")
    ]
    assert engines[0].recipe == engines[1].recipe
    images = torch.randn(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    first, second = (engine.step(*images, 0).loss for engine in engines)
    assert torch.equal(first, second)
    code, said, err = run("pretrain", recipe, *options, "--dry-run")
    assert code == 0 and "BatchNorm                   none" in said, err
    assert "shuffling has nothing to hide" in said and "received by a rank" not in said


def test_an_untried_network_says_so_and_an_unknown_one_leaves_nothing(
    recipe: Path, run: Run, tmp_path: Path
) -> None:
    options = ["encoder.stem=imagenet", "encoder.image_size=32", *SHORT]
    code, said, err = run(
        "pretrain", recipe, *options, "encoder.arch=timm:mobilenetv3_small_050", "--dry-run"
    )
    assert code == 0 and "Nobody here has tried timm:mobilenetv3_small_050: tried are" in said, err
    code, said, err = run("pretrain", recipe, *options, "encoder.arch=timm:vit_tiny_patch16_224")
    assert code == 2 and "MoCo v3" in err, said
    assert not list(tmp_path.glob("run/*.yaml")), "nothing but word of why"


@pytest.mark.slow
def test_the_report_draws_its_first_filters_and_stages(
    trained: Callable[..., RunFolder], run: Run
) -> None:
    pytest.importorskip("matplotlib")
    folder = trained("timm:convnextv2_atto")
    code, said, err = run("report", folder.root)
    assert code == 0, said + err
    page = (folder.root / "report" / "report.html").read_text()
    assert "40 × 3 × 4 × 4" in page and "What the first convolution and the stages make of" in page
