"""Which network a file's tensors are: the one that they fill to the last tensor, or none.

What stands before the names (`state_dict.`, `module.encoder_q.`, `teacher.backbone.`, ...) is found
in the file: everything before the name of a tensor that each ResNet has. Where several networks
fit, the words before them tell the one that was trained from its moving average, or nobody does,
and the user is asked.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import takewhile

import torch

from fastmoco.config.encoder import TIMM, EncoderSpec, Head, Stem
from fastmoco.core.strict_yaml import near
from fastmoco.errors import CheckpointError
from fastmoco.interop.key_maps import NAMINGS, Naming, renamed
from fastmoco.interop.read_checkpoint import copied, unfit, without_wrappers
from fastmoco.models.encoder import Encoder

Tensors = dict[str, torch.Tensor]

# BatchNorm never reads its count of batches under a fixed momentum; files before 2018 have none.
_OPTIONAL = "num_batches_tracked"
_SHOWN = 3
_MOST_PLACES = 64  # in a file that a person made
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
_HEADS: dict[frozenset[str], Head] = {
    frozenset({"weight", "bias"}): "linear",
    frozenset({"0.weight", "0.bias", "2.weight", "2.bias"}): "mlp",
}
# Words in the names of modules.
_TRAINED = frozenset({"q", "query", "student", "online"})
_AVERAGED = frozenset({"k", "key", "momentum", "ema", "teacher", "target", "averaged", "shadow"})
_CONTRASTED = frozenset({"q", "query", "k", "key"})
_PROJECTIONS = frozenset({"head", "projection", "projector", "proj", "mlp", "neck"})


@dataclass(frozen=True)
class Match:
    """A network, and where in a file its tensors are.

    Attributes:
        prefix: before the names of its backbone.
        naming: of them.
        arch, stem, channels, head, dim: what `Encoder` is built from.
        weights: state dict of that encoder, fp32, finite.
        notes: what else there was, in words.
    """

    prefix: str
    naming: Naming
    arch: str
    stem: Stem
    channels: int
    head: Head
    dim: int
    weights: Tensors
    notes: tuple[str, ...]


def match(
    tensors: Tensors, prefix: str | None = None, stem: Stem | None = None, arch: str | None = None
) -> Match:
    """Find the network that the tensors fill.

    Args:
        tensors: of a file, by dotted names.
        prefix: before the names of its backbone; None: found.
        stem: of the network; None: by the shape of its first convolution, or timm's own.
        arch: of the network; None: a ResNet of torchvision, found.

    Raises:
        UsageError: there is no such network.
        CheckpointError: no network is filled in full (names what the nearest one lacks), several
            are and nothing tells which is meant, or a value is not finite.
    """
    namings: Sequence[Naming] = NAMINGS
    archs = (arch,) if arch else ARCHS
    if arch and arch.startswith(TIMM):
        stem = stem or "imagenet"  # many of its networks begin with 3x3
        namings = (_timm_naming(arch, stem),)
    places = _places(tensors, prefix, namings, arch or "ResNet")
    tries = [_nearest(tensors, *place, archs, stem) for place in places]
    fits = [one for one in tries if not one.cost]
    # A moving average is not taken for a network that was trained and does not fit.
    nearest = min(tries, key=lambda one: (_role(one.prefix), one.cost))
    if nearest.cost:
        other = f" {_listed(one.prefix for one in fits)} fits: --prefix takes it." if fits else ""
        raise CheckpointError(nearest.refusal() + other)
    chosen, others = _chosen(fits)
    return chosen.match(others)


def _nearest(
    tensors: Tensors,
    prefix: str,
    namings: Sequence[Naming],
    archs: Sequence[str],
    stem: Stem | None,
) -> "Candidate":
    tries = (Candidate(tensors, naming, prefix, arch, stem) for naming in namings for arch in archs)
    return min(tries, key=lambda one: one.cost)


@cache
def _timm_naming(arch: str, stem: Stem) -> Naming:
    spec = EncoderSpec(arch=arch, stem=stem)
    convolutions = [name for name, tensor in _state(spec).items() if tensor.dim() == 4]
    classifier = _blank(spec).backbone.pretrained_cfg["classifier"]
    return Naming("timm", head=f"{classifier}.", landmarks=(convolutions[0], convolutions[-1]))


def _places(
    tensors: Tensors, asked: str | None, namings: Sequence[Naming], what: str
) -> list[tuple[str, list[Naming]]]:
    """Return the prefixes that networks may be behind, and by whose names."""
    found: dict[str, list[Naming]] = {}
    for naming in namings:
        for ending in naming.endings:
            for name in tensors:
                if name == ending or name.endswith(f".{ending}"):
                    known = found.setdefault(name.removesuffix(ending), [])
                    known += [naming] if naming not in known else []
    places = [(p, n) for p, n in found.items() if asked is None or _is_named(p, asked)]
    if not places:
        names = ", ".join(list(tensors)[:_SHOWN])
        behind = f" behind {asked!r}" if asked is not None else ""
        others = f"; there are some behind {_listed(found)}." if found else "."
        raise CheckpointError(f"its tensors ({names}, ...) are those of no {what}{behind}{others}")
    if len(places) > _MOST_PLACES:
        raise CheckpointError(f"it holds parts of {len(places)} networks: name one by --prefix.")
    return places


def _is_named(prefix: str, asked: str) -> bool:
    """Return whether a user's words name a prefix, with or without the containers before it."""
    whole, end = prefix.rstrip("."), without_wrappers(asked).rstrip(".")
    return whole == end or bool(end and whole.endswith(f".{end}"))


