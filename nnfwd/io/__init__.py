"""Model files: one module a format, chosen by the file's extension.

A reader parses metadata into a plan, checks it, and only then allocates; it executes nothing and follows no reference
out of the file. A writer is atomic: the file appears under its name when it is complete.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nnfwd.errors import ModelFileError

if TYPE_CHECKING:
    from nnfwd.network import Network


@dataclass(frozen=True)
class Limits:
    """What a model file may ask for; beyond it, `ModelFileError` before anything is allocated. Sizes in bytes."""

    file: int = 16 * 2**30
    metadata: int = 16 * 2**20
    tensors: int = 4096
    layers: int = 1024
    dimension: int = 2**24
    tensor: int = 8 * 2**30
    expansion: int = 20
    """How many times larger than its compressed form a member may be."""


def load(path: str | os.PathLike[str], /, *, limits: Limits | None = None) -> "Network":
    """The network of a model file, `.npz` as `save` writes it. Weights are NumPy arrays.

    Raises:
        ModelFileError: for a damaged file, one beyond the limits, or one that holds what cannot be represented.
        FileNotFoundError, PermissionError, IsADirectoryError: as `open`.
    """
    return _module(path).read(Path(path), Limits() if limits is None else limits)


def save(network: "Network", path: str | os.PathLike[str], /) -> None:
    """Writes a network to a model file, `.npz`. The file is replaced as a whole or not at all.

    Raises:
        ModelFileError: for an activation that is a callable of one's own, or a dtype the format has not.
    """
    _module(path).write(network, Path(path))


def _module(path: str | os.PathLike[str]):  # type: ignore[no-untyped-def]
    from nnfwd.io import npz

    formats = {".npz": npz}
    extension = Path(path).suffix.lower()
    if extension not in formats:
        raise ModelFileError(f"{path}: no model format {extension or 'without an extension'}: use {', '.join(formats)}")
    return formats[extension]
