"""MATLAB 5 files, read by scipy, which is asked for only when one is met."""

import io
from pathlib import Path
from typing import Any

from fastmoco.errors import DataError, UsageError

INFLATION = 1032  # zlib packs at most so many bytes into one: what is claimed beyond is no data


def load_mat(file: Path | io.BytesIO, name: str, where: str) -> Any:
    """Return one variable of a MATLAB file, dimensions of 1 removed.

    Args:
        file: the file, or its bytes.
        name: of the variable.
        where: what holds it, for errors.

    Raises:
        UsageError: scipy is not installed.
        DataError: the file is damaged or has no such variable.
    """
    _require_scipy()
    from scipy.io import loadmat

    try:
        found = loadmat(file, appendmat=False, squeeze_me=True, variable_names=[name])
        return found[name]
    except KeyError:
        raise DataError(f"{where} has no variable {name}: it is another kind of file.") from None
    except Exception as error:  # damaged files raise anything
        raise _damaged(where, error) from error


def get_shape(path: Path, name: str) -> tuple[int, ...]:
    """Return the shape of a uint8 variable, without reading it.

    Raises:
        UsageError: scipy is not installed.
        DataError: the file is damaged, has no such variable, or claims more than it can hold.
    """
    _require_scipy()
    from scipy.io import whosmat

    try:
        found = {variable: (shape, kind) for variable, shape, kind in whosmat(path, False)}
    except Exception as error:  # damaged files raise anything
        raise _damaged(str(path), error) from error
    shape, kind = found.get(name, ((), ""))
    if kind != "uint8":
        raise DataError(f"{path} has no uint8 variable {name}: it is another kind of file.")
    size = 1
    for side in shape:
        size *= int(side)
    if not 0 < size <= INFLATION * path.stat().st_size:
        raise DataError(f"{path} claims {size} bytes of {name}, more than it can hold.")
    return tuple(map(int, shape))


def _require_scipy() -> None:
    try:
        import scipy.io  # noqa: F401
    except ImportError as error:
        raise UsageError("Reading a .mat file needs scipy: run `pip install scipy`.") from error


def _damaged(where: str, error: Exception) -> DataError:
    return DataError(f"{where} cannot be read as a MATLAB 5 file ({error}): get it again.")
