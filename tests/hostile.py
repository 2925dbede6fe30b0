"""Damaged model files: every truncation, a change of every byte, random edits; and what loading one may do."""

import contextlib
import difflib  # noqa: F401  # which the message of an unknown name imports when it is first needed
import encodings.cp437  # noqa: F401  # and zipfile this
import importlib
import os
import sys
import time
import tracemalloc
import unittest.mock
from pathlib import Path

import numpy as np

import nnfwd
from nnfwd.errors import ModelFileError

ALL = os.environ.get("NNFWD_FUZZ") == "all"
SECONDS = 5
ROOM = 64 * 2**20
_FORBIDDEN = ("exec", "import", "pickle.find_class", "marshal.", "os.", "shutil.", "subprocess.", "socket.", "ctypes.")
_seen: list[tuple[str, str]] | None = None


def _hook(event, arguments):
    if _seen is not None and (event == "open" or event.startswith(_FORBIDDEN)):
        _seen.append((event, str(arguments[0]) if arguments else ""))


sys.addaudithook(_hook)


@contextlib.contextmanager
def watched():
    """The list of (event, first argument) of every file opened, module imported, code executed meanwhile."""
    global _seen
    _seen = seen = []
    try:
        yield seen
    finally:
        _seen = None


_imported = importlib.import_module


def _import_module(name, package=None):
    assert name.split(".")[0] == "nnfwd", f"{name} is imported by name"
    return _imported(name, package)


def attempt(path: Path, **arguments):
    """The network of a file, or the ModelFileError; nothing else may come out, nor take long, nor need much memory.

    Memory is measured while tracemalloc runs.
    """
    known = nnfwd.io.find(path)
    known.function(known.reader)  # the warm-up: the reader's module is ours
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    start = time.perf_counter()
    with watched() as seen, unittest.mock.patch("importlib.import_module", _import_module):
        try:
            outcome = nnfwd.load(path, **arguments)
        except ModelFileError as error:
            outcome = error
    seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1] - before
    files = {str(path), str(arguments.get("weights"))}
    assert [event for event in seen if event[0] != "open" or event[1] not in files] == []
    assert seconds < SECONDS, f"{seconds:.1f} s"
    assert peak <= 2 * path.stat().st_size + ROOM, f"{peak} bytes"
    if isinstance(outcome, ModelFileError):
        assert str(outcome).startswith(str(path))
        assert "\n" not in str(outcome)
    return outcome


def edits(seed: bytes, rng: np.random.Generator, count: int):
    """Random edits of a few bytes: cut out, doubled, overwritten, inserted, swapped."""
    extremes = (b"\0" * 8, b"\xff" * 8, b"\xff\xff\xff\x7f", b"\0\0\0\x80", (2**40).to_bytes(8, "little"))
    for _ in range(count):
        data = bytearray(seed)
        for _ in range(rng.integers(1, 4)):
            i, n = int(rng.integers(len(data) + 1)), int(rng.integers(1, 65))
            kind = rng.integers(5)
            if kind == 0:
                del data[i : i + n]
            elif kind == 1:
                data[i:i] = data[i : i + n]
            elif kind == 2:
                extreme = extremes[rng.integers(len(extremes))]
                data[i : i + len(extreme)] = extreme
            elif kind == 3:
                data[i:i] = rng.bytes(n)
            else:
                j = int(rng.integers(len(data) + 1))
                data[i : i + n], data[j : j + n] = data[j : j + n], data[i : i + n]
        yield bytes(data)


def damaged(seed: bytes, rng: np.random.Generator):
    """Every truncation; one drawn change of every byte, or all 255 under NNFWD_FUZZ=all; random edits."""
    for n in range(len(seed)):
        yield seed[:n]
    for i, byte in enumerate(seed):
        changes = range(1, 256) if ALL else [int(rng.integers(1, 256))]
        for change in changes:
            yield seed[:i] + bytes([(byte + change) % 256]) + seed[i + 1 :]
    yield from edits(seed, rng, 20_000 if ALL else 500)


def survives(tmp_path: Path, extension: str, seed: bytes, note, **arguments) -> None:
    """Loads a whole file, then damaged copies of it, each by `attempt`; notes how many were refused."""
    path = tmp_path / f"seed{extension}"
    path.write_bytes(seed)
    nnfwd.load(path, **arguments)  # the warm-up: what it imports, it imports now
    rng = np.random.default_rng(len(seed))
    count = refused = 0
    assert not isinstance(attempt(path, **arguments), ModelFileError)
    try:
        for data in damaged(seed, rng):
            path.write_bytes(data)
            if ALL or count % 4 == 0:  # it makes everything slow
                tracemalloc.start()
            refused += isinstance(attempt(path, **arguments), ModelFileError)
            tracemalloc.stop()
            count += 1
    except Exception as error:
        error.add_note(f"the damaged file is {path}")
        raise
    finally:
        tracemalloc.stop()
    note(f"{count} damaged {extension} files of {len(seed)} bytes: {refused} refused, no other error")
    assert refused >= len(seed) // 2
