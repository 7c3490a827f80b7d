"""What `fastmoco pseudolabel` leaves behind: a CSV of labels, and a JSON that says how good.

    sample,name,label,weight,confidence

as `fastmoco label` and `--more` read it. The JSON is self-contained: the report draws it.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastmoco.core.files import to_csv, write_bytes, write_json
from fastmoco.dataset.classes import Known, few
from fastmoco.label.pseudo import PseudoLabels
from fastmoco.label.threshold import wilson

_WRONG = 16  # of the surest wrong labels are told
_NAMED = 20  # classes
Weight = Literal["one", "confidence"]


def write_pseudolabels(found: PseudoLabels, out: Path, weight: Weight) -> dict[str, Any]:
    """Write the description, then the labels, each whole or not at all; return the description.

    Args:
        found: the labels.
        out: of the CSV; the description goes beside it.
        weight: what a label counts in training: 1, or its confidence.
    """
    rows = (
        [
            sample,
            found.pool.get_name(sample),
            found.classes[label],
            "1" if weight == "one" else f"{sure:.6f}",
            f"{sure:.6f}",
        ]
        for sample, label, sure in zip(
            found.ids.tolist(), found.labels.tolist(), found.confidence.tolist(), strict=True
        )
    )
    content = to_csv(["sample", "name", "label", "weight", "confidence"], rows)
    counts = np.bincount(found.labels, minlength=len(found.classes)).tolist()
    about = found.about | {
        "kind": "pseudolabels",
        "labels": len(found.ids),
        "weight": weight,
        "classes": dict(zip(found.classes, counts, strict=True)),
        "truth": _compare(found),
        "warnings": found.warnings,
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    write_json(out.with_suffix(".json"), about)
    write_bytes(out, content)
    return about


def _compare(found: PseudoLabels) -> dict[str, Any] | None:
    """Return how many labels are those that the pool was packed with, and the surest wrong ones."""
    packed = found.pool.labels()[found.ids]
    places = np.flatnonzero(packed >= 0)
    if not len(places):
        return None
    names = found.pool.manifest.classes
    codes = Known(found.classes).codes(names)  # -1: a class that no label was of
    right = codes[packed[places]] == found.labels[places]
    wrong = places[~right]
    surest = wrong[np.argsort(-found.confidence[wrong], kind="stable")][:_WRONG]
    return {
        "labels": len(places),
        "right": int(right.sum()),
        "surest_wrong": [
            {
                "sample": int(found.ids[place]),
                "label": found.classes[found.labels[place]],
                "truth": names[packed[place]],
                "confidence": float(found.confidence[place]),
            }
            for place in surest.tolist()
        ],
    }


def describe(about: dict[str, Any], out: Path) -> Iterator[str]:
    """Yield what a person should read of pseudo-labels."""
    counts = about["classes"]
    yield (
        f"{out}: {about['labels']:,} labels for {about['candidates']:,} candidates, "
        f"{min(counts.values())} to {max(counts.values())} of each class"
    )
    yield "  " + few([f"{name} {count}" for name, count in counts.items()], _NAMED)
    for one in about["classifiers"]:
        said = f"  classifier: {one['run']}"
        if one.get("accuracy") is not None:
            said += (
                f", {one['samples']} labels, {one['accuracy']:.1f} % right out of fold, "
                f"C {one['strength']:g}, temperature {one['temperature']:.2f}, calibration error "
                f"{one['error_before']:.2f}, {one['error']:.2f} with temperature"
            )
        yield said
    if "threshold" in about:
        yield from _describe_estimate(about)
    else:
        yield (
            f"  {about['learner']} learns them from the other; how many are right cannot be told. "
            f"The runs call {about['called_differently']} samples differently"
        )
    for warning in about["warnings"]:
        yield f"  warning: {warning}"
    if truth := about["truth"]:
        right, labels = truth["right"], truth["labels"]
        low, high = wilson(right, labels)
        yield (
            f"  in truth: {100 * right / labels:.1f} % of {labels:,} are right [{100 * low:.1f}, "
            f"{100 * high:.1f}], by the labels that the pool was packed with"
        )
    yield f"train on them by `probe` or `finetune` with --more {about['pool']} {out}"


def _describe_estimate(about: dict[str, Any]) -> Iterator[str]:
    estimate, share = about["estimate"], about["above_threshold"]
    wanted = about["precision"]
    chosen = "by hand" if wanted is None else f"for a precision of {wanted:g}"
    yield f"  threshold: {about['threshold']:.3f}, {chosen}"
    if estimate["precision"] is None:
        yield "  how many are right cannot be told: there is no label out of fold above it"
        return
    precision, low, high = (100 * estimate[key] for key in ("precision", "low", "high"))
    yield (
        f"  estimate: {precision:.1f} % are right [{low:.1f}, {high:.1f}], by {estimate['labels']} "
        f"labels out of fold; above the threshold are {100 * share['out_of_fold']:.1f} % of the "
        f"labels, {100 * share['pool']:.1f} % of the pool"
    )
    yield (
        "  this holds only if the pool is drawn as the labels were: images of other classes count "
        "as right here"
    )
