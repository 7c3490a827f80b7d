"""How hard images are: against InfoNCE written naively on views that torchvision draws."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import ranked
import torch
import torchvision_executor
import yaml
from copies import NO_PIXELS

from fastmoco.config.loading import load_recipe
from fastmoco.config.recipe import Recipe
from fastmoco.dataset.numbers import read_numbers
from fastmoco.dataset.reader import Reader
from fastmoco.dataset.shard_set import ConcatShardSets, ShardSet
from fastmoco.errors import FastmocoError
from fastmoco.label import hardness
from fastmoco.label.hardness import measure_hardness
from fastmoco.load.view_params import draw
from fastmoco.models.encoder import Encoder
from fastmoco.pretrain import main
from fastmoco.runs.run_folder import RunFolder

ROUNDS = 3


@pytest.fixture
def trained(recipe: Path, small_set: ShardSet, tmp_path: Path) -> RunFolder:
    """A run of `recipe` in fp32: two unlike encoders, and a queue of 20 rows of which 13 count."""
    resolved = load_recipe(str(recipe), ["runtime.precision=fp32", "objective.temperature=0.2"])
    folder = RunFolder(tmp_path / "trained")
    folder.checkpoints.mkdir(parents=True)
    folder.describe(resolved, {})
    torch.manual_seed(0)
    networks = {name: Encoder(resolved.encoder) for name in ("encoder_q", "encoder_k")}
    for network in networks.values():  # running statistics that are not those of the start
        network(torch.randn(64, 3, 16, 16))
    state = {name: network.state_dict() for name, network in networks.items()}
    keys = torch.nn.functional.normalize(torch.randn(20, 16), dim=1)
    queue = {"keys": keys, "pointer": torch.tensor(13), "filled": torch.tensor(13)}
    folder.save(state | {"queue": queue}, 9, {}, keep=2)
    return folder


def naive_hardness(run: RunFolder, data: ShardSet, seed: int) -> np.ndarray:
    """Image by image, with cross-entropy over the logits of the key and of each queue row."""
    recipe, (state, _) = run.recipe(), run.latest()
    networks = []
    for name in ("encoder_q", "encoder_k"):
        networks.append(Encoder(recipe.encoder).double().eval())
        networks[-1].load_state_dict(state[name])
    losses = np.zeros(len(data))
    for sample in range(len(data)):
        for turn in range(ROUNDS):
            views = two_views(recipe, data, sample, turn, seed)
            q, k = (network(view)[0] for network, view in zip(networks, views, strict=True))
            q, k = q / q.norm(), k / k.norm()
            rows = [k, *state["queue"]["keys"][:13].double()]
            logits = torch.stack([(q * row).sum() for row in rows]) / 0.2
            loss = torch.nn.functional.cross_entropy(logits[None], torch.tensor([0]))
            losses[sample] += loss.item() / ROUNDS
    return losses


def two_views(
    recipe: Recipe, data: ShardSet, sample: int, turn: int, seed: int
) -> list[torch.Tensor]:
    stream = np.random.Philox(key=np.array([seed, 7 * 2**33], np.uint64))
    stream.advance((turn * len(data) + sample) * 2 * 32 // 4)
    u = (stream.random_raw(2 * 32) >> np.uint64(11)) * 2.0**-53
    (encoded,) = Reader(ConcatShardSets([data])).fetch(np.array([sample]))
    image = torchvision_executor._decode(encoded).double() / 255
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in recipe.encoder.normalization())
    sizes = np.array([image.shape[1:]])
    drawn = [draw(view, u[None, 32 * i :][:, :32], sizes) for i, view in enumerate(recipe.views)]
    return [
        ((torchvision_executor.draw(image, one, 0, 16) - mean) / std).double()[None]
        for one in drawn
    ]


def test_it_is_infonce_of_pairs_of_views(trained: RunFolder, small_set: ShardSet) -> None:
    found = measure_hardness(trained.root, rounds=ROUNDS, seed=5)
    wanted = naive_hardness(trained, small_set, seed=5)
    assert np.abs(found.numbers - wanted).max() < 2e-3 < wanted.std() / 20
    assert found.about["step"] == 9 and found.about["negatives"] == 13


@pytest.mark.slow
@pytest.mark.dist
def test_neither_batch_nor_ranks_change_it(trained, small_set, monkeypatch, tmp_path) -> None:
    whole = measure_hardness(trained.root, rounds=2).numbers
    monkeypatch.setattr(hardness, "_BATCH", 7)
    assert np.abs(measure_hardness(trained.root, rounds=2).numbers - whole).max() < 1e-5
    script, out = tmp_path / "two_ranks.py", tmp_path / "two.csv"
    script.write_text("from fastmoco import cli\ncli.main()\n")
    words = ["hardness", str(trained.root), "--rounds", "2", "--out", str(out), "--device", "cpu"]
    processes = ranked.start_script(tmp_path / "log", [str(script), *words], ranks=2)
    assert ranked.finish(processes) == [0, 0], ranked.words(tmp_path / "log")
    shared = read_numbers(out, ConcatShardSets([small_set]))
    assert np.abs(shared - whole).max() < 1e-5
    assert ranked.words(tmp_path / "log", 1) == "", "rank 0 alone talks"


def test_more_rounds_agree_more(trained: RunFolder) -> None:
    few, many = (measure_hardness(trained.root, rounds=n) for n in (2, 16))
    assert few.correlation < many.correlation < 1
    one = measure_hardness(trained.root, rounds=1)
    assert one.correlation is None
    other = measure_hardness(trained.root, rounds=1, seed=1)
    assert np.abs(one.numbers - other.numbers).min() > 0


def test_what_is_written_is_read_by_a_query_and_a_recipe(trained, small_set, recipe, run, tmp_path):
    out = tmp_path / "deep" / "hard.csv"
    words = ("hardness", trained.root, "--rounds", 2, "--out", out, "--device", "cpu")
    code, said, err = run(*words)
    assert code == 0, err
    assert "24 samples, loss of 2 pairs of views" in said and f"data.weights={out}" in said
    measured = measure_hardness(trained.root, rounds=2).numbers
    rows = [line.split(",") for line in out.read_text().splitlines()]
    assert rows[0] == ["sample", "name", "hardness"]
    assert [row[1] for row in rows[1:]] == [small_set.get_name(i) for i in range(24)]
    assert np.array_equal([np.float32(row[2]) for row in rows[1:]], measured.astype(np.float32))
    about = json.loads(out.with_suffix(".json").read_text())
    assert about["set_ids"] == [small_set.manifest.set_id] and about["rounds"] == 2
    code, _, err = run(*words)
    assert code == 2 and "--replace" in err
    before = out.read_bytes()
    assert run(*words, "--replace")[0] == 0 and out.read_bytes() == before

    asked = ("--strategy", "scores", "--scores", out, "--out", tmp_path / "request.csv")
    root = Path(shutil.copytree(small_set.root, tmp_path / "pool", ignore=NO_PIXELS))
    config = yaml.safe_load(trained.config.read_text()) | {"monitor": None}
    trained.config.write_text(yaml.safe_dump(config))
    assert run("query", trained.root, root, "--budget", 5, *asked)[0] == 0
    lines = (tmp_path / "request.csv").read_text().splitlines()[1:]
    hardest = np.argsort(-measured, kind="stable")[:5].tolist()
    assert [int(line.split(",")[0]) for line in lines] == hardest
    overrides = [f"init={trained.root}", f"data.weights={out}", "monitor=null", "stop_epoch=1"]
    assert main([str(recipe), *overrides]) == 0


def test_other_sets_than_those_of_the_run(trained, small_set, run, tmp_path) -> None:
    twice = [small_set.root, small_set.root]
    found = measure_hardness(trained.root, twice, rounds=1)
    assert len(found.numbers) == 48 and found.data.set_ids == [small_set.manifest.set_id] * 2
    words = ("--rounds", 1, "--out", tmp_path / "h.csv", "--device", "cpu")
    code, said, _ = run("hardness", trained.root, *twice, *words)
    assert code == 0 and "48 samples" in said and "query" not in said


def imported(run: RunFolder, state: dict) -> None:
    run.config.unlink()


def without_queue(run: RunFolder, state: dict) -> None:
    del state["queue"]
    run.save(state, 10, {}, keep=2)


def empty_queue(run: RunFolder, state: dict) -> None:
    state["queue"]["filled"] *= 0
    run.save(state, 10, {}, keep=2)


def untrained(run: RunFolder, state: dict) -> None:
    shutil.rmtree(run.checkpoints)


def diverged(run: RunFolder, state: dict) -> None:
    state["encoder_k"]["head.bias"][0] = torch.inf
    run.save(state, 10, {}, keep=2)


@pytest.mark.parametrize(
    ("spoil", "code", "told"),
    [
        (imported, 2, "were imported: there are no views to measure by"),
        (without_queue, 2, "take a run of moco"),
        (empty_queue, 4, "is still empty"),
        (untrained, 4, "has no checkpoint yet"),
        (diverged, 5, "head.bias in the checkpoint of step 10"),
    ],
)
def test_what_cannot_be_measured(trained, spoil, code, told) -> None:
    spoil(trained, trained.latest()[0])
    with pytest.raises(FastmocoError, match=told) as error:
        measure_hardness(trained.root)
    assert error.value.exit_code == code


def test_a_damaged_image_is_named_and_nothing_written(trained, copied, run, tmp_path) -> None:
    entry = copied.samples[11]
    with (copied.root / "shard-000000.tar").open("r+b") as shard:
        shard.seek(int(entry["offset"]))
        shard.write(bytes(int(entry["size"])))
    out = tmp_path / "h.csv"
    code, _, err = run("hardness", trained.root, copied.root, "--out", out, "--device", "cpu")
    assert code == 3 and "sample 11 (" in err and not list(tmp_path.glob("h.*"))
