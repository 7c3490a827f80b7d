"""What every arm that draws views has in common: the measured section, and the proof of work."""

import time
from collections.abc import Callable, Generator
from contextlib import closing
from itertools import islice
from typing import Any

import torch

from harness.arm import Section

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WARM_UP = 2  # batches before the section
_ROWS = 4  # of each view that the proof of work looks at

Views = tuple[torch.Tensor, ...]


def measured(
    section: Section, open_batches: Callable[[], Generator[Views]], count: int
) -> dict[str, Any]:
    """Draw batches, the first ones as a warm-up, and return the form of an arm's result.

    Args:
        section: of the arm.
        open_batches: called once; yields batches of two (n, 3, size, size) fp32 views, normalized
            by the channel statistics of ImageNet, for as long as they are asked for.
        count: batches in the section.
    """
    threads = torch.get_num_threads()
    # The proof of work shall not wake threads that wait by spinning, on cores that the arm needs.
    torch.set_num_threads(1)
    began = time.perf_counter()
    with closing(open_batches()) as batches:
        first = next(batches)
        first_batch_s = time.perf_counter() - began
        for _ in range(WARM_UP - 1):
            next(batches)
        seen = _Seen()
        with section:
            for views in islice(batches, count):
                seen.add(views)
    torch.set_num_threads(threads)
    layout = {"shape": list(first[0].shape), "dtype": str(first[0].dtype), "views": len(first)}
    return {
        "images": seen.images,
        "check": {**layout, **seen.result()},
        "first_batch_s": first_batch_s,
    }


class _Seen:
    """What views look like, from four rows of each, which are kept in the section and read after.

    Each arm pays for keeping them, which is little; reading them at once would not be.
    """

    def __init__(self) -> None:
        self.images = 0
        self._rows: list[torch.Tensor] = []

    def add(self, views: Views) -> None:
        self.images += len(views[0])
        step = views[0].shape[2] // _ROWS
        self._rows.append(torch.stack([view[:, :, step // 2 :: step] for view in views]))

    def result(self) -> dict[str, float]:
        # In levels of 0..255: 57 to one standard deviation of ImageNet.
        names = ("mean", "std", "color_change", "edges")
        return dict(zip(names, (57 * self._looks()).tolist(), strict=True))

    def _looks(self) -> torch.Tensor:
        return torch.stack([_looks_of(rows) for rows in self._rows]).mean(dim=0)


def _looks_of(rows: torch.Tensor) -> torch.Tensor:
    """Return mean, deviation, color change between views and steps along (2, n, 3, r, w) rows."""
    colors = rows.mean(dim=(3, 4))
    change = (colors[0] - colors[1]).abs().mean()
    steps = (rows[..., 1:] - rows[..., :-1]).abs().mean()
    return torch.stack([rows.mean(), rows.std(), change, steps])
