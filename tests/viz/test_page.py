"""The page says what is true of the run, in full, safely, and the same each time."""

import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from parsed_page import Parsed, samples
from PIL import Image

from fastmoco import cli
from fastmoco.config.loading import load_recipe
from fastmoco.errors import DataError, UsageError
from fastmoco.evaluate.evaluator import Evaluation
from fastmoco.models.encoder import Encoder
from fastmoco.runs.run_folder import RunFolder
from fastmoco.viz import encoder_study as study_module
from fastmoco.viz import report as module
from fastmoco.viz.report import report
from fastmoco.viz.report_plots import draw_heat
from fastmoco.viz.run_facts import gather

SECTIONS = (
    *("run", "curves", "numbers", "views", "neighbors", "extremes"),
    *("confusion", "classes", "projection", "labels", "filters", "maps"),
)
LABELLED = ("neighbors", "extremes", "confusion", "classes", "projection")


@pytest.fixture(scope="module")
def parsed(page: Path) -> Parsed:
    return Parsed(page)


@pytest.fixture(scope="module")
def evaluation(full_run: RunFolder) -> Evaluation:
    return Evaluation.open(full_run.root, device="cpu")


@pytest.fixture(scope="module")
def votes(evaluation: Evaluation) -> np.ndarray:
    """(24, 4) shares of the votes, computed without our classifier."""
    similarity = similarities(evaluation)
    shares = np.zeros((len(similarity), 4))
    for row, line in enumerate(similarity):
        for place in np.argsort(-line)[:7]:
            shares[row, evaluation.train.labels[place]] += np.exp(line[place] / 0.2)
    return shares / shares.sum(axis=1, keepdims=True)


def similarities(evaluation: Evaluation) -> np.ndarray:
    train, test = (
        evaluation.features(one, "backbone")[0].double().numpy()
        for one in (evaluation.train, evaluation.test)
    )
    train, test = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (train, test))
    return test @ train.T


def test_every_section_is_there_and_filled(parsed: Parsed) -> None:
    assert set(SECTIONS) <= parsed.text.keys()
    for section in set(SECTIONS) - {"labels"}:  # shows what is named
        assert "Not shown" not in parsed.text[section], section
    pictured = set(SECTIONS) - {"run", "numbers", "classes", "labels"}
    assert all(parsed.alts.get(section) for section in pictured)
    assert all(alt for alts in parsed.alts.values() for alt in alts), "an image without words"
    assert len(parsed.alts["curves"]) == 6


def test_nothing_comes_from_elsewhere(parsed: Parsed, page: Path) -> None:
    for link in parsed.links:
        assert link.startswith(("data:image/png;base64,", "#")) or link == "data:,", link[:80]
    anchors = {link[1:] for link in parsed.links if link.startswith("#")}
    assert anchors == set(SECTIONS)
    assert not parsed.tags & {"script", "iframe", "object", "embed", "form"}
    assert not re.search(r"url\(|@import|https?://", page.read_text())


def test_names_cannot_break_out(parsed: Parsed, page: Path) -> None:
    assert not parsed.tags & {"script", "b", "i"}
    words = " ".join(parsed.text.values())
    for name in ("<script>alert(1)<b>", '"q" & $x^$', "猫 ü", "tiny <i>run</i>", "1 & 2"):
        assert name in words
    assert "<script" not in page.read_text()


def test_the_numbers_are_a_table_newest_first(parsed: Parsed) -> None:
    _, probe, knn = parsed.cells["numbers"]
    assert probe[:5] == ["probe", "12", "61.25", "99.50", "lr=0.3, epochs=3, lrs=0.3 1"]
    assert (
        knn[0] == "knn"
        and knn[3] == "100.00"
        and knn[4] == "feature=backbone, k=5, t=0.1, precision=fp32"
    )
    assert "train: " in knn[5] and "(40 samples, set " in knn[5]


def test_neighbors_are_those_of_a_naive_sort(parsed: Parsed, evaluation: Evaluation) -> None:
    similarity, train, test = similarities(evaluation), evaluation.train, evaluation.test
    shown = np.reshape(samples(parsed.alts["neighbors"]), (-1, 9))
    assert len(shown) == 10 and len(set(shown[:, 0])) == 10
    for asked, *near in shown.tolist():
        line = similarity[test.ids.tolist().index(asked)]
        assert near == train.ids[np.argsort(-line, kind="stable")[:8]].tolist()
    marks = re.findall("[✓✗]", parsed.text["neighbors"])
    label = dict(zip(train.ids.tolist(), train.labels.tolist(), strict=True))
    wanted = dict(zip(test.ids.tolist(), test.labels.tolist(), strict=True))
    right = [label[one] == wanted[row[0]] for row in shown.tolist() for one in row[1:]]
    assert [mark == "✓" for mark in marks] == right and len({*right}) == 2


