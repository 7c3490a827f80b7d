"""What the check runs on, and the photographs that it draws from."""

import subprocess
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness.images import names_of, repeated
from PIL import Image

from fastmoco.core.cores import count_cores
from fastmoco.core.environment import environment
from fastmoco.demo.demo import PHOTOGRAPHS, Photograph
from fastmoco.errors import UsageError
from fastmoco.pack.options import PackOptions
from fastmoco.pack.packer import pack
from gpu_phases.task import Figures, Item, Items, Task

SIZE = (500, 375)  # width and height of the images made: those of an average photograph of ImageNet
QUALITY = 95
IMAGES, TOY_IMAGES = 1024, 48
_NVIDIA_SMI = "driver_version,power.limit,clocks.max.sm,clocks.max.mem,mig.mode.current"


def items(task: Task) -> Items:
    """Return the machine's description and, where a phase needs them, the photographs."""
    return {
        "machine": Item(machine),
        "data/photographs": Item(lambda: photographs(task)),
        "data/packed set": Item(lambda: packed(task)),
    }


def machine() -> Figures:
    """Return what the figures depend on beside the code."""
    found: dict[str, Any] = environment()
    found["cuda"], found["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        found["device"] = device.name
        found["device_memory_gb"] = round(device.total_memory / 1e9, 1)
        found["multiprocessors"] = device.multi_processor_count
        found |= _nvidia_smi()
    return found


def _nvidia_smi() -> dict[str, str]:
    """Return what the driver says of the device, as far as it says anything."""
    command = ("nvidia-smi", f"--query-gpu={_NVIDIA_SMI}", "--format=csv,noheader", "--id=0")
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(_NVIDIA_SMI.split(","), told.stdout.strip().split(", "), strict=False))


def photographs(task: Task) -> Figures:
    """Fill `task.images`, a folder of class folders, with as many images as a check needs."""
    began = time.perf_counter()
    wanted = TOY_IMAGES if task.dry else IMAGES
    source = _given(task.photos, task, wanted) if task.photos else _made(task.images, wanted)
    files = [path for path in task.images.rglob("*") if path.is_file()]
    return {
        "images": len(files),
        "kb_per_image": sum(path.stat().st_size for path in files) / len(files) / 1e3,
        "images_per_s": len(files) / (time.perf_counter() - began),
        "source": source,
    }


def _given(photos: Path, task: Task, wanted: int) -> str:
    folder = photos
    if photos.is_file():
        folder = task.work / "given"
        with zipfile.ZipFile(photos) as archive:
            archive.extractall(folder)  # zipfile keeps names inside the folder
    names = names_of(folder)
    names = names[:: max(1, len(names) // wanted)]  # of ImageNet no more than are needed
    made = repeated(folder, names, max(2, -(-wanted // len(names))), task.work)
    # One class for ImageFolder: the folders given may be splits, or hold a mask an image.
    (task.images / "given").mkdir(parents=True)
    files = [path for path in made.rglob("*") if path.is_file()]
    for number, path in enumerate(files):
        path.rename(task.images / "given" / f"{number:06d}{path.suffix}")
    return f"{photos.name}: {len(names)} images, repeated"


def _made(folder: Path, count: int) -> str:
    found = [photograph for photograph in PHOTOGRAPHS if _is_there(photograph)]
    if not found:
        raise UsageError("No package carries photographs here: give some by --photos.")
    for photograph in found:
        (folder / photograph.name).mkdir(parents=True)
    pixels = [photograph.pixels() for photograph in found]
    drawn = np.random.Philox(key=0).random_raw((count, 3)).tolist()

    def save(number: int) -> None:
        which = number % len(found)
        image = cut(pixels[which], drawn[number])
        image.save(folder / found[which].name / f"{number:05d}.jpg", quality=QUALITY)

    _over_threads(save, count)
    packages = sorted({photograph.package for photograph in found})
    return f"cut from {len(found)} photographs of {' and '.join(packages)}, JPEG quality {QUALITY}"


def _is_there(photograph: Photograph) -> bool:
    try:
        return photograph.file().is_file()
    except UsageError:
        return False


def cut(pixels: "np.ndarray[Any, Any]", words: list[int]) -> Image.Image:
    """Return a part of (height, width, 3) pixels, enlarged or shrunk to `SIZE`.

    Args:
        pixels: of a photograph.
        words: three random integers, which choose the part.
    """
    height, width = pixels.shape[:2]
    largest = min(width, height * SIZE[0] // SIZE[1])
    across = largest * 3 // 5 + words[0] % (largest * 2 // 5)
    down = across * SIZE[1] // SIZE[0]
    left, top = words[1] % (width - across + 1), words[2] % (height - down + 1)
    part = Image.fromarray(pixels[top : top + down, left : left + across])
    return part.resize(SIZE, Image.Resampling.BICUBIC)


def _over_threads(work: Callable[[int], None], count: int) -> None:
    with ThreadPoolExecutor(count_cores(1)) as pool:  # PIL lets go of the GIL
        for _ in pool.map(work, range(count)):
            pass


def packed(task: Task) -> Figures:
    """Pack the photographs into `task.set` by our own packer."""
    began = time.perf_counter()
    workers = count_cores(1)
    options = PackOptions(unlabelled=True, workers=workers)
    (manifest,) = pack(task.images, task.set, options).values()
    size = sum(path.stat().st_size for path in task.set.glob("*.tar"))
    return {
        "images": manifest.samples,
        "kb_per_image": size / manifest.samples / 1e3,
        "images_per_s": manifest.samples / (time.perf_counter() - began),
        "source": f"the same images, {workers} workers",
    }
