"""What other programs load: how each is written, and how it is loaded again to be compared."""

import pickle
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors.torch import save
from torch import nn

from fastmoco.config.encoder import TIMM, EncoderSpec
from fastmoco.core.files import write_json
from fastmoco.interop.detect import match
from fastmoco.interop.key_maps import DETECTRON2, HUGGINGFACE, Table, renamed
from fastmoco.interop.read_checkpoint import read_weights
from fastmoco.models.encoder import METADATA, Encoder, saved
from fastmoco.models.timm_backbone import create, small_stem

Tensors = dict[str, torch.Tensor]
OPSET = 18


class Target:
    """A program that our weights go to.

    Attributes:
        library: the package that loads the result; None: no package of the index does.
        needs: the packages that write it.
        folder: the result is a folder.
        suffix: that the result must have; None: any.
        graph: the result says what is computed; the others know a network by its tensors.
    """

    library: str | None = None
    needs: tuple[str, ...] = ()
    folder = False
    suffix: str | None = None
    graph = False

    def refusal(self, spec: EncoderSpec) -> str | None:
        """Return why the program cannot hold such a network; None: it can."""
        if spec.attention != "none" and not self.graph:
            return f"there is no place for encoder.attention {spec.attention}"
        return self._refuse(spec)

    def _refuse(self, spec: EncoderSpec) -> str | None:
        return None

    def write(self, encoder: Encoder, spec: EncoderSpec, out: Path) -> None:
        """Write the file, or fill the folder, that does not exist or is empty."""
        raise NotImplementedError

    def features(self, spec: EncoderSpec, out: Path, images: torch.Tensor) -> torch.Tensor:
        """Load the result in its library; return the (n, features) of (n, C, H, W) images."""
        raise NotImplementedError

    def note(self, spec: EncoderSpec, out: Path) -> str:
        """Return the code or the settings that load the result."""
        raise NotImplementedError


def _backbone(encoder: Encoder, table: Table | None = None) -> Tensors:
    state = encoder.backbone.state_dict()
    return {renamed(name, table or {}): tensor.contiguous() for name, tensor in state.items()}


def _safely(tensors: Tensors, spec: EncoderSpec) -> bytes:
    return save(tensors, {"format": "pt", METADATA: spec.model_dump_json()})


def _save(encoder: Encoder, spec: EncoderSpec, out: Path) -> None:
    """Write the backbone as the name's ending asks: safetensors, or a checkpoint of torch."""
    if out.suffix == ".safetensors":
        out.write_bytes(_safely(_backbone(encoder), spec))
    else:
        out.write_bytes(saved(_backbone(encoder), spec))


def _only_imagenet_stem(spec: EncoderSpec, program: str) -> str | None:
    if spec.stem == "imagenet":
        return None
    return f"{program} has no ResNet with a 3x3 stem for small images (stem: {spec.stem})"


def _depths(spec: EncoderSpec) -> tuple[str, list[int]]:
    """Return the kind of block of a plain ResNet and its blocks a stage."""
    with torch.device("meta"):
        net = Encoder(spec).backbone
    stages = [net.layer1, net.layer2, net.layer3, net.layer4]
    kind = "bottleneck" if hasattr(net.layer1[0], "conv3") else "basic"
    return kind, [len(stage) for stage in stages]


class Torchvision(Target):
    """A state dict of `torchvision.models`, without `fc`."""

    library = "torchvision"

    def _refuse(self, spec: EncoderSpec) -> str | None:
        """Refuse timm's networks."""
        return f"torchvision has no {spec.arch}" if spec.arch.startswith(TIMM) else None

    def write(self, encoder: Encoder, spec: EncoderSpec, out: Path) -> None:
        """Write the state dict."""
        _save(encoder, spec, out)

    def features(self, spec: EncoderSpec, out: Path, images: torch.Tensor) -> torch.Tensor:
        """Load it as the note says."""
        models: Any = torchvision.models
        if spec.arch == "resnet10":
            net = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1])
        else:
            net = models.get_model(spec.arch, weights=None)
        if own := self._first_convolution(spec):
            net.conv1 = nn.Conv2d(*own, bias=False)
        if spec.stem != "imagenet":
            net.maxpool = nn.Identity()
        net.fc = nn.Identity()
        net.load_state_dict(read_weights(out).tensors)
        found: torch.Tensor = net.eval()(images)
        return found

    def note(self, spec: EncoderSpec, out: Path) -> str:
        """Return code."""
        build = f"torchvision.models.{spec.arch}()"
        if spec.arch == "resnet10":
            blocks = "torchvision.models.resnet.BasicBlock, [1, 1, 1, 1]"
            build = f"torchvision.models.ResNet({blocks})"
        lines = [f"model = {build}"]
        if own := self._first_convolution(spec):
            given = ", ".join(map(str, own))
            lines.append(f"model.conv1 = torch.nn.Conv2d({given}, bias=False)")
        if spec.stem != "imagenet":
            lines.append("model.maxpool = torch.nn.Identity()")
        lines.append(f"model.load_state_dict({_loaded(out)}, strict=False)  # only fc is missing")
        return "\n".join(lines)

    def _first_convolution(self, spec: EncoderSpec) -> tuple[int, int, int, int, int] | None:
        """Return channels, filters, size, stride and padding; None: those of torchvision."""
        if spec.stem == "imagenet":
            return None if spec.channels == 3 else (spec.channels, 64, 7, 2, 3)
        return spec.channels, 64, 3, 2 if spec.stem == "small-stride2" else 1, 1


