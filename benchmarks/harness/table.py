"""A report as a person reads it."""

from rich.console import Console
from rich.table import Table

from harness.bootstrap import Interval
from harness.report import MAX_STEAL, Comparison, Measurement, Report

CLAIM = 5  # pairs below which an interval means little
LASTS = 5.0  # seconds of a section below which its noise decides


def show(report: Report, console: Console) -> None:
    """Print the table of the arms, then what each comparison says."""
    console.print(_table(report))
    for comparison in report.comparisons:
        for line in _lines(comparison):
            console.print(line, markup=False, highlight=False)
    shortest = min(found.seconds for found in report.measurements)
    if shortest < LASTS:
        advice = f"too short for a claim, take {LASTS:g} s of work or more"
        console.print(f"The shortest section took {shortest:.1f} s: {advice}.", highlight=False)
    if report.smallest_effect is not None:
        effect = f"{100 * report.smallest_effect:.1f} %"
        console.print(f"The smallest effect that this machine can show: {effect}", highlight=False)
    for difference in report.differences:
        console.print(f"NOT THE SAME WORK: {difference}", markup=False, highlight=False)


def line_of(found: Measurement) -> str:
    """Return a measurement as one line."""
    return (
        f"pair {found.pair + 1}  {found.arm}: {1 / found.seconds_per_image:.1f} images/s, "
        f"{1e3 * found.cpu_per_image:.2f} ms CPU an image, peak {found.peak_bytes / 1e6:.0f} MB"
    )


def _table(report: Report) -> Table:
    table = Table("arm")
    for title in ("images/s", "ms/batch", "CPU ms/image", "peak MB", "first batch s"):
        table.add_column(title, justify="right")
    for arm in report.arms:
        found = report.medians(arm)
        first, each = found["first_batch_s"], found["ms_per_batch"]
        table.add_row(
            arm,
            f"{found['images_per_s']:.1f}",
            "-" if each is None else f"{each:.1f}",
            f"{found['cpu_ms_per_image']:.2f}",
            f"{found['peak_mb']:.0f}",
            "-" if first is None else f"{first:.2f}",
        )
    return table


def _lines(found: Comparison) -> list[str]:
    dropped = [
        f"  pair {pair + 1} dropped: {steal:.1f} % of the time was stolen (limit {MAX_STEAL:g} %)"
        for pair, steal in found.dropped.items()
    ]
    if found.speed is None or found.cpu is None:
        return [f"{found.arm} against {found.reference}: no pair counts", *dropped]
    few = f"  too few pairs for a claim, take {CLAIM} or more"
    return [
        f"{found.arm} against {found.reference}, pairs: {found.pairs}, median [95 % interval]:",
        f"  speed {_said(found.speed)}   CPU {_said(found.cpu)}   (over 1: better)",
        *dropped,
        *([few] if found.pairs < CLAIM else []),
    ]


def _said(interval: Interval) -> str:
    return f"{interval.median:.3f}x [{interval.low:.3f}, {interval.high:.3f}]"
