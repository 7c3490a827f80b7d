"""The labelled samples of sets: what a classifier is trained on, and tested on."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastmoco.core.rng import Ids, first_of_each
from fastmoco.dataset.classes import Known, few
from fastmoco.dataset.shard_set import ConcatShardSets, ShardSet, label_path, read_labels
from fastmoco.errors import DataError, UsageError

Weights = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Source:
    """Where some of the labels come from.

    Attributes:
        set: the set of the samples.
        table: the side table or CSV of their labels; None: they were packed with the set.
        samples: how many labels it gave.
        dropped: how many it had for samples that have one from a source before.
    """

    set: ShardSet
    table: str | None
    samples: int
    dropped: int = 0


@dataclass(frozen=True)
class Labelled:
    """The labelled samples of a set, or of several.

    Attributes:
        data: the sets; ids run through them.
        ids: (n,) int64, ascending: the samples that have a label.
        labels: (n,) int64, theirs.
        classes: names of the labels 0, 1, ...
        weights: (n,) fp32, above 0: what each counts in training.
        sources: where the labels come from, in order.
        drawn: how some of them were chosen, in the words of the options; empty: all are here.
    """

    data: ConcatShardSets
    ids: Ids
    labels: Ids
    classes: list[str]
    weights: Weights
    sources: tuple[Source, ...]
    drawn: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, shard_set: ShardSet, table: str | None = None) -> "Labelled":
        """Return the samples that have a label, in the set or in one of its side tables.

        Raises:
            DataError: the table is missing, damaged or belongs to another set.
        """
        if table is not None:
            rows, classes = read_labels(shard_set, table)
            ids, labels = (rows[column].astype(np.int64) for column in ("id", "label"))
            return cls.of_rows(shard_set, ids, labels, rows["weight"], classes, table)
        everything = shard_set.labels()
        ids = np.flatnonzero(everything >= 0)
        labels, ones = everything[ids].astype(np.int64), np.ones(len(ids), np.float32)
        return cls.of_rows(shard_set, ids, labels, ones, shard_set.manifest.classes)

    @classmethod
    def of_rows(
        cls,
        shard_set: ShardSet,
        ids: Ids,
        labels: Ids,
        weights: Weights,
        classes: list[str],
        table: str | None = None,
    ) -> "Labelled":
        """Return labels of one set, which may come in any order."""
        source = Source(shard_set, table, len(ids))
        order = np.argsort(ids, kind="stable")
        data = ConcatShardSets([shard_set])
        return cls(data, ids[order], labels[order], classes, weights[order], (source,))

    @property
    def set(self) -> ShardSet:
        """The set named first."""
        return self.sources[0].set

    @property
    def table(self) -> str | None:
        """The table named first."""
        return self.sources[0].table

    def relative_weights(self) -> Weights | None:
        """Return the weights over their mean, (n,) fp32; None where all are equal."""
        if len(self.weights) == 0 or (self.weights == self.weights[0]).all():
            return None
        relative: Weights = (self.weights / self.weights.mean(dtype=np.float64)).astype(np.float32)
        return relative

    def take(self, places: Ids) -> "Labelled":
        """Return some of the samples, by their ascending places in `ids`."""
        return replace(
            self, ids=self.ids[places], labels=self.labels[places], weights=self.weights[places]
        )

    def draw(self, per_class: int, seed: int) -> "Labelled":
        """Return so many samples of every class that has any; fewer are part of more.

        Raises:
            UsageError: a class has fewer.
        """
        counts = np.bincount(self.labels, minlength=len(self.classes))
        short = np.flatnonzero((counts > 0) & (counts < per_class))
        if len(short):
            worst = short[np.argmin(counts[short])]
            raise UsageError(
                f"--per-class {per_class}: {len(short)} of {len(self.classes)} classes have fewer "
                f"labels, {self.classes[worst]!r} has {counts[worst]}: choose --per-class "
                f"{counts[worst]}, or label more of them."
            )
        places = first_of_each(self.labels, seed, lambda _: per_class)
        return replace(self.take(places), drawn={"per_class": per_class, "seed": seed})


def union(first: Labelled, *more: Labelled) -> Labelled:
    """Add the labels of other sets, or of other tables of the same ones.

    A sample that has a label keeps it.

    Args:
        first: whose classes count.
        more: each of one set; a class is found as `Known` finds it.

    Raises:
        DataError: one has a class that the first has not.
    """
    sets, sources = list(first.data.sets), list(first.sources)
    columns = [(first.ids, first.labels, first.weights)]
    for part in more:
        set_ids = [one.manifest.set_id for one in sets]
        if part.set.manifest.set_id not in set_ids:
            sets.append(part.set)
            set_ids.append(part.set.manifest.set_id)
        labels = _numbered_like(first, part, "label them by the names that it has")
        place = set_ids.index(part.set.manifest.set_id)
        ids = part.ids + ConcatShardSets(sets).starts[place]
        new = ~np.isin(ids, np.concatenate([known for known, _, _ in columns]))
        columns.append((ids[new], labels[new], part.weights[new]))
        sources.append(Source(part.set, part.table, int(new.sum()), int((~new).sum())))
    ids, labels, weights = (np.concatenate(column) for column in zip(*columns, strict=True))
    order = np.argsort(ids, kind="stable")
    return replace(
        first,
        data=ConcatShardSets(sets),
        ids=ids[order],
        labels=labels[order],
        weights=weights[order],
        sources=tuple(sources),
    )


def labelled_pair(
    bank: Path, queries: Path, table: str | None = None, more: Sequence[Labelled] = ()
) -> tuple[Labelled, Labelled]:
    """Open a labelled training set and a labelled test set, its classes numbered as the first's.

    The test set may lack classes of the training set; a class is found as `Known` finds it.

    Args:
        bank: the training set.
        queries: the test set.
        table: name of a side table of the training set. The test set is held to its own table of
            that name if it has one, else to the labels that it was packed with.
        more: added to the training set, see `union`.

    Raises:
        DataError: one has no labels, images of one class only or labels without a class, or
            another has a class that the training set has not.
    """
    first = union(Labelled.of(ShardSet(bank), table), *more)
    asked = ShardSet(queries)
    second = Labelled.of(asked, table if table and _has_table(asked, table) else None)
    for one in (first, second):
        refuse_unfit(one)
    mend = "give both tables the same --classes" if table else "pack the test set without them"
    labels = _numbered_like(first, second, mend)
    return first, replace(second, labels=labels, classes=first.classes)


def _numbered_like(first: Labelled, second: Labelled, mend: str) -> Ids:
    """Return the labels of the second by the class numbers of the first."""
    codes = Known(first.classes).codes(second.classes)
    odd = [second.classes[label] for label in np.unique(second.labels) if codes[label] < 0]
    if odd:
        raise DataError(
            f"{first.set.root} and {second.set.root} differ in their classes ({few(odd)}): only "
            f"{second.table or 'the second'} has these; {mend}."
        )
    return codes[second.labels].astype(np.int64)


def _has_table(one: ShardSet, table: str) -> bool:
    """Return whether a side table of that name is the set's; one outside of it has one owner."""
    about = label_path(one, table).with_suffix(".json")
    if not table.endswith(".npy"):
        return about.exists()
    try:
        return bool(json.loads(about.read_text())["set_id"] == one.manifest.set_id)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def refuse_unfit(one: Labelled) -> None:
    """Check that a classifier can learn from the labels, or be tested on them.

    Raises:
        DataError: there are none, all are of one class, or one has no class.
    """
    if len(one.classes) < 2:
        raise DataError(
            f"{one.set.root} has {len(one.classes)} classes; an accuracy needs two or more: pack "
            "a folder with one subfolder a class, or name a table of labels by --labels."
        )
    if not len(one.ids):
        raise DataError(f"{one.set.root} has classes, but no sample has a label.")
    if one.labels.max() >= len(one.classes):
        raise DataError(
            f"{one.set.root} has a label {one.labels.max()}, but only {len(one.classes)} classes: "
            "name every class, or leave those samples unlabelled."
        )
    if len(one.ids) > 1 and one.labels.min() == one.labels.max():
        raise DataError(
            f"All labelled images of {one.set.root} are of one class "
            f"({one.classes[one.labels[0]]!r}): any guess of it would be 100 % right. Look at how "
            "its folders were packed, by `fastmoco inspect`."
        )
