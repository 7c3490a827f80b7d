"""How a network is fine-tuned."""

from dataclasses import dataclass, replace
from typing import Literal

from fastmoco.config.recipe import View
from fastmoco.evaluate.choosing import Choose
from fastmoco.evaluate.labelled_loader import VIEW
from fastmoco.evaluate.noise import strong
from fastmoco.evaluate.semi import WEAK, SemiConfig

Normalize = Literal["run", "imagenet", "set"]
_EPOCHS, _LEAST_STEPS = 30, 1000
_HEAD = 5  # times the backbone's rate: with 10, features of norm 17 made the first steps explode


@dataclass(frozen=True)
class FinetuneConfig:
    """How a network is trained on labels.

    Attributes:
        fraction: of the labels of each class, 0..1; at least one of each.
        from_scratch: random weights, the supervised baseline, instead of the run's.
        epochs: over the chosen images.
        steps: instead of epochs; neither: 30 epochs, and at least 1000 steps.
        lr: of the backbone; falls by a cosine. None: 0.02, and 0.1 from scratch, for 256 images a
            step, scaled to `batch` (Goyal et al. 2017).
        lrs: candidates for `lr`; the one that is chosen is trained again on all labels.
        choose: by what, see `HeldOut`; "test": by test accuracy.
        head_lr: of the classifier. None: five times `lr`, and `lr` from scratch.
        batch: images a step over all ranks; BatchNorm averages over those of one rank.
        weight_decay: of all weights.
        seed: of the choice of labels, the order, the crops and the random weights.
        normalize: by the mean and deviation of the run, of ImageNet or of the training set.
        size: side of the images, pixels; small ones are enlarged. None: the run's.
        even: every class is shown equally often, in as many steps.
        noise: images are changed strongly, and features and blocks dropped, see `noisy`.
        semi: how images without labels are used; None: not at all.
    """

    fraction: float = 1.0
    from_scratch: bool = False
    epochs: int | None = None
    steps: int | None = None
    lr: float | None = None
    head_lr: float | None = None
    lrs: tuple[float, ...] = ()
    choose: Choose = "holdout"
    batch: int = 256
    weight_decay: float = 1e-4
    seed: int = 0
    normalize: Normalize = "run"
    size: int | None = None
    even: bool = False
    noise: bool = False
    semi: SemiConfig | None = None

    def resolved(self, images: int, size: int) -> "FinetuneConfig":
        """Return the protocol with nothing left open.

        Args:
            images: with a label.
            size: of the run.
        """
        batch = min(self.batch, images)
        lr, times = (0.1, 1) if self.from_scratch else (0.02, _HEAD)
        lr = lr * batch / 256 if self.lr is None else self.lr
        head_lr = times * lr if self.head_lr is None else self.head_lr
        return replace(
            self,
            batch=batch,
            steps=self._steps(images // batch),
            lr=lr,
            head_lr=head_lr,
            size=self.size or size,
        )

    def view(self, size: int) -> View:
        """Return how images with a label of a size are changed."""
        if self.noise:
            return strong(size)
        return WEAK if self.semi else VIEW

    def _steps(self, per_epoch: int) -> int:
        if self.steps or self.epochs:
            return self.steps or (self.epochs or 0) * per_epoch
        return max(_EPOCHS * per_epoch, _LEAST_STEPS)