def _loaded(out: Path) -> str:
    if out.suffix == ".safetensors":
        return f"safetensors.torch.load_file({out.name!r})"
    return f"torch.load({out.name!r})"


class Timm(Target):
    """A state dict of `timm.create_model(NAME, num_classes=0)`."""

    library = "timm"

    def _refuse(self, spec: EncoderSpec) -> str | None:
        """Refuse, of torchvision's networks, what timm has not: small stems and our resnet10."""
        if spec.arch.startswith(TIMM):
            return None
        if spec.arch == "resnet10":
            return "timm has no resnet10 of this kind"
        return _only_imagenet_stem(spec, "timm")

    def write(self, encoder: Encoder, spec: EncoderSpec, out: Path) -> None:
        """Write the state dict: timm's names for a ResNet are torchvision's."""
        _save(encoder, spec, out)

    def features(self, spec: EncoderSpec, out: Path, images: torch.Tensor) -> torch.Tensor:
        """Load it strictly."""
        net = create(spec)
        net.load_state_dict(read_weights(out).tensors)
        found: torch.Tensor = net.eval()(images)
        return found

    def note(self, spec: EncoderSpec, out: Path) -> str:
        """Return code."""
        name, gray = spec.arch.removeprefix(TIMM), ""
        if spec.channels != 3:
            gray = f", in_chans={spec.channels}"
        lines = [f"model = timm.create_model({name!r}, num_classes=0{gray})"]
        if spec.stem != "imagenet":
            with_own_stem = create(spec.model_copy(update={"stem": "imagenet"}))
            for place, module in small_stem(with_own_stem, spec).items():
                lines.append(f"model.set_submodule({place!r}, torch.nn.{module!r})")
        return "\n".join([*lines, f"model.load_state_dict({_loaded(out)})"])


class Safetensors(Target):
    """Backbone and head by our names; `fastmoco import` reads it back to the same bits."""

    library = "safetensors"
    suffix = ".safetensors"

    def write(self, encoder: Encoder, spec: EncoderSpec, out: Path) -> None:
        """Write both, and in the metadata what network they are of."""
        tensors = {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}
        out.write_bytes(_safely(tensors, spec))

    def features(self, spec: EncoderSpec, out: Path, images: torch.Tensor) -> torch.Tensor:
        """Load it as an import does."""
        weights = read_weights(out)
        found = match(weights.tensors, "backbone", spec.stem, spec.arch)
        encoder = Encoder(
            EncoderSpec(
                arch=found.arch,
                stem=found.stem,
                channels=found.channels,
                head=found.head,
                dim=found.dim,
            )
        )
        encoder.load_state_dict(found.weights)
        features: torch.Tensor = encoder.eval().backbone(images)
        return features

    def note(self, spec: EncoderSpec, out: Path) -> str:
        """Return the command."""
        return f"fastmoco import {out.name} OUT"


class HuggingFace(Target):
    """A folder for `transformers.ResNetModel.from_pretrained`."""

    library = "transformers"
    folder = True

    def _refuse(self, spec: EncoderSpec) -> str | None:
        """Refuse small stems, and the wide and grouped blocks that its ResNet cannot express."""
        if not spec.arch.startswith("resnet"):
            return f"transformers' ResNet has no {spec.arch}"
        if spec.channels != 3:
            return "transformers' image processors make three channels of every image"
        return _only_imagenet_stem(spec, "transformers")

    def write(self, encoder: Encoder, spec: EncoderSpec, out: Path) -> None:
        """Write weights, network and how images are shown to it."""
        content = save(_backbone(encoder, HUGGINGFACE), {"format": "pt"})
        (out / "model.safetensors").write_bytes(content)
        write_json(out / "config.json", _huggingface_config(spec))
        write_json(out / "preprocessor_config.json", _huggingface_images(spec))

    def features(self, spec: EncoderSpec, out: Path, images: torch.Tensor) -> torch.Tensor:
        """Load the folder."""
        import transformers

        logging: Any = transformers.utils.logging
        logging.disable_progress_bar()
        net: Any = transformers.ResNetModel.from_pretrained(str(out), local_files_only=True)
        found: torch.Tensor = net.eval()(images).pooler_output.flatten(1)
        return found

    def note(self, spec: EncoderSpec, out: Path) -> str:
        """Return code."""
        return f"model = transformers.ResNetModel.from_pretrained({str(out)!r})"


def _huggingface_config(spec: EncoderSpec) -> dict[str, Any]:
    kind, depths = _depths(spec)
    expansion = 4 if kind == "bottleneck" else 1
    return {
        "architectures": ["ResNetModel"],
        "model_type": "resnet",
        "num_channels": 3,
        "embedding_size": 64,
        "hidden_sizes": [width * expansion for width in (64, 128, 256, 512)],
        "depths": depths,
        "layer_type": kind,
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,  # torchvision strides in the 3x3 convolution
        "torch_dtype": "float32",
    }