def _chosen(fits: Sequence["Candidate"]) -> tuple["Candidate", list[str]]:
    """Return the network that is meant, and the prefixes of those with other weights."""
    ordered = sorted(fits, key=lambda one: _role(one.prefix))
    distinct: list[Candidate] = []
    for one in ordered:
        if not any(one.equals(other) for other in distinct):
            distinct.append(one)
    first, *others = distinct
    alike = [one for one in distinct if _role(one.prefix) == _role(first.prefix)]
    if len(alike) > 1:
        raise CheckpointError(
            f"it holds {len(alike)} networks, and nothing tells which is meant: choose by "
            + " or ".join(f"--prefix {_shown(one.prefix)}" for one in alike)
        )
    return first, [one.prefix for one in others]


def _role(prefix: str) -> int:
    """Return 0 for the network that was trained, 2 for its moving average, 1 where no word tells.

    Of nested modules the innermost that has such a word counts.
    """
    for part in reversed(prefix.split(".")):
        words = _words(part)
        if words & _TRAINED | words & _AVERAGED:
            return 0 if words & _TRAINED else 2
    return 1


def _part(name: str, prefix: str) -> str:
    """Return what module behind a prefix a tensor lies in."""
    return name[len(prefix) :].split(".")[0]


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z]+", name.lower()))


def _shown(prefix: str) -> str:
    return prefix.removesuffix(".") or '""'


def _listed(prefixes: Iterable[str]) -> str:
    return ", ".join(_shown(prefix) for prefix in sorted(prefixes)[:_SHOWN])


@cache
def _blank(spec: EncoderSpec) -> Encoder:
    """Return a network without values."""
    with torch.device("meta"):
        return Encoder(spec).to("meta")


@cache
def _state(spec: EncoderSpec) -> Tensors:
    """Return the state dict of a network's backbone, without values."""
    state: Tensors = _blank(spec).backbone.state_dict()
    return state


@cache
def _names(spec: EncoderSpec, naming: Naming) -> dict[str, str]:
    """Return the names of a network's backbone: theirs by ours."""
    return {name: renamed(name, naming.table) for name in _state(spec)}


