"""Requests: from a run and a pool to a CSV, and back as labels."""

import csv
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from fastmoco import cli
from fastmoco.dataset.labels import Labelled
from fastmoco.dataset.shard_set import LABEL_DTYPE, ShardSet, write_labels
from fastmoco.evaluate.features import embed
from fastmoco.label.estimate import estimate_minutes
from fastmoco.models.encoder import Encoder
from fastmoco.pack.options import PackOptions
from fastmoco.pack.packer import pack
from fastmoco.runs.run_folder import RunFolder

Make = Callable[..., Path]
STRATEGIES = (
    *("random", "least", "margin", "entropy", "intersection", "hybrid"),
    *("coreset", "herding", "kmeans", "typiclust"),
)


@pytest.fixture
def place(
    make_images: Make, make_colored_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder with labelled sets `train` and `test`, a `pool` that shares images with both."""
    make_images(tmp_path / "in/train", ("ape", "bee", "cow"), 8)
    make_images(tmp_path / "in/test", ("ape", "bee", "cow"), 4, (30, 30))
    make_images(tmp_path / "in/pool", ("ape", "bee", "cow"), 12, (36, 28))
    for name in ("ape", "bee", "cow"):
        for split, number in (("train", 0), ("test", 1)):
            source = tmp_path / f"in/{split}/{name}/{number:04d}.jpg"
            shutil.copy(source, tmp_path / f"in/pool/{name}/of-{split}.jpg")
    shutil.copy(tmp_path / "in/pool/ape/0003.jpg", tmp_path / "in/pool/bee/twice.jpg")
    for split in ("train", "test", "pool"):
        pack(tmp_path / "in" / split, tmp_path / split, PackOptions())
    make_colored_run(tmp_path / "run", tmp_path, 0)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr("sys.argv", ["fastmoco", *map(str, words)])
        cli.main()
    said = capsys.readouterr()
    return int(end.value.code or 0), said.out, said.err


def asked(path: Path) -> list[int]:
    with path.open() as stream:
        return [int(row["sample"]) for row in csv.DictReader(stream)]


def details(place: Path) -> list[dict[str, str]]:
    with (place / "request.details.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_has_a_label_is_not_asked_for(place, capsys, strategy):
    """Nor what is in the test set, nor the same bytes twice."""
    code, out, err = command(
        capsys, "query", "run", "pool", "--budget", 36, "--strategy", strategy, "--device", "cpu"
    )
    assert code == 0, err
    pool = ShardSet(place / "pool")
    names = {pool.get_name(sample) for sample in asked(place / "request.csv")}
    assert len(names) == 36 and not any("of-" in name for name in names)
    assert not {"ape/0003.jpg", "bee/twice.jpg"} <= names
    for words in (
        "3 samples are left out: labelled already",
        "3 samples are left out: of the test",
    ):
        assert words in out
    assert "1 samples are left out: their bytes come before in the pool" in out
    told = json.loads((place / "request.json").read_text())
    assert (told["strategy"], told["candidates"], told["budget"]) == (strategy, 36, 36)


def test_a_committee_of_two_runs(place, capsys):
    """The other is at step 0: that is told, and both are named."""
    torch.manual_seed(1)
    shutil.copytree(place / "run", place / "new", ignore=shutil.ignore_patterns("checkpoints"))
    other = RunFolder(place / "new")
    other.save({"encoder_q": Encoder(other.spec()).state_dict()}, 0, {}, keep=1)
    words = ("--strategy", "disagreement", "--with", "new", "--members", "2", "--device", "cpu")
    code, out, err = command(capsys, "query", "run", "pool", "--budget", 7, *words)
    assert code == 0 and "the encoder of new is untrained (step 0)" in out, err
    told = json.loads((place / "request.json").read_text())
    assert told["runs"] == [{"run": "tiny", "step": 5}, {"run": "tiny", "step": 0}]
    assert told["members"] == 2 and len(set(asked(place / "request.csv"))) == 7


def test_features_of_a_file_are_those_of_the_run(place, capsys):
    """The request is the same to the byte; a file of something else is refused."""
    words = ("query", "run", "pool", "--budget", 7, "--strategy", "margin", "--device", "cpu")
    assert command(capsys, *words)[0] == 0
    before = [(place / f"request{end}").read_bytes() for end in (".csv", ".details.csv", ".json")]
    embedding = ("embed", "run", "--device", "cpu", "--out")
    assert command(capsys, *embedding, "pool.npy", "pool")[0] == 0
    with pytest.MonkeyPatch.context() as patch:
        calls: list[int] = []
        patch.setattr("fastmoco.label.pool.embed", counted(calls))
        code, _, err = command(capsys, *words, "--features", "pool.npy", "--replace")
    assert code == 0 and calls == [24], err
    assert [
        (place / f"request{end}").read_bytes() for end in (".csv", ".details.csv", ".json")
    ] == before
    command(capsys, *embedding, "test.npy", "test")
    command(capsys, *embedding, "head.npy", "pool", "--feature", "head")
    odd = np.load(place / "pool.npy")
    for name, change in (("short", odd[1:]), ("nan", np.where(odd == odd[20, 0], np.nan, odd))):
        np.save(place / f"{name}.npy", change)
        for end in (".json", ".ids.npy"):
            shutil.copy(place / f"pool{end}", place / f"{name}{end}")
    about = json.loads((place / "pool.json").read_text())
    shutil.copy(place / "pool.npy", place / "old.npy")
    shutil.copy(place / "pool.ids.npy", place / "old.ids.npy")
    (place / "old.json").write_text(json.dumps(about | {"step": 4}))
    for name, told in (
        ("test", "features of another set_id: '"),
        ("head", "features of another feature: 'head', not 'backbone'"),
        ("old", "features of another step: 4, not 5"),
        ("short", "has the shape (42, 512), not (43, 512)"),
        ("nan", "features of sample 20 are not finite"),
        ("none", "cannot be read as features"),
    ):
        code, _, err = command(capsys, *words, "--features", f"{name}.npy", "--out", "no.csv")
        assert code == 3 and told in err, err
        assert not list(place.glob("no.*"))


def test_what_takes_long_is_told_before_it_begins(place, capsys, monkeypatch):
    words = ("query", "run", "pool", "--budget", 7, "--strategy", "kmeans", "--device", "cpu")
    told = "kmeans: 7 of 36 samples by 512 numbers each take up to about 0 minutes"
    code, out, _ = command(capsys, *words)
    assert code == 0 and told not in out
    monkeypatch.setattr("fastmoco.label.query.LONG", 0)

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastmoco.label.query.choose", stop)
    code, out, _ = command(capsys, *words, "--replace")
    assert code == 130 and told in out


@pytest.mark.parametrize(
    ("strategy", "minutes"),
    [
        # 12,800 passes over 512,000 x 512 numbers at 2e9 a second, labels in blocks on two threads.
        ("coreset", (12_800 * 512_000 / 2e9 + 25_600 * 512_000 / 2e10) * 512 / 60),
        # 22 products of all samples and centers, and first centers among three times as many.
        ("kmeans", (22 * 512_000 * 12_800 / 2e10 + 12_800 * 38_400 / 2e9) * 512 / 60),
    ],
)
def test_minutes_come_from_counts(strategy, minutes):
    counts = (strategy, 512_000, 512, 12_800, 25_600, 800, 2)
    assert estimate_minutes(*counts) == pytest.approx(minutes)


def counted(calls: list[int]) -> Callable[..., torch.Tensor]:
    """`embed`, which notes how many images it is given."""

    def call(*arguments: object, ids: np.ndarray, **options: object) -> torch.Tensor:
        calls.append(len(ids))
        return embed(*arguments, ids=ids, **options)

    return call


@pytest.mark.parametrize("strategy", [*STRATEGIES, "disagreement", "scores"])
def test_the_pools_own_labels_change_no_request(place, capsys, strategy):
    """Shuffled, they leave the same bytes: a gain of any strategy is no leak."""
    arguments = ("query", "run", "pool", "--budget", 9, "--strategy", strategy, "--device", "cpu")
    np.save(place / "mine.npy", np.arange(len(ShardSet(place / "pool"))) % 7)
    arguments += {"disagreement": ("--members", "2"), "scores": ("--scores", "mine.npy")}.get(
        strategy, ()
    )
    assert command(capsys, *arguments)[0] == 0
    files = ("request.csv", "request.details.csv", "request.json", "request.png")
    before = [(place / name).read_bytes() for name in files]
    rows = np.array(ShardSet(place / "pool").samples)
    rows["label"] = np.random.default_rng(0).permutation(rows["label"])
    np.save(place / "pool/samples.npy", rows)
    code, _, err = command(capsys, *arguments)
    assert code == 2 and "--replace" in err
    assert command(capsys, *arguments, "--replace")[0] == 0
    assert [(place / name).read_bytes() for name in files] == before


def test_a_round_trip(place, capsys):
    """Asked, labelled by the truth, read back; then nobody asks for those again."""
    arguments = ("query", "run", "pool", "--budget", 6, "--device", "cpu")
    code, out, _ = command(capsys, *arguments, "--images", "look")
    assert code == 0 and "by herding" in out and "8 labels a class are few" in out
    pool = ShardSet(place / "pool")
    first = asked(place / "request.csv")
    copies = sorted(path.name for path in (place / "look").iterdir())
    assert copies == [f"{rank:05d}-{sample}.jpg" for rank, sample in enumerate(first, 1)]
    lines = (place / "request.csv").read_text().splitlines()
    filled = [lines[0], *(line + line.split(",")[1].split("/")[0] for line in lines[1:])]
    (place / "back.csv").write_text("\n".join(filled) + "\n")
    code, out, err = command(capsys, "label", "pool", "back.csv", "--name", "asked")
    assert code == 0 and "6 labels" in out, err
    table = Labelled.of(pool, "asked")
    assert table.ids.tolist() == sorted(first)
    truth = [pool.get_name(int(i)).split("/")[0] for i in table.ids]
    assert [table.classes[label] for label in table.labels] == truth
    code, out, _ = command(capsys, *arguments, "--replace")
    assert code == 0 and "6 samples are left out: labelled in the table 'asked'" in out
    assert "--more pool asked trains on them" in out
    assert not set(first) & set(asked(place / "request.csv"))
    code, out, err = command(capsys, *arguments, "--replace", "--more", "pool", "asked")
    assert code == 0 and "9 samples are left out: labelled already" in out, err
    told = json.loads((place / "request.json").read_text())
    assert told["labels"] == 30 and not set(first) & set(asked(place / "request.csv"))
    probe = ("probe", "run", "--cached", "--epochs", 2, "--device", "cpu")
    for table in ("asked", "back.csv"):
        code, out, err = command(capsys, *probe, "--more", "pool", table)
        assert code == 0, err
    lines = (place / "run/evaluations.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    by_table, by_csv = (row["sets"]["train"] for row in rows)
    (more,) = by_table["more"]
    assert (by_table["samples"], more["samples"], by_table["total"]) == (24, 6, 30)
    assert (more["labels"], by_csv["more"][0]["labels"]) == ("asked", "back.csv")
    assert rows[0]["learning_rates"] == rows[1]["learning_rates"]


def test_a_copy_of_what_is_labelled_is_not_asked_for(place, capsys):
    """Whichever of two samples of the same bytes has the label: nobody pays twice."""
    pool = ShardSet(place / "pool")
    copies = [i for i in range(len(pool)) if pool.get_name(i) in ("ape/0003.jpg", "bee/twice.jpg")]
    for last in copies:
        rows = np.array([(last, 0, 1.0)], dtype=LABEL_DTYPE)
        write_labels(pool, "mine", rows, ["ape", "bee", "cow"], "by hand")
        arguments = ("query", "run", "pool", "--budget", 35, "--strategy", "random", "--replace")
        code, _, err = command(capsys, *arguments, "--device", "cpu")
        assert code == 0 and not set(copies) & set(asked(place / "request.csv")), err
    code, _, err = command(capsys, *arguments[:3], "--budget", 36, *arguments[5:])
    assert code == 2 and "has 35 samples to ask for" in err


def test_labels_that_tell_nothing_are_refused(place, capsys, make_images):
    make_images(place / "in/none", (), 3, (31, 33))
    pack(place / "in/none", place / "none", PackOptions())
    rows = np.array([(i, 1, 1.0) for i in range(4)], dtype=LABEL_DTYPE)
    write_labels(ShardSet(place / "train"), "bees", rows, ["ape", "bee"], "by hand")
    arguments = ("query", "run", "pool", "--budget", 4, "--device", "cpu", "--strategy", "margin")
    for words, told in (
        (("train", "--labels", "bees"), "All labels are of one class ('bee')"),
        (("none",), "none has no labels: name a table by --labels"),
    ):
        code, _, err = command(capsys, *arguments, "--train", *words)
        assert code == 3 and told in err, err
    assert not list(place.glob("request*"))
    rows["label"] = np.arange(4) % 2
    write_labels(ShardSet(place / "train"), "two", rows, ["ape", "bee", "cow"], "by hand")
    code, out, err = command(capsys, *arguments, "--train", "train", "--labels", "two")
    assert code == 0 and "warning: no label of the class 'cow' yet (1 such)" in out, err


def test_a_request_that_is_still_out_is_not_made_again(place, capsys):
    arguments = ("query", "run", "pool", "--budget", 6, "--device", "cpu")
    command(capsys, *arguments, "--out", "one.csv")
    command(capsys, *arguments, "--out", "two.csv", "--exclude", "one.csv")
    assert not set(asked(place / "one.csv")) & set(asked(place / "two.csv"))
    code, _, err = command(capsys, *arguments, "--out", "three.csv", "--exclude", "run/config.yaml")
    assert code == 3 and "is no request" in err and not (place / "three.csv").exists()


@pytest.mark.parametrize("monitor", [None, {"bank": "train"}])  # a bank whose labels are not read
def test_the_first_request_needs_no_labels(place, capsys, tmp_path, monitor):
    config = place / "run/config.yaml"

    values = yaml.safe_load(config.read_text()) | {"monitor": monitor}
    config.write_text(yaml.safe_dump(values))
    for strategy in ("auto", "random", "herding", "coreset", "kmeans", "typiclust"):
        out = f"{strategy}.csv"
        code, _, err = command(
            capsys, *("query", "run", "pool", "--budget", 4, "--strategy", strategy, "--out", out)
        )
        assert code == 0, err
        assert len(asked(place / out)) == 4
        details = (place / f"{strategy}.details.csv").read_text().splitlines()
        assert details[1].endswith(",1,,,,,"), "no head, no beliefs"
    words = ("query", "run", "pool", "--budget", 4, "--strategy", "margin", "--out", "margin.csv")
    code, _, err = command(capsys, *words)
    assert code == 2 and "needs labels" in err
    write_labels(
        ShardSet(place / "pool"),
        "few",
        np.array([(i, i % 2, 1.0) for i in range(6)], dtype=LABEL_DTYPE),
        ["ape", "bee"],
        "by hand",
    )
    code, out, err = command(capsys, *words, "--more", "pool", "few")
    assert code == 0 and "6 samples are left out: labelled already" in out, err


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("--budget", "0"), 2, "--budget 0: pool has 36 samples to ask for"),
        (("--budget", "37"), 2, "--budget 37: pool has 36 samples to ask for"),
        (("--budget", "3", "--strategy", "scores"), 2, "belong together"),
        (("--budget", "3", "--scores", "x.npy"), 2, "belong together"),
        (
            ("--budget", "3", "--strategy", "scores", "--scores", "short.npy"),
            3,
            "has the shape (3,)",
        ),
        (
            ("--budget", "3", "--strategy", "scores", "--scores", "nan.npy"),
            3,
            "sample 5 is not fin",
        ),
        (
            ("--budget", "3", "--strategy", "scores", "--scores", "other.npy"),
            3,
            "other.npy is of other sets",
        ),
        (("--budget", "3", "--out", "request.txt"), 2, "must end in .csv"),
        (("--budget", "3", "--strategy", "disagreement"), 2, "add --members 5, or --with RUN"),
        (("--budget", "3", "--strategy", "margin", "--members", "5"), 2, "no other strategy"),
        (("--budget", "3", "--with", "run"), 2, "no other strategy has one"),
        (("--budget", "3", "--max-margin", "1.5"), 2, "1.5 is not a share"),
        (("--budget", "3", "--min-entropy", "nan"), 2, "nan is not a share"),
        (
            ("--budget", "3", "--strategy", "random", "--features", "x.npy"),
            2,
            "--features does nothing with random",
        ),
        (
            ("--budget", "3", "--strategy", "disagreement", "--with", "empty"),
            4,
            "empty has no checkpoint",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(place, capsys, words, code, told):
    count = len(ShardSet(place / "pool"))
    np.save(place / "short.npy", np.zeros(3))
    odd = np.zeros(count)
    odd[5] = np.nan
    np.save(place / "nan.npy", odd)
    np.save(place / "other.npy", np.zeros(count))
    (place / "other.json").write_text('{"set_ids": ["of another"]}')
    (place / "empty").mkdir()
    shutil.copy(place / "run/encoder.json", place / "empty")
    found, _, err = command(capsys, "query", "run", "pool", *words, "--device", "cpu")
    assert (found, told in err) == (code, True), err
    assert not list(place.glob("request*"))


def test_scores_of_ones_own_are_taken_largest_first(place, capsys):
    pool = ShardSet(place / "pool")
    scores = np.random.default_rng(1).permutation(len(pool)).astype(float)
    np.save(place / "mine.npy", scores)
    words = ("--budget", 5, "--strategy", "scores", "--scores", "mine.npy", "--exclude", "old.csv")
    (place / "old.csv").write_text(f"sample,name,label\n{int(scores.argmax())},x,\n")
    assert command(capsys, "query", "run", "pool", *words)[0] == 0
    found = asked(place / "request.csv")
    values = scores[found].tolist()
    assert values == sorted(values, reverse=True) and int(scores.argmax()) not in found
    rows = details(place)
    assert [float(row["score"]) for row in rows] == values
    each = Counter(row["predicted"] for row in rows)
    assert max(each.values()) <= 2, "of each of three predicted classes an equal share"
    words += ("--no-balance", "--replace")
    assert command(capsys, "query", "run", "pool", *words)[0] == 0
    top = scores[asked(place / "request.csv")].tolist()
    assert sum(top) > sum(values) and {row["predicted"] for row in details(place)} == {""}


def test_scores_may_be_a_csv(place, capsys):
    pool = ShardSet(place / "pool")
    scores = np.random.default_rng(2).permutation(len(pool))
    rows = [f"{sample},{score}" for sample, score in enumerate(scores.tolist())]
    (place / "mine.csv").write_text("\n".join(["sample,score", *rows[::-1]]) + "\n")
    np.save(place / "mine.npy", scores)
    found = []
    for name in ("mine.csv", "mine.npy"):
        words = ("--budget", 5, "--strategy", "scores", "--scores", name, "--replace")
        assert command(capsys, "query", "run", "pool", *words)[0] == 0
        found.append(asked(place / "request.csv"))
    assert found[0] == found[1]


def test_when_all_is_labelled_that_is_told(place, capsys):
    pool = ShardSet(place / "pool")
    rows = np.array([(i, 0, 1.0) for i in range(len(pool))], dtype=LABEL_DTYPE)
    write_labels(pool, "all", rows, ["ape"], "by hand")
    code, _, err = command(capsys, "query", "run", "pool", "--budget", 1)
    assert code == 3 and "no sample left to ask for" in err
