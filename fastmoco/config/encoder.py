"""What an encoder is: all that is needed to build it and to show it images."""

from typing import Literal

from fastmoco.core.strict_yaml import Count, Positive, Side, Strict, Triple

Stem = Literal["imagenet", "small", "small-stride2"]
Head = Literal["linear", "mlp", "none"]
Attention = Literal["none", "dot", "parametrized"]


class EncoderSpec(Strict):
    """A network and the images that it takes.

    It stands in the recipe, in `encoder.json` of a run folder, and in every file of weights or
    features that we write.

    Attributes:
        arch: a ResNet of torchvision, by its name there, or resnet10.
        stem: "imagenet": 7x7, stride 2, max-pool; "small": 3x3, no pool; "small-stride2": 3x3,
            stride 2, no pool.
        attention: "none": features are the mean over the last stage; "dot", "parametrized": means
            over stages 2 and 3, weighted by attention (twice as wide; ResNets only).
        head: "linear" (MoCo v1), "mlp" (v2), or "none", of imported backbones.
        dim: of the head's output.
        image_size: side of the images, pixels.
        mean, std: of the channels, in 0..1 units; None: those of the first set's manifest.
    """

    arch: str = "resnet50"
    stem: Stem = "imagenet"
    attention: Attention = "none"
    head: Head = "linear"
    dim: Count = 128
    image_size: Side = 224
    mean: Triple | None = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] | None = (0.229, 0.224, 0.225)

    @property
    def crop_fraction(self) -> float:
        """The part of the short side that an evaluation shows: all of a small image."""
        return 224 / 256 if self.image_size >= 160 else 1.0

    def normalization(self) -> tuple[Triple, Triple]:
        """Return mean and standard deviation of the channels, once they are known."""
        assert self.mean and self.std, "the recipe is not resolved"
        return self.mean, self.std
