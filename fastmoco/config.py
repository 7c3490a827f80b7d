"""Strict YAML and the recipe's schema: an unknown key, wrong type or doubled key is an error."""

import difflib
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fastmoco.errors import UsageError

Unit = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
Triple = tuple[float, float, float]
Model = TypeVar("Model", bound="Strict")
RECIPES = resources.files("fastmoco") / "recipes"


class Strict(BaseModel):
    """A schema for YAML: unknown keys, infinite numbers and booleans for numbers are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_bool_for_number(cls, value: Any) -> Any:
        """YAML reads `on` and `no` as booleans, and Python takes True for 1: refuse both."""
        for key, item in value.items() if isinstance(value, Mapping) else ():
            field = cls.model_fields.get(key)
            if isinstance(item, bool) and field is not None and field.annotation is not bool:
                raise ValueError(f"{key} must not be a boolean")
        return value


class View(Strict):
    """How one view is drawn from an image. Probabilities in 0..1, jitter as torchvision has it.

    Attributes:
        crop: "random": a resized crop drawn by `scale` and `ratio`; "center": the central square;
            "none": the whole image, squeezed into a square. Without the random crop two views
            differ by little more than their colours, and training learns next to nothing.
        scale: bounds of the crop's share of the image area.
        ratio: bounds of its aspect ratio, drawn log-uniformly.
        jitter: strengths of brightness, contrast, saturation and hue.
        blur_sigma: bounds of the Gaussian's standard deviation, in output pixels.
        solarize: levels from 128 on are inverted, after the blur, as in BYOL and DINO.
    """

    crop: Literal["random", "center", "none"] = "random"
    scale: tuple[Unit, Unit] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: Unit = 0.5
    jitter: tuple[Unit, Unit, Unit, Annotated[float, Field(ge=0.0, le=0.5)]] = (0, 0, 0, 0)
    jitter_p: Unit = 1.0
    grayscale: Unit = 0.0
    blur: Unit = 0.0
    blur_sigma: tuple[Annotated[float, Field(gt=0)], float] = (0.1, 2.0)
    solarize: Unit = 0.0


class Subset(Strict):
    """Which samples of the data take part: those of a list, or a share of every class.

    Attributes:
        ids: a text of one sample id a line, or a `.npy` of integers.
        fraction: of every class, as in the 1 % and 10 % protocols; at least one sample of each.
        labels: side table of the data that tells the classes; None: the packed labels.
        seed: of the choice; the share of a smaller fraction is part of that of a larger one.
    """

    ids: Path | None = None
    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    labels: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @model_validator(mode="after")
    def _one_of_two(self) -> "Subset":
        if (self.ids is None) == (self.fraction is None):
            raise ValueError("name either ids or fraction")
        return self


class Optimizer(Strict):
    """The optimizer of the query encoder."""

    name: Literal["sgd"] = "sgd"
    lr: Annotated[float, Field(gt=0)]
    momentum: Unit = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4


class Schedule(Strict):
    """The learning rate over `epochs`, whether or not the run stops before.

    Attributes:
        update: "epoch" sets the rate once an epoch, as the published code does, "step" each step.
        first_epoch: what the first epoch counts as: 0 on ImageNet, 1 in the CIFAR-10 notebook.
        warmup_epochs: linear rise from 0, before either schedule.
    """

    name: Literal["cosine", "step"] = "cosine"
    epochs: Count
    milestones: tuple[int, ...] = ()
    gamma: Annotated[float, Field(gt=0)] = 0.1
    warmup_epochs: Annotated[float, Field(ge=0)] = 0
    update: Literal["epoch", "step"] = "epoch"
    first_epoch: Literal[0, 1] = 0


class Monitor(Strict):
    """kNN accuracy during training: `queries` classified by their neighbours in `bank`.

    Attributes:
        labels: a side table of the bank, see `shardset.labelled_pair`; None: the packed labels.
    """

    bank: Path
    queries: Path
    labels: str | None = None
    feature: Literal["head", "backbone"] = "head"
    k: Count = 200
    t: Annotated[float, Field(gt=0)] = 0.1
    every: Count = 1


class Recipe(Strict):
    """One training run.

    Attributes:
        data: shard sets, as one; ids run through them in order.
        subset: which of their samples take part; None: all.
        repeat: times that an epoch shows each sample: short epochs of small sets become long ones.
        window: shards shuffled together, in random order, for storage that cannot seek; None: all.
        mean, std: of the channels, in 0..1 units; None: those of the first set's manifest.
        batch: images a step over all ranks.
        bn_group: samples normalised together by BatchNorm, whatever the number of ranks.
        queue: number of negative keys K.
        momentum: m of the key encoder.
        temperature: T of the loss.
        stop_epoch: end here, on the schedule of `schedule.epochs`.
        log_every, checkpoint_every: in steps.
        keep: checkpoints kept, the newest ones.
        max_bad_images: damaged images to go on without, each replaced by the next good one of the
            epoch; 0: the first one ends the run.
        max_skipped: steps in a row with a non-finite gradient before the run stops.
        threads: decoding threads a rank; 0: cores / ranks of this machine.
    """

    name: str
    data: Annotated[tuple[Path, ...], Field(min_length=1)]
    subset: Subset | None = None
    repeat: Count = 1
    window: Count | None = None
    out: Path
    monitor: Monitor | None = None

    arch: str = "resnet50"
    stem: Literal["imagenet", "small", "small-stride2"] = "imagenet"
    head: Literal["linear", "mlp", "none"] = "linear"
    dim: Count = 128

    image_size: Annotated[int, Field(ge=8)] = 224
    mean: Triple | None = (0.485, 0.456, 0.406)
    std: Triple | None = (0.229, 0.224, 0.225)
    views: Annotated[tuple[View, ...], Field(min_length=2, max_length=2)]

    batch: Count = 256
    bn_group: Count = 32
    queue: Count = 65536
    momentum: Unit = 0.999
    temperature: Annotated[float, Field(gt=0)] = 0.07
    optimizer: Optimizer
    schedule: Schedule
    stop_epoch: Count | None = None

    precision: Literal["bf16", "fp32", "fp64"] = "bf16"
    deterministic: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    executor: Literal["dali", "torchvision"] = "dali"
    threads: Annotated[int, Field(ge=0)] = 0
    prefetch: Count = 2

    log_every: Count = 50
    checkpoint_every: Count = 500
    keep: Annotated[int, Field(ge=2)] = 2
    max_bad_images: Annotated[int, Field(ge=0)] = 0
    max_skipped: Count = 20

    @model_validator(mode="after")
    def _fits(self) -> "Recipe":
        if self.batch % self.bn_group:
            raise ValueError(
                f"batch {self.batch} is not a whole number of bn_group {self.bn_group}: "
                "choose a bn_group that divides it"
            )
        if self.batch == 1 or self.bn_group == 1:
            raise ValueError("bn_group 1 leaves BatchNorm nothing to average: choose 2 or more")
        return self

    @property
    def last_epoch(self) -> int:
        """The epoch after which the run ends, counted from 1."""
        return min(self.stop_epoch or self.schedule.epochs, self.schedule.epochs)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-4` as a number and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise UsageError(f"The key {key!r} stands twice (line {line}): keep one.")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, origin: str) -> Any:
    """Parse YAML strictly.

    Raises:
        UsageError: it is not YAML, holds a tag, or gives a key twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader subclass: builds no objects
    except yaml.YAMLError as error:
        raise UsageError(f"{origin} is not plain YAML: {' '.join(str(error).split())}") from error