def _shapes(tensors: Tensors) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Candidate:
    """Tensors held against one network at one place."""

    tensors: Tensors
    naming: Naming
    prefix: str
    arch: str
    asked_stem: Stem | None

    @cached_property
    def spec(self) -> EncoderSpec:
        """The network, its stem and channels by the first convolution unless the stem is asked."""
        name = self.naming.landmarks[0] if self.arch.startswith(TIMM) else "conv1.weight"
        first = self.tensors.get(self.prefix + renamed(name, self.naming.table))
        shape = () if first is None else tuple(first.shape)
        stem = self.asked_stem or ("small" if shape[-1:] == (3,) else "imagenet")
        channels = 1 if shape[1:2] == (1,) else 3
        return EncoderSpec(arch=self.arch, stem=stem, channels=channels)

    @cached_property
    def keys(self) -> dict[str, str]:
        """Names in the file by those of our backbone."""
        names = _names(self.spec, self.naming)
        return {ours: self.prefix + theirs for ours, theirs in names.items()}

    @cached_property
    def faults(self) -> dict[str, str]:
        """Say of each of the network's tensors that the file does not fill why, by their names."""
        wanted = _state(self.spec)
        told = {key: self._fault(key, wanted[ours]) for ours, key in self.keys.items()}
        return {key: fault for key, fault in told.items() if fault}

    def _fault(self, key: str, like: torch.Tensor) -> str | None:
        found = self.tensors.get(key)
        if found is None:
            return None if key.endswith(_OPTIONAL) else f"{key} is missing"
        if found.shape != like.shape:
            return f"{key} is {tuple(found.shape)}, wanted {tuple(like.shape)}"
        return f"{key} {odd}" if (odd := unfit(found, like.is_floating_point())) else None

    @cached_property
    def foreign(self) -> list[str]:
        """Tensors within the backbone that the network lacks: it would compute otherwise.

        Those are what lies in its own modules, and convolutions beside them. All else that lies
        beside (heads, prototypes, a queue) comes after it.
        """
        known, own = set(self.keys.values()), self._modules
        classifier = tuple([self.prefix + self.naming.head] if self.naming.head else [])
        names = [n for n in self._within(self.prefix) if n not in known]
        parts = {n: _part(n, self.prefix) for n in names if not n.startswith(classifier)}
        endings = tuple(f".{ending}" for one in (*NAMINGS, self.naming) for ending in one.endings)
        aside = {part for name, part in parts.items() if name.endswith(endings)}  # other networks
        return sorted(
            name
            for name, part in parts.items()
            if part in own or (self.tensors[name].dim() == 4 and part not in aside)
        )

    @property
    def _modules(self) -> set[str]:
        return {_part(key, self.prefix) for key in self.keys.values()}

    def _within(self, prefix: str) -> list[str]:
        return [name for name in self.tensors if name.startswith(prefix)]

    @cached_property
    def cost(self) -> int:
        """How many tensors speak against the network; 0: it is the one."""
        return len(self.faults) + len(self.foreign)

    def equals(self, other: "Candidate") -> bool:
        """Return whether both, which fit, have the same weights."""
        if self.spec != other.spec:
            return False
        names = (name for name in self.keys if not name.endswith(_OPTIONAL))
        pairs = ((self.tensors[self.keys[n]], other.tensors[other.keys[n]]) for n in names)
        return all(a is b or (a.dtype == b.dtype and torch.equal(a, b)) for a, b in pairs)

    def match(self, others: Sequence[str]) -> Match:
        """Return the network with its weights, once it is known to be whole.

        Args:
            others: prefixes of networks that were not taken.
        """
        kind, dim, head, note = self._head()
        weights = {f"head.{name}": copied(key, self.tensors[key]) for name, key in head.items()}
        for name, like in _state(self.spec).items():
            key = self.keys[name]
            weights[f"backbone.{name}"] = copied(
                key, self.tensors.get(key, torch.tensor(0)), like.dtype
            )
        taken = (
            f"Taken was {_shown(self.prefix)}; behind {_listed(others)} there are other weights "
            "(--prefix takes them)."
        )
        notes = (*([taken] if others else []), *([note] if note else []))
        built = self.arch, self.spec.stem, self.spec.channels, kind, dim
        return Match(self.prefix, self.naming, *built, weights, notes)

    def _head(self) -> tuple[Head, int, dict[str, str], str]:
        """Return the kind of our heads that the file fills, `dim`, its names by ours, and a note.

        A linear layer in the place of the classifier is one, unless the network is MoCo's query or
        key encoder.
        """
        left = []
        for prefix in self._head_places():
            names = {name.removeprefix(prefix): name for name in self._within(prefix)}
            kind = _HEADS.get(frozenset(names), "none")
            dim = self._dim(kind, names)
            classifier = prefix == f"{self.prefix}{self.naming.head}" and kind == "linear"
            if dim and not (classifier and not _words(self.prefix) & _CONTRASTED):
                return kind, dim, names, ""
            what = "a classifier" if classifier else "neither one linear layer nor MoCo v2's two"
            left.append(f"{len(names)} tensors under {prefix} are {what}")
        note = f"The head was left out: {', '.join(left)}." if left else "No head was taken."
        features = _blank(self.spec).features
        return "none", features, {}, f"{note} Head features are the backbone's."

    def _dim(self, kind: Head, names: dict[str, str]) -> int:
        """Return the width of a head's output; 0: its tensors are not those of ours."""
        found = {name: self.tensors[key] for name, key in names.items()}
        last = found.get("2.bias" if kind == "mlp" else "bias")
        if kind == "none" or last is None or not last.numel():
            return 0
        if any(unfit(tensor, floating=True) for tensor in found.values()):
            return 0
        sized = self.spec.model_copy(update={"head": kind, "dim": last.numel()})
        ours = _blank(sized).head.state_dict()
        return last.numel() if _shapes(found) == _shapes(ours) else 0

    def _head_places(self) -> list[str]:
        """Return where heads lie: in place of the classifier, or in modules that are called so."""
        places = [f"{self.prefix}{self.naming.head}"] if self.naming.head else []
        parent = ".".join(self.prefix.split(".")[:-2])
        for above in dict.fromkeys((self.prefix, f"{parent}." if parent else "")):
            beside: dict[str, list[str]] = {}
            for name in self._within(above):
                beside.setdefault(_part(name, above), []).append(name)
            for part, names in beside.items():
                columns = zip(*(name.split(".") for name in names), strict=False)
                common = takewhile(lambda column: len(set(column)) == 1, columns)
                place = ".".join([*(column[0] for column in common), ""])
                called = _words(place[len(above) :]) & _PROJECTIONS
                if called and part not in self._modules and len(names) > 1:
                    places.append(place)
        # A projection of the moving average may lie beside that of the network.
        places.sort(key=lambda place: _role(place) != _role(self.prefix))
        return [place for place in places if self._within(place)]

    def refusal(self) -> str:
        """Say what keeps the network from being filled."""
        faults, foreign = self.faults, self.foreign
        network = f"a {self.arch} by the names of {self.naming.name}"
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
