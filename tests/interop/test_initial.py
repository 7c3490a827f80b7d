"""Runs that start from given weights: with the features of the source, or words say why not."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from fastmoco.config.loading import load_recipe
from fastmoco.core.distributed import World
from fastmoco.interop.initial import read_initial
from fastmoco.models.encoder import Encoder
from fastmoco.pretrain import main
from fastmoco.runs.load_encoder import load_encoder
from fastmoco.runs.run_folder import RunFolder
from fastmoco.train.engine import Engine

from .conftest import build, parts, saved, spec_for

SMALL = ["monitor=null", "schedule.epochs=null", "schedule.steps=1"]
RESNET18 = ["encoder.arch=resnet18", "encoder.stem=imagenet", "encoder.image_size=32"]


@pytest.fixture
def source(tmp_path: Path) -> RunFolder:
    """A run at step 7 of the network of `recipe`, in which every tensor counts."""
    folder = RunFolder(tmp_path / "source")
    folder.root.mkdir()
    encoder = build("resnet10", "small-stride2", "linear", 16)
    folder.describe_encoder(spec_for(encoder, "resnet10", "small-stride2", "linear", 16), {})
    folder.save({"encoder_q": encoder.state_dict()}, 7, {}, keep=2)
    return folder


@pytest.fixture
def first_step(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """What the first step of a run finds: features of its query view, and both encoders."""
    seen: dict[str, torch.Tensor] = {}
    take = Engine.step

    def step(
        self: Engine, query_view: torch.Tensor, key_view: torch.Tensor, number: int, *ids: Any
    ) -> object:
        if number == 0:
            self.encoder_q.eval()
            with torch.no_grad():
                seen["features"] = self.encoder_q.backbone(query_view).float()
                seen["head"] = self.encoder_q(query_view).float()
            self.train()
            keys = self.objective.encoder_k.state_dict()
            for name, tensor in self.encoder_q.state_dict().items():
                assert torch.equal(tensor, keys[name]), name
            seen["images"] = query_view
        return take(self, query_view, key_view, number, *ids)

    monkeypatch.setattr(Engine, "step", step)
    return seen


@pytest.mark.parametrize("what", ["run", "checkpoint", "file"])
def test_the_first_features_are_those_of_a_run(recipe, source, first_step, capsys, what):
    checkpoint = source.checkpoints / "step-000000007"
    path = {"run": source.root, "checkpoint": checkpoint, "file": checkpoint / "state.pt"}[what]
    assert main([str(recipe), *SMALL, f"init={path}"]) == 0
    assert f"init: backbone and head of {path}" in capsys.readouterr().out
    encoder, _, _ = load_encoder(source, torch.device("cpu"))
    with torch.no_grad():
        features, head = encoder.backbone(first_step["images"]), encoder(first_step["images"])
    assert features.abs().max() > 0.1
    assert torch.allclose(first_step["features"], features, rtol=0, atol=1e-6)
    assert torch.allclose(first_step["head"], head, rtol=0, atol=1e-6)


def test_the_first_features_are_those_of_torchvision(recipe, first_step, capsys, tmp_path):
    """A classifier in the place of the head is no head."""
    torch.manual_seed(3)
    net = torchvision.models.resnet18(weights=None)
    torch.save(net.state_dict(), tmp_path / "resnet18.pth")
    assert main([str(recipe), *SMALL, *RESNET18, f"init={tmp_path}/resnet18.pth"]) == 0
    out = capsys.readouterr().out
    assert f"init: backbone of {tmp_path}/resnet18.pth" in out
    assert "init: the head is new: none there, linear of 16 in the recipe" in out
    net.fc = nn.Identity()
    with torch.no_grad():
        features = net.eval()(first_step["images"])
    assert torch.allclose(first_step["features"], features, rtol=0, atol=1e-6)


def test_a_head_of_another_shape_is_left_and_told(recipe, source, first_step, capsys):
    new_head = ["encoder.head=mlp", "encoder.mean=[0.1,0.2,0.3]"]
    assert main([str(recipe), *SMALL, *new_head, f"init={source.root}"]) == 0
    out = capsys.readouterr().out
    assert "the head is new: linear of 16 there, mlp of 16 in the recipe" in out
    mean, std = "encoder.mean=[0.485, 0.456, 0.406]", "encoder.std=[0.229, 0.224, 0.225]"
    assert f"another normalization: to keep it, set '{mean}' '{std}'" in out
    encoder, _, _ = load_encoder(source, torch.device("cpu"))
    with torch.no_grad():
        features = encoder.backbone(first_step["images"])
    assert torch.allclose(first_step["features"], features, rtol=0, atol=1e-6)


def test_a_resumed_run_does_not_look_at_it(recipe, source, capsys, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    arguments = [str(recipe), "monitor=null", f"init={source.root}"]
    assert main([*arguments, f"out={whole}"]) == 0
    assert main([*arguments, f"out={halves}", "stop_epoch=2"]) == 0
    kept = RunFolder(halves)
    kept.latest()
    wanted = read_initial(source.root, source.spec()).sha256
    shutil.rmtree(source.root)
    capsys.readouterr()
    assert main([*arguments, "init=another", f"out={halves}"]) == 0
    out = capsys.readouterr().out
    assert "init another is not read: the run goes on from its step 6" in out
    assert "on init:" not in out and kept.recipe().init == source.root
    ends = [RunFolder(one) for one in (whole, halves)]
    ours, theirs = (one.latest()[0]["encoder_q"] for one in ends)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {one.fingerprint["init"] for one in (*ends, kept)} == {wanted}


def test_other_weights_have_another_hash(source, tmp_path):
    hashes = set()
    for factor in (1, 1.001):
        state = source.latest()[0]["encoder_q"]
        state["backbone.layer3.0.conv1.weight"] *= factor
        file = saved(state, tmp_path / f"{factor}.pth")
        hashes.add(read_initial(file, source.spec()).sha256)
    assert len(hashes) == 2
    assert read_initial(source.root, source.spec()).sha256 in hashes  # the same values in a run


def test_the_recipe_of_the_docs_is_one(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "continued.yaml").write_text(block)
    recipe = load_recipe(str(tmp_path / "continued.yaml"))
    assert recipe.init == Path("moco_v2_200ep_pretrain.pth.tar")
    assert recipe.objective.queue // recipe.batch == 64 and recipe.schedule.warmup_epochs == 2


def test_a_dry_run_says_what_would_be_taken(recipe, source, capsys, tmp_path):
    assert main([str(recipe), f"init={source.root}", "--dry-run"]) == 0
    assert f"init: backbone and head of {source.root}, step 7" in capsys.readouterr().out
    assert main([str(recipe), f"init={tmp_path}/none.pth", "--dry-run"]) == 2


def missing(path: Path, encoder: Encoder) -> Path:
    return path / "none.pth"


def no_run(path: Path, encoder: Encoder) -> Path:
    (path / "folder").mkdir()
    return path / "folder"


def of_another_arch(path: Path, encoder: Encoder) -> Path:
    return saved(torchvision.models.resnet18(weights=None).state_dict(), path / "other.pth")


def cut(path: Path, encoder: Encoder) -> Path:
    file = saved(encoder.state_dict(), path / "cut.pth")
    file.write_bytes(file.read_bytes()[:-1000])
    return file


def incomplete(path: Path, encoder: Encoder) -> Path:
    backbone, _ = parts(encoder)
    del backbone["layer3.0.conv1.weight"]
    return saved(backbone, path / "incomplete.pth")


def not_finite(path: Path, encoder: Encoder) -> Path:
    state = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    state["backbone.conv1.weight"][0] = torch.nan
    return saved(state, path / "nan.pth")


def two_networks(path: Path, encoder: Encoder) -> Path:
    backbone, _ = parts(encoder)
    state = {f"left.{name}": t for name, t in backbone.items()}
    state |= {f"right.{name}": t + 1 for name, t in backbone.items()}
    return saved(state, path / "two.pth")


@pytest.mark.parametrize(
    ("make", "code", "told"),
    [
        (missing, 2, "none.pth is neither a run folder nor a file of weights"),
        (no_run, 2, "is not a run folder (no encoder.json)"),
        (of_another_arch, 2, "set encoder.arch=resnet18 encoder.stem=imagenet"),
        (cut, 4, "is damaged"),
        (incomplete, 4, "layer3.0.conv1.weight is missing"),
        (not_finite, 4, "not finite numbers"),
        (two_networks, 4, "A run folder that `fastmoco import` makes of a file will do too"),
    ],
)
def test_what_cannot_be_started_from(
    recipe: Path, capsys, tmp_path: Path, make: Callable[..., Path], code: int, told: str
) -> None:
    encoder = build("resnet10", "imagenet", "linear", 16)
    file = make(tmp_path, encoder)
    assert main([str(recipe), *SMALL, "encoder.stem=imagenet", f"init={file}"]) == code
    assert told in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def test_a_damaged_checkpoint_is_not_started_from(recipe, source, capsys):
    checkpoint = source.checkpoints / "step-000000007"
    with (checkpoint / "state.pt").open("r+b") as file:
        file.seek(5000)
        file.write(b"damage")
    assert main([str(recipe), *SMALL, f"init={checkpoint}"]) == 4
    assert "is damaged: name another one" in capsys.readouterr().err


def test_ranks_that_read_other_weights_are_refused(recipe, source, monkeypatch, capsys):
    monkeypatch.setattr(World, "gather_object", lambda self, value: [value, "another"])
    assert main([str(recipe), *SMALL, f"init={source.root}", "--dry-run"]) == 4
    assert "The ranks read different weights" in capsys.readouterr().err


def test_attention_starts_new_beside_a_backbone_without(
    recipe, source, first_step, capsys, tmp_path
):
    attentive = tmp_path / "attentive"
    attends = [str(recipe), *SMALL, "encoder.attention=dot"]
    assert main([*attends, f"init={source.root}", f"out={attentive}"]) == 0
    assert "init: the attention is new: none there, dot in the recipe" in capsys.readouterr().out
    given = load_encoder(source, torch.device("cpu"))[0].backbone.state_dict()
    started = read_initial(source.root, load_recipe(attends[0], attends[1:]).encoder).weights
    assert set(started) == {f"backbone.{name}" for name in given}
    assert main([str(recipe), *SMALL, f"init={attentive}", f"out={tmp_path}/plain"]) == 2
    assert "set encoder.attention=dot, or name other weights" in capsys.readouterr().err
    state = next(attentive.glob("checkpoints/step-*/state.pt"))
    assert main([*attends, f"init={state.parent}", f"out={tmp_path}/again"]) == 2
    assert "attention is read from a run folder alone" in capsys.readouterr().err
    assert main([*attends, f"init={attentive}", f"out={tmp_path}/again"]) == 0
    assert f"init: backbone and head of {attentive}" in capsys.readouterr().out
