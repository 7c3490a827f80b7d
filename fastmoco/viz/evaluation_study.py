"""What a run's evaluations say together: accuracy against labels, and how each training went."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastmoco.viz.report_plots import draw_accuracy, draw_training
from fastmoco.viz.run_facts import read_rows

_CURVES = 6  # trainings that are drawn, the newest
Row = Mapping[str, Any]


def draw_evaluations(folder: Path, root: Path, rows: Sequence[Row]) -> dict[str, Any]:
    """Draw what the rows of evaluations.jsonl hold.

    Args:
        folder: where the PNGs go.
        root: of the run.
        rows: the oldest first.

    Returns:
        `accuracy`: a picture, None where all are of one number of labels; `apart`: evaluations of
        another step or test set than the newest, which are not in it; `curves`: pictures, each
        with words for who does not see it.
    """
    counted = [row for row in rows if _is_counted(row)]
    alike = [row for row in counted if _get_test(row) == _get_test(counted[-1])]
    kinds: dict[str, list[tuple[int, float]]] = {}
    for row in alike:
        kinds.setdefault(_name(row), []).append((count_labels(row), row["top1"]))
    drawn: dict[str, Any] = {"accuracy": None, "apart": len(counted) - len(alike), "curves": []}
    if len({count for points in kinds.values() for count, _ in points}) > 1:
        drawn["accuracy"] = "accuracy.png"
        draw_accuracy(folder / "accuracy.png", kinds)
    trained = [row for row in rows if row.get("curve")]
    for number, row in enumerate(trained[: -_CURVES - 1 : -1]):
        file = f"training_{number}.png"
        if curve := read_rows(root / row["curve"]):
            drawn["curves"].append({"file": file, "alt": _draw(folder / file, row, curve)})
    return drawn


def _is_counted(row: Row) -> bool:
    return row.get("top1") is not None and bool(count_labels(row)) and bool(_get_test(row)[1])


def _get_test(row: Row) -> tuple[Any, Any]:
    """Return the step and the test set, which must be the same for numbers to be compared."""
    return row.get("step"), row.get("sets", {}).get("test", {}).get("set_id")


def count_labels(row: Row) -> int:
    """Return how many labels a classifier was trained on; 0: it is not told."""
    train = row.get("sets", {}).get("train", {})
    count = row.get("labels", {}).get("images") or train.get("total", train.get("samples", 0))
    return int(count)


def _name(row: Row) -> str:
    """Return the classifier in words."""
    protocol = row.get("protocol") or {}
    if row.get("kind") != "finetune":
        return str(row.get("kind", ""))
    words = ["from scratch" if protocol.get("from_scratch") else "fine-tuned"]
    words += [(protocol.get("semi") or {}).get("method", "")]
    words += ["noise"] * bool(protocol.get("noise"))
    return ", ".join(word for word in words if word)


def _draw(path: Path, row: Row, curve: Sequence[Row]) -> str:
    """Draw a training; return what it shows, in words."""
    unit = "epoch" if "epoch" in curve[0] else "step"
    x = [point[unit] for point in curve]
    chosen = (row.get("chosen") or row.get("best") or {}).get("lr", row["protocol"].get("lr"))
    rates = row["protocol"]["lrs"] if unit == "epoch" else [chosen]
    order = sorted(range(len(rates)), key=lambda place: (rates[place] != chosen, place))
    columns = {
        name: [point[name] if unit == "epoch" else [point[name]] for point in curve]
        for name in ("test_top1", "train_top1")
    }
    test = {f"lr {rates[n]:g}": [rates_of[n] for rates_of in columns["test_top1"]] for n in order}
    train = [rates_of[order[0]] for rates_of in columns["train_top1"]]
    title = f"{_name(row)}, {count_labels(row):,} labels ({row['curve'].split('/')[-1][:4]})"
    draw_training(path, x, unit, test, train, title)
    return f"{title}: top-1 over the {unit}s, of the test images and of those trained on"
