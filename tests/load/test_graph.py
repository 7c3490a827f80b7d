"""The DALI graph: one for both devices, checked without a GPU; its pixels checked with one."""

import struct
import weakref
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import nvidia.dali.backend as backend
import pytest
import torch
from nvidia.dali.pipeline import Pipeline
from PIL import Image

from fastmoco.config.recipe import View
from fastmoco.core.rng import uniforms
from fastmoco.load import dali_executor as dali
from fastmoco.load.executor import EnabledOps, EncodedBatch, PipelineSpec, Settings
from fastmoco.load.view_params import draw

REGISTERED = {
    "cpu": set(backend.RegisteredCPUOps()),
    "gpu": set(backend.RegisteredGPUOps()),
    "mixed": set(backend.RegisteredMixedOps()),
}
LOOKS = {
    "two full views": (EnabledOps(True, True), EnabledOps(True, True)),
    "solarized": (EnabledOps(True, True), EnabledOps(True, True, True)),
    "color": (EnabledOps(color=True), EnabledOps(color=True)),
    "blur": (EnabledOps(blur=True),),
    "evaluation": (EnabledOps(),),
}


def built(device: str, stages: tuple[EnabledOps, ...], decoder: str | None = None) -> Pipeline:
    look = PipelineSpec(32, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), stages)
    return dali.build(
        lambda info: [],
        look,
        batch=4,
        threads=1,
        prefetch=2,
        device=device,
        device_id=None,
        decoder=decoder or {"cpu": "cpu", "gpu": "mixed"}[device],
        hw_decoder_load=0.375,
    )


def operators(pipeline: Pipeline) -> list[tuple[str, str]]:
    """Return the (name, device) of each operator; from what DALI does not publish."""
    pipeline._build_graph()
    kinds = [op._op for op in pipeline._ops]
    return [(getattr(op, "schema_name", type(op).__name__), op.device) for op in kinds]


@pytest.mark.parametrize("name", LOOKS)
def test_both_devices_run_the_same_operators(name: str) -> None:
    on_cpu, on_gpu = (operators(built(device, LOOKS[name])) for device in ("cpu", "gpu"))
    assert [op for op, _ in on_cpu] == [op for op, _ in on_gpu]
    assert {device for _, device in on_cpu} == {"cpu"}
    assert {"gpu", "mixed"} <= {device for _, device in on_gpu}


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_every_operator_exists_for_its_device(device: str) -> None:
    found = operators(built(device, LOOKS["two full views"]))
    assert len(found) > 10
    assert [op for op in found if op[0] not in REGISTERED[op[1]]] == []


@pytest.mark.parametrize("name", LOOKS)
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_graph_serializes_without_a_gpu(device: str, name: str) -> None:
    assert len(built(device, LOOKS[name]).serialize()) > 1000


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_an_image_is_decoded_once_for_all_views(device: str) -> None:
    names = [name for name, _ in operators(built(device, LOOKS["two full views"]))]
    assert len([name for name in names if "ecoder" in name]) == 1
    assert len([name for name in names if name == "Resize"]) == 2


def test_images_decoded_on_the_cpu_are_drawn_on_the_gpu() -> None:
    on_cpu, on_gpu = (built("gpu", LOOKS["two full views"], d) for d in ("cpu", "mixed"))
    for (name, device), (other, there) in zip(operators(on_cpu), operators(on_gpu), strict=True):
        assert (name, device) == (other, "cpu" if there == "mixed" else there)
    assert len(on_cpu.serialize()) > 1000


def test_a_gpu_decodes_as_it_is_told_and_its_chroma_as_a_cpu_does() -> None:
    graph = built("gpu", LOOKS["evaluation"]).serialize()
    # In protobuf: name, type, value.
    assert b"hw_decoder_load\x12\x05float\x1d" + struct.pack("<f", 0.375) in graph
    assert b"jpeg_fancy_upsampling\x12\x04bool\x30\x01" in graph


class _Stream(Exception):
    """Tells the stream that a pipeline was run on."""


def test_the_gpu_hands_over_on_the_stream_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pipe:
        def run(self, stream: object) -> None:
            raise _Stream(stream)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    for device, stream in (("cuda:1", "stream of cuda:1"), ("cpu", None)):
        with pytest.raises(_Stream) as told:
            dali._next(Pipe(), torch.device(device))
        assert told.value.args == (stream,)


def test_memory_of_the_gpu_is_kept_until_torch_is_done_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alive: dict[int, weakref.ref[torch.Tensor]] = {}
    done: list[int] = []

    class Event:
        def __init__(self) -> None:
            self.number = len(alive) - 1

        def synchronize(self) -> None:
            assert alive[self.number]() is not None
            done.append(self.number)

    def drawn(output: object) -> torch.Tensor:
        view = torch.zeros(1)
        alive[len(alive)] = weakref.ref(view)
        return view

    def build(feed: Callable[[object], list[object]], *_: object, **__: object) -> object:
        info = SimpleNamespace(iteration=0)
        return SimpleNamespace(build=lambda: None, run=lambda stream: feed(info))

    stream = SimpleNamespace(record_event=Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(dali, "build", build)
    monkeypatch.setattr(dali, "to_torch", drawn)
    look, settings = (
        PipelineSpec(32, (0, 0, 0), (1, 1, 1), ()),
        Settings(device=torch.device("cuda", 0)),
    )
    batches = dali.render(lambda number: EncodedBatch(np.arange(1), [], []), look, 1, settings)
    for number in range(6):
        next(batches)
        gone = [i for i in range(number) if alive[i]() is None]
        assert gone == done == list(range(number - dali._KEPT))


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_no_operator_draws_numbers_of_its_own(device: str) -> None:
    names = [name for name, _ in operators(built(device, LOOKS["two full views"]))]
    assert not [name for name in names if "andom" in name or "Flip" in name or "Uniform" in name]


def test_views_without_color_or_blur_do_not_pay_for_them() -> None:
    plain = {name for name, _ in operators(built("cpu", LOOKS["evaluation"]))}
    full = {name for name, _ in operators(built("cpu", LOOKS["two full views"]))}
    assert not {"CoordTransform", "GaussianBlur"} & plain
    assert {"CoordTransform", "GaussianBlur"} <= full


@pytest.mark.gpu
@pytest.mark.parametrize("decode", ["cpu", "mixed"])
def test_the_gpu_draws_what_the_cpu_draws(
    make_picture: Callable[..., Image.Image], encode: Callable[..., np.ndarray], decode: str
) -> None:
    images = [make_picture(i, (64, 48)) for i in range(8)]
    view = View(jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grayscale=0.2, blur=0.5)
    numbers = draw(view, uniforms(0, 0, 8, 1)[0], np.tile([[48, 64]], (8, 1)))
    work = EncodedBatch(np.arange(8), [encode(image, "jpeg") for image in images], [numbers])
    look = PipelineSpec(32, (0.5, 0.5, 0.5), (1 / 255,) * 3, (EnabledOps(True, True),))
    cpu, gpu = (
        next(dali.render(lambda i: None if i else work, look, 8, settings)).views[0]
        for settings in (Settings(), Settings(device=torch.device("cuda", 0), decode=decode))
    )
    assert gpu.is_cuda and gpu.dtype == torch.float16
    assert gpu.is_contiguous(memory_format=torch.channels_last)
    assert (gpu.float().cpu() - cpu).abs().mean() < 2  # levels
