"""The learning rate over a number of steps."""

import math


def cosine(step: int, steps: int, warmup: float = 0) -> float:
    """Return what a rate is multiplied by: a linear rise, then half a cosine down to 0.

    Args:
        step: from 0.
        steps: of the whole training.
        warmup: steps of the rise.
    """
    if step < warmup:
        return min(1.0, (step + 1) / warmup)
    return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
