"""Inputs and outputs as files: `.npy`, `.npz` and `.csv`."""

import csv
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

import numpy as np

from nnfwd.errors import DataFileError
from nnfwd.io.files import replacing


def check_output(path: Path, formats: Iterable[str], *, sources: Iterable[Path] = (), force: bool) -> None:
    """Raises `DataFileError` unless a file of one of these formats may be written to `path`: before any work."""
    _known(path, formats)
    if path.exists() and any(path.samefile(source) for source in sources):
        raise DataFileError(f"{path} is read from: choose another name for the output")
    if not path.parent.is_dir():
        raise DataFileError(f"{path}: the folder {path.parent} does not exist")
    if path.exists() and not force:
        raise DataFileError(f"{path} exists: choose another name, or replace it with --force")


def read_array(path: Path, /) -> tuple[np.ndarray, bool]:
    """The array of a file, and whether the file states its dtype (text does not: it is read as float64).

    `.npy`; `.npz` with one array, or one of them called x; `.csv` of numbers, `(rows, columns)`, a first line of names
    is skipped.

    Raises:
        DataFileError: for an unknown format or a damaged file.
        FileNotFoundError, PermissionError: as `open`.
    """
    read = _READERS[_known(path, _READERS)]
    try:
        return read(path), path.suffix.lower() != ".csv"
    except (FileNotFoundError, PermissionError, IsADirectoryError, DataFileError):
        raise
    except Exception as error:  # whatever NumPy's readers meet in a damaged file
        raise DataFileError(f"{path}: not a valid {path.suffix} file of numbers: {error}") from error


def write_array(path: Path, y: np.ndarray, /) -> None:
    """Writes an array in the format of the extension, as a whole or not at all; in `.npz` it is called y."""
    write = _WRITERS[_known(path, _WRITERS)]
    if path.suffix.lower() == ".csv" and y.ndim > 2:
        raise DataFileError(f"{path}: a .csv has two dimensions and the result is {y.shape}: write .npy")
    with replacing(path) as file:
        write(file, y)


def _known(path: Path, formats: Iterable[str]) -> str:
    extension = path.suffix.lower()
    if extension not in formats:
        given = extension or "without an extension"
        raise DataFileError(f"{path}: no format {given} here: use {', '.join(formats)}")
    return extension


def _read_npz(path: Path) -> np.ndarray:
    with np.load(path, allow_pickle=False) as archive:
        name = "x" if "x" in archive.files else archive.files[0]
        if name != "x" and len(archive.files) != 1:
            raise DataFileError(f"{path} holds {', '.join(archive.files)}: call the input x")
        return np.asarray(archive[name])


def _read_csv(path: Path) -> np.ndarray:
    with open(path, encoding="utf-8-sig") as file:
        lines = [line for line in file if line.strip()]
    names = bool(lines) and not any(map(_is_value, lines[0].split(",")))
    if len(lines) <= names:
        raise DataFileError(f"{path} holds no numbers")
    return np.loadtxt(lines[names:], delimiter=",", ndmin=2)


def _is_value(text: str) -> bool:
    """Whether a cell of the first line is a value and no name: a number, or one that is missing."""
    text = text.strip().strip('"')
    if not any(map(str.isalpha, text)) or text.lower() in ("na", "n/a", "nan", "null", "none"):
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True


def _write_npy(file: IO[bytes], y: np.ndarray) -> None:
    np.save(file, y)


def _write_npz(file: IO[bytes], y: np.ndarray) -> None:
    np.savez(file, y=y)


def _write_csv(file: IO[bytes], y: np.ndarray) -> None:
    if y.dtype.kind != "f":  # labels: one a line, or a row of them
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(y.reshape(-1, 1) if y.ndim < 2 else y)
        file.write(text.getvalue().encode())
        return
    digits = {"float16": 5, "float32": 9}.get(str(y.dtype), 17)  # enough to read the same number back
    np.savetxt(file, np.atleast_2d(y), fmt=f"%.{digits}g", delimiter=",")


WRITTEN = (".npy", ".npz", ".csv")
_READERS: dict[str, Callable[[Path], np.ndarray]] = {
    ".npy": lambda path: np.load(path, mmap_mode="r", allow_pickle=False),
    ".npz": _read_npz,
    ".csv": _read_csv,
}
_WRITERS: dict[str, Callable[[IO[bytes], np.ndarray], None]] = {
    ".npy": _write_npy,
    ".npz": _write_npz,
    ".csv": _write_csv,
}
