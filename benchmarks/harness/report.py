"""What a comparison of arms found: ratios within pairs, the proof of equal work, the costs."""

import statistics
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from typing import Any

from fastmoco.errors import DataError
from harness.bootstrap import Interval, interval_of

MAX_STEAL = 2.0  # percent; a pair with more is dropped


@dataclass(frozen=True)
class Measurement:
    """One arm, run once.

    Attributes:
        arm: its name.
        pair: the round, from 0.
        images: done in the measured section.
        seconds: wall time of the section.
        cpu_s: CPU seconds of all its processes, less those outside the section where it tells.
        wall_s: wall time of the whole process.
        whole_cpu_s: CPU seconds of the whole process tree.
        peak_bytes: of memory, over the process tree.
        memory_samples: how often memory was looked at.
        load_before: the 1-minute load before it started.
        steal_percent: of all cores' time, kept by the machine's host.
        check: what the arm proves of its work.
        first_batch_s: if the arm tells.
        details: anything else that the arm tells.
    """

    arm: str
    pair: int
    images: int
    seconds: float
    cpu_s: float
    wall_s: float
    whole_cpu_s: float
    peak_bytes: int
    memory_samples: int
    load_before: float
    steal_percent: float
    check: dict[str, Any]
    first_batch_s: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds_per_image(self) -> float:
        """Wall time of the section, shared out."""
        return self.seconds / self.images

    @property
    def cpu_per_image(self) -> float:
        """CPU seconds of the section, shared out."""
        return self.cpu_s / self.images


@dataclass(frozen=True)
class Comparison:
    """The first arm against another one.

    Attributes:
        arm, reference: their names.
        pairs: that count.
        dropped: pairs in which the host kept too much time, with the percentage.
        speed: the reference's wall time per image by the arm's; None if no pair counts.
        cpu: the same of CPU seconds.
    """

    arm: str
    reference: str
    pairs: int
    dropped: dict[int, float]
    speed: Interval | None
    cpu: Interval | None


@dataclass(frozen=True)
class Report:
    """What a comparison found.

    Attributes:
        environment: see `fastmoco.core.environment`.
        subject: what was measured: its settings and inputs.
        measurements: in the order in which they were made.
        comparisons: the first arm against each other one.
        differences: in what the arms did, in words; empty if all did the same work.
        tolerance: that floats of the proof were allowed.
        smallest_effect: of an arm against itself: the half-width of the interval of the speed,
            which is the smallest effect that this machine can show.
    """

    environment: dict[str, Any]
    subject: dict[str, Any]
    measurements: list[Measurement]
    comparisons: list[Comparison]
    differences: list[str]
    tolerance: float
    smallest_effect: float | None

    def require_result(self) -> None:
        """Check that there is a result.

        Raises:
            DataError: the arms did not do the same work, or no pair counts.
        """
        if self.differences:
            listed = "".join(f"\n  {difference}" for difference in self.differences)
            raise DataError(f"The arms did not do the same work:{listed}")
        if any(comparison.speed is None for comparison in self.comparisons):
            raise DataError(
                f"The machine's host kept more than {MAX_STEAL:g} % of the time in every pair: "
                "there is no result. Try again later."
            )

    def row(self) -> dict[str, Any]:
        """Return what is recorded beside the measurements."""
        return {
            "environment": self.environment,
            "subject": self.subject,
            "comparisons": [asdict(comparison) for comparison in self.comparisons],
            "medians": {name: self.medians(name) for name in self.arms},
            "same_work": not self.differences,
            "differences": self.differences,
            "tolerance": self.tolerance,
            "smallest_effect": self.smallest_effect,
        }

    @property
    def arms(self) -> list[str]:
        """The names of the arms, the first one first."""
        return list(dict.fromkeys(found.arm for found in self.measurements))

    def medians(self, arm: str) -> dict[str, Any]:
        """Return speed, costs and peak of one arm over all its measurements."""
        found = [one for one in self.measurements if one.arm == arm]
        first_batches = [one.first_batch_s for one in found if one.first_batch_s is not None]
        seconds = statistics.median(one.seconds_per_image for one in found)
        batch = self.subject.get("batch")
        return {
            "images_per_s": 1 / seconds,
            "ms_per_batch": 1e3 * seconds * batch if batch else None,
            "cpu_ms_per_image": 1e3 * statistics.median(one.cpu_per_image for one in found),
            "peak_mb": max(one.peak_bytes for one in found) / 1e6,
            "first_batch_s": statistics.median(first_batches) if first_batches else None,
        }


def report_of(
    found: list[Measurement],
    environment: dict[str, Any],
    subject: Mapping[str, Any],
    tolerance: float,
    against_itself: bool = False,
    bounds: Set[str] = frozenset(),
) -> Report:
    """Compare the first arm of the measurements with the others; `bounds` do less than it."""
    first, *others = dict.fromkeys(one.arm for one in found)
    comparisons = [_comparison(found, first, other) for other in others]
    speed = comparisons[0].speed if against_itself else None
    return Report(
        environment=environment,
        subject=dict(subject),
        measurements=found,
        comparisons=comparisons,
        differences=_differences([one for one in found if one.arm not in bounds], tolerance),
        tolerance=tolerance,
        smallest_effect=speed.half_width if speed else None,
    )


def _comparison(found: Sequence[Measurement], arm: str, reference: str) -> Comparison:
    ours = {one.pair: one for one in found if one.arm == arm}
    theirs = {one.pair: one for one in found if one.arm == reference}
    steal = {pair: max(ours[pair].steal_percent, theirs[pair].steal_percent) for pair in ours}
    kept = [pair for pair in ours if steal[pair] <= MAX_STEAL]
    speeds = [theirs[pair].seconds_per_image / ours[pair].seconds_per_image for pair in kept]
    cpus = [theirs[pair].cpu_per_image / ours[pair].cpu_per_image for pair in kept]
    return Comparison(
        arm=arm,
        reference=reference,
        pairs=len(kept),
        dropped={pair: steal[pair] for pair in ours if pair not in kept},
        speed=interval_of(speeds) if kept else None,
        cpu=interval_of(cpus) if kept else None,
    )


def _differences(found: Sequence[Measurement], tolerance: float) -> list[str]:
    """Return in words where an arm did something else than the very first measurement."""
    first, *others = found
    told: dict[tuple[str, str], str] = {}  # one line for each arm and quantity
    for one in others:
        ours, theirs = {"images": first.images, **first.check}, {"images": one.images, **one.check}
        for key in {**ours, **theirs}:
            if not _same(ours.get(key), theirs.get(key), tolerance):
                line = f"{key}: {theirs.get(key)} in {one.arm}, {ours.get(key)} in {first.arm}"
                told.setdefault((one.arm, key), line)
    return list(told.values())


def _same(ours: Any, theirs: Any, tolerance: float) -> bool:
    if isinstance(ours, list) and isinstance(theirs, list):
        pairs = zip(ours, theirs, strict=False)
        return len(ours) == len(theirs) and all(_same(a, b, tolerance) for a, b in pairs)
    if isinstance(ours, float) and isinstance(theirs, float):
        return abs(ours - theirs) <= tolerance
    return bool(ours == theirs)
