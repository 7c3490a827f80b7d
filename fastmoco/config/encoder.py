"""What an encoder is: all that is needed to build it and to show it images."""

from typing import Any, Literal

from pydantic import model_validator

from fastmoco.core.strict_yaml import Count, Positive, Side, Strict

PerChannel = tuple[float, ...]
Stem = Literal["imagenet", "small", "small-stride2"]
Head = Literal["linear", "mlp", "none"]
TIMM = "timm:"  # before the name of a network of timm
Attention = Literal["none", "dot", "parametrized"]


class EncoderSpec(Strict):
    """A network and the images that it takes.

    It stands in the recipe, in `encoder.json` of a run folder, and in every file of weights or
    features that we write.

    Attributes:
        arch: a ResNet of torchvision, by its name there, or resnet10; or timm:NAME, a convolutional
            network of timm.
        stem: "imagenet": 7x7, stride 2, max-pool; "small": 3x3, no pool; "small-stride2": 3x3,
            stride 2, no pool.
        attention: "none": features are the mean over the last stage; "dot", "parametrized": means
            over stages 2 and 3, weighted by attention (twice as wide; ResNets only).
        head: "linear" (MoCo v1), "mlp" (v2), or "none", of imported backbones.
        dim: of the head's output.
        image_size: side of the images, pixels.
        channels: of the images: 3, or 1 of sets that were packed by `--gray`.
        mean, std: of the channels, in 0..1 units; None: those of the first set's manifest, as
            without them for one channel.
    """

    arch: str = "resnet50"
    stem: Stem = "imagenet"
    attention: Attention = "none"
    head: Head = "linear"
    dim: Count = 128
    image_size: Side = 224
    channels: Count = 3
    mean: PerChannel | None = (0.485, 0.456, 0.406)
    std: tuple[Positive, ...] | None = (0.229, 0.224, 0.225)

    @model_validator(mode="before")
    @classmethod
    def _defaults_are_of_colors(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("channels", 3) not in (3, "3"):
            return {"mean": None, "std": None, **values}
        return values

    @model_validator(mode="after")
    def _one_for_each(self) -> "EncoderSpec":
        if self.channels not in (1, 3):
            raise ValueError(f"channels {self.channels}: choose 3, or 1 for gray")
        for name in ("mean", "std"):
            numbers = getattr(self, name)
            if numbers and len(numbers) != self.channels:
                raise ValueError(
                    f"{name} is of {len(numbers)} channels, and channels {self.channels}: set "
                    "encoder.mean=null encoder.std=null, which takes those of the set"
                )
        return self

    @property
    def crop_fraction(self) -> float:
        """The part of the short side that an evaluation shows: all of a small image."""
        return 224 / 256 if self.image_size >= 160 else 1.0

    def normalization(self) -> tuple[PerChannel, PerChannel]:
        """Return mean and standard deviation of the channels, once they are known."""
        assert self.mean and self.std, "the recipe is not resolved"
        return self.mean, self.std
