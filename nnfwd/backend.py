"""Backends: how the pass reaches an array library, and how one is found.

A backend is a module `nnfwd_<library>` with the five names of `Backend`; any such module on the path is one, a
stranger's too. It says where arrays live and how a pass is executed, never what a network is. It is imported when it is
asked for by name, or when an array of its library arrives, so `import nnfwd` imports no array library but NumPy.

Things a backend *may* have besides; without them the plain pass runs:

    apply(forward, layers, x, /)                     what `net(x)` does instead (Dask: one `map_blocks`);
                                                     `forward(x, layers)` is the whole public call
    computed(x, /)                                   with `apply`: x whole, an array of the library of its blocks
    compile(forward, layers, /, **options)           a callable of x that executes `forward(layers, x)`, the plain pass
                                                     in its scope, well (JAX: `jax.jit`); the layers are placed already,
                                                     options are keyword-only arguments with defaults
    spread(device, /)                                a `Spread` where `device=` of `net.compile` is several devices,
                                                     else None
    large(x, /)                                      whether `net(x)` does well to compile for an x of this size
    threaded(count, /)                               a context around compiled passes on so many threads of the caller's
    keeps(a, /)                                      whether a placed weight may be kept for later calls
    arithmetic(dtype, /, *, precision, device)       how the library rounds there, a `nnfwd.bounds.Arithmetic`;
                                                     `device` is one of the strings of `devices()`

One whose library runs threads or holds a GPU calls `in_use` wherever it uses it: a forked process has neither.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import os
import re
import types
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
from array_api_compat import array_namespace

from nnfwd.errors import ArrayError, BackendError, DtypeError, UnknownNameError

Array = Any
PREFIX = "nnfwd_"
PRECISIONS = ("highest", "high", "medium")


class Backend(Protocol):
    """What a module `nnfwd_<library>` provides."""

    xp: Any
    """The library's Array API namespace, with `__array_namespace_info__`."""

    def devices(self) -> tuple[str, ...]:
        """The devices usable here and now, as strings (`"cpu"`, `"cuda:0"`); `()` when there is none."""

    def place(self, a: Array, /, *, dtype: str, like: Array | None = None, device: Any = None) -> Array:
        """The NumPy array (or array of this library) `a` as `dtype`, on `device`, else next to `like`, else anywhere.

        `device` is one of the strings of `devices()` or the library's own device object.
        """

    def to_numpy(self, x: Array, /) -> np.ndarray:
        """The array as a NumPy array in host memory, complete: nothing is still being computed.

        bfloat16, which NumPy has not, comes as float32.
        """

    def scope(self, precision: str, x: Array, /) -> contextlib.AbstractContextManager[Any]:
        """A context around every pass on x: the library multiplies with `precision`, and computes where x is."""


class Spread(Protocol):
    """One pass over several devices, see `spread`."""

    parts: int
    """Into how many parts a pair of weights is divided; 1 where every device has them whole."""

    def weight(self, axes: int, axis: int | None, /) -> Any:
        """For `place`: where a weight of so many axes stands, divided along one of them, or whole on every device."""

    def compiled(self, run: Any, dtype: str, named: bool, /) -> Any:
        """What `compile` made, for any x of this library or NumPy's, which it casts and divides.

        `named`: whether each row of the result is that of the same row alone.
        """


def name_of(backend: Backend) -> str:
    """The backend's name: `"jax"` for the module `nnfwd_jax`."""
    return backend.__name__.removeprefix(PREFIX)  # type: ignore[attr-defined]


_name_by_type: dict[type, str] = {}
_found: dict[str, Backend] = {}


def of(x: Array, /, what: str = "x") -> Backend:
    """The backend of an array. Raises `ArrayError` where `x` is no array, naming the conversion to write."""
    name = _name_by_type.get(type(x))
    if name is None:
        name = _name_by_type[type(x)] = _find(x, what)
    return _found[name]


def _find(x: Array, what: str) -> str:
    found = _search(x, what)
    name = name_of(found)
    _found[name] = found
    return name


