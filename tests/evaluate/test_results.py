"""What is written down about an evaluation."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastmoco.dataset.labels import labelled_pair
from fastmoco.evaluate.predictions import Predictions
from fastmoco.evaluate.results import append
from fastmoco.runs.run_folder import RunFolder


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


def test_of_many_classes_the_confusion_is_sparse(tmp_path: Path) -> None:
    classes = 100_000  # dense: 80 GB
    labels, guessed = torch.tensor([5, 5, 5, 99_999]), torch.tensor([5, 7, 7, 99_999])
    found = Predictions(labels, guessed, (labels != guessed).long(), torch.ones(4), classes)
    assert found.confused().tolist() == [[5, 5, 1], [5, 7, 2], [99_999, 99_999, 1]]
    shares = found.per_class()
    assert shares[5] == pytest.approx(100 / 3) and shares[99_999] == 100 and shares[7] is None
    test = SimpleNamespace(ids=np.arange(4), classes=list(map(str, range(classes))))
    row = append(RunFolder(tmp_path), {"kind": "knn"}, found, test)  # type: ignore[arg-type]
    with np.load(tmp_path / row["predictions"]) as stored:
        assert np.array_equal(stored["confusion"], found.confused())
