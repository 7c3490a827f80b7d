"""The arms of `benchmarks/peers.py` train the same network on the same images."""

import peers
import pytest
from harness.arm import Section

from fastmoco.pack.options import PackOptions
from fastmoco.pack.packer import pack

OPTIONS = {
    "encoder.arch": "resnet18",
    "encoder.image_size": 32,
    "batch": 8,
    "objective.queue": 64,
    "objective.bn_group": 8,
    "runtime.device": "cpu",
}


@pytest.mark.slow
def test_all_arms_do_the_same_work(make_images, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "WARM_UP", 1)
    folder = make_images(tmp_path / "in", ("a", "b"), 12, (40, 48), "jpg")
    pack(folder, tmp_path / "set", PackOptions())
    done = [peers.ours(Section(), str(tmp_path / "set"), OPTIONS, steps=1)]
    for tuned in (False, True):
        done.append(peers.official(Section(), str(folder), OPTIONS, 1, workers=0, tuned=tuned))
    assert [one["images"] for one in done] == [8, 8, 8]
    assert done[0]["check"] == done[1]["check"] == done[2]["check"]
    assert done[0]["check"]["shape"] == [8, 3, 32, 32]
