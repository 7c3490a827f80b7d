"""How other programs name the tensors of a ResNet: one small table for each layout.

Our names are torchvision's. A table renames them into another program's, pattern by pattern; an
import looks up the names that a table gives, an export writes under them. So both directions read
the same few lines.
"""

import re
from dataclasses import dataclass

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
class Layout:
    """Where one program keeps an encoder among the tensors of its files.

    Attributes:
        name: of the program; several layouts may bear the same.
        prefix: before the names of the backbone.
        head: prefix of the projection head, which ours fits as `weight` and `bias` (linear) or as
            `0.weight` ... `2.bias` (mlp); None: no head of such a kind.
        table: renames the backbone.
    """

    name: str
    prefix: str
    head: str | None = None
    table: Table | None = None

    def key(self, name: str) -> str:
        """Return what a backbone tensor of ours, by torchvision's name, is called there."""
        return self.prefix + renamed(name, self.table or {})


_CLASSY = "classy_state_dict.base_model.model."

# A wrapping `module.` of DistributedDataParallel is gone before these are read. The query encoder
# stands before the momentum encoder where both could be taken.
LAYOUTS = (
    Layout("fastmoco", "backbone.", "head."),
    Layout("moco", "encoder_q.", "encoder_q.fc."),
    Layout("moco", "encoder_q.net.", "encoder_q.net.9.", _NOTEBOOK),
    Layout("moco_v3", "base_encoder.", "base_encoder.fc."),
    Layout("lightly", "query_backbone.", "query_projection_head.layers."),
    Layout("lightly", "query_backbone.", "query_projection_head.layers.", _SEQUENTIAL),
    Layout("lightly", "backbone.", "projection_head.layers."),
    Layout("lightly", "backbone.", "projection_head.layers.", _SEQUENTIAL),
    Layout("lightly", "", None, _SEQUENTIAL),
    Layout("solo", "backbone.", "projector."),
    Layout("solo", "encoder.", "projector."),
    Layout("vissl", f"{_CLASSY}trunk._feature_blocks.", f"{_CLASSY}heads."),
    Layout("vissl", "_feature_blocks."),
    Layout("torchvision", ""),  # timm's ResNets have these names too
    Layout("huggingface", "", None, HUGGINGFACE),
    Layout("huggingface", "resnet.", None, HUGGINGFACE),
)


def layout_names() -> list[str]:
    """Return the names of the layouts, each once."""
    return list(dict.fromkeys(layout.name for layout in LAYOUTS))
