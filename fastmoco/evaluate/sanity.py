"""What makes an accuracy say less than it seems to: told beside the number, and stored with it."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from fastmoco.core.rng import Ids
from fastmoco.dataset.labels import Labelled

_NAMED = 3


def cautions(train: Labelled, test: Labelled, step: int | None = None) -> list[str]:
    """Return sentences about two labelled sets, and about the encoder if its step is told.

    Args:
        train, test: with equal class lists.
        step: of the encoder's checkpoint.
    """
    found = [_untrained(step), _overlap(train, test), _unseen(train, test), _untested(train, test)]
    return [sentence for sentence in [*found, *tell_dropped(train)] if sentence]


def _untrained(step: int | None) -> str | None:
    return "this encoder is untrained (step 0)" if step == 0 else None


def tell_dropped(train: Labelled) -> Iterator[str]:
    """Yield which tables have labels that are not used."""
    for source in train.sources:
        if source.dropped:
            yield (
                f"{source.dropped} labels of {source.table} are not used: their images have a "
                "label of a table or set that was named before"
            )


def _overlap(train: Labelled, test: Labelled) -> str | None:
    both = shared(train, test)
    if not len(both):
        return None
    if len(both) == len(test.ids):
        return (
            f"every one of the {len(both)} test images is in the training set too: this number "
            "says what is remembered, not what is recognized"
        )
    names = ", ".join(test.data.get_name(int(row)) for row in both[:_NAMED])
    more = ", ..." if len(both) > _NAMED else ""
    return (
        f"{len(both)} of {len(test.ids)} test images ({100 * len(both) / len(test.ids):.3g} %) "
        f"are in the training set too, byte for byte: {names}{more}"
    )


def shared(train: Labelled, test: Labelled) -> Ids:
    """Return the ids of the test samples whose bytes are those of a training sample.

    By the 64-bit hashes of the stored bytes: an image that was encoded anew is another one.
    """
    asked = _hashes(test)
    return test.ids[np.isin(asked, _hashes(train))]


def _hashes(one: Labelled) -> npt.NDArray[np.uint64]:
    return np.asarray(one.data.rows(one.ids)["hash"], dtype=np.uint64)


def _unseen(train: Labelled, test: Labelled) -> str | None:
    """Tell classes of the test set that no classifier can have learnt."""
    odd = np.setdiff1d(test.labels, train.labels)
    return _told(train, odd, "no training image, so none of their test images can be right")


def _untested(train: Labelled, test: Labelled) -> str | None:
    odd = np.setdiff1d(train.labels, test.labels)
    return _told(train, odd, "no test image: the accuracy is one over the others")


def _told(one: Labelled, odd: npt.NDArray[np.int64], what: str) -> str | None:
    if not len(odd):
        return None
    names = ", ".join(one.classes[label] for label in odd[:_NAMED])
    more = ", ..." if len(odd) > _NAMED else ""
    return f"{len(odd)} of {len(one.classes)} classes ({names}{more}) have {what}"