# To a compiler that traces Python (PyTorch's) this is a constant: it is not to look inside, at imports.
_find._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _search(x: Array, what: str) -> Backend:
    kind = type(x)
    if isinstance(x, np.ndarray) and kind not in (np.ndarray, np.memmap):
        write = f"{what}.filled(...)" if isinstance(x, np.ma.MaskedArray) else f"numpy.asarray({what})"
        raise ArrayError(f"{what} is a {kind.__module__}.{kind.__name__}: write {write}, nothing is dropped silently")
    if isinstance(x, np.ndarray):
        return _load("numpy")
    try:
        namespace = array_namespace(x)
    except TypeError:
        write = next((f": write {what}.{m}" for m in ("data", "to_numpy()") if hasattr(x, m.strip("()"))), "")
        raise ArrayError(
            f"{what} is a {kind.__module__}.{kind.__name__}, not an array or a nested list of numbers{write}"
        ) from None
    library = namespace.__name__.removeprefix("array_api_compat.").partition(".")[0]
    try:
        return _load(library)
    except UnknownNameError:
        return _Standard(library, namespace)


def load(backend: str | types.ModuleType, /) -> Backend:
    """The backend of a name (`"jax"`) or of a namespace module (`jax.numpy`), usable here and now.

    Raises `UnknownNameError` where there is no such backend, `BackendError` where its library is not installed, broken,
    or finds no device.
    """
    if isinstance(backend, types.ModuleType):
        name = backend.__name__.removeprefix("array_api_compat.").partition(".")[0]
    elif isinstance(backend, str):
        name = backend
    else:
        raise UnknownNameError("backend", backend, _names())
    found = _load(name)
    try:
        usable = found.devices()
    except BackendError:
        raise
    except Exception as error:  # a driver or a setting may fail in any way, and it is the user's to mend
        raise BackendError(f"{name} is installed but broken: {_line(error)}") from error
    if not usable:
        raise BackendError(f"{name} is installed but finds no usable device here: choose another backend")
    return found


def _load(name: str) -> Backend:
    if not name.isidentifier() or importlib.util.find_spec(PREFIX + name) is None:
        raise UnknownNameError("backend", name, _names())
    try:
        module = importlib.import_module(PREFIX + name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise BackendError(f"{name} is installed but broken: {error}") from error
        raise BackendError(f"{name} is not installed: {_install(name)}") from None
    except Exception as error:  # a library may fail to import in any way, and it is the user's to mend
        raise BackendError(f"{name} is installed but broken: {_line(error)}") from error
    lacking = [part for part in ("xp", "devices", "place", "to_numpy", "scope") if not hasattr(module, part)]
    if lacking:
        raise BackendError(f"the module {PREFIX}{name} is no backend: it has no {', '.join(lacking)}")
    return module


_in_use: set[str] = set()
_left: set[str] = set()  # in use when this process was forked


def in_use(name: str, /) -> None:
    """Notes that a library runs threads or holds a GPU. Raises as `refuse_forked`."""
    refuse_forked(name)
    _in_use.add(name)


def refuse_forked(name: str, /) -> None:
    """Raises `forked` in a process forked since the library was in use: it has neither its threads nor its GPU."""
    if name in _left:
        raise forked(name)


def forked(name: str, /) -> BackendError:
    """The error of a library that was in use when this process was forked."""
    return BackendError(
        f"{name} was in use when this process was forked, which left its threads and GPU behind: "
        "start processes with multiprocessing.get_context('spawn')"
    )


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=lambda: _left.update(_in_use))


