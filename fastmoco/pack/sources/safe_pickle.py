"""Reading a pickle of lists, strings and byte arrays without running anything that it asks for.

What makes a pickle dangerous is that it may call any function by name, and that it may claim any
amount of memory. Here a closed list of operations is checked before the first is carried out, and
the four names that an array needs lead to stand-ins that only take down what they are given.
"""

import io
import pickle
import pickletools
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastmoco.errors import DataError
from fastmoco.pack.sources.raw import Bytes

# Protocols 0 to 4 without what makes objects (INST, OBJ, NEWOBJ, EXT, PERSID) or room ahead of
# the data (BYTEARRAY8): what is left makes small objects only, each for some bytes of the file.
OPERATIONS = {
    *("PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE"),
    *("INT", "LONG", "LONG1", "BININT", "BININT1", "BININT2"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET"),
    *("GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"),
}
PUT = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
GET = {"GET", "BINGET", "LONG_BINGET"}
UNSEEN = {"PROTO", "FRAME"}  # leave the stack as it is
CONTAINERS = {
    *("MARK", "EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_DICT", "DICT", "SETITEM"),
    *("SETITEMS", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
}
"""Operations after which a container is on top of the stack."""


class _Refused(Exception):
    """The pickle asks for something that images have no use for."""


class _Array:
    """Stands in for an array, and for the function and the class that make one."""

    state: tuple[Any, ...] = ()

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state


class _Dtype:
    """Stands in for the type of an array's elements."""

    def __init__(self, code: str = "", *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        """Take no byte order: single bytes have none."""


class _Latin1:
    """Stands in for `codecs.encode`, by which Python 3 writes bytes for Python 2.

    It keeps the text, which may be shared: encoded at each call, a small file fills the memory.
    """

    def __init__(self, text: str, encoding: str) -> None:
        if encoding not in ("latin1", "latin-1"):
            raise _Refused(f"the encoding {encoding!r}")
        self.text = text

    def __setstate__(self, state: object) -> None:
        raise _Refused("a state for bytes")


ADMITTED: dict[tuple[str, str], type] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _Latin1,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in ADMITTED:
            raise _Refused(f"the name {module}.{name}")
        return ADMITTED[module, name]


def load(content: bytes, where: str) -> Mapping[str, Any]:
    """Return the dictionary that a pickle holds; arrays in it are for `get_bytes`.

    Args:
        content: a pickle of protocol 0 to 4, by Python 2 or 3.
        where: what holds it, for errors.

    Raises:
        DataError: it is damaged, or asks for anything but lists, strings and byte arrays.
    """
    try:
        _check_operations(content)
        found = _Unpickler(io.BytesIO(content), encoding="latin1").load()
    except _Refused as error:
        raise DataError(
            f"{where} is refused: a pickle of images has no use for {error}. Get the files again "
            "from where they are published."
        ) from error
    except Exception as error:  # damaged pickles raise anything
        raise DataError(f"{where} is damaged ({error}): get it again.") from error
    if not isinstance(found, dict):
        raise DataError(f"{where} holds no dictionary: it is another kind of file.")
    return {str(key): value for key, value in found.items()}


def get_bytes(value: object, where: str) -> Bytes:
    """Return the uint8 array of a loaded pickle.

    Raises:
        DataError: it is none, or its shape and its bytes do not agree.
    """
    try:
        _, shape, dtype, fortran, raw = value.state  # type: ignore[attr-defined]
        content = raw.text if isinstance(raw, _Latin1) else raw
        # Python 2 had no bytes: they come as text of one character a byte.
        data = content.encode("latin-1") if isinstance(content, str) else bytes(content)
        if dtype.code not in ("u1", "uint8"):
            raise ValueError(f"of type {dtype.code}")
        return np.frombuffer(data, dtype=np.uint8).reshape(shape, order="F" if fortran else "C")
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(
            f"{where} holds no sound array of bytes ({error}): get it again."
        ) from error


def _check_operations(content: bytes) -> None:
    is_container, memo = False, dict[int, bool]()
    for count, (operation, argument, _) in enumerate(pickletools.genops(content)):
        name = operation.name
        if name not in OPERATIONS:
            raise _Refused(f"the operation {name}")
        if name in PUT:
            # The unpickler makes room for as many remembered values as the largest number says.
            if argument is not None and argument > count:
                raise _Refused(f"{argument} remembered values")
            memo[len(memo) if argument is None else argument] = is_container
        elif name in GET:
            # Containers that hold one another twice double with each level, where they are read.
            if argument is not None and memo.get(argument):
                raise _Refused("one list in several places")
            is_container = False
        elif name not in UNSEEN:
            is_container = name in CONTAINERS
