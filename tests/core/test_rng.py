"""The random numbers of a run are for ever those of commit 831a4a3, which drew these constants."""

import numpy as np
import pytest

from fastmoco.config.recipe import View
from fastmoco.core.rng import stratified, uniforms
from fastmoco.load.order import Repeated, Shuffled, SubsetOrder, Windowed
from fastmoco.load.sampler import Plan
from fastmoco.load.view_params import draw

SUBSET = stratified((np.arange(120) % 7).astype(np.int32), 0.5, 11)
VIEW = View(
    jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grayscale=0.2, blur=0.5, solarize=0.2, flip=0.5
)
PLANS = {
    "shuffled": Plan(100, 8, 3),
    "windowed": Plan(120, 8, 5, Repeated(Windowed((10, 20, 5, 25), 2, 5), 2)),
    "subset": Plan(60, 6, 7, SubsetOrder(SUBSET, Shuffled(len(SUBSET), 7))),
}


@pytest.mark.parametrize(
    ("plan", "step", "ids", "crops", "numbers", "flags"),
    [
        (
            "shuffled",
            0,
            [81, 88, 92, 21],
            [[12, 132, 303, 365], [132, 154, 240, 319]],
            [1.30904, 1.39554, 0.76744, 0.06915, 1.13067],
            [False, True, True],
        ),
        (
            "shuffled",
            999,
            [3, 26, 1, 32],
            [[34, 173, 213, 220], [3, 76, 368, 302]],
            [0.81923, 0.7175, 1.08118, 0.05209, 0.83081],
            [False, True, False],
        ),
        (
            "windowed",
            0,
            [18, 20, 13, 30],
            [[23, 65, 333, 395], [12, 8, 361, 475]],
            [1.17206, 0.84688, 0.65667, -0.03331, 1.06539],
            [True, True, False],
        ),
        (
            "windowed",
            999,
            [58, 59, 39, 44],
            [[2, 53, 270, 294], [4, 135, 291, 359]],
            [0.83383, 1.17559, 0.69651, -0.05281, 1.49685],
            [False, False, False],
        ),
        (
            "subset",
            0,
            [74, 114, 107],
            [[8, 72, 354, 348], [65, 91, 260, 214]],
            [1.25981, 0.80437, 0.6899, -0.07515, 1.99243],
            [False, True, False],
        ),
        (
            "subset",
            999,
            [105, 69, 32],
            [[96, 154, 239, 318], [34, 141, 337, 283]],
            [0.65217, 1.20957, 1.01005, -0.06284, 1.26554],
            [False, False, True],
        ),
    ],
)
def test_ids_and_view_parameters(plan, step, ids, crops, numbers, flags):
    """Of the second of two ranks, and of the second view of an image of 375 x 500 pixels.

    Args:
        ids: of the rank's samples.
        crops: of the first two.
        numbers: brightness, contrast, saturation, hue and sigma of the first.
        flags: its grayscale, blur and flip.
    """
    positions = PLANS[plan].positions(step, rank=1, ranks=2)
    assert PLANS[plan].order(positions).tolist() == ids
    u = uniforms(PLANS[plan].seed, int(positions[0]), len(positions), 2)[1]
    drawn = draw(VIEW, u, np.tile([[375, 500]], (len(u), 1)))
    assert drawn.crop[:2].tolist() == crops
    found = drawn.brightness, drawn.contrast, drawn.saturation, drawn.hue, drawn.sigma
    assert [float(values[0]) for values in found] == pytest.approx(numbers, abs=1e-5)
    assert [bool(values[0]) for values in (drawn.grayscale, drawn.blur, drawn.flip)] == flags
