"""A row of the metrics is the mean over all steps since the row before."""

from types import SimpleNamespace

import pytest
import torch
from recipes import recipe_from

from fastmoco.core.distributed import World
from fastmoco.train.engine import StepOutput
from fastmoco.train.meter import Meter

T = 0.2


def output(seed: int, ok: bool = True) -> StepOutput:
    random = torch.Generator().manual_seed(seed)
    negative = torch.rand(6, 9, generator=random) / T
    positive = torch.rand(6, generator=random) / T
    loss = torch.rand(6, generator=random) if ok else torch.full((6,), torch.nan)
    q = torch.nn.functional.normalize(torch.rand(6, 4, generator=random), dim=1)
    return StepOutput(loss, positive, negative, q, torch.tensor(1.0), torch.tensor(ok))


@pytest.fixture
def meter(worker):
    recipe = recipe_from(worker.DEFAULTS | {"temperature": T})
    return Meter(recipe, World(), torch.device("cpu"))


ENGINE = SimpleNamespace(
    scale=SimpleNamespace(scale=1.0),
    objective=SimpleNamespace(numbers=dict),
    guard=SimpleNamespace(check=lambda: 0),
)


def by_hand(outputs: list[StepOutput]) -> dict[str, float]:
    rows = []
    for o in outputs:
        ranks = [
            sorted([p, *n.tolist()], reverse=True).index(p)
            for p, n in zip(o.positive.tolist(), o.negative, strict=True)
        ]
        rows.append(
            {
                "loss": o.loss.mean(),
                "pretext_top1": sum(r < 1 for r in ranks) / 6,
                "pretext_top5": sum(r < 5 for r in ranks) / 6,
                "positive_similarity": T * o.positive.mean(),
                "negative_similarity": T * o.negative.mean(),
                "feature_std": 2 * o.q.std(dim=0).mean(),
            }
        )
    return {name: float(sum(row[name] for row in rows) / len(rows)) for name in rows[0]}


def test_a_row_is_the_mean_of_its_steps(meter):
    """Not of those before the last row, nor of skipped ones."""
    for seed in range(3):
        meter.count(output(seed), 0.0)
    meter.read(output(2), ENGINE)
    outputs = [output(seed) for seed in (4, 5, 6)]
    for one in (*outputs, output(7, ok=False)):
        meter.count(one, 0.0)
    row = meter.read(outputs[-1], ENGINE)
    expected = by_hand(outputs)
    assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert meter.end_epoch() == pytest.approx(
        sum(float(output(seed).loss.mean()) for seed in (0, 1, 2, 4, 5, 6)) / 6, abs=1e-6
    )


def test_a_resumed_row_has_the_steps_before_the_checkpoint(meter, worker):
    meter.count(output(0), 0.0)
    again = Meter(recipe_from(worker.DEFAULTS | {"temperature": T}), World(), torch.device("cpu"))
    again.load(meter.state())
    again.count(output(1), 0.0)
    row, expected = again.read(output(1), ENGINE), by_hand([output(0), output(1)])
    assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-6)
