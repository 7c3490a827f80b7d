"""The recipe: its schema, the shipped ones, and how one is read with its overrides."""

import copy
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from fastmoco.core.strict_yaml import Strict, near, parse_yaml, validate_as
from fastmoco.errors import UsageError

Unit = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Ratio = Annotated[float, Field(ge=0.01, le=100)]
Sigma = Annotated[float, Field(le=100)]  # beyond it an image is one color
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Triple = tuple[float, float, float]
Stem = Literal["imagenet", "small", "small-stride2"]
Side = Annotated[int, Field(ge=8)]  # of an image, pixels
RECIPES = resources.files("fastmoco.config") / "recipes"


class View(Strict):
    """How one view is drawn from an image. Probabilities in 0..1, jitter as torchvision has it.

    Attributes:
        crop: "random": a resized crop drawn by `scale` and `ratio`; "center": the central square;
            "none": the whole image, squeezed into a square. Without the random crop two views
            differ by little more than their colors, and training learns next to nothing.
        scale: bounds of the crop's share of the image area.
        ratio: bounds of its aspect ratio, drawn log-uniformly.
        jitter: strengths of brightness, contrast, saturation and hue.
        blur_sigma: bounds of the Gaussian's standard deviation, in output pixels.
        solarize: levels from 128 on are inverted, after the blur, as in BYOL and DINO.
    """

    crop: Literal["random", "center", "none"] = "random"
    scale: tuple[Unit, Unit] = (0.2, 1.0)
    ratio: tuple[Ratio, Ratio] = (3 / 4, 4 / 3)
    flip: Unit = 0.5
    jitter: tuple[Unit, Unit, Unit, Annotated[float, Field(ge=0.0, le=0.5)]] = (0, 0, 0, 0)
    jitter_p: Unit = 1.0
    grayscale: Unit = 0.0
    blur: Unit = 0.0
    blur_sigma: tuple[Sigma, Sigma] = (0.1, 2.0)
    solarize: Unit = 0.0

    @model_validator(mode="after")
    def _bounds_ascend(self) -> "View":
        for name in ("scale", "ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} [{low:g}, {high:g}] needs 0 < low <= high")
        return self


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


OPTIMIZER_OPTIONS = {
    "sgd": {"momentum"},
    "lars": {"momentum", "trust"},
    "adam": {"betas"},
    "adamw": {"betas"},
    "adagrad": set(),
    "rmsprop": {"momentum"},
    "apex_sgd": {"momentum"},
    "apex_adam": {"betas"},
    "apex_lamb": {"betas"},
}
"""What each optimizer takes beside its learning rate and weight decay."""


class Optimizer(Strict):
    """The optimizer of the query encoder; those of apex need NVIDIA apex, built from source.

    Attributes:
        lr: learning rate, of a whole step.
        lr_batch: images a step that `lr` is meant for: the rate used is lr * batch / lr_batch
            (Goyal et al. 2017); None: `lr` as it is.
        momentum: of SGD, LARS and RMSprop; None: 0.9.
        betas: of Adam, AdamW and LAMB; None: (0.9, 0.999).
        trust: the coefficient of LARS; None: 0.001.
    """

    name: Literal[
        "sgd",
        "lars",
        "adam",
        "adamw",
        "adagrad",
        "rmsprop",
        "apex_sgd",
        "apex_adam",
        "apex_lamb",
    ] = "sgd"
    lr: Positive
    lr_batch: Count | None = None
    momentum: Unit | None = None
    betas: tuple[Beta, Beta] | None = None
    trust: Positive | None = None
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4

    def options(self) -> dict[str, Any]:
        """Return what the named optimizer takes beside its rate and weight decay."""
        defaults = {"momentum": 0.9, "betas": (0.9, 0.999), "trust": 0.001}
        given = {name: getattr(self, name) for name in sorted(OPTIMIZER_OPTIONS[self.name])}
        return {n: defaults[n] if value is None else value for n, value in given.items()}

    @model_validator(mode="after")
    def _only_its_own(self) -> "Optimizer":
        for option in ("momentum", "betas", "trust"):
            if getattr(self, option) is not None and option not in OPTIMIZER_OPTIONS[self.name]:
                raise ValueError(f"{self.name} has no {option}: leave it out")
        return self