def test_a_tile_holds_its_image(page: Path, parsed: Parsed, evaluation: Evaluation) -> None:
    asked = samples(parsed.alts["neighbors"])[0]
    name = evaluation.test.set.get_name(asked)
    with Image.open(evaluation.test.set.root.parent / "source" / "test" / name) as original:
        square = original.convert("RGB").crop((0, 8, 32, 40)).resize((16, 16), 2)
    tile = np.asarray(Image.open(page.parent / "query_0.png")).astype(int)
    assert abs(tile - np.asarray(square)).max() <= 2


def test_best_and_worst_are_sorted_by_confidence(
    parsed: Parsed, evaluation: Evaluation, votes: np.ndarray
) -> None:
    predicted, labels = votes.argmax(axis=1), evaluation.test.labels
    order = sorted(range(24), key=lambda place: -votes[place].max())
    best = [place for place in order if predicted[place] == labels[place]][:16]
    worst = [place for place in order if predicted[place] != labels[place]][:16]
    assert best and worst
    assert samples(parsed.alts["extremes"]) == evaluation.test.ids[best + worst].tolist()
    said = re.findall(r"(\d+) %\s", parsed.text["extremes"].split("Right and surest")[1])
    assert list(map(int, said)) == [round(100 * votes[place].max()) for place in best + worst]


def test_no_more_neighbors_vote_than_a_class_has_images(evaluation: Evaluation) -> None:
    monitor = evaluation.recipe.monitor.model_copy(update={"k": 200, "feature": "head"})
    recipe = evaluation.recipe.model_copy(update={"monitor": monitor})
    study = study_module.Study.of(replace(evaluation, recipe=recipe), 1000)
    assert study.bank.k == len(evaluation.train.ids) // 4 and study.feature == "head"
    assert f"votes of the {study.bank.k} nearest neighbors (head features" in study.classifier


def test_a_shipped_recipe_says_what_was_changed(make_run, tmp_path: Path) -> None:
    changes = {"name": "moco_v2_imagenet_r50"}
    changed = gather(make_run(tmp_path / "changed", checkpoint=False, **changes)).changed
    assert {"encoder.arch: resnet50 -> resnet10", "batch: 256 -> 8"} <= set(changed)
    assert not any(line.startswith(("out", "monitor", "runtime.device")) for line in changed)
    shipped = load_recipe("moco_v2_imagenet_r50", [f"out={tmp_path}/same", "runtime.threads=3"])
    run = RunFolder(tmp_path / "same")
    run.root.mkdir()
    run.describe(shipped, {})
    assert gather(run).changed == []


def test_confusion_is_that_of_scikit_learn(
    parsed: Parsed, evaluation: Evaluation, votes: np.ndarray
) -> None:
    from sklearn.metrics import confusion_matrix

    names, labels = evaluation.train.classes, evaluation.test.labels
    matrix = confusion_matrix(labels, votes.argmax(axis=1), labels=range(4))
    found = study_module.Study.of(evaluation, 1000).predictions()
    np.testing.assert_array_equal(found.confusion().numpy(), matrix)
    assert found.top(1) == pytest.approx(100 * np.trace(matrix) / 24)
    errors = {(names[a], names[b]): matrix[a, b] for a in range(4) for b in range(4) if a != b}
    drawn = {(row[0], row[1]): int(row[2]) for row in parsed.cells["confusion"][1:]}
    assert sorted(drawn.values(), reverse=True) == list(drawn.values())
    assert all(errors[pair] == count for pair, count in drawn.items())
    assert min(drawn.values()) >= max((n for pair, n in errors.items() if pair not in drawn))
    for row in parsed.cells["classes"][1:]:
        number = names.index(row[0])
        assert row[1:3] == [f"{100 * matrix[number, number] / 6:.1f}", "6"]


def test_the_same_run_gives_the_same_bytes(full_run: RunFolder, page: Path, tmp_path: Path) -> None:
    again = report(full_run.root, tmp_path / "again", device="cpu").parent
    files = sorted(path.name for path in page.parent.iterdir())
    assert files == sorted(path.name for path in again.iterdir()) and len(files) > 50
    for name in files:
        assert (page.parent / name).read_bytes() == (again / name).read_bytes(), name


def test_samples_bound_what_is_looked_at(full_run: RunFolder, tmp_path: Path) -> None:
    found = Parsed(report(full_run.root, tmp_path, samples=7, device="cpu"))
    assert "Looked at: 7 images of" in found.text["neighbors"]
    assert "of the 7 test images" in found.text["extremes"]
    shown = np.reshape(samples(found.alts["neighbors"]), (-1, 1 + 7))  # not 8 neighbors
    assert all(len(set(row[1:])) == 7 for row in shown.tolist())


