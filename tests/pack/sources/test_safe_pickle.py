"""Hostile pickles: nothing runs, nothing fills the memory, and the refusal says why."""

import pickle
import resource
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastmoco.errors import DataError
from fastmoco.pack.sources.safe_pickle import ADMITTED, get_bytes, load


class Runs:
    """Unpickles by calling a function with arguments."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def hostile(sentinel: Path) -> dict[str, bytes]:
    import os

    command = f"touch {sentinel}"
    text = repr(command).encode()
    pickles = {
        f"os.system, protocol {protocol}": pickle.dumps(
            {"data": Runs(os.system, command)}, protocol=protocol
        )
        for protocol in range(6)
    }
    return pickles | {
        "popen": pickle.dumps({"data": Runs(subprocess.Popen, ["touch", str(sentinel)])}),
        "eval": pickle.dumps({"data": Runs(eval, f"open({str(sentinel)!r}, 'w')")}),
        "inst": b"(S" + text + b"\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nS" + text + b"\no.",
        "through numpy": b"cnumpy\nndarray.__class__\n.",
        "through codecs": b"c_codecs\nencode.__globals__\n.",
        "stacked name": b"\x80\x04\x8c\x02os\x8c\x06system\x93S" + text + b"\n\x85R.",
        "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0fdtype.__class__\x93.",
        "extension": b"\x80\x02\x82\x01.",
        "persistent": b"Pname\n.",
    }


def test_nothing_runs(tmp_path):
    sentinel = tmp_path / "sentinel"
    for kind, content in hostile(sentinel).items():
        with pytest.raises(DataError, match=r"is refused: .* no use for the (name|operation)"):
            load(content, kind)
        assert not sentinel.exists(), kind


def test_the_hostile_pickles_are_hostile(tmp_path):
    # Else the test above would prove nothing.
    sentinel = tmp_path / "sentinel"
    pickle.loads(hostile(sentinel)["os.system, protocol 2"])
    assert sentinel.exists()


def test_what_is_admitted_cannot_be_altered_by_a_pickle():
    before = {name: dict(vars(stand_in)) for name, stand_in in ADMITTED.items()}
    for name in (b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"c_codecs\nencode\n"):
        # A state for the stand-in itself, which would set attributes for all pickles to come.
        content = name + b"(N}X\x05\x00\x00\x00stateX\x01\x00\x00\x00xstb."
        with pytest.raises(DataError):
            load(content, "PICKLE")
    assert before == {name: dict(vars(stand_in)) for name, stand_in in ADMITTED.items()}


def doubled(levels: int, value: list | tuple, protocol: int) -> bytes:
    for _ in range(levels):
        value = type(value)([value, value])
    return pickle.dumps({"labels": value}, protocol=protocol)


BOMBS = {
    # A memo of 2^31 places, an array of 8 GB, bytes of 8 GB, a byte array of 8 GB.
    "memo": b"\x80\x02}r" + struct.pack("<I", 2**31 - 1) + b".",
    "memo as text": b"}p2000000000\n.",
    "array": b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(L8000000000L\ntU\x01btR.",
    "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 8 * 10**9) + b"x.",
    "byte array": b"\x80\x05\x96" + struct.pack("<Q", 8 * 10**9) + b"x.",
    "long": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x.",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}.",
}

BOMBS |= {
    # Forty levels, each of which holds the one below twice: as labels, and as a key that is hashed.
    f"nested {kind}, protocol {protocol}": doubled(40, empty, protocol)
    for kind, empty in (("list", []), ("tuple", (1, 2)))
    for protocol in (0, 2, 4)
}


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))


@pytest.mark.parametrize("kind", BOMBS)
def test_no_claim_fills_the_memory(kind):
    # In a process of its own, whose memory is bounded: it must say no, not die.
    code = (
        "import sys; from fastmoco.errors import DataError\n"
        "from fastmoco.pack.sources.safe_pickle import load\n"
        "try:\n  load(bytes.fromhex(sys.argv[1]), 'PICKLE')\n"
        "except DataError as error:\n  print(error)\n"
        "line = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(int(line.split()[1]) < 2**18)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, BOMBS[kind].hex()],
        capture_output=True,
        text=True,
        preexec_fn=_limit_memory,
        env={"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    assert "PICKLE" in ran.stdout and "()" not in ran.stdout  # a MemoryError, which has no words
    assert ran.stdout.endswith("True\n")


def test_an_array_that_claims_more_than_it_has_is_refused():
    whole = pickle.dumps({"a": np.zeros((2, 3), dtype=np.uint8)}, protocol=2)
    claims = whole.replace(b"K\x02K\x03\x86", b"K\x20K\x03\x86")
    assert claims != whole
    with pytest.raises(DataError, match="no sound array"):
        get_bytes(load(claims, "PICKLE")["a"], "PICKLE")


def test_arrays_in_either_order_come_back():
    for order in ("C", "F"):
        array = np.asarray(np.arange(6, dtype=np.uint8).reshape(2, 3), order=order)
        for protocol in (2, 4):
            loaded = load(pickle.dumps({"a": array}, protocol=protocol), "PICKLE")
            np.testing.assert_array_equal(get_bytes(loaded["a"], "PICKLE"), array)


def test_bytes_are_admitted_in_one_encoding_only():
    # Another would import its codec, and some of them unpack.
    whole = pickle.dumps({"a": np.arange(6, dtype=np.uint8)}, protocol=2)
    other = whole.replace(b"latin1", b"base64")
    assert other != whole
    with pytest.raises(DataError, match="no use for the encoding 'base64'"):
        load(other, "PICKLE")


def test_random_damage_never_escapes():
    whole = bytearray(
        pickle.dumps({"data": np.zeros((2, 8), dtype=np.uint8), "labels": [1, 2]}, protocol=2)
    )
    chance = np.random.default_rng(0)
    for _ in range(2000):
        content = bytearray(whole)
        for _ in range(3):
            content[chance.integers(len(content))] = chance.integers(256)
        try:
            get_bytes(load(bytes(content), "PICKLE").get("data"), "PICKLE")
        except DataError:
            continue
