"""The page: what was measured, in tables, and what was not."""

from collections.abc import Iterable, Sequence
from typing import Any

from gpu_phases.catalog import SETUP, Phase, Table

Row = dict[str, Any]
NOTHING = "not measured"
ROOFLINE = (
    "Of the roofline: img/s over min(copy rate / 659 MB, bf16 matmul rate / 32.5 GFLOP), what an "
    "image of ResNet-50 at 224 px moves and computes in a step of MoCo in bf16 with nothing fused, "
    "by the two rates of phase a; the same bound for all lines."
)
_SHOWN, _LONGEST = 6, 90  # kernels of a step, and characters of their names


def page_of(
    rows: Sequence[Row], phases: Sequence[Phase], command: str, began: str, dry: bool
) -> str:
    """Return the page as Markdown.

    Args:
        rows: all that were written.
        phases: that were to run, in the order of the page.
        command: that made them.
        began: when, as text.
        dry: whether they are of a dry run.
    """
    machine = next((row for row in rows if row["item"] == "machine"), {})
    where = machine.get("device") or machine.get("cpu") or "machine unknown"
    lines = [f"# GPU check: {where}", ""]
    if dry:
        lines += [
            "**A dry run: toy sizes on a CPU. Its figures say that the phases run, no more.**",
            "",
        ]
    lines += [f"`{command}`, {began}.", "", *_machine(machine), "", *_verdict(rows, phases)]
    rows = with_roofline(rows)
    for phase in (SETUP, *phases):
        own = [row for row in rows if row["phase"] == phase.letter]
        lines += ["", *_section(phase, own, f"{command} --only {phase.letter}")]
    return "\n".join(lines) + "\n"


def _machine(machine: Row) -> list[str]:
    """Return what it ran on, one line a thing."""
    names = {
        "device": "device",
        "device_memory_gb": "its memory, GB",
        "multiprocessors": "its multiprocessors",
        "driver_version": "driver",
        "power.limit": "power limit",
        "clocks.max.sm": "highest clock",
        "clocks.max.mem": "highest memory clock",
        "mig.mode.current": "MIG",
        "cuda": "CUDA of torch",
        "cudnn": "cuDNN",
        "cpu": "CPU",
        "cores": "cores",
        "memory_gb": "memory, GB",
        "python": "Python",
        "versions": "packages",
        "git": "commit",
        "git_changed": "changed since",
    }
    found = [(name, machine[key]) for key, name in names.items() if machine.get(key) is not None]
    if not found:
        return [f"Machine: {NOTHING}."]
    return [f"- {name}: {_plain(value)}" for name, value in found]


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return str(value)


def _verdict(rows: Sequence[Row], phases: Sequence[Phase]) -> list[str]:
    failed = [row for row in rows if row["status"] == "failed"]
    lines = [f"**{len(failed)} failed.**" if failed else "Nothing failed."]
    lines += [f"- {row['phase']}, {_cell(row['item'])}: {_cell(row['reason'])}" for row in failed]
    told = {row["phase"] for row in rows if row["status"] in {"measured", "failed"}}
    for phase in phases:
        if phase.letter in told:
            continue
        why = next((row["reason"] for row in rows if row["phase"] == phase.letter), "not run")
        lines.append(f"- {phase.letter}, {phase.title}: {NOTHING} ({_cell(why)})")
    return lines


def _section(phase: Phase, rows: Sequence[Row], command: str) -> list[str]:
    lines = [f"## {phase.letter}. {phase.title}", "", f"`{command}`"]
    for table in phase.tables:
        own = [row for row in rows if row["item"].startswith(f"{table.name}/")]
        lines += ["", *_table(table, own)]
        if any(row.get("roofline") is not None for row in own):
            lines += ["", ROOFLINE]
        lines += _kernels(own)
    return lines


def _table(table: Table, rows: Sequence[Row]) -> list[str]:
    if not rows:
        return [f"{table.name}: {NOTHING}."]
    titles = [table.name, *(title for _, title, _ in table.columns)]
    lines = [_line(titles), _line(["---"] * len(titles))]
    for row in rows:
        name = row["item"].partition("/")[2]
        if row["status"] == "measured":
            cells = [_number(row.get(key), form) for key, _, form in table.columns]
        else:
            why = "failed" if row["status"] == "failed" else _cell(row["reason"])
            cells = [f"{NOTHING} ({why})", *[""] * (len(table.columns) - 1)]
        lines.append(_line([_cell(name), *cells]))
    return [*lines, "", table.note] if table.note else lines


def _number(value: Any, form: str) -> str:
    """Return a figure as the column has it; what is not there is said to be not there."""
    if value is None:
        return NOTHING
    return _cell(value) if isinstance(value, str) else format(value, form)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    """Return text that stays in its cell."""
    return text.replace("|", "\\|").replace("\n", " ")


def _kernels(rows: Sequence[Row]) -> list[str]:
    """Return the tables of the kernels that took longest."""
    lines = []
    for row in rows:
        if row.get("top"):
            name = row["item"].partition("/")[2]
            lines += ["", f"Kernels of {name} that took longest, in one step:", ""]
            lines += [_line(("kernel", "number", "ms")), _line(["---"] * 3)]
            lines += [
                _line((_cell(k[:_LONGEST]), str(n), f"{ms:.2f}"))
                for k, n, ms in row["top"][:_SHOWN]
            ]
    return lines


def with_roofline(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with the share of the roofline, where its rates and the work are known."""
    rates = {row["item"]: row.get("value") for row in rows if row["phase"] == "a"}
    copy, matmul = rates.get("rate/copy"), rates.get("rate/bf16 matmul")
    done = []
    for row in rows:
        if copy and matmul and row.get("bytes_per_image") and row.get("images_per_s"):
            bound = min(1e9 * copy / row["bytes_per_image"], 1e12 * matmul / row["flop_per_image"])
            row = {**row, "roofline": 100 * row["images_per_s"] / bound}
        done.append(row)
    return done
