"""The contract between training and evaluation: the run folder and its verified checkpoints.

encoder.json                     the network, and the images that it takes
config.yaml                      the resolved recipe of the last start; none of an import
configs/step-000000024.yaml      where it changed on the way: each, by the step that it held from
versions.json                    what it ran on
metrics.jsonl                    one row a logged step, epoch and monitor
evaluations.jsonl, evaluations/  numbers of its encoder, and what was said of each image
status.json                      how the last start ended: exit code and message; code null: it
                                 runs, or was killed
stopped                          there if a signal stopped it before its end: to be started again
checkpoints/step-000000097/      state.pt and the manifest.json that vouches for it; whoever reads a
                                 run takes such a path too, and checkpoints/best
"""

import itertools
import json
import math
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout

from fastmoco.config.encoder import EncoderSpec
from fastmoco.config.loading import differences, in_sections, to_yaml, validate
from fastmoco.config.recipe import Recipe, Runtime
from fastmoco.core.files import write_bytes, write_json
from fastmoco.core.strict_yaml import parse_yaml, validate_as
from fastmoco.errors import CheckpointError, UsageError
from fastmoco.runs.checkpoints import (
    Fingerprint,
    Measured,
    State,
    check_fingerprint,
    find_best,
    read_manifest,
    read_measured,
    write_checkpoint,
)

ORIGIN = "origin.json"  # in the folder of a run whose weights another program trained