def test_without_scikit_learn_the_plane_is_of_principal_components(
    evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sklearn.decomposition import PCA

    features, labels = evaluation.features(evaluation.train, "backbone")
    assert study_module.projected(features, labels.numpy(), 0)[2] == "t-SNE of 40 test images"
    monkeypatch.setattr(study_module, "find_spec", lambda name: None)
    places, shuffled, method = study_module.projected(features, labels.numpy(), 0)
    assert method == "principal components of 40 test images"
    rows = features.double().numpy()
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    reference = PCA(2, svd_solver="full").fit_transform(rows)
    for axis in range(2):
        ours, theirs = np.sort(abs(places[:, axis])), np.sort(abs(reference[:, axis]))
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert sorted(shuffled) == sorted(labels)


def test_label_free_numbers_come_with_what_they_can_say_and_a_collapse_is_told(
    make_run: Callable[..., RunFolder], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", monitor={})
    numbers = {"rankme": 40.0, "rankme_head": 1.2, "alignment": 0.0, "uniformity": -0.001}
    for epoch, head in enumerate((9.0, 1.2)):
        row = {"kind": "epoch", "step": 60 * epoch, "epoch": epoch}
        run.log(row | numbers | {"rankme_head": head})
    text = Parsed(report(run.root, device="cpu")).text["curves"]
    assert "noise fills all" in text and "0 after a collapse too" in " ".join(text.split())
    assert "The head has collapsed: its features fill 1.20 directions" in text


def test_a_run_without_labels(
    make_run: Callable[..., RunFolder], tmp_path: Path, sets: dict[str, Path]
) -> None:
    run = make_run(tmp_path / "run", monitor=None)
    found = Parsed(report(run.root, device="cpu"))
    for section in LABELLED:
        assert "of labelled sets: name two by --train and --test" in found.text[section]
    for section in ("views", "filters", "maps"):
        assert found.alts[section]
    assert "no numbers yet" in found.text["curves"] and "none yet" in found.text["numbers"]
    assert "still running, or was killed" in found.text[""]
    named = report(run.root, None, sets["train"], sets["test"], device="cpu")
    assert named == run.root / "report" / "report.html"
    assert "Not shown" not in Parsed(named).text["neighbors"]


def test_a_run_that_lost_its_images_and_has_no_checkpoint(
    make_run: Callable[..., RunFolder], tmp_path: Path
) -> None:
    gone = str(tmp_path / "gone")
    run = make_run(tmp_path / "a", data=[gone], monitor={"bank": gone, "queries": gone})
    run.log({"kind": "step", "step": 1, "epoch": 0.1, "loss": float("nan"), "lr": 0.0})
    (run.root / "versions.json").unlink()
    found = Parsed(report(run.root, device="cpu"))
    assert len(found.alts["curves"]) == 1, "a loss that is no number is not drawn"
    assert found.alts["filters"]
    for section in (*LABELLED, "views", "maps"):
        assert "is not a shard set" in found.text[section]
    bare = Parsed(report(make_run(tmp_path / "b", checkpoint=False).root, device="cpu"))
    for section in (*LABELLED, "filters", "maps"):
        assert "has no checkpoint yet" in bare.text[section]


def test_what_the_user_got_wrong_is_an_error(
    full_run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="is not a run folder"):
        report(tmp_path)
    with pytest.raises(DataError, match="is not a shard set"):
        report(full_run.root, tmp_path, train=tmp_path, device="cpu")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"Cannot write to .*: choose another by --out"):
        report(full_run.root, tmp_path / "file", samples=5, device="cpu")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'fastmoco\[report\]'"):
        report(full_run.root)


def test_the_command(
    make_run: Callable[..., RunFolder],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = make_run(tmp_path / "run", monitor=None)
    arguments = ["report", str(run.root), "--out", str(tmp_path / "out"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["fastmoco", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    page = tmp_path / "out" / "report.html"
    assert capsys.readouterr().out == f"{page}\n" and page.is_file()
    shutil.rmtree(run.root)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2


def test_attention_is_drawn_where_it_looks(make_run, tmp_path: Path) -> None:
    """All of stage 3's weight in one corner: the picture is bright there and dark elsewhere."""
    run = make_run(tmp_path / "run", checkpoint=False, encoder={"attention": "dot"})
    encoder = Encoder(run.spec())
    run.save({"encoder_q": encoder.state_dict()}, 12, {}, keep=2)
    parsed = Parsed(report(run.root, device="cpu"))
    alts = parsed.alts["extremes"]
    heat = [alt for alt in alts if alt.startswith("stage ")]
    surest = [alt for alt in alts if alt.startswith("stage 2 over ")]
    assert len(heat) == 2 * len(surest) and 0 < len(surest) <= 16
    assert all(alt.removeprefix("stage 2 over ") in alts for alt in surest)
    for stage, width in ((2, 128), (3, 256)):
        assert encoder.backbone.attend[f"stage{stage}"].project.in_features == width
    weights = torch.zeros(4, 4)
    weights[0, 3] = 1
    draw_heat(tmp_path / "heat.png", np.full((16, 16, 3), 100, np.uint8), weights)
    drawn = np.asarray(Image.open(tmp_path / "heat.png")).astype(int).sum(axis=-1)
    assert drawn[0, 15] == drawn.max()
    assert drawn[8:, :8].max() == drawn.min() < drawn.max() // 2
