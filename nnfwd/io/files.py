"""Writing a file as a whole or not at all."""

import contextlib
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from nnfwd.errors import DataFileError


def check_output(path: Path, formats: Iterable[str], *, sources: Iterable[Path] = (), force: bool) -> None:
    """Raises `DataFileError` unless a file of one of these formats may be written to `path`: before any work."""
    if path.suffix.lower() not in formats:
        given = path.suffix or "without an extension"
        raise DataFileError(f"{path}: no format {given} here: use {', '.join(formats)}")
    if path.exists() and any(path.samefile(source) for source in sources):
        raise DataFileError(f"{path} is read from: choose another name for the output")
    if not path.parent.is_dir():
        raise DataFileError(f"{path}: the folder {path.parent} does not exist")
    if path.exists() and not force:
        raise DataFileError(f"{path} exists: choose another name, or replace it with --force")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[Any]]:
    """A binary file to write, which takes the name `path` when the block ends well, and vanishes when it does not."""
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    try:
        handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0), 0o666)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from None
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def synced(file: IO[Any] | Path, /) -> None:
    """Sees to it that a file, or what a folder lists, is on the disk."""
    if not isinstance(file, Path):
        file.flush()
        os.fsync(file.fileno())
        return
    if file.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(file, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
