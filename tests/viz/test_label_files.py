"""What `query` and `pseudolabel` wrote, as the report shows it."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from parsed_page import Parsed, samples

from fastmoco.errors import DataError
from fastmoco.runs.run_folder import RunFolder
from fastmoco.viz.report import report

RunCommand = Callable[..., tuple[int, str, str]]


@pytest.fixture
def station(
    make_run: Callable[..., RunFolder],
    sets: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: RunCommand,
) -> Path:
    """A folder with a run, `pseudolabels.csv` and a `request.csv` by margin."""
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", monitor=None)
    for command, words in (
        ("pseudolabel", ("--threshold", 0.3, "--seed", 3)),
        ("query", ("--budget", 9, "--strategy", "margin")),
    ):
        shared = ("run", sets["test"], "--train", sets["train"], "--device", "cpu")
        code, _, err = run(command, *shared, *words)
        assert code == 0, err
    return tmp_path


def test_pseudolabels_and_a_request_on_the_page(
    station: Path, run: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, plot = [], Axes.plot

    def note(self, x, y, *style, **more):  # type: ignore[no-untyped-def]
        drawn.append((np.array(x).tolist(), np.array(y).tolist()))
        return plot(self, x, y, *style, **more)

    monkeypatch.setattr(Axes, "plot", note)
    files = ("--label-file", "pseudolabels.csv", "--label-file", "request.csv")
    code, _, err = run("report", "run", "--device", "cpu", *files)
    assert code == 0, err
    page, about = (
        Parsed(Path("run/report/report.html")),
        json.loads(Path("pseudolabels.json").read_text()),
    )
    text = " ".join(page.text["labels"].split())
    truth, wrong = about["truth"], about["truth"]["surest_wrong"]
    assert f"{about['labels']} pseudo-labels for 24 images" in text
    assert f"{100 * truth['right'] / truth['labels']:.1f} % of {truth['labels']} are right" in text
    assert "a confidence of 0.300 or more" in text and "A request for 9 of 24 images" in text
    precision, reliability, *tiles = page.alts["labels"]
    assert "the chosen one is marked" in precision and "before and after" in reliability
    assert samples(tiles) == [row["sample"] for row in wrong] and len(wrong) > 3
    for row in wrong:
        assert f"✗wrong {row['truth']}, taken for {row['label']}" in text
    curve = about["curve"]
    coverage, share = ([100 * p[key] for p in curve] for key in ("coverage", "precision"))
    assert (coverage, share) in drawn
    cut = max(place for place, point in enumerate(curve) if point["threshold"] >= 0.3)
    assert (coverage[cut], share[cut]) in drawn
    for rows in about["classifiers"][0]["bins"].values():
        bins = ([100 * row[key] for row in rows] for key in ("confidence", "accuracy"))
        assert tuple(bins) in drawn
    tables = [row for row in page.cells["labels"] if row[0] != "class"]
    balance = {row[0]: int(row[1]) for row in tables[:4]}
    assert balance == about["classes"]
    assert list(balance.values()) == sorted(balance.values(), reverse=True)
    details = Path("request.details.csv").read_text().splitlines()[1:]
    asked = Counter(line.split(",")[3].strip('"') for line in details)
    assert sorted(int(row[1]) for row in tables[4:]) == sorted(asked.values())
    assert "(predictions, by margin)" in text
    # Filled in, the request is counted by what people said.
    lines = Path("request.csv").read_text().splitlines()
    Path("request.csv").write_text("\n".join([lines[0], *(line + "plain" for line in lines[1:])]))
    code, _, err = run("report", "run", "--device", "cpu", "--label-file", "request.csv")
    again = Parsed(Path("run/report/report.html"))
    assert code == 0 and "(labels that came back)" in again.text["labels"], err
    assert [row[:2] for row in again.cells["labels"][1:]] == [["plain", "9"]]


def test_the_same_bytes_and_a_pool_that_is_gone(station: Path, sets: dict[str, Path]) -> None:
    files = [Path("pseudolabels.csv")]
    first, second = (
        report(Path("run"), Path(name), device="cpu", label_files=files).parent for name in "ab"
    )
    names = sorted(path.name for path in first.iterdir())
    assert {"precision_0.png", "reliability_0_0.png", "pseudo_0_0.png"} <= set(names)
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    about = json.loads(Path("pseudolabels.json").read_text())
    for pool, told in (("gone", "is not a shard set"), (str(sets["train"]), "is not the set that")):
        Path("pseudolabels.json").write_text(json.dumps(about | {"pool": pool}))
        page = Parsed(report(Path("run"), Path("c"), device="cpu", label_files=files))
        assert told in page.text["labels"] and len(page.alts["labels"]) == 2
    bare = Parsed(report(Path("run"), Path("d"), device="cpu"))
    assert "name a CSV of the commands query or pseudolabel" in bare.text["labels"]


def test_what_a_run_learns_from_another(
    station: Path, run: RunCommand, sets: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    named, legend = [], Axes.legend

    def note(self, **style):  # type: ignore[no-untyped-def]
        named.append((self.get_title("right"), self.get_legend_handles_labels()[1]))
        return legend(self, **style)

    monkeypatch.setattr(Axes, "legend", note)
    words = ("--train", sets["train"], "--device", "cpu", "--with", "run", "--per-round", 8)
    code, _, err = run("pseudolabel", "run", sets["test"], *words, "--out", "co.csv")
    assert code == 0, err
    page = Parsed(report(Path("run"), device="cpu", label_files=[Path("co.1.csv")]))
    text = " ".join(page.text["labels"].split())
    assert ", from which run learns what another run is sure of. In truth" in text
    assert named == [("run", ["as sure as right", "before calibration", "after calibration"])] * 2


def test_what_is_no_such_file_is_refused_at_once(station: Path) -> None:
    shutil.copy("pseudolabels.csv", "alone.csv")
    shutil.copy("pseudolabels.csv", "odd.csv")
    Path("odd.json").write_text("[]")
    for name in ("alone.csv", "odd.csv", "absent.csv"):
        with pytest.raises(DataError, match=rf"{name} is no CSV that `fastmoco query` or"):
            report(Path("run"), Path("out"), device="cpu", label_files=[Path(name)])
    with Path("pseudolabels.csv").open("a") as stream:
        stream.write("1,a,b,1,1\n")
    with pytest.raises(DataError, match=r"is another one than its .json describes"):
        report(Path("run"), Path("out"), device="cpu", label_files=[Path("pseudolabels.csv")])
    assert not Path("out").exists()
