"""Makes a small set of photographs to try a recipe on, from fewer and larger ones.

    python benchmarks/photo_crops.py PHOTOS OUT [--side 128] [--train 8] [--test 2]

Cuts squares at random places; a square's class is the photograph that it comes from. OUT/train and
OUT/test then hold a folder for each photograph, for `fastmoco shard OUT SET`.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image


def main() -> None:
    """Cut them."""
    parser = argparse.ArgumentParser(description="Squares of photographs, a class each.")
    parser.add_argument("photos", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--side", type=int, default=128, help="in pixels")
    parser.add_argument("--train", type=int, default=8, help="squares of a photograph")
    parser.add_argument("--test", type=int, default=2)
    options = parser.parse_args()
    random = np.random.default_rng(0)
    names = {".jpg", ".jpeg", ".png"}
    photos = sorted(p for p in options.photos.rglob("*") if p.suffix.lower() in names)
    for number, path in enumerate(photos):
        image = Image.open(path).convert("RGB")
        room = np.array(image.size) - options.side
        if room.min() < 0:
            print(f"left out, smaller than {options.side} pixels: {path.name}")
            continue
        for square in range(options.train + options.test):
            left, top = random.integers(0, room + 1).tolist()
            part = "train" if square < options.train else "test"
            folder = options.out / part / f"{number:04}"
            folder.mkdir(parents=True, exist_ok=True)
            box = (left, top, left + options.side, top + options.side)
            image.crop(box).save(folder / f"{square}.jpg", quality=95)


if __name__ == "__main__":
    main()
