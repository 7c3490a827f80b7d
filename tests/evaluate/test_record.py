"""What is written down about an evaluation."""

from concurrent.futures import ThreadPoolExecutor

import torch

from fastmoco.evaluate.measure import Predictions
from fastmoco.evaluate.record import append
from fastmoco.run import RunFolder
from fastmoco.shardset import labelled_pair


def test_evaluations_that_end_at_once_get_a_number_each(small_set, tmp_path):
    _, test = labelled_pair(small_set.root, small_set.root)
    labels = torch.from_numpy(test.labels)
    found = Predictions.of_logits(torch.eye(3)[labels], labels)

    def one(number: int) -> dict:
        return append(RunFolder(tmp_path), {"kind": "knn", "number": number}, found, test)

    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(one, range(24)))
    assert len({row["predictions"] for row in rows}) == 24
    assert all((tmp_path / row["predictions"]).is_file() for row in rows)
    assert len((tmp_path / "evaluations.jsonl").read_text().splitlines()) == 24