class Schedule(Strict):
    """The learning rate over a number of epochs or steps, whether or not the run stops before.

    Attributes:
        epochs, steps: length: one of the two; `milestones` are counted in the same unit.
        milestones: of the step schedule: from each on, the rate is times `gamma`.
        warmup_epochs, warmup_steps: linear rise from 0, before either schedule: one of the two.
        update: "epoch" sets the rate once an epoch, as the published code does, "step" each step;
            None: in the unit of the length.
        first_epoch: what the first epoch counts as: 0 on ImageNet, 1 in the CIFAR-10 notebook.
    """

    name: Literal["cosine", "step"] = "cosine"
    epochs: Count | None = None
    steps: Count | None = None
    milestones: tuple[int, ...] = ()
    gamma: Positive = 0.1
    warmup_epochs: Annotated[float, Field(ge=0)] = 0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    update: Literal["epoch", "step"] | None = None
    first_epoch: Annotated[int, Field(ge=0, le=1)] = 0

    @model_validator(mode="after")
    def _one_of_each(self) -> "Schedule":
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("name either epochs or steps")
        if self.warmup_epochs and self.warmup_steps:
            raise ValueError("name either warmup_epochs or warmup_steps")
        if (self.epochs and self.warmup_epochs >= self.epochs) or (
            self.steps and self.warmup_steps >= self.steps
        ):
            raise ValueError("the warm-up is as long as the schedule: shorten it")
        if self.name == "cosine" and self.milestones:
            raise ValueError("cosine has no milestones: leave them out, or choose name: step")
        if [0, *self.milestones] != sorted({0, *self.milestones}):
            raise ValueError("the milestones must ascend, from 1 on")
        if self.first_epoch and self.update == "step":
            raise ValueError("first_epoch counts only with update: epoch")
        return self


class Monitor(Strict):
    """kNN accuracy during training: `queries` classified by their neighbors in `bank`.

    Attributes:
        labels: a side table of the bank, see `labelled.labelled_pair`; None: the packed labels.
    """

    bank: Path
    queries: Path
    labels: str | None = None
    feature: Literal["head", "backbone"] = "head"
    k: Count = 200
    t: Positive = 0.1
    every: Count = 1


