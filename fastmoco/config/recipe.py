"""The recipe of a training run: one section for each station that reads it."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fastmoco.config.data import Data
from fastmoco.config.encoder import EncoderSpec
from fastmoco.config.monitor import Checkpoints, Monitor
from fastmoco.config.objectives import Moco, Objective
from fastmoco.core.strict_yaml import Beta, Count, Positive, Strict, Unit

Ratio = Annotated[float, Field(ge=0.01, le=100)]
Sigma = Annotated[float, Field(le=100)]  # beyond it an image is one color


class View(Strict):
    """How one view is drawn from an image. Probabilities in 0..1, jitter as torchvision has it.

    Attributes:
        crop: "random": a resized crop drawn by `scale` and `ratio`; "center": the central square;
            "none": the whole image, squeezed into a square. Without the random crop two views
            differ by little more than their colors, and training learns next to nothing.
        scale: bounds of the crop's share of the image area.
        ratio: bounds of its aspect ratio, drawn log-uniformly.
        flip: probability of a horizontal flip.
        jitter: strengths of brightness, contrast, saturation and hue.
        jitter_p: probability that the jitter applies.
        grayscale, blur: probability of each.
        blur_sigma: bounds of the Gaussian's standard deviation, in output pixels.
        solarize: probability that levels from 128 on are inverted, after the blur, as in BYOL and
            DINO.
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
        name: see the docs on training; the defaults of the options are its own.
        lr: learning rate, of a whole step.
        lr_batch: images a step that `lr` is meant for: the rate used is lr * batch / lr_batch
            (Goyal et al. 2017); None: `lr` as it is.
        momentum: of SGD, LARS and RMSprop; None: 0.9.
        betas: of Adam, AdamW and LAMB; None: (0.9, 0.999).
        trust: the coefficient of LARS; None: 0.001.
        weight_decay: of all weights.
        clip: largest norm of a step's gradient; None: not clipped.
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
    clip: Positive | None = None

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
        name: of the curve of the rate.
        epochs, steps: length: one of the two; `milestones` are counted in the same unit.
        milestones: of the step schedule: from each on, the rate is times `gamma`.
        gamma: see there.
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


class Runtime(Strict):
    """How the same run is computed; nothing here changes what it computes, but for rounding.

    Attributes:
        precision: that the network computes in; weights and loss are fp32 (fp64: all of it);
            "auto": bf16 where the device has instructions for it, else fp16 on a GPU and fp32 on
            a CPU. A run notes which.
        compile: compile the encoders by torch.compile; "auto": on a GPU, where Triton finds a C
            compiler, unless the run is deterministic or BatchNorm spans ranks.
        deterministic: let torch choose deterministic kernels alone; slower on a GPU.
        accumulate: parts that a rank's share of a step goes through the network in, to save
            memory; BatchNorm's groups being fixed, the step stays the same.
        device: "auto": a GPU if there is one.
        executor: who decodes and augments: "dali", or "fused", a compiled pass of our own on the
            CPU, whose hue is that of torchvision; "auto": fused on a CPU, dali on a GPU.
        threads: decoding threads per rank; 0: its share of the cores that this process may keep
            busy (affinity, CPU quota), at most 16.
        prefetch: batches that are made ahead.
        decode: where JPEGs are decoded that DALI draws on a GPU: "cpu", or "mixed", by CPU and
            GPU together; "auto": mixed for JPEGs of the area of 128 x 128 pixels and more.
        hw_decoder_load: with mixed, the share of them for the JPEG engine that an A100, H100 or
            newer GPU has.
        pixels: with the fused executor: "cached": each set is decoded once, into a file beside its
            shards that is mapped into memory; "decoded": images are decoded as they come; "auto":
            cached for sets of one size of at most 128 x 128 pixels that fit into half of the free
            disk. What is drawn is the same.
        cache: folder for such files where the set's own cannot be written to.
        log_every: in steps.
        trackers: where the metrics go beside metrics.jsonl; each needs its package.
        stall_s: seconds without a step, or a batch of the monitor, after which the run ends with
            the stacks of its threads.
        max_skipped: steps in a row with a non-finite gradient before the run stops.
    """

    precision: Literal["auto", "bf16", "fp16", "fp32", "fp64"] = "auto"
    compile: Literal["auto"] | bool = "auto"
    deterministic: bool = False
    accumulate: Count = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    executor: Literal["auto", "dali", "fused"] = "auto"
    threads: Annotated[int, Field(ge=0)] = 0
    prefetch: Count = 3
    decode: Literal["auto", "cpu", "mixed"] = "auto"
    hw_decoder_load: Unit = 0.65
    pixels: Literal["auto", "cached", "decoded"] = "auto"
    cache: Path | None = None
    log_every: Count = 50
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    stall_s: Positive = 1800
    max_skipped: Count = 20