def recipe_names() -> list[str]:
    """Return the names of the recipes that ship with the package."""
    return sorted(p.name.removesuffix(".yaml") for p in RECIPES.iterdir() if p.name[-5:] == ".yaml")


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe by its name or path, with `key=value` overrides (dots reach into it).

    Raises:
        UsageError: no such recipe, an unknown key, a value that does not fit.
    """
    text = _recipe_text(name_or_path)
    values = parse_yaml(text, name_or_path)
    if not isinstance(values, dict):
        raise UsageError(f"{name_or_path} holds no `key: value` lines.")
    for override in overrides:
        _apply(values, override)
    return validate(values, name_or_path)


def _recipe_text(name_or_path: str) -> str:
    shipped, path = RECIPES / f"{name_or_path}.yaml", Path(name_or_path)
    if path.suffix in {".yaml", ".yml"}:
        if not path.is_file():
            raise UsageError(f"There is no recipe file {path}.")
        return path.read_text()
    if not shipped.is_file():
        hint = near(name_or_path, recipe_names())
        raise UsageError(
            f"There is no recipe {name_or_path!r}{hint} Shipped: {', '.join(recipe_names())}; "
            "your own needs a path that ends in .yaml."
        )
    return shipped.read_text()


def _apply(values: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals:
        raise UsageError(f"{override!r} is not key=value, such as optimizer.lr=0.03.")
    *parents, last = dotted.split(".")
    holder: Any = values
    for parent in parents:
        holder = _child(holder, parent, dotted)
    value = parse_yaml(text, dotted)
    if isinstance(holder, list) and last.isdigit() and int(last) < len(holder):
        holder[int(last)] = value
    elif isinstance(holder, dict):
        holder[last] = value
    else:
        raise UsageError(f"{dotted} does not name a key of the recipe.")


def _child(holder: Any, key: str, dotted: str) -> Any:
    if isinstance(holder, list) and key.isdigit() and int(key) < len(holder):
        # YAML anchors share one mapping between views: an override must change one of them only.
        holder[int(key)] = dict(holder[int(key)])
        return holder[int(key)]
    if isinstance(holder, dict):
        if holder.get(key) is None:
            holder[key] = {}
        return holder[key]
    raise UsageError(f"{dotted} does not name a key of the recipe.")


def validate(values: Any, origin: str) -> Recipe:
    """Build a recipe from parsed YAML; every fault becomes one plain line.

    Raises:
        UsageError: listing each fault with its key and, for an unknown key, the nearest known.
    """
    return validate_as(Recipe, values, origin)


def validate_as(model: type[Model], values: Any, origin: str) -> Model:
    """Build any schema from parsed YAML; see `validate`."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [_fault(dict(fault), model) for fault in error.errors()]
        raise UsageError(f"{origin}: " + "; ".join(lines)) from error


def _fault(fault: dict[str, Any], model: type[Strict]) -> str:
    where = [str(part) for part in fault["loc"]]
    dotted = ".".join(where)
    if fault["type"] == "extra_forbidden":
        return f"unknown key {dotted!r}{near(where[-1], _keys_at(where[:-1], model))}"
    if fault["type"] == "missing":
        return f"the key {dotted!r} is missing"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{dotted}: {message}" if dotted else message


def _keys_at(where: Sequence[str], model: type[BaseModel]) -> list[str]:
    for part in where:
        # The number of a list's item and the key of a mapping are no fields: they lead nowhere.
        field = model.model_fields.get(part)
        model = (_models_in(field.annotation) if field else [model])[0]
    return list(model.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if get_origin(annotation) is None:
        is_model = isinstance(annotation, type) and issubclass(annotation, BaseModel)
        return [annotation] if is_model else []
    return [model for part in get_args(annotation) for model in _models_in(part)]


def near(word: str, known: Sequence[str]) -> str:
    """Return the suggestion that ends a sentence about an unknown word."""
    close = difflib.get_close_matches(word, known, n=1)
    return f": did you mean {close[0]!r}?" if close else "."


def to_yaml(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML that `load_recipe` reads back to an equal one."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
