"""The commands that bring encoders in, and take encoders and features out."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from fastmoco.cli import options
from fastmoco.core.terminal import echo


def import_(
    file: Annotated[Path, typer.Argument(help="A checkpoint (.pth, .pth.tar, .safetensors).")],
    out: Annotated[Path, typer.Argument(help="A new run folder.")],
    prefix: Annotated[
        str | None,
        typer.Option(help="Before conv1.weight, such as teacher.backbone. [default: found]"),
    ] = None,
    stem: Annotated[
        Literal["imagenet", "small", "small-stride2"] | None,
        typer.Option(help="Of the network. [default: by the first convolution; stride 1]"),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=8, help="Pixels. [default: 224, or 32 after a 3x3 stem]")
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option(help="timm:NAME, of timm's networks. [default: one of torchvision's, found]"),
    ] = None,
) -> None:
    """Make a run folder of another program's network, to probe or to export it."""
    from fastmoco.interop.importer import import_weights

    found = import_weights(file, out, prefix, stem, image_size, arch)
    spec = found.spec
    head = "no head" if spec.head == "none" else f"{spec.head} head of {spec.dim}"
    echo(f"{out}: {spec.arch}, {spec.stem} stem, {head}, {found.source}")
    for note in found.notes:
        echo(f"  {note}")
    echo(f"next: fastmoco probe {out} --train SET --test SET")


def export(
    run: options.Run,
    out: Annotated[Path, typer.Argument(help="A new file; for huggingface a new folder.")],
    to: Annotated[
        Literal["torchvision", "timm", "safetensors", "huggingface", "detectron2", "onnx"],
        typer.Option(help="What shall load it."),
    ],
) -> None:
    """Write the query encoder of a run for another program, and compare what that loads."""
    import torch

    from fastmoco.interop.exporter import export as write
    from fastmoco.runs.load_encoder import load_encoder
    from fastmoco.runs.run_folder import RunFolder

    encoder, spec, step = load_encoder(RunFolder(run), torch.device("cpu"))
    done = write(encoder, spec, out, to)
    echo(f"{out}: {spec.arch} of step {step} for {to}; {done.checked}")
    echo(done.note)


def embed(
    run: options.Run,
    set: options.Set,
    out: Annotated[Path, typer.Option(help="A new .npy; .ids.npy and .json go beside it.")],
    feature: options.Feature = "backbone",
    precision: Annotated[
        Literal["bf16", "fp32"], typer.Option(help="That the network computes in.")
    ] = "fp32",
    device: options.Device = "auto",
) -> None:
    """Write the features of a set's images, in id order, as fp32 numpy files."""
    from dataclasses import replace

    import numpy as np

    from fastmoco.core.distributed import get_device
    from fastmoco.dataset.shard_set import ConcatShardSets
    from fastmoco.evaluate.features import embed as features_of
    from fastmoco.evaluate.features import frozen_preprocessing
    from fastmoco.interop.feature_files import check_absent, write_features
    from fastmoco.runs.load_encoder import load_encoder
    from fastmoco.runs.run_folder import RunFolder

    check_absent(out)
    where = get_device(device, 0)
    folder = RunFolder(run)
    encoder, spec, step = load_encoder(folder, where)
    data = ConcatShardSets.open([set])
    preprocessing = frozen_preprocessing(spec, folder.runtime(), where)
    preprocessing = replace(preprocessing, precision=precision)
    features = features_of(encoder, data, feature, preprocessing).cpu().numpy()
    about = {"run": folder.name, "step": step, "set_id": data.set_ids[0], "feature": feature}
    about |= {"precision": precision, "encoder": spec.model_dump(mode="json")}
    write_features(out, features, np.arange(len(features)), about)
    echo(f"{out}: {len(features)} x {features.shape[1]} {feature} features of step {step}")
