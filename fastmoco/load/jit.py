"""numba's compiler, with its results kept where they can be."""

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

from fastmoco.core.terminal import echo

Function = TypeVar("Function", bound=Callable[..., Any])


_config: Any = import_module("numba.core.config")


def _cache() -> Path | None:
    """Return a folder for compiled functions that can be written to, None if there is none."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(_config.CACHE_DIR or Path(base) / "fastmoco")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        echo(
            f"warning: compiles anew at each start: {folder} cannot be written ({error})", err=True
        )
        return None
    return folder


_CACHE = _cache()


def jit(function: Function) -> Function:
    """Compile a function at its first call; it runs without the interpreter's lock."""
    before = _config.CACHE_DIR
    _config.CACHE_DIR = str(_CACHE or before)  # numba looks at it here, and nobody else's moves
    try:
        # fastmath: sums may be vectorized. Each image is drawn by one thread, so that its bits do
        # not depend on how many there are. numpy: a division that may raise is not vectorized.
        compile_ = numba.njit(
            nogil=True, fastmath=True, error_model="numpy", cache=_CACHE is not None
        )
        compiled: Any = compile_(function)
    finally:
        _config.CACHE_DIR = before
    return cast(Function, compiled)