class Recipe(Strict):
    """One training run.

    Attributes:
        name: shown on the display, in curves and in the report.
        data: shard sets, as one; ids run through them in order.
        subset: which of their samples take part; None: all.
        repeat: times that an epoch shows each sample: short epochs of small sets become long ones.
        window: shards shuffled together, in random order, for storage that cannot seek; None: all.
        out: the run folder.
        monitor: kNN accuracy during training; None: the run needs no labels.
        arch: a ResNet of torchvision, by its name there, or resnet10.
        stem: "imagenet": 7x7, stride 2, max-pool; "small": 3x3, no pool; "small-stride2": 3x3,
            stride 2, no pool.
        head: "linear" (MoCo v1), "mlp" (v2) or "none", of imported backbones.
        dim: of the head's output.
        image_size: side of the views, pixels.
        mean, std: of the channels, in 0..1 units; None: those of the first set's manifest.
        views: of the query and of the key.
        batch: images a step over all ranks.
        bn: "groups": BatchNorm over groups of `bn_group`; "whole": over the whole batch of all
            ranks together, by which query and key betray each other: for ablations.
        bn_group: samples normalized together by BatchNorm, whatever the number of ranks.
        shuffle: who changes places before the keys are made: "global": all samples of the batch;
            "node": those of one machine, which spares the network (the groups then depend on the
            number of machines); "off": none, for ablations.
        exchange: how shuffled images travel: "all_to_all": each to the rank that needs it, the
            fewest bytes; "all_gather": all to all, as published. The result is the same.
        symmetric: each view is query and key in turn; what is minimized is the sum of both
            losses, as published, and what is logged their mean.
        queue: number of negative keys K.
        momentum: m of the key encoder.
        temperature: T of the loss.
        accumulate: parts that a rank's share of a step goes through the network in, to save
            memory; BatchNorm's groups being fixed, the step stays the same.
        clip: largest norm of a step's gradient; None: not clipped.
        stop_epoch: end here, on the schedule of its full length.
        precision: that the network computes in; weights and loss are fp32 (fp64: all of it).
        compile: compile the encoders by torch.compile.
        deterministic: let torch choose deterministic kernels alone; slower on a GPU.
        seed: of initial weights, order, views and shuffle.
        device: "auto": a GPU if there is one.
        executor: who decodes and augments; "torchvision" needs no DALI.
        log_every: in steps.
        checkpoint_every, checkpoint_minutes: between checkpoints, in steps or in minutes of rank
            0's clock: one of the two; neither: 30 minutes.
        keep: checkpoints kept, the newest ones.
        trackers: where the metrics go beside metrics.jsonl; each needs its package.
        stall_s: seconds without a step, or a batch of the monitor, after which the run ends with
            the stacks of its threads.
        max_bad_images: damaged images to go on without, each replaced by the next good one of the
            epoch; 0: the first one ends the run.
        max_skipped: steps in a row with a non-finite gradient before the run stops.
        threads: decoding threads a rank; 0: its share of the cores that this process may keep
            busy (affinity, CPU quota), at most 16.
        prefetch: batches that are made ahead.
        decode: where JPEGs are decoded that DALI draws on a GPU: "cpu", or "mixed", by CPU and
            GPU together; "auto": mixed for JPEGs of the area of 128 x 128 pixels and more.
        hw_decoder_load: with mixed, the share of them for the JPEG engine that an A100, H100 or
            newer GPU has.
    """

    name: str
    data: Annotated[tuple[Path, ...], Field(min_length=1)]
    subset: Subset | None = None
    repeat: Count = 1
    window: Count | None = None
    out: Path
    monitor: Monitor | None = None

    arch: str = "resnet50"
    stem: Stem = "imagenet"
    head: Literal["linear", "mlp", "none"] = "linear"
    dim: Count = 128

    image_size: Side = 224
    mean: Triple | None = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] | None = (0.229, 0.224, 0.225)
    views: Annotated[tuple[View, ...], Field(min_length=2, max_length=2)]

    batch: Count = 256
    bn: Literal["groups", "whole"] = "groups"
    bn_group: Count = 32
    shuffle: Literal["global", "node", "off"] = "global"
    exchange: Literal["all_to_all", "all_gather"] = "all_to_all"
    symmetric: bool = False
    queue: Count = 65536
    momentum: Unit = 0.999
    temperature: Positive = 0.07
    optimizer: Optimizer
    accumulate: Count = 1
    clip: Positive | None = None
    schedule: Schedule
    stop_epoch: Count | None = None

    precision: Literal["bf16", "fp16", "fp32", "fp64"] = "bf16"
    compile: bool = False
    deterministic: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    executor: Literal["dali", "torchvision"] = "dali"
    threads: Annotated[int, Field(ge=0)] = 0
    prefetch: Count = 3
    decode: Literal["auto", "cpu", "mixed"] = "auto"
    hw_decoder_load: Unit = 0.65

    log_every: Count = 50
    checkpoint_every: Count | None = None
    checkpoint_minutes: Positive | None = None
    keep: Annotated[int, Field(ge=2)] = 2
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    stall_s: Positive = 1800
    max_bad_images: Annotated[int, Field(ge=0)] = 0
    max_skipped: Count = 20

    @field_validator("data", mode="before")
    @classmethod
    def _one_set(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _by_the_clock(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("checkpoint_every") is None:
            return {"checkpoint_minutes": 30.0, **values}
        return values

    @model_validator(mode="after")
    def _one_interval(self) -> "Recipe":
        if (self.checkpoint_every is None) == (self.checkpoint_minutes is None):
            raise ValueError("name either checkpoint_every or checkpoint_minutes, the other null")
        return self

    @model_validator(mode="after")
    def _fits(self) -> "Recipe":
        if self.bn == "whole":
            if self.accumulate > 1:
                raise ValueError("bn: whole cannot go in parts: set accumulate=1, or bn=groups")
            return self
        if self.batch % self.bn_group:
            raise ValueError(
                f"batch {self.batch} is not a whole number of bn_group {self.bn_group}: "
                "choose a bn_group that divides it"
            )
        if self.bn_group == 1:
            raise ValueError("bn_group 1 leaves BatchNorm nothing to average: choose 2 or more")
        if self.batch == self.bn_group:
            raise ValueError(
                f"one group of {self.batch} is the whole batch: shuffling cannot hide which query "
                "goes with which key, and the network cheats. Choose a smaller bn_group, or ask "
                "for it by bn: whole"
            )
        return self

    @property
    def lr(self) -> float:
        """The learning rate at the height of the schedule, scaled to the batch."""
        return self.optimizer.lr * self.batch / (self.optimizer.lr_batch or self.batch)

    @property
    def keys_per_step(self) -> int:
        """How many keys a step adds to the queue, and queries it has."""
        return self.batch * (1 + self.symmetric)

    def last_step(self, steps_per_epoch: int) -> int:
        """Return the number of steps of the whole run."""
        whole = self.schedule.steps or (self.schedule.epochs or 0) * steps_per_epoch
        return min(whole, (self.stop_epoch or whole) * steps_per_epoch)


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


def _recipe_text(name_or_path: str) -> bytes:
    shipped, path = RECIPES / f"{name_or_path}.yaml", Path(name_or_path)
    if path.suffix in {".yaml", ".yml"}:
        if not path.is_file():
            raise UsageError(f"There is no recipe file {path}.")
        return path.read_bytes()
    if not shipped.is_file():
        hint = near(name_or_path, recipe_names())
        raise UsageError(
            f"There is no recipe {name_or_path!r}{hint} Shipped: {', '.join(recipe_names())}; "
            "your own needs a path that ends in .yaml."
        )
    return shipped.read_bytes()


def _apply(values: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals:
        raise UsageError(f"{override!r} is not key=value, such as optimizer.lr=0.03.")
    *parents, last = dotted.split(".")
    holder: Any = values
    for parent in parents:
        holder = _child(holder, parent, dotted)
    value = parse_yaml(text, dotted)
    if isinstance(holder, list):
        holder[_place(holder, last, dotted)] = value
    elif isinstance(holder, dict):
        holder[last] = value
    else:
        raise _no_key(dotted)


def _child(holder: Any, key: str, dotted: str) -> Any:
    if isinstance(holder, list):
        place = _place(holder, key, dotted)
        # YAML anchors share one mapping between views: an override must change one of them only.
        holder[place] = copy.copy(holder[place])
        return holder[place]
    if isinstance(holder, dict):
        holder[key] = {} if holder.get(key) is None else copy.copy(holder[key])
        return holder[key]
    raise _no_key(dotted)


def _place(holder: list[Any], key: str, dotted: str) -> int:
    """Return the place in a list that a part of a key names."""
    if key not in map(str, range(len(holder))):
        raise _no_key(dotted)
    return int(key)


def _no_key(dotted: str) -> UsageError:
    return UsageError(f"{dotted} does not name a key of the recipe.")


def validate(values: Any, origin: str) -> Recipe:
    """Build a recipe from parsed YAML; see `strict.validate_as`."""
    return validate_as(Recipe, values, origin)


def to_yaml(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML that `load_recipe` reads back to an equal one."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
