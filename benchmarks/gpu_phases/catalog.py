"""The phases in the order of their worth, and the tables that they fill. Imports nothing heavy."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A table of the page: one line an item.

    Attributes:
        name: of its items, which are called NAME/REST.
        columns: key of an item's figures, with its title and the format of a number.
        note: how the figures came about.
    """

    name: str
    columns: tuple[tuple[str, str, str], ...]
    note: str = ""


@dataclass(frozen=True)
class Phase:
    """A phase, which runs as a process of its own.

    Attributes:
        letter: its name on the command line.
        module: by its full name; its `items(task)` are what is measured.
        title: on the page.
        seconds: its part of a check of ten minutes, and of a shorter one in proportion; what it
            leaves, later ones may use.
        least: seconds under which it would come to nothing, half of them for its imports.
        tables: on the page.
        needs: modules beside those that every phase needs.
        photographs: whether it reads the set of photographs.
    """

    letter: str
    module: str
    title: str
    seconds: float
    least: float
    tables: tuple[Table, ...]
    needs: tuple[str, ...] = ()
    photographs: bool = False


# By import name: what `pip install` calls it, and why.
PACKAGES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "numpy": "numpy",
    "PIL": "pillow",
    "yaml": "pyyaml",
    "pydantic": "pydantic",
    "filelock": "filelock",
    "rich": "rich",
    "typer": "typer",
    "safetensors": "safetensors",
    "nvidia.dali": "nvidia-dali-cuda130 (a driver older than 580: nvidia-dali-cuda120)",
    "six": "six: nvidia-dali needs it by way of astunparse",
    "pytest": "pytest",
    "pytest_timeout": "pytest-timeout: the suite's settings stop pytest without it",
    "hypothesis": "hypothesis",
    "sklearn": "scikit-learn: carries the photographs; or give some by --photos",
}
EVERY = (
    *("torch", "torchvision", "numpy", "PIL", "yaml", "pydantic", "filelock"),
    *("rich", "typer", "safetensors"),
)
DALI = ("nvidia.dali", "six")

SETUP = Phase(
    letter="setup",
    module="gpu_phases.setup",
    title="Machine and data",
    seconds=25,
    least=20,
    tables=(
        Table(
            "data",
            (
                ("images", "images", ",d"),
                ("kb_per_image", "kB an image", ".1f"),
                ("images_per_s", "img/s", ",.0f"),
                ("source", "from", ""),
            ),
        ),
    ),
)

PHASES = (
    Phase(
        letter="a",
        module="gpu_phases.hardware",
        title="What the device can do",
        seconds=15,
        least=10,
        tables=(
            Table(
                "rate",
                (("value", "rate", ",.1f"), ("unit", "unit", ""), ("how", "how", "")),
                "The bounds of phase c are computed from the first two.",
            ),
        ),
    ),
    Phase(
        letter="c",
        module="gpu_phases.step",
        title="Training step on synthetic batches",
        seconds=180,
        least=30,
        tables=(
            Table(
                "momentum",
                (
                    ("kernels", "kernels", "d"),
                    ("waits", "waits for the device", ""),
                    ("ms", "ms", ".3f"),
                    ("difference", "largest difference", ".1e"),
                ),
                "All parameters of the encoder at once; the difference is from m k + (1 - m) q in "
                "fp64.",
            ),
            Table(
                "step",
                (
                    ("images_per_s", "img/s", ",.0f"),
                    ("ms", "ms a step", ".1f"),
                    ("memory_gb", "memory, GB", ".1f"),
                    ("kernels", "kernels a step", ",d"),
                    ("waits", "host waits a step", "d"),
                    ("roofline", "of the roofline, %", ".0f"),
                ),
                "Memory is the peak of torch's allocator; kernels, and calls in which the host "
                "waits, are counted by torch.profiler in one step.",
            ),
        ),
    ),
    Phase(
        letter="d",
        module="gpu_phases.loader",
        title="Loader: two views of MoCo v2",
        seconds=100,
        least=30,
        tables=(
            Table(
                "draw",
                (
                    ("images_per_s", "img/s", ",.0f"),
                    ("cores", "CPU cores busy", ".1f"),
                    ("first_batch_s", "first batch, s", ".1f"),
                    ("memory_gb", "device memory in use, GB", ".1f"),
                ),
                "Ours end on the device, ImageFolder's in host memory. Cores busy: CPU time of the "
                "process and its workers over wall time.",
            ),
            Table(
                "pixels",
                (
                    ("mean", "mean difference, levels", ".2f"),
                    ("largest", "largest, levels", ".1f"),
                    ("images", "images", "d"),
                ),
                "Both views against those of the CPU, in levels of 0..255.",
            ),
        ),
        needs=DALI,
        photographs=True,
    ),
    Phase(
        letter="e",
        module="gpu_phases.together",
        title="Loader and step together",
        seconds=50,
        least=25,
        tables=(
            Table(
                "train",
                (
                    ("synthetic", "step alone, img/s", ",.0f"),
                    ("real", "together, img/s", ",.0f"),
                    ("ratio", "together / alone", ".2f"),
                    ("data_wait_percent", "waiting for data, %", ".1f"),
                ),
            ),
        ),
        needs=DALI,
        photographs=True,
    ),
    Phase(
        letter="b",
        module="gpu_phases.suite",
        title="Tests that need a GPU",
        seconds=70,
        least=45,
        tables=(
            Table(
                "pytest",
                (
                    ("passed", "passed", "d"),
                    ("failed", "failed", "d"),
                    ("skipped", "skipped", "d"),
                    ("seconds", "s", ".0f"),
                ),
            ),
        ),
        needs=(*DALI, "pytest", "pytest_timeout", "hypothesis"),
    ),
    Phase(
        letter="g",
        module="gpu_phases.neighbors",
        title="kNN",
        seconds=25,
        least=15,
        tables=(
            Table(
                "knn",
                (
                    ("queries", "queries", ",d"),
                    ("bank", "bank", ",d"),
                    ("seconds", "s", ".2f"),
                    ("accuracy", "accuracy, %", ".2f"),
                    ("agreement", "same answer as plainly, %", ".1f"),
                ),
                "Clusters of random features; the plain way, one product and topk in fp32, answers "
                "the first queries again.",
            ),
        ),
    ),
    Phase(
        letter="h",
        module="gpu_phases.checkpoint",
        title="Cost of a checkpoint",
        seconds=60,
        least=50,
        tables=(
            Table(
                "save",
                (
                    ("ms", "median step, ms", ".1f"),
                    ("longest_ms", "longest step after a save, ms", ".1f"),
                    ("extra_ms", "a save costs, ms", ".1f"),
                    ("saves", "saves", "d"),
                    ("size_mb", "size, MB", ".0f"),
                ),
                "From metrics.jsonl of a run that logs each step. A save costs what the steps up "
                "to the next one take longer than as many median ones.",
            ),
        ),
        needs=DALI,
        photographs=True,
    ),
    Phase(
        letter="f",
        module="gpu_phases.cifar",
        title="cifar10_r18 beside the published curve",
        seconds=120,
        least=60,
        tables=(
            Table(
                "epoch",
                (
                    ("loss", "loss", ".3f"),
                    ("published_loss", "published", ".3f"),
                    ("knn_top1", "kNN, %", ".2f"),
                    ("published_knn", "published", ".2f"),
                    ("seconds", "s since the start", ".0f"),
                ),
                "One seed, stopped when its time was up; the published run is one seed too.",
            ),
        ),
        needs=DALI,
    ),
)
