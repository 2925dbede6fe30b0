"""Model files: one module a format, chosen by the file's extension.

A reader parses metadata into a plan, checks it, and only then allocates; it executes nothing, imports nothing by name
and follows no reference out of the file. A writer is atomic: the file appears under its name when it is complete.
"""

import hashlib
import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnfwd.errors import ModelFileError
from nnfwd.io.reading import Given, Limits, opened

if TYPE_CHECKING:
    from nnfwd.network import Network

__all__ = ["FORMATS", "Format", "Limits", "load", "save"]


@dataclass(frozen=True)
class Format:
    """A kind of model file."""

    name: str
    extensions: tuple[str, ...]
    module: str
    """Of `nnfwd.io`; it has the function `reader`, and `write` where the format is written."""
    reader: str = "read"
    takes: frozenset[str] = frozenset()
    """Which arguments of `load` it needs or uses, because such a file does not state them."""
    writes: bool = False

    def function(self, name: str) -> Callable[..., Any]:
        """`read` or `write` of this format."""
        return getattr(importlib.import_module(f"nnfwd.io.{self.module}"), name)


_STATE_DICT = frozenset({"activations", "prefix", "epsilon"})
FORMATS = (
    Format("NumPy npz", (".npz",), "npz", takes=_STATE_DICT, writes=True),
    Format("NumPy npy", (".npy",), "npz", "read_npy", takes=_STATE_DICT),
    Format("safetensors", (".safetensors",), "safetensors", takes=_STATE_DICT, writes=True),
    Format("ONNX", (".onnx",), "onnx", writes=True),
    Format("Keras", (".keras",), "keras"),
    Format("Keras HDF5", (".h5", ".hdf5"), "keras", "read_h5"),
    Format("JSON of Keras or lwtnn", (".json",), "lwtnn", takes=frozenset({"weights"})),
    Format("PyTorch state dict", (".pt", ".pth", ".ckpt", ".bin"), "torch", takes=_STATE_DICT),
    Format("scikit-learn skops", (".skops",), "sklearn"),
    Format("NNet", (".nnet",), "nnet"),
)
READ = tuple(extension for known in FORMATS for extension in known.extensions)
WRITTEN = tuple(extension for known in FORMATS for extension in known.extensions if known.writes)


def load(
    path: str | os.PathLike[str],
    /,
    *,
    activations: Any = None,
    prefix: str | Sequence[str] | None = None,
    epsilon: float | None = None,
    weights: str | os.PathLike[str] | None = None,
    limits: Limits | None = None,
) -> "Network":
    """The network of a model file; its weights are NumPy arrays. The framework that wrote it is not needed.

    `.npz`, `.npy`, `.safetensors`, `.onnx` (the extra `onnx`), `.keras`, `.h5`, `.json` (Keras' with `weights=`, or
    lwtnn's), `.pt`, `.pth`, `.ckpt` and `.bin` (PyTorch's state dicts and checkpoints), `.skops`, `.nnet`.

    Args:
        activations: of a file that only holds arrays (a state dict): one for all layers, or a list with one for each;
            see `from_state_dict`, for prefix and epsilon too.
        prefix: which layers of a state dict, in the order of the pass: the start of their names, or several.
        epsilon: of its batch normalisations, which a state dict does not hold either.
        weights: the `.h5` that belongs to a `.json` of Keras.
        limits: what the file may ask for.

    Raises:
        ModelFileError: for a damaged file, one beyond the limits, one that holds what cannot be represented, and for
            an argument that is needed or that the file itself answers.
        FileNotFoundError, PermissionError, IsADirectoryError: as `open`.
        BackendError: where an extra is missing.
    """
    path = Path(path)
    if path.is_dir():
        raise ModelFileError(f"{path} is a folder: name the model's file in it")
    known = find(path)
    asked = {"activations": activations, "prefix": prefix, "epsilon": epsilon, "weights": weights}
    for name, value in asked.items():
        if value is not None and name not in known.takes:
            raise ModelFileError(f"{path}: {name} is nothing that a file of {known.name} needs: leave {name}= out")
    given = Given(limits or Limits(), activations, prefix, epsilon, weights=None if weights is None else Path(weights))
    read = known.function(known.reader)
    with opened(path, given.limits) as file:
        network: Network = read(file, given)
    return network


def save(network: "Network", path: str | os.PathLike[str], /) -> None:
    """Writes a network to a model file, `.npz`, `.safetensors` or `.onnx`: as a whole or not at all.

    Raises:
        ModelFileError: for what the format cannot hold: an activation that is a callable of one's own, bfloat16.
        BackendError: where an extra is missing.
    """
    path = Path(path)
    write = find(path, writes=True).function("write")
    try:
        write(network, path)
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from error


def facts(path: Path, /) -> dict[str, Any]:
    """What can be said of a model file without reading it: its `format`, `bytes` and `sha256`."""
    with opened(path, Limits()) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        return {"format": find(path).name, "bytes": file.tell(), "sha256": digest}


def find(path: Path, /, *, writes: bool = False) -> Format:
    """The format of an extension, or `ModelFileError`."""
    extension = path.suffix.lower()
    if extension in (".pkl", ".pickle", ".joblib"):
        raise ModelFileError(
            f"{path}: a pickle runs code when it is loaded, so it is not: write skops.io.dump for scikit-learn, "
            "torch.save(model.state_dict()) for PyTorch, numpy.savez for arrays"
        )
    for known in FORMATS:
        if extension in known.extensions and (known.writes or not writes):
            return known
    what = "model format to write" if writes else "model format"
    raise ModelFileError(
        f"{path}: no {what} {extension or 'without an extension'}: use {', '.join(WRITTEN if writes else READ)}"
    )
