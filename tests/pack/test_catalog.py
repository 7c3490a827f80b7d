"""Descriptions of known sets: strict to read, and a source that differs is refused."""

import hashlib
from pathlib import Path

import pytest
import torchvision

import fastmoco
from fastmoco.errors import DataError, UsageError
from fastmoco.pack.catalog import check, load_spec, open_known
from fastmoco.pack.packer import pack_sources
from fastmoco.pack.sources import open_sources

SHARDS = Path(fastmoco.__file__).parents[1] / "shards"
SPEC = """
name: pets
about: cats and dogs
format: folder
splits:
  train: {images: 4}
  val: {images: 2}
  extra: {images: 3, labelled: false, optional: true}
classes: [cat, dog]
"""


@pytest.fixture
def spec(tmp_path):
    """`spec(text)`, read back from a file."""

    def read(text=SPEC):
        (tmp_path / "pets.yaml").write_text(text)
        return load_spec(tmp_path / "pets.yaml")

    return read


@pytest.fixture
def source(tmp_path):
    """`source(*names)`: a folder with files that hold their name."""

    def write(*names):
        for name in names:
            path = tmp_path / "source" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(name.encode())
        return tmp_path / "source"

    return write


TRAIN = [f"train/{kind}/{n}.png" for kind in ("cat", "dog") for n in (1, 2)]
VAL = ["val/cat/1.png", "val/dog/1.png"]
EXTRA = [f"unlabeled/{n}.png" for n in (1, 2, 3)]


@pytest.mark.parametrize("path", sorted(SHARDS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_description_is_sound(path):
    found = load_spec(path)
    assert found.name == path.stem
    assert found.name in (SHARDS / "README.md").read_text() or "96" in found.name


def test_the_sets_of_the_issue_are_there_with_their_counts():
    found = {path.stem: load_spec(path) for path in SHARDS.glob("*.yaml")}
    counts = {
        name: {split: about.images for split, about in spec.splits.items()}
        for name, spec in found.items()
    }
    assert counts == {
        "cifar10": {"train": 50000, "test": 10000},
        "cifar100": {"train": 50000, "test": 10000},
        "stl10": {"train": 5000, "test": 8000, "unlabeled": 100000},
        "svhn": {"train": 73257, "test": 26032, "extra": 531131},
        "imagenet": {"train": 1281167, "val": 50000},
        "ssl96": {"unlabeled": 512000, "train": 25600, "val": 25600},
    }


def test_the_checksums_are_those_of_torchvision():
    sets = torchvision.datasets
    published = {
        "cifar10": dict(map(tuple, [*sets.CIFAR10.train_list, *sets.CIFAR10.test_list])),
        "cifar100": dict(map(tuple, [*sets.CIFAR100.train_list, *sets.CIFAR100.test_list])),
        "stl10": dict(map(tuple, [*sets.STL10.train_list, *sets.STL10.test_list])),
        "svhn": {name: md5 for _, name, md5 in sets.SVHN.split_list.values()},
        "imagenet": dict(sets.imagenet.ARCHIVE_META.values()),
    }
    for kind in (sets.CIFAR10, sets.CIFAR100):
        known = published[kind.__name__.lower()]
        known |= {kind.filename: kind.tgz_md5, kind.meta["filename"]: kind.meta["md5"]}
    for name, known in published.items():
        ours = load_spec(SHARDS / f"{name}.yaml").checksums
        theirs = {file: f"md5:{md5}" for file, md5 in known.items()}
        # torchvision does not know the binary versions.
        assert {file: ours[file] for file in ours if "binary" not in file} == theirs


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("about:", "abuot:", "unknown key 'abuot': did you mean 'about'?"),
        ("images: 4", "imges: 4", "unknown key 'splits.train.imges': did you mean 'images'?"),
        ("images: 4", "images: 0", "splits.train.images: Input should be greater than or equal"),
        ("images: 4", "images: true", "images: Input should be a valid integer"),
        ("format: folder", "format: foldr", "no format 'foldr': did you mean 'folder'?"),
        ("format: folder", "", "the key 'format' is missing"),
        ("classes:", "options: {shards_mb: 3}\nclasses:", "'options.shards_mb': did you mean"),
        ("classes:", "checksums: {a: md5:12}\nclasses:", "checksums.a: String should match"),
        ("classes:", "checksums: {../a: md5:12}\nclasses:", "checksums.../a"),
        ("classes:", "name: x\nclasses:", "'name' stands twice"),
        ("cats and dogs", "!!python/object/apply:os.system ['true']", "is not plain YAML"),
    ],
)
def test_a_fault_in_a_description_is_named(spec, old, new, words):
    with pytest.raises(UsageError) as caught:
        spec(SPEC.replace(old, new))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_description_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        load_spec(tmp_path / "none.yaml")