class Recipe(Strict):
    """One training run.

    Attributes:
        name: shown on the console, in curves and in the report.
        out: the run folder.
        seed: of initial weights, order, views and shuffle.
        batch: images a step over all ranks.
        stop_epoch: end here, on the schedule of its full length.
        init: weights to start from: a run folder, a checkpoint's folder, or a file that
            `fastmoco import` reads; None: random ones. It counts at step 0 alone.
        views: of the query and of the key; of a memory bank, the query's alone.
        objective: what is minimized: one of the sections below, by its `name`.
        monitor: what is measured during training; `{}`: without labels. None: nothing.
    """

    name: str
    out: Path
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    batch: Count = 256
    stop_epoch: Count | None = None
    init: Path | None = None

    data: Data
    views: Annotated[tuple[View, ...], Field(min_length=1, max_length=2)]
    encoder: EncoderSpec = EncoderSpec()
    objective: Objective = Moco()
    optimizer: Optimizer
    schedule: Schedule
    runtime: Runtime = Runtime()
    monitor: Monitor | None = None
    checkpoints: Checkpoints = Checkpoints(minutes=30.0)

    @model_validator(mode="after")
    def _best_is_measured(self) -> "Recipe":
        if self.checkpoints.best and self.monitor is None:
            raise ValueError("checkpoints.best needs a monitor: monitor={} needs no labels")
        if self.checkpoints.best == "knn_top1" and not (self.monitor and self.monitor.validation):
            raise ValueError(
                "checkpoints.best: knn_top1 needs labels that are not the test: set "
                "monitor.validation=0.1, a tenth of the bank"
            )
        return self

    @model_validator(mode="after")
    def _gray_has_no_colors(self) -> "Recipe":
        if self.encoder.channels == 3:
            return self
        if self.runtime.executor == "dali" or self.runtime.decode == "mixed":
            raise ValueError(
                "encoder.channels: 1 is not for DALI, which draws three: set "
                "runtime.executor=fused runtime.decode=auto"
            )
        colors = dict[str, str]()  # what is to be set, by what means nothing
        for number, view in enumerate(self.views):
            brightness, contrast, saturation, hue = view.jitter
            key = f"views.{number}"
            neutral = f"'{key}.jitter=[{brightness:g},{contrast:g},0,0]'"
            colors |= {f"{key} saturation": neutral} if saturation else {}
            colors |= {f"{key} hue": neutral} if hue else {}
            colors |= {f"{key} grayscale": f"{key}.grayscale=0"} if view.grayscale else {}
        if colors:
            raise ValueError(
                f"encoder.channels: 1 has no color for {', '.join(colors)} to change: set "
                f"{' '.join(dict.fromkeys(colors.values()))}"
            )
        return self

    @model_validator(mode="after")
    def _fits(self) -> "Recipe":
        name, wanted = self.objective.name, self.objective.drawn_views
        if len(self.views) != wanted:
            raise ValueError(
                f"views: {name} draws {wanted} of each image, not {len(self.views)}: leave one out"
                if len(self.views) > wanted
                else f"views: {name} draws {wanted} of each image, not {len(self.views)}: add one"
            )
        if self.objective.in_batch and self.runtime.accumulate > 1:
            raise ValueError(
                f"{name} compares the images of a batch with each other, which cannot go in parts: "
                "set runtime.accumulate=1, or lower batch"
            )
        if self.objective.bn == "whole":
            if self.runtime.accumulate > 1:
                raise ValueError(
                    "objective.bn: whole cannot go in parts: set runtime.accumulate=1, or "
                    "objective.bn=groups"
                )
            return self
        group = self.objective.bn_group
        if self.batch % group:
            raise ValueError(
                f"batch {self.batch} is not a whole number of objective.bn_group {group}: "
                "choose a bn_group that divides it"
            )
        if group == 1:
            raise ValueError(
                "objective.bn_group 1 leaves BatchNorm nothing to average: choose 2 or more"
            )
        if self.batch == group and isinstance(self.objective, Moco):
            raise ValueError(
                f"one group of {self.batch} is the whole batch: shuffling cannot hide which query "
                "goes with which key, and the network cheats. Choose a smaller objective.bn_group, "
                "or ask for it by objective.bn: whole"
            )
        return self

    @property
    def lr(self) -> float:
        """The learning rate at the height of the schedule, scaled to the batch."""
        return self.optimizer.lr * self.batch / (self.optimizer.lr_batch or self.batch)

    @property
    def encoded_per_step(self) -> int:
        """How many views of a step the query encoder sees; of moco, keys that are enqueued too."""
        return self.batch * self.objective.encoded_views

    @property
    def candidates(self) -> int:
        """Among how many keys a query is to find its own: chance is a loss of its logarithm."""
        return self.objective.candidates(self.batch)

    def last_step(self, steps_per_epoch: int) -> int:
        """Return the number of steps of the whole run."""
        whole = self.schedule.steps or (self.schedule.epochs or 0) * steps_per_epoch
        return min(whole, (self.stop_epoch or whole) * steps_per_epoch)
