"""What a run is asked every few epochs: how its features spread, and with labels its kNN."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Literal

import numpy as np
import torch
from torch.nn.functional import normalize

from fastmoco.config.monitor import Monitor
from fastmoco.config.recipe import Recipe, View
from fastmoco.core.distributed import World
from fastmoco.core.rng import Ids, stratified
from fastmoco.core.terminal import echo
from fastmoco.dataset.labels import Labelled, labelled_pair
from fastmoco.dataset.shard_set import ConcatShardSets
from fastmoco.errors import DivergedError
from fastmoco.evaluate.features import (
    Feature,
    Preprocessing,
    Stopped,
    embed,
    embed_labelled,
    embed_views,
)
from fastmoco.evaluate.knn import KNNClassifier
from fastmoco.evaluate.label_free import (
    Moments,
    alignment,
    alpha_req,
    lidar,
    rankme,
    uniformity,
)
from fastmoco.evaluate.sanity import cautions
from fastmoco.load.loader import Loader, check_channels
from fastmoco.models.encoder import Encoder

RANKED = 25_600  # images whose features' rank is measured, as in RankMe's paper
PAIRED = 1_024  # images of which two views are compared
LIDAR, LIDAR_VIEWS = 1_000, 10  # images and views of each, as in LiDAR's paper
_OTHER = 1 << 62  # of the seed: the views are not those of the run's first steps

Stop = Callable[[], bool]


@dataclass(frozen=True)
class RunMonitor:
    """Measures an encoder; a collective of the ranks, of which each looks at its share.

    Attributes:
        config: the monitor of the recipe.
        views: those of the run.
        seed: of the run.
        data: where the images come from.
        ids: (n,) int64, ascending: the images that are looked at.
        bank: their labels; None: none are read.
        queries: what is classified by the bank.
        preprocessing: how images are shown.
        world: see above.
    """

    config: Monitor
    views: Sequence[View]
    seed: int
    data: ConcatShardSets
    ids: Ids
    bank: Labelled | None
    queries: Labelled | None
    preprocessing: Preprocessing
    world: World

    @classmethod
    def open(
        cls, recipe: Recipe, loader: Loader, preprocessing: Preprocessing, world: World
    ) -> "RunMonitor | None":
        """Open the sets of a recipe's monitor, and tell what its numbers will not say.

        Raises:
            DataError: a set is missing, or they do not fit together.
            UsageError: a set has other channels than the encoder.
        """
        config, bank, queries = recipe.monitor, None, None
        if config is None:
            return None
        if config.bank and config.labelled:
            bank, asked = labelled_pair(config.bank, config.queries or config.bank, config.labels)
            queries = asked if config.queries else None
            data, ids = ConcatShardSets([bank.set]), bank.ids
        elif config.bank:
            data = ConcatShardSets.open([config.bank])
            ids = np.arange(len(data))
        else:
            data, chosen = loader.data, loader.plan.chosen
            ids = np.arange(len(data)) if chosen is None else chosen
        held = [*data.sets, *([queries.set] if queries else [])]
        check_channels(held, recipe.encoder.channels)
        if bank and queries and world.is_main:
            for caution in cautions(bank, queries):
                echo(f"warning: {caution}", err=True)
        shown = recipe.views, recipe.seed
        return cls(config, *shown, data, ids, bank, queries, preprocessing, world)

    def describe_cost(self, samples: int) -> str:
        """Say what it costs a run with so many samples an epoch.

        A sample of an epoch takes four forward passes' time: forward, backward (two), and its key.
        """
        voting = len(self.ids) if self.bank else min(RANKED, len(self.ids))
        asked = len(self.queries.ids) if self.queries else 0
        passes = voting + asked + 2 * min(PAIRED, len(self.ids))
        passes += LIDAR_VIEWS * min(LIDAR, len(self.ids)) if self.config.lidar else 0
        every = self.config.every
        share = 100 * passes / (passes + 4 * samples * every)
        return f"{passes:,} images every {every} epochs, about {share:.2g} % of the time"

    def __call__(self, encoder: Encoder, stop: Stop) -> dict[str, float]:
        """Return the numbers by name; none if it is stopped or a feature is not finite.

        Args:
            encoder: in evaluation mode.
            stop: whether to give up; asked equally often on all ranks.
        """
        try:
            return self._measure(encoder, stop)
        except Stopped:
            return {}
        except DivergedError as error:  # met by all ranks alike; the guard looks after the run
            if self.world.is_main:
                echo(f"warning: nothing is measured. {error}", err=True)
            return {}

    def _measure(self, encoder: Encoder, stop: Stop) -> dict[str, float]:
        ranked = _spread_out(self.ids, RANKED)
        features = self._embed(encoder, "both", ranked, stop)
        backbone, head = features.tensor_split([encoder.features], dim=1)
        moments = Moments.of(backbone, self.world)
        numbers = {
            "rankme": rankme(moments),
            "rankme_head": rankme(Moments.of(head, self.world)),
            "rankme_images": len(ranked),
            "alpha_req": alpha_req(moments),
            **self._compare_views(encoder, stop),
        }
        if self.config.lidar:
            numbers["lidar"] = lidar(self._heads(encoder, LIDAR, LIDAR_VIEWS, stop))
        if self.bank:
            feature = self.config.feature
            rest = np.setdiff1d(self.ids, ranked, assume_unique=True)
            seen = backbone if feature == "backbone" else head  # votes too, without another pass
            voting = torch.cat([seen, self._embed(encoder, feature, rest, stop)])
            own = np.concatenate([ids[self.world.share(len(ids))] for ids in (ranked, rest)])
            numbers |= self._classify(self.bank, voting, own, encoder, stop)
        return {n: x for n, x in numbers.items() if x is not None and math.isfinite(x)}

    def _embed(
        self, encoder: Encoder, feature: Feature | Literal["both"], ids: Ids, stop: Stop
    ) -> torch.Tensor:
        return embed(encoder, self.data, feature, self.preprocessing, self.world, ids, stop)

    def _compare_views(self, encoder: Encoder, stop: Stop) -> dict[str, float]:
        heads = self._heads(encoder, PAIRED, 2, stop)
        first, second = normalize(heads, dim=2).unbind(dim=1)
        return {"alignment": alignment(first, second), "uniformity": uniformity(first)}

    def _heads(self, encoder: Encoder, count: int, views: int, stop: Stop) -> torch.Tensor:
        """Return the (n, V, dim) head's outputs for views of at most `count` images, of all ranks.

        The views of the run take turns.
        """
        ids = _spread_out(self.ids, count)
        drawn = list(islice(cycle(self.views), views)), self.seed ^ _OTHER
        own = embed_views(encoder, self.data, *drawn, self.preprocessing, self.world, ids, stop)
        return self.world.gather_shares(own, len(ids))

    def _classify(
        self, bank: Labelled, features: torch.Tensor, ids: Ids, encoder: Encoder, stop: Stop
    ) -> dict[str, float]:
        """Return the kNN accuracies, percent.

        Args:
            bank: the labels.
            features: (n, width) of this rank's share of the bank.
            ids: (n,) int64, theirs.
        """
        labels = torch.from_numpy(bank.labels[np.searchsorted(bank.ids, ids)]).to(features.device)

        def classifier(rows: torch.Tensor | slice) -> KNNClassifier:
            k, t = self.config.k, self.config.t
            return KNNClassifier(features[rows], labels[rows], len(bank.classes), k, t, self.world)

        numbers = {}
        if self.config.validation:
            places = stratified(bank.labels.astype(np.int32), self.config.validation, seed=0)
            held = torch.from_numpy(np.isin(ids, bank.ids[places])).to(features.device)
            asked = features[held], labels[held]
            numbers["validation_top1"] = classifier(~held).accuracy(*asked, stop)
        if self.queries:
            asked = embed_labelled(
                encoder, self.queries, self.config.feature, self.preprocessing, self.world, stop
            )
            numbers["knn_top1"] = classifier(slice(None)).accuracy(*asked, stop)
        return numbers


def _spread_out(ids: Ids, count: int) -> Ids:
    """Return at most `count` of the ids, at equal steps: of sets in the order of classes too."""
    count = min(count, len(ids))
    return ids[np.arange(count) * len(ids) // count]
