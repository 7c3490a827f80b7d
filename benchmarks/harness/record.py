"""Results as data: one JSON row for each measurement and one for the report, only ever appended."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastmoco.errors import UsageError
from harness.report import Measurement, Report

DIGITS = 6  # significant, of each float in a row


class Record:
    """Appends the rows of one benchmark to a file.

    Args:
        path: of the file, None: nothing is kept.
        bench: the benchmark's name. It and the time of the start tell a file's reports apart.

    Raises:
        UsageError: the file cannot be written.
    """

    def __init__(self, path: Path | None, bench: str) -> None:
        self.path = path
        self._head = {"bench": bench, "began": datetime.now(UTC).isoformat(timespec="seconds")}
        if path is not None:
            _refuse_unwritable(path)  # now, not after an hour of measuring

    def measurement(self, found: Measurement) -> None:
        """Append a measurement."""
        self._append({"kind": "measurement", **self._head, **asdict(found)})

    def report(self, report: Report) -> None:
        """Append the report on the measurements."""
        self._append({"kind": "report", **self._head, **report.row()})

    def _append(self, row: Mapping[str, Any]) -> None:
        if self.path is not None:
            with self.path.open("a") as stream:
                stream.write(json.dumps(_rounded(row)) + "\n")


def _refuse_unwritable(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.") from error


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
