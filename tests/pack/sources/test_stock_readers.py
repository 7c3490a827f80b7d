"""The shards of every source, in stock webdataset and stock DALI: the same images and labels."""

import io
import pickle
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastmoco.dataset.shard_set import ShardSet
from fastmoco.pack.options import PackOptions
from fastmoco.pack.packer import pack
from fastmoco.pack.sources import FORMATS

# By split: each image as (height, width, bytes of its RGB pixels), and its class or None.
Truth = dict[str, list[tuple[Any, str | None]]]
TEN = [f"class{number}" for number in range(10)]


def noise(seed: int, side: int) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def png(array: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def planes(array: Any) -> bytes:
    return b"".join(array[:, :, channel].tobytes() for channel in range(3))


def tree(split: str = "") -> dict[str, tuple[Any, str]]:
    """Six images in two classes, by path."""
    names = [(name, number) for name in ("ant", "bee") for number in range(3)]
    seeds = {f"{split}{name}/{number}.png": (name, 10 * number) for name, number in names}
    return {
        path: (noise(seed + len(split) + ord(name[0]), 8), name)
        for path, (name, seed) in seeds.items()
    }


def folder(root: Path) -> tuple[Path, Truth]:
    for split in ("train/", "val/"):
        for path, (array, _) in tree(split).items():
            (root / "in" / path).parent.mkdir(parents=True, exist_ok=True)
            (root / "in" / path).write_bytes(png(array))
    return root / "in", {split: list(tree(f"{split}/").values()) for split in ("train", "val")}


def zipped(root: Path) -> tuple[Path, Truth]:
    with zipfile.ZipFile(root / "in.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path, (array, _) in tree().items():
            archive.writestr(path, png(array))
    return root / "in.zip", {"": list(tree().values())}


def tarred(root: Path) -> tuple[Path, Truth]:
    (root / "in.tar").write_bytes(tar_of({path: png(array) for path, (array, _) in tree().items()}))
    return root / "in.tar", {"": list(tree().values())}


def tar_of(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def csv(root: Path) -> tuple[Path, Truth]:
    lines = ["path,label,split"]
    for number, (array, name) in enumerate(tree().values()):
        (root / f"{number}.png").write_bytes(png(array))
        lines.append(f"{number}.png,{name},{'val' if number in (0, 5) else 'train'}")
    (root / "in.csv").write_text("\n".join(lines) + "\n")
    rows = list(tree().values())
    return root / "in.csv", {"train": rows[1:5], "val": [rows[0], rows[5]]}


def cifar(root: Path) -> tuple[Path, Truth]:
    found: Truth = {"train": [], "test": []}
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        arrays = [noise(100 + 2 * number + k, 32) for k in range(2)]
        labels = [number, 9 - number]
        data = np.stack([np.frombuffer(planes(array), np.uint8) for array in arrays])
        (root / name).write_bytes(pickle.dumps({"data": data, "labels": labels}, protocol=2))
        split = "test" if name == "test_batch" else "train"
        found[split] += [(a, TEN[label]) for a, label in zip(arrays, labels, strict=True)]
    (root / "batches.meta").write_bytes(pickle.dumps({"label_names": TEN}, protocol=2))
    return root, found


def stl10(root: Path) -> tuple[Path, Truth]:
    (root / "class_names.txt").write_text("\n".join(TEN) + "\n")
    found: Truth = {}
    for seed, split in enumerate(("train", "test", "unlabeled")):
        arrays = [noise(200 + 3 * seed + k, 96) for k in range(3)]
        columns = [planes(array.transpose(1, 0, 2)) for array in arrays]
        (root / f"{split}_X.bin").write_bytes(b"".join(columns))
        names = [None] * 3 if split == "unlabeled" else TEN[:3]
        if split != "unlabeled":
            (root / f"{split}_y.bin").write_bytes(bytes([1, 2, 3]))
        found[split] = list(zip(arrays, names, strict=True))
    return root, found


def svhn(root: Path) -> tuple[Path, Truth]:
    savemat = pytest.importorskip("scipy.io").savemat
    found: Truth = {}
    for seed, split in enumerate(("train", "test")):
        arrays = [noise(300 + 3 * seed + k, 32) for k in range(3)]
        labels = np.array([[10], [1], [7]], dtype=np.uint8)
        savemat(root / f"{split}_32x32.mat", {"X": np.stack(arrays, axis=3), "y": labels})
        found[split] = list(zip(arrays, ["0", "1", "7"], strict=True))
    return root, found


def imagenet(root: Path) -> tuple[Path, Truth]:
    wnids, inner, found = ("n00000002", "n00000001"), {}, []
    for seed, wnid in enumerate(wnids):
        arrays = [noise(400 + 2 * seed + k, 9) for k in range(2)]
        inner[f"{wnid}.tar"] = tar_of({f"{wnid}_{k}.JPEG": png(a) for k, a in enumerate(arrays)})
        found += [(array, wnid) for array in arrays]
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar_of(inner))
    return root, {"train": found}


def tensor(root: Path) -> tuple[Path, Truth]:
    arrays = [noise(500 + k, 7) for k in range(4)]
    np.save(root / "in.npy", np.stack(arrays).transpose(0, 3, 1, 2))
    np.save(root / "in_labels.npy", np.array([0, 2, 1, 2]))
    return root / "in.npy", {"": list(zip(arrays, "0212", strict=True))}


def numbered_pngs(root: Path) -> tuple[Path, Truth]:
    arrays = [noise(600 + k, 7) for k in range(11)]
    (root / "X").mkdir()
    for number, array in enumerate(arrays):
        (root / f"X/{number}.png").write_bytes(png(array))
    labels = [number % 3 for number in range(11)]
    np.save(root / "X_labels.npy", np.array(labels))
    return root / "X", {"": [(a, str(n)) for a, n in zip(arrays, labels, strict=True)]}


def tiny_imagenet(root: Path) -> tuple[Path, Truth]:
    found: Truth = {"train": [], "val": []}
    for path, (array, name) in tree().items():
        number = Path(path).stem
        for file in (f"train/{name}/images/{number}.png", f"val/images/{name}{number}.png"):
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_bytes(png(array))
        with (root / "val/val_annotations.txt").open("a") as lines:
            lines.write(f"{name}{number}.png\t{name}\t0\t0\t7\t7\n")
        for images in found.values():
            images.append((array, name))
    return root, found


def metadata(root: Path) -> tuple[Path, Truth]:
    lines = ["file_name,label"]
    for number, (array, name) in enumerate(tree().values()):
        (root / f"{number}.png").write_bytes(png(array))
        lines.append(f"{number}.png,{name}")
    (root / "metadata.csv").write_text("\n".join(lines))
    return root, {"": list(tree().values())}


def arrow(root: Path) -> tuple[Path, Truth]:
    pa = pytest.importorskip("pyarrow")
    images = [{"bytes": png(array), "path": None} for array, _ in tree().values()]
    table = pa.table({"image": images, "label": [name for _, name in tree().values()]})
    file = str(root / "in.arrow")
    with pa.OSFile(file, "wb") as sink, pa.ipc.new_file(sink, table.schema) as stream:
        stream.write_table(table)
    return Path(file), {"": list(tree().values())}


def webdataset_tars(root: Path) -> tuple[Path, Truth]:
    for number, (array, name) in enumerate(tree().values()):
        key = f"{number:04d}"
        content = tar_of({f"{key}.png": png(array), f"{key}.cls": name.encode()})
        (root / f"{number}.tar").write_bytes(content)
    return root, {"": list(tree().values())}


BUILDERS: dict[str, Callable[[Path], tuple[Path, Truth]]] = {
    "folder": folder,
    "zip": zipped,
    "tar": tarred,
    "csv": csv,
    "cifar": cifar,
    "stl10": stl10,
    "svhn": svhn,
    "imagenet": imagenet,
    "tensor": tensor,
    "png-tensor": numbered_pngs,
    "tiny-imagenet": tiny_imagenet,
    "metadata": metadata,
    "arrow": arrow,
    "webdataset": webdataset_tars,
}


def tars_of(shards: ShardSet) -> list[str]:
    return [str(shards.root / shard.name) for shard in shards.manifest.shards]


def by_webdataset(shards: ShardSet) -> Iterator[tuple[Any, int | None]]:
    import webdataset

    urls = tars_of(shards)
    dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("rgb8")
    for sample in dataset:
        image = sample["jpg"] if "jpg" in sample else sample["png"]
        yield image, sample.get("cls")


def by_dali(shards: ShardSet) -> Iterator[tuple[Any, int | None]]:
    fn = pytest.importorskip("nvidia.dali.fn")
    from nvidia.dali import Pipeline

    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    labelled = bool(shards.manifest.classes)
    with pipeline:
        outputs = fn.readers.webdataset(
            paths=tars_of(shards),
            index_paths=[tar.replace(".tar", ".idx") for tar in tars_of(shards)],
            ext=["jpg;png", "cls"] if labelled else ["jpg;png"],
            missing_component_behavior="error",
        )
        encoded, *label = outputs if labelled else [outputs]
        pipeline.set_outputs(fn.decoders.image(encoded), *label)
    pipeline.build()
    for _ in range(len(shards)):
        image, *label = pipeline.run()
        yield np.array(image.at(0)), int(bytes(np.array(label[0].at(0)))) if labelled else None


def counted(pairs: Any) -> Counter[Any]:
    return Counter((array.shape, array.tobytes(), name) for array, name in pairs)


def test_every_format_is_here() -> None:
    assert set(BUILDERS) == set(FORMATS)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its streams open
@pytest.mark.parametrize("kind", list(BUILDERS))
def test_stock_readers_find_what_went_in(tmp_path: Path, kind: str) -> None:
    (tmp_path / "source").mkdir()
    source, truth = BUILDERS[kind](tmp_path / "source")
    manifests = pack(source, tmp_path / "out", PackOptions())
    assert set(manifests) == set(truth)
    for split, images in truth.items():
        shards = ShardSet(tmp_path / "out" / split)
        for read in (by_webdataset, by_dali):
            found = [
                (array, None if label is None else shards.manifest.classes[label])
                for array, label in read(shards)
            ]
            assert counted(found) == counted(images), (split, read.__name__)
