"""Which network a file's tensors are: the one that they fill to the last tensor, or none."""

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

import torch

from fastmoco.errors import CheckpointError
from fastmoco.exchange.layouts import LAYOUTS, Layout, layout_names
from fastmoco.models.resnet import Encoder
from fastmoco.strict import near

Tensors = dict[str, torch.Tensor]
Head = Literal["linear", "mlp", "none"]

# BatchNorm never reads its count of batches under a fixed momentum; files before 2018 have none.
_OPTIONAL = "num_batches_tracked"
_SHOWN = 3
ARCHS = (
    "resnet10",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)
# Every ResNet has these; a file with none of them is not in the layout at all.
_LANDMARKS = ("conv1.weight", "layer1.0.conv1.weight", "layer4.0.conv1.weight")
_HEADS: dict[frozenset[str], Head] = {
    frozenset({"weight", "bias"}): "linear",
    frozenset({"0.weight", "0.bias", "2.weight", "2.bias"}): "mlp",
}


@dataclass(frozen=True)
class Match:
    """A network, and where in a file its tensors are.

    Attributes:
        layout: of the file.
        arch, stem, head, dim: what `Encoder` is built from.
        weights: state dict of that encoder, fp32.
        left_out: why a head that is there was not taken; None: it was, or there is none.
    """

    layout: Layout
    arch: str
    stem: str
    head: Head
    dim: int
    weights: Tensors
    left_out: str | None


def match(tensors: Tensors, layout: str = "auto", stem: str | None = None) -> Match:
    """Find the ResNet and the layout that the tensors fill.

    Args:
        tensors: of a file, by name.
        layout: name of the only one to consider, or "auto".
        stem: of the network; None: by the shape of its first convolution.

    Raises:
        CheckpointError: no network is filled in full; names what the nearest one lacks.
    """
    layouts = [one for one in LAYOUTS if layout in ("auto", one.name) and _is_in(tensors, one)]
    if not layouts:
        names = ", ".join(list(tensors)[:_SHOWN])
        raise CheckpointError(
            f"its tensors ({names}, ...) are in no layout of a ResNet that is known: "
            f"{', '.join(layout_names())}."
        )
    tries = [
        _Try(tensors, one, arch, stem or _stem(tensors, one)) for arch in ARCHS for one in layouts
    ]
    # fastmoco, solo-learn and lightly name the backbone alike and the head each in its own way.
    nearest = min(tries, key=lambda one: (one.cost, not one.projection))
    if nearest.cost:
        raise CheckpointError(_refusal(nearest))
    return nearest.match()


def _is_in(tensors: Tensors, layout: Layout) -> bool:
    return any(layout.key(name) in tensors for name in _LANDMARKS)


@cache
def _blank(arch: str, stem: str, head: str = "linear", dim: int = 1) -> Encoder:
    """Return a network without values."""
    with torch.device("meta"):
        return Encoder(arch, stem, head, dim)


def _shapes(tensors: Tensors) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _copy(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a copy of its own: a view would take all of its storage along into a checkpoint."""
    return tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _stem(tensors: Tensors, layout: Layout) -> str:
    first = tensors.get(layout.key("conv1.weight"))
    return "small" if first is not None and first.shape[-1] == 3 else "imagenet"


@dataclass(frozen=True)
class _Try:
    """Tensors held against one layout of one network."""

    tensors: Tensors
    layout: Layout
    arch: str
    stem: str

    @cached_property
    def wanted(self) -> Tensors:
        """State dict of the network's backbone, without values."""
        state: Tensors = _blank(self.arch, self.stem).backbone.state_dict()
        return state

    @cached_property
    def faults(self) -> dict[str, str]:
        """Say of each of the network's tensors that the file does not fill why, by their names."""
        found = {self.layout.key(name): like for name, like in self.wanted.items()}
        told = {key: self._fault(key, like) for key, like in found.items()}
        return {key: fault for key, fault in told.items() if fault}

    def _fault(self, key: str, like: torch.Tensor) -> str | None:
        found = self.tensors.get(key)
        if found is None:
            return None if key.endswith(_OPTIONAL) else f"{key} is missing"
        if found.shape != like.shape:
            return f"{key} is {tuple(found.shape)}, wanted {tuple(like.shape)}"
        return None

    @cached_property
    def foreign(self) -> list[str]:
        """Tensors within the backbone that the network lacks: it would compute otherwise."""
        known = {self.layout.key(name) for name in self.wanted}
        heads = (f"{self.layout.prefix}fc.", self.layout.head or f"{self.layout.prefix}fc.")
        within = (name for name in self.tensors if name.startswith(self.layout.prefix))
        return sorted(name for name in within if name not in known and not name.startswith(heads))

    @property
    def cost(self) -> int:
        """How many tensors speak against the network; 0: it is the one."""
        return len(self.faults) + len(self.foreign)

    @property
    def projection(self) -> Tensors:
        """What lies where the layout keeps its head, by the names behind the prefix."""
        prefix = self.layout.head
        names = [name for name in self.tensors if prefix and name.startswith(prefix)]
        return {name.removeprefix(prefix or ""): self.tensors[name] for name in names}

    @property
    def head(self) -> tuple[Head, int, Tensors]:
        """The kind of our heads that the file fills, its `dim`, and its tensors by our names."""
        found = self.projection
        kind = _HEADS.get(frozenset(found))
        if kind is not None:
            dim = len(found["2.bias" if kind == "mlp" else "bias"])
            if _shapes(found) == _shapes(_blank(self.arch, self.stem, kind, dim).head.state_dict()):
                return kind, dim, found
        return "none", _blank(self.arch, self.stem).features, {}

    def match(self) -> Match:
        """Return the network with its weights, once it is known to be whole."""
        kind, dim, head = self.head
        weights = {f"head.{name}": _copy(tensor, torch.float32) for name, tensor in head.items()}
        for name, like in self.wanted.items():
            found = self.tensors.get(self.layout.key(name), torch.tensor(0))
            weights[f"backbone.{name}"] = _copy(found, like.dtype)
        return Match(self.layout, self.arch, self.stem, kind, dim, weights, self._left_out(kind))

    def _left_out(self, kind: Head) -> str | None:
        count = len(self.projection)
        if kind != "none" or not count:
            return None
        under = f"{count} tensors under {self.layout.head}"
        return f"{under} are neither one linear layer nor MoCo v2's two"


def _refusal(nearest: _Try) -> str:
    """Say what keeps the nearest network from being filled."""
    faults, foreign = nearest.faults, nearest.foreign
    network = f"a {nearest.arch} in the layout of {nearest.layout.name}"
    if faults:
        shown = [
            fault + (near(key, foreign).rstrip(".") if fault.endswith("missing") else "")
            for key, fault in list(faults.items())[:_SHOWN]
        ]
        more = "; ..." if len(faults) > _SHOWN else "."
        return f"{len(faults)} tensors keep it from being {network}: {'; '.join(shown)}{more}"
    return (
        f"it is not {network}, which lacks {len(foreign)} of its tensors: "
        f"{', '.join(foreign[:_SHOWN])}{', ...' if len(foreign) > _SHOWN else '.'}"
    )
