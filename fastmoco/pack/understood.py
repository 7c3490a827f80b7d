"""Saying what a source was understood to hold, before any image is decoded."""

from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np

from fastmoco.dataset.classes import few
from fastmoco.pack.sources.base import Source

_SHOWN = 5


def understood(sources: Mapping[str, Source]) -> list[str]:
    """Return lines that tell splits, classes, images and labels, and all that is not packed."""
    lines = []
    for split, source in sources.items():
        name = f"split {split}" if split else "found"
        lines.append(f"{name}: {len(source)} images, {_classes(source)}")
        lines += [f"  {note}" for note in source.notes]
    lines += _left_out(sources)
    for source in sources.values():
        lines += [
            f"  passed over: {kind}, {group.count} ({group.first}{', ...' * (group.count > 1)})"
            for kind, group in source.passed.items()
        ]
    return lines


def _classes(source: Source) -> str:
    if not source.classes:
        return "no labels"
    labels = source.labels
    counts = np.bincount(labels[labels >= 0], minlength=len(source.classes)).tolist()
    shown = ", ".join(
        f"{name} {count}" for name, count in zip(source.classes[:_SHOWN], counts, strict=False)
    )
    more = ", ..." if len(source.classes) > _SHOWN else ""
    origin = f" from {source.labels_from}" if source.labels_from else ""
    none = int((labels < 0).sum())
    without = f"; {none} images without a label" if none else ""
    empty = [name for name, count in zip(source.classes, counts, strict=True) if not count]
    lacking = f"; without images, {len(empty)}: {few(empty)}" if empty else ""
    return f"{len(source.classes)} classes{origin} ({shown}{more}){without}{lacking}"


def _left_out(sources: Mapping[str, Source]) -> Iterator[str]:
    """Yield a line for each reason for which images are left out, the commonest first."""
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for source in sources.values():
        for name, reason in source.left_out:
            counts[reason] += 1
            first.setdefault(reason, name)
    for reason, count in counts.most_common():
        yield f"  left out: {count}, each {reason} ({first[reason]}{', ...' * (count > 1)})"
