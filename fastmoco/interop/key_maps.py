"""How other programs name the tensors of a ResNet: one small table for each way.

Our names are torchvision's. A table renames them into another program's, pattern by pattern; an
import looks up the names that a table gives, an export writes under them. So both directions read
the same few lines. What stands before the names in a file is no concern of the tables.
"""

import re
from dataclasses import dataclass, field

Table = dict[str, str]
"""Regular expressions and their replacements, applied to a torchvision name in this order."""

_STAGES = range(1, 5)

# The place of each child in nn.Sequential(*resnet.children()): 2 is ReLU and 3 the max-pool.
_SEQUENTIAL: Table = {
    r"^conv1\.": "0.",
    r"^bn1\.": "1.",
    **{rf"^layer{n}\.": f"{n + 3}." for n in _STAGES},
}

# MoCo's CIFAR-10 notebook does the same, but leaves the max-pool out.
_NOTEBOOK: Table = {
    r"^conv1\.": "0.",
    r"^bn1\.": "1.",
    **{rf"^layer{n}\.": f"{n + 2}." for n in _STAGES},
}

# The ResNets for CIFAR that SupContrast and many others go back to.
_SHORTCUT: Table = {r"\.downsample\.": ".shortcut."}

HUGGINGFACE: Table = {
    r"^conv1\.": "embedder.embedder.convolution.",
    r"^bn1\.": "embedder.embedder.normalization.",
    **{rf"^layer{n}\.(\d+)\.": rf"encoder.stages.{n - 1}.layers.\1." for n in _STAGES},
    **{rf"\.conv{n}\.": f".layer.{n - 1}.convolution." for n in (1, 2, 3)},
    **{rf"\.bn{n}\.": f".layer.{n - 1}.normalization." for n in (1, 2, 3)},
    r"\.downsample\.0\.": ".shortcut.convolution.",
    r"\.downsample\.1\.": ".shortcut.normalization.",
}

DETECTRON2: Table = {
    r"^(conv1|bn1)\.": r"stem.\1.",
    **{rf"^layer{n}\.": f"res{n + 1}." for n in _STAGES},
    r"\.bn(\d)\.": r".conv\1.norm.",
    r"\.downsample\.0\.": ".shortcut.",
    r"\.downsample\.1\.": ".shortcut.norm.",
}


def renamed(name: str, table: Table) -> str:
    """Return what a table makes of a torchvision name such as layer1.0.bn2.running_mean."""
    for pattern, replacement in table.items():
        name = re.sub(pattern, replacement, name)
    return name


@dataclass(frozen=True)
class Naming:
    """One way to name the tensors of a ResNet.

    Attributes:
        name: of the library that it is known by.
        table: renames the backbone.
        head: prefix of what stands in the place of the classifier; None: nothing does.
        landmarks: our names of tensors that each such network has: where neither is, there is none.
    """

    name: str
    table: Table = field(default_factory=dict, hash=False)
    head: str | None = None
    landmarks: tuple[str, ...] = ("layer1.0.conv1.weight", "layer4.0.conv1.weight")

    @property
    def endings(self) -> tuple[str, ...]:
        """The landmarks by the names of the program."""
        return tuple(renamed(mark, self.table) for mark in self.landmarks)


NAMINGS = (
    Naming("torchvision", head="fc."),  # and of timm, OpenMMLab, MoCo, DINO, solo-learn, VISSL, ...
    Naming("torchvision, shortcut for downsample", _SHORTCUT),
    Naming("torch.nn.Sequential", _SEQUENTIAL),
    Naming("torch.nn.Sequential without the max-pool", _NOTEBOOK, head="9."),
    Naming("huggingface", HUGGINGFACE),
)
