"""Files of others that are no weights for a ResNet: refused by the names of what is wrong."""

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
from safetensors.torch import save_file
from torch import nn

from fastmoco.errors import CheckpointError, UsageError
from fastmoco.interop.importer import import_weights
from fastmoco.models.encoder import Encoder
from fastmoco.runs.run_folder import RunFolder

from .conftest import Run, Tensors, moco, named, prefixed, same, saved


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


def test_refusals_end_in_their_exit_codes(run: Run, r10: Encoder, tmp_path: Path) -> None:
    file = saved(changed(r10, rename), tmp_path / "theirs.pth")
    code, _, err = run("import", file, tmp_path / "run")
    assert code == 4 and err.startswith(f"error: {file}: 1 tensors keep") and "Traceback" not in err
    assert run("import", tmp_path / "none.pth", tmp_path / "run")[0] == 2