def _huggingface_images(spec: EncoderSpec) -> dict[str, Any]:
    return {
        "image_processor_type": "ConvNextImageProcessor",  # ResNet has none of its own
        "do_resize": True,
        # Below 384 px it resizes the short side to size / crop_pct, then cuts the center.
        "size": {"shortest_edge": spec.image_size},
        "crop_pct": 224 / 256 if spec.image_size >= 160 else 1.0,
        "resample": 2,  # bilinear, antialiased
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": spec.mean,
        "image_std": spec.std,
    }


# Depth, groups and width a group of Detectron2's ResNets that are torchvision's.
_DETECTRON2_NETS = {
    "resnet18": (18, 1, 64),
    "resnet34": (34, 1, 64),
    "resnet50": (50, 1, 64),
    "resnet101": (101, 1, 64),
    "resnet152": (152, 1, 64),
    "resnext50_32x4d": (50, 32, 4),
    "resnext101_32x8d": (101, 32, 8),
    "resnext101_64x4d": (101, 64, 4),
    "wide_resnet50_2": (50, 1, 128),
    "wide_resnet101_2": (101, 1, 128),
}


class Detectron2(Target):
    """A pickle of numpy arrays, in the form that the MoCo repository converts its weights to."""

    def _refuse(self, spec: EncoderSpec) -> str | None:
        """Refuse small stems and our resnet10."""
        if spec.arch not in _DETECTRON2_NETS:
            return f"Detectron2 has no {spec.arch}"
        if spec.channels != 3:
            return "Detectron2 reads images of three channels"
        return _only_imagenet_stem(spec, "Detectron2")

    def write(self, encoder: Encoder, spec: EncoderSpec, out: Path) -> None:
        """Write the pickle."""
        arrays = {
            name: tensor.numpy()
            for name, tensor in _backbone(encoder, DETECTRON2).items()
            if not name.endswith("num_batches_tracked")  # FrozenBatchNorm2d has none
        }
        content = {"model": arrays, "__author__": "fastmoco", "matching_heuristics": True}
        out.write_bytes(pickle.dumps(content, protocol=4))

    def note(self, spec: EncoderSpec, out: Path) -> str:
        """Return the settings under which its ResNet is this one."""
        depth, groups, width = _DETECTRON2_NETS[spec.arch]
        mean, std = ([round(255 * v, 3) for v in vs or ()] for vs in (spec.mean, spec.std))
        last = "  RES2_OUT_CHANNELS: 64" if depth < 50 else ""
        return (
            f"MODEL.WEIGHTS: {out.name}\n"
            f"MODEL.RESNETS: DEPTH: {depth}  NUM_GROUPS: {groups}  WIDTH_PER_GROUP: {width}"
            f"  STRIDE_IN_1X1: False{last}\n"
            f"INPUT.FORMAT: RGB  MODEL.PIXEL_MEAN: {mean}  MODEL.PIXEL_STD: {std}"
        )


class Onnx(Target):
    """An ONNX graph: `images` (n, C, H, W) to `features` and, if there is a head, `projection`."""

    library = "onnxruntime"
    needs = ("onnx", "onnxscript")
    graph = True

    def write(self, encoder: Encoder, spec: EncoderSpec, out: Path) -> None:
        """Write one file, for any number of images of the run's size."""
        outputs = ["features"] if spec.head == "none" else ["features", "projection"]
        torch.onnx.export(
            _Outputs(encoder, len(outputs)).eval(),
            (torch.zeros(2, spec.channels, spec.image_size, spec.image_size),),
            out,
            input_names=["images"],
            output_names=outputs,
            opset_version=OPSET,
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("n")},),
            external_data=False,
            verbose=False,
        )

    def features(self, spec: EncoderSpec, out: Path, images: torch.Tensor) -> torch.Tensor:
        """Run it on the CPU."""
        import onnxruntime

        session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])

    def note(self, spec: EncoderSpec, out: Path) -> str:
        """Return inputs and outputs."""
        outputs = "features" if spec.head == "none" else "features, projection (not normalized)"
        shape = f"(n, {spec.channels}, {spec.image_size}, {spec.image_size})"
        return f"opset {OPSET}: images {shape} -> {outputs}"


class _Outputs(nn.Module):
    """An encoder that gives its features first, then its projection."""

    def __init__(self, encoder: Encoder, count: int) -> None:
        super().__init__()
        self.encoder, self.count = encoder, count

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return (n, features) and, if asked for, (n, dim)."""
        features = self.encoder.backbone(images)
        return (features, self.encoder.head(features))[: self.count]


TARGETS: dict[str, Target] = {
    "torchvision": Torchvision(),
    "timm": Timm(),
    "safetensors": Safetensors(),
    "huggingface": HuggingFace(),
    "detectron2": Detectron2(),
    "onnx": Onnx(),
}
