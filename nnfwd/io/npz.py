"""The `.npz` and `.npy` formats, NumPy's own.

A `.npz` of ours has the arrays of `description.py` and one member more, `nnfwd`, its JSON text. One without it is a
state dict, see `state_dict.py`; a `.npy` is one weight `(out, in)`.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from nnfwd.errors import ModelFileError
from nnfwd.io import description, state_dict
from nnfwd.io.files import replacing
from nnfwd.io.reading import Archive, Given, file_size, npy
from nnfwd.network import Network

_DESCRIPTION = "nnfwd"


def write(network: Network, path: Path) -> None:
    """Writes a network, as a whole or not at all."""
    text, arrays = description.describe(network)
    with replacing(path) as file:
        np.savez(file, **{_DESCRIPTION: np.frombuffer(text.encode(), dtype="u1")}, **arrays)  # type: ignore[arg-type]


def read(file: IO[bytes], given: Given) -> Network:
    """Reads a network."""
    archive = Archive(file, given.limits)
    plans = {}
    for member, info in archive.members.items():
        name = member.removesuffix(".npy")
        if name in plans or name == member:
            raise ModelFileError(f"the member {member} is none that NumPy writes, or stands there twice")
        plans[name] = npy(lambda member=member: archive.open(member), info.file_size, member, given.limits)  # type: ignore[misc]
    text = plans.pop(_DESCRIPTION, None)
    if text is None:
        return state_dict.network(plans, given)
    given.refuse("activations", "prefix", "epsilon")
    if text.dtype != "uint8" or len(text.shape) != 1 or text.shape[0] > given.limits.metadata:
        raise ModelFileError(
            f"its description is {text.dtype} {text.shape}: it must be up to {given.limits.metadata} bytes"
        )

    return description.network(text.read().tobytes(), plans, given.limits)


def read_npy(file: IO[bytes], given: Given) -> Network:
    """Reads one weight `(out, in)`, a network of one layer without a bias."""
    size = file_size(file)

    @contextlib.contextmanager
    def again() -> Iterator[IO[bytes]]:  # the plan reads twice, the file is open once
        file.seek(0)
        yield file

    return state_dict.network({"weight": npy(again, size, "the array", given.limits)}, given)
