"""Dask arrays: the whole network is one `map_blocks`, each chunk run by the backend of its own array type.

The network is one key of the graph, on which the task of every chunk depends: a distributed worker gets it once, and
its tasks share one object with what it compiled. Equal networks have equal names, and share results.

Known to differ: nothing is computed until asked. The feature axis must be one chunk. Arithmetic is that of the chunks.
"""

import concurrent.futures
import contextlib
import importlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import array_api_compat.dask.array as xp
import dask
import dask.array as da
import numpy as np
from dask.base import normalize_token, tokenize

from nnfwd import backend
from nnfwd.activations import Function
from nnfwd.bounds import Arithmetic, arithmetic_of
from nnfwd.errors import ArrayError, BackendError, DeviceError, DtypeError, ShapeError
from nnfwd.layers import Chain, Layer
from nnfwd.placement import dtype_name

__all__ = ["apply", "arithmetic", "cluster", "computed", "devices", "place", "scope", "to_numpy", "xp"]


def devices() -> tuple[str, ...]:
    return ("cpu",)


def place(a: Any, /, *, dtype: str, like: Any = None, device: Any = None) -> da.Array:
    if dtype == "bfloat16":
        raise DtypeError("dask has no bfloat16: use float16 or float32")
    if device not in (None, "cpu"):
        raise DeviceError(f"dask has no device {device!r} here: there is cpu")
    if isinstance(a, da.Array):
        return a.astype(dtype)
    return da.from_array(a.astype(dtype), chunks=(*("auto",) * (a.ndim - 1), -1) if a.size else a.shape)


def to_numpy(x: Any, /) -> np.ndarray:
    home = computed(x)
    return backend.of(home).to_numpy(home)


def computed(x: da.Array, /) -> Any:
    return x.compute()


def scope(precision: str, x: Any, /) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext()


def apply(forward: Callable[..., Any], layers: Any, x: da.Array, /) -> da.Array:
    if x.numblocks[-1] != 1:
        raise ShapeError(f"x has {x.numblocks[-1]} chunks along its features: write x.rechunk({{-1: -1}}) first")
    # The pass over no rows gives the type, dtype and shape of a block, and refuses what a worker would refuse.
    try:
        none = np.zeros((0,) * (x.ndim - 1) + x.shape[-1:])
        meta = forward(backend.of(x._meta).place(none, dtype=dtype_name(x.dtype), like=x._meta), layers)
    except ArrayError as error:
        raise ArrayError(f"{error} (x is a dask array of them)") from None
    lead = x.ndim - 1
    new = ((layers.members,),) if meta.ndim > x.ndim else ()
    return x.map_blocks(
        forward,
        dask.delayed(layers, name=f"network-{tokenize(layers)}", traverse=False),
        dtype=meta.dtype,
        meta=meta,
        new_axis=0 if new else None,
        chunks=(*new, *x.chunks[:lead], (meta.shape[-1],)),
    )


def arithmetic(dtype: str, /, *, precision: str, device: str) -> Arithmetic:
    return arithmetic_of(backend.load("numpy"), dtype, precision=precision)


def _contents(part: Chain | Layer | Function) -> Any:
    """What Dask names a network by. It would pickle it whole, where equal objects differ from one object twice."""
    return normalize_token(part.__reduce__())


normalize_token.register((Chain, Layer, Function), _contents)


_PATIENCE = 10  # seconds for a scheduler to answer


class Cluster:
    """Workers of a Dask cluster that run functions of something shared."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._sent: tuple[Any, Any] = None, None  # what was shared last, and its future

    @property
    def threads(self) -> int:
        """How many threads the workers have, all of them together, now."""
        return sum(self._client.nthreads().values())

    def submit(self, function: Callable[..., Any], shared: Any, /, *args: Any) -> Any:
        """A future of `function(shared, *args)`; its `result()` waits, and raises what the function raised.

        As long as `shared` is the same object, a worker gets it once, and its calls share it. What a worker had that
        died is computed again elsewhere, so the function may run more than once. Where it is what kills workers, or the
        cluster is gone, `result()` raises `BackendError`.
        """
        # Dask warns of much in a graph, lest it be sent again and again. What is here is sent once.
        with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1 TiB"}):
            if self._sent[1] is None or self._sent[0] is not shared:
                self._sent = shared, self._client.submit(_itself, shared, pure=False)
            return _Outcome(self._client.submit(function, self._sent[1], *args, pure=False))


class _Outcome:
    """A future whose cluster may fail."""

    def __init__(self, future: Any) -> None:
        self._future = future

    def result(self) -> Any:
        import distributed

        try:
            return self._future.result()
        except (distributed.KilledWorker, distributed.comm.CommClosedError, concurrent.futures.CancelledError) as error:
            raise BackendError(f"the Dask cluster failed: {type(error).__name__}: {error}") from error

    def cancel(self) -> None:
        self._future.cancel()


def _itself(shared: Any) -> Any:
    return shared


@contextlib.contextmanager
def cluster(address: str, /) -> Iterator[Cluster]:
    """The cluster of a scheduler, by its address (`"tcp://10.0.0.1:8786"`) or the path of its scheduler file.

    It runs on afterwards; what was submitted and has not run by then is dropped. Raises `BackendError` where nobody
    answers.
    """
    try:
        distributed = importlib.import_module("distributed")
    except ModuleNotFoundError:
        raise BackendError("distributed is not installed: pip install 'nnfwd[cluster]'") from None
    try:
        if "://" not in address:
            with open(address) as file:
                address = json.load(file)["address"]
        distributed.comm.resolve_address(address)  # what is no address at all would upset the client
        client = distributed.Client(address, timeout=_PATIENCE, set_as_default=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackendError(
            f"no Dask scheduler answers at {address}: give its address, tcp://host:port, or its scheduler file "
            f"({type(error).__name__}: {error})"
        ) from None
    with client:
        yield Cluster(client)