class RunFolder:
    """A run on disk.

    Args:
        root: the folder; made when it is first written to. Or one of its checkpoints, to be read:
            RUN/checkpoints/step-000000012, or RUN/checkpoints/best.
    """

    def __init__(self, root: Path) -> None:
        self.root, self._asked = _split(Path(root))
        self.checkpoints = self.root / "checkpoints"
        self.config, self.configs = self.root / "config.yaml", self.root / "configs"
        self.metrics = self.root / "metrics.jsonl"
        self.damaged: list[str] = []  # names of checkpoints that `latest` had to pass over
        self.fingerprint: Fingerprint = {}  # of the checkpoint that `latest` returned

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for writing; the lock dies with its process.

        Raises:
            UsageError: another process holds it, it cannot be written, or it is a checkpoint.
        """
        if self._asked:
            raise UsageError(f"out= names a checkpoint; name its run: out={self.root}.")
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.root / ".lock", timeout=0)
            lock.acquire()
        except Timeout:
            raise UsageError(
                f"The run folder {self.root} is in use by another process ({self._holder()}): "
                "wait for it, stop it, or choose another folder by out=DIR."
            ) from None
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            for leftover in self.checkpoints.glob(".*.partial"):
                shutil.rmtree(leftover, ignore_errors=True)
            yield
        finally:
            lock.release()

    def _unwritable(self, error: OSError) -> UsageError:
        return UsageError(
            f"Cannot write to the run folder {self.root} ({error.strerror}): "
            "make room, or choose another by out=DIR."
        )

    def begin(self, recipe: Recipe, versions: dict[str, Any], step: int) -> list[str]:
        """Take over the folder for a start from `step`, which nothing speaks against any more.

        Returns:
            Sentences: what changed in the recipe, and where the metrics of a run whose checkpoints
            are gone were put.

        Raises:
            UsageError: the folder cannot be written.
        """
        try:
            (self.root / "stopped").unlink(missing_ok=True)
            holder = f"process {os.getpid()} on {socket.gethostname()}"
            write_json(self.root / "status.json", {"code": None, "message": f"running: {holder}"})
            aside = None if step else self._put_metrics_aside()
            self.rewind(step if step else -1)
            changes = self.describe(recipe, versions, step)
        except OSError as error:
            raise self._unwritable(error) from error
        told = [f"from step {step} on {change}" for change in changes]
        return told + ([f"no checkpoint goes on from metrics.jsonl: now {aside}"] if aside else [])

    def _put_metrics_aside(self) -> str | None:
        """Rename the metrics of steps that no checkpoint goes on from; return their new name."""
        if not any(row["step"] for row in self.rows()):
            return None
        names = (f"metrics-{number}.jsonl" for number in itertools.count(1))
        name = next(name for name in names if not (self.root / name).exists())
        self.metrics.rename(self.root / name)
        return name

    def _status(self) -> dict[str, Any]:
        try:
            found = json.loads((self.root / "status.json").read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _holder(self) -> str:
        status = self._status()
        return "not known" if self.ended() else str(status.get("message", "not known"))

    @property
    def imported(self) -> bool:
        """Whether the weights came from another program."""
        return (self.root / ORIGIN).is_file()

    def recipe(self) -> Recipe | None:
        """Return the resolved recipe of the run; None: its weights were imported.

        Raises:
            UsageError: there is no run here.
        """
        if not self.config.is_file():
            self.spec()
            return None
        return validate(in_sections(_yaml(self.config)), str(self.config))

    @property
    def name(self) -> str:
        """What the run is called."""
        recipe = self.recipe()
        return recipe.name if recipe else self.root.resolve().name

    def runtime(self) -> Runtime:
        """Return how the run is computed; an import in fp32, as its weights came."""
        recipe = self.recipe()
        return recipe.runtime if recipe else Runtime(precision="fp32")

    def spec(self) -> EncoderSpec:
        """Return what the run's encoder is.

        Raises:
            UsageError: there is no run here.
        """
        path = self.root / "encoder.json"
        if path.is_file():
            return validate_as(EncoderSpec, _yaml(path), str(path))
        if not self.config.is_file():
            raise UsageError(f"{self.root} is not a run folder (no encoder.json).")
        # A run from before encoder.json, which imports had a recipe in too.
        return validate(in_sections(_yaml(self.config)), str(self.config)).encoder

    def describe_encoder(self, spec: EncoderSpec, versions: dict[str, Any]) -> None:
        """Write down what the encoder is, and what its program ran on."""
        write_json(self.root / "encoder.json", spec.model_dump(mode="json"))
        write_json(self.root / "versions.json", versions)

    def describe(self, recipe: Recipe, versions: dict[str, Any], step: int = 0) -> list[str]:
        """Write down what is run from `step` on, and on what.

        A recipe that differs from that of the steps before is kept beside theirs.

        Returns:
            The keys that differ, as "key: old -> new".
        """
        config = self.config
        kept = sorted(self.configs.glob("step-*.yaml"))
        now = self.configs / f"step-{step:09d}.yaml"
        for undone in [path for path in kept if path >= now]:  # of steps that are taken again
            undone.unlink()
        changes = []
        if step and config.is_file():
            before = ([config] + [path for path in kept if path < now])[-1].read_text()
            old = in_sections(yaml.safe_load(before))
            # What step 0 started from stays that, whatever is asked for by now.
            init = Path(old["init"]) if old.get("init") else None
            recipe = recipe.model_copy(update={"init": init})
            changes = differences(old, recipe.model_dump(mode="json"))
        text = to_yaml(recipe)
        if changes:
            self.configs.mkdir(exist_ok=True)
            if not kept:
                write_bytes(self.configs / f"step-{0:09d}.yaml", before.encode())
            write_bytes(now, text.encode())
        write_bytes(config, text.encode())
        self.describe_encoder(recipe.encoder, versions)
        return changes

    def finish(self, code: int, message: str) -> None:
        """Write down how the run ended: torchrun hides its workers' exit codes."""
        write_json(self.root / "status.json", {"code": code, "message": message})

    def ended(self) -> bool:
        """Return whether status.json says already how the run ended."""
        return self._status().get("code") is not None

    def ended_well(self) -> bool:
        """Return whether a run went to its end here, or to a signal: it has left a checkpoint."""
        return self._status().get("code") == 0

    def stop(self, message: str) -> None:
        """Write down that a signal stopped the run: job scripts start it again by the marker."""
        write_bytes(self.root / "stopped", f"{message}\n".encode())
        self.finish(0, message)

    def log(self, row: dict[str, Any]) -> None:
        """Append a row to the metrics; a number that is not finite becomes null."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        with self.metrics.open("a") as stream:
            stream.write(json.dumps(finite) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """Return the metrics; a row cut short by a kill or a full disk is left out."""
        if not self.metrics.is_file():
            return []
        lines = self.metrics.read_text().splitlines(keepends=True)
        return [row for line in lines if (row := parse_row(line)) is not None]

    def rewind(self, step: int) -> None:
        """Drop the metrics of steps after `step`: a resumed run writes them again."""
        kept = [json.dumps(row) + "\n" for row in self.rows() if row["step"] <= step]
        write_bytes(self.metrics, "".join(kept).encode())

    def save(
        self,
        state: State,
        step: int,
        fingerprint: Fingerprint,
        keep: int,
        measured: Measured | None = None,
        best: str | None = None,
    ) -> Path:
        """Write a checkpoint, whole or not at all, then drop all but the newest and the best.

        Older ones go only once the new one has been read back.

        Args:
            state, step, fingerprint: of the run.
            keep: how many of the newest stay.
            measured: see there.
            best: the number by which one more stays, however old; None: none does.

        Raises:
            OSError: it cannot be written; the older ones are as before.
        """
        final = self.checkpoints / f"step-{step:09d}"
        shutil.rmtree(final, ignore_errors=True)  # the same step again, after a damaged one
        write_checkpoint(final, state, step, fingerprint, measured or {})
        # Newer ones are damaged, else the run had gone on from them: they do not count.
        folders = [folder for folder in self._folders() if folder <= final]
        spared = find_best(folders, best) if best else None
        for old in folders[:-keep]:
            if old != spared:
                shutil.rmtree(old, ignore_errors=True)
        return final

    def measured_best(self, metric: str, step: int) -> Measured:
        """Return what was measured of the best checkpoint up to a step; nothing: there is none."""
        last = self.checkpoints / f"step-{step:09d}"
        best = find_best([folder for folder in self._folders() if folder <= last], metric)
        return read_measured(best) if best else {}

    def last_good(self) -> str:
        """Say which checkpoint a run would go on from."""
        for folder in reversed(self._folders()):
            if read_manifest(folder):
                return f"The last good checkpoint is {folder}."
        return "There is no checkpoint yet."

    def _folders(self) -> list[Path]:
        return sorted(self.checkpoints.glob("step-*"))

    def _readable(self) -> list[Path]:
        """Return those that may be read: the one that was asked for, or all of them."""
        folders = self._folders()
        if not self._asked:
            return folders
        named = {folder.name: folder for folder in folders}
        recipe = self.recipe()
        metric = recipe.checkpoints.best_metric if recipe else None
        if metric and (best := find_best(folders, metric)):
            named["best"] = best
        if self._asked in named:
            return [named[self._asked]]
        why = ""
        if self._asked == "best":
            why = (
                "; the best one is known of runs with checkpoints.best=rankme, once it is measured"
            )
        there = ", ".join(named) or "none yet"
        raise CheckpointError(
            f"There is no {self._asked} in {self.checkpoints} (there are: {there}){why}."
        )

    def latest(self, fingerprint: Fingerprint | None = None) -> tuple[State, int] | None:
        """Return the newest checkpoint that its hash vouches for, and its step; None: none yet.

        Those that had to be passed over are named in `damaged`.

        Args:
            fingerprint: the fingerprint that it must have.

        Raises:
            CheckpointError: every checkpoint is damaged, or one is of another run or format.
        """
        damaged = self.damaged = []
        for folder in reversed(self._readable()):
            manifest = read_manifest(folder)
            if manifest is None:
                damaged.append(folder.name)
                continue
            if fingerprint is not None:
                check_fingerprint(folder, manifest["fingerprint"], fingerprint)
            # On the CPU: what rank 0 saved from its GPU is for every rank, or for none.
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
            self.fingerprint = manifest["fingerprint"]
            return state, int(manifest["step"])
        if damaged and self._asked:
            raise CheckpointError(
                f"{damaged[0]} of {self.root} is damaged (not the bytes of its sha256): restore "
                "it, or name another."
            )
        if damaged:
            raise CheckpointError(
                f"Every checkpoint of {self.root} is damaged ({', '.join(damaged)}): "
                "restore one, or start anew with another out=DIR."
            )
        return None


def _split(path: Path) -> tuple[Path, str]:
    """Return the run that a path names, and the checkpoint; "": the newest."""
    root = path.parent.parent
    is_run = (root / "encoder.json").is_file() or (root / "config.yaml").is_file()
    if path.parent.name == "checkpoints" and is_run:
        return root, path.name
    return path, ""


def _yaml(path: Path) -> dict[str, Any]:
    values = parse_yaml(path.read_bytes(), str(path))
    return values if isinstance(values, dict) else {}


def parse_row(line: str) -> dict[str, Any] | None:
    """Return a line of a .jsonl; None: it was cut short by a kill or a full disk."""
    try:
        row: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return row if line.endswith("\n") else None