class _Standard:
    """The backend of a conforming library that has no module of its own: the Array API standard and nothing else."""

    def __init__(self, library: str, namespace: Any) -> None:
        self.__name__ = PREFIX + library
        self.xp = namespace

    def _by_name(self) -> dict[str, Any]:
        return {str(device): device for device in self.xp.__array_namespace_info__().devices()}

    def devices(self) -> tuple[str, ...]:
        return tuple(self._by_name())

    def place(self, a: Array, /, *, dtype: str, like: Array | None = None, device: Any = None) -> Array:
        if not hasattr(self.xp, dtype):
            raise DtypeError(f"{name_of(self)} has no {dtype}: choose another dtype")
        if device is None and like is not None:
            device = like.device
        return self.xp.asarray(a, dtype=getattr(self.xp, dtype), device=self._by_name().get(device, device))

    def to_numpy(self, x: Array, /) -> np.ndarray:
        return np.from_dlpack(x)

    def scope(self, *_: Any) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()


@dataclasses.dataclass(frozen=True)
class BackendInfo:
    """What is known of one backend on this machine."""

    name: str
    version: str | None
    """Version of the installed library, None when it is not installed."""
    devices: tuple[str, ...] | None
    """Usable devices, None when not probed."""
    status: str
    """`installed`, `usable`, `installed, no device`, `broken: <why>`, or `missing: <how to install>`."""


def backends(*, devices: bool = False) -> tuple[BackendInfo, ...]:
    """Every backend on the path, the library's version, and how to install what is missing.

    Reads package metadata only; with `devices=True` it imports each installed library and asks for its devices.
    """
    return tuple(_info(name, probe=devices) for name in _names())


def _info(name: str, *, probe: bool) -> BackendInfo:
    if importlib.util.find_spec(name) is None:
        return BackendInfo(name, None, None, f"missing: {_install(name)}")
    found_version = version(name)
    if not probe:
        return BackendInfo(name, found_version, None, "installed")
    try:
        found = _load(name).devices()
    except Exception as error:  # probing must answer for every library, whatever it raises
        why = _line(error).removeprefix(f"{name} is installed but ").removeprefix("broken: ")
        return BackendInfo(name, found_version, (), f"broken: {why}")
    return BackendInfo(name, found_version, found, "usable" if found else "installed, no device")


# The survey reads package metadata with modules that are slow to import, so `import nnfwd` leaves them alone.


def _names() -> list[str]:
    import pkgutil

    return sorted({m.name.removeprefix(PREFIX) for m in pkgutil.iter_modules() if m.name.startswith(PREFIX)})


def _extra(name: str) -> list[str]:
    """Distributions that nnfwd's extra of this name asks for (CuPy has a distribution per CUDA version)."""
    import importlib.metadata

    needs: list[str] = []
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # run from its sources, not installed
        needs = importlib.metadata.requires("nnfwd") or []
    return [
        re.split(r"[^\w.-]", need, maxsplit=1)[0] for need in needs if re.search(rf"extra == ['\"]{name}['\"]", need)
    ]


def _install(name: str) -> str:
    return f"pip install 'nnfwd[{name}]'" if _extra(name) else f"pip install {name.replace('_', '-')}"


def version(name: str, /) -> str:
    """The version of the library of a backend, `unknown` where no metadata says it."""
    import importlib.metadata

    def every() -> Iterator[str]:
        yield name
        yield from _extra(name)
        yield from importlib.metadata.packages_distributions().get(name, ())  # reads all that is installed: last

    for distribution in every():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    return "unknown"


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def usable_cores() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_options(adapter: Backend, options: Iterable[str]) -> None:
    """Raises `UnknownNameError` where the backend's `compile` has no option of such a name."""
    names = compile_options(adapter)
    for name in options:
        if name not in names:
            raise UnknownNameError(f"option of compile on {name_of(adapter)}", name, names or ["none"])


def compile_options(adapter: Backend) -> list[str]:
    """The names of the options that the backend's `compile` has."""
    known = inspect.signature(adapter.compile).parameters.values() if hasattr(adapter, "compile") else ()
    return [p.name for p in known if p.kind is p.KEYWORD_ONLY]


def check_precision(precision: str) -> None:
    """Raises `UnknownNameError` unless precision is one of `PRECISIONS`."""
    if not isinstance(precision, str) or precision not in PRECISIONS:
        raise UnknownNameError("precision", precision, PRECISIONS)