def test_the_set_described_passes(spec, source):
    root = source(*TRAIN, *VAL)
    check(spec(), open_sources(root), root)
    check(spec(), open_sources(root, like=["dog", "cat"]), root)
    numbered = SPEC.replace("[cat, dog]", "2")
    check(spec(numbered), open_sources(root), root)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([*TRAIN[:-1], *VAL], "pets, split train: expected 4 images, found 3"),
        ([*TRAIN, *VAL, "val/dog/2.png"], "pets, split val: expected 2 images, found 3"),
        ([*TRAIN], "expected the splits train, val, extra, found train"),
        ([*TRAIN, *VAL, *EXTRA], "found train, unlabeled, val"),
        (["cat/1.png", "dog/1.png"], "found none"),
        (
            [name.replace("dog", "cow") for name in [*TRAIN, *VAL]],
            "split train: expected the classes cat, dog, found cow",
        ),
        (
            [
                name
                for old in [*TRAIN, *VAL]
                for name in [old.replace("cat/", "").replace("dog/", "x")]
            ],
            "expected 4 images|found no labels",
        ),
    ],
)
def test_another_set_is_refused(spec, source, names, words):
    root = source(*names)
    with pytest.raises(DataError, match=words):
        check(spec(), open_sources(root), root)


def test_a_number_of_classes_is_compared(spec, source):
    root = source(*TRAIN, *VAL)
    with pytest.raises(DataError, match="expected 3 classes, found 2"):
        check(spec(SPEC.replace("[cat, dog]", "3")), open_sources(root), root)


def test_labels_are_compared_unless_they_are_not_wanted(spec, source):
    flat = [f"{split}/{n}.png" for split, count in (("train", 4), ("val", 2)) for n in range(count)]
    root = source(*flat)
    with pytest.raises(DataError, match="expected 2 classes, found no labels"):
        check(spec(), open_sources(root), root)
    check(spec(), open_sources(root), root, unlabelled=True)
    with pytest.raises(DataError, match="expected no labels, found 2 classes"):
        text = SPEC.replace("{images: 4}", "{images: 4, labelled: false}")
        for name in flat:
            (root / name).unlink()
        check(spec(text), open_sources(source(*TRAIN, *VAL)), root)


@pytest.mark.parametrize("kind", ["md5", "sha256"])
@pytest.mark.parametrize("place", ["LIST", "val/LIST"])
def test_checksums_are_compared_where_the_file_is_there(spec, source, kind, place):
    digest = hashlib.new(kind, b"content").hexdigest()
    text = f"{SPEC}checksums: {{LIST: {kind}:{digest}, OTHER: md5:{32 * '0'}}}\n"
    root = source(*TRAIN, *VAL)
    sources = open_sources(root)
    check(spec(text), sources, root)
    (root / place).write_bytes(b"content")
    check(spec(text), sources, root)
    (root / place).write_bytes(b"contents")
    with pytest.raises(DataError, match=rf"pets: .*LIST has the {kind} .*expected {digest}"):
        check(spec(text), sources, root)


def test_the_checksum_of_a_source_that_is_a_file(spec, tmp_path):
    (tmp_path / "x.csv").write_text("path,label,split\n")
    text = f"{SPEC}checksums: {{x.csv: md5:{32 * '0'}}}\n"
    empty = spec(text).model_copy(update={"splits": {}})
    with pytest.raises(DataError, match=r"x\.csv has the md5"):
        check(empty, {}, tmp_path / "x.csv")


def test_a_known_set_needs_its_source(tmp_path, spec):
    spec()
    with pytest.raises(UsageError, match="describes pets: say by --source DIR"):
        open_known(tmp_path / "pets.yaml", None, tmp_path / "out", {})


def test_a_known_set_is_packed_or_refused_before_anything_is_written(tmp_path, spec, source):
    from PIL import Image

    spec(SPEC + "options: {min_side: 3}\n")
    root = source(*TRAIN, *VAL)
    for number, path in enumerate(sorted(root.rglob("*.png"))):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    options, sources = open_known(tmp_path / "pets.yaml", root, tmp_path / "out", {"seed": 1})
    found = pack_sources(sources, tmp_path / "out", options)
    assert {split: manifest.samples for split, manifest in found.items()} == {"train": 4, "val": 2}
    assert found["train"].options["min_side"] == 3 and found["train"].options["seed"] == 1
    options, _ = open_known(tmp_path / "pets.yaml", root, tmp_path / "two", {"min_side": 4})
    assert options.min_side == 4
    (root / TRAIN[0]).unlink()
    with pytest.raises(DataError, match="expected 4 images, found 3"):
        open_known(tmp_path / "pets.yaml", root, tmp_path / "three", {})
    assert not list(tmp_path.glob("*three*"))
