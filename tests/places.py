"""The places a case is run at: every usable device of every backend found on this machine."""

import contextlib
import dataclasses
import functools
import importlib
import os
from typing import Any

import pytest
from array_api_compat import device as device_of

import nnfwd
from nnfwd import backend
from nnfwd.errors import DtypeError
from nnfwd.placement import dtype_name

DTYPES = ("float32", "float64", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Place:
    """One device of one backend."""

    name: str
    device: str

    def __str__(self) -> str:
        return f"{self.name}-{self.device}"

    @functools.cached_property
    def adapter(self) -> Any:
        return backend.load(self.name)

    def context(self, dtype: str) -> Any:
        """What a user of this library does to have the dtype at all."""
        if self.name == "jax" and dtype == "float64":
            import jax

            return jax.enable_x64(True)
        return contextlib.nullcontext()

    def put(self, a: Any, dtype: str) -> Any:
        return self.adapter.place(a, dtype=dtype, device=self.device)

    def has(self, dtype: str) -> bool:
        import numpy as np

        with self.context(dtype):
            try:
                return dtype_name(self.put(np.zeros(1, dtype="float32"), dtype).dtype) == dtype
            except DtypeError:
                return False

    def holds(self, y: Any) -> bool:
        """Whether y is an array of this library, on this device."""
        return backend.of(y) is self.adapter and device_of(y) == device_of(self.put(_one(), dtype_name(y.dtype)))


def _one() -> Any:
    import numpy as np

    return np.ones(1)


@functools.cache
def places() -> tuple[Place, ...]:
    found = nnfwd.backends(devices=True)
    return tuple(Place(info.name, device) for info in found for device in info.devices or ())


def missing() -> dict[str, str]:
    """Backends that cannot be run here, with the reason."""
    return {info.name: info.status for info in nnfwd.backends(devices=True) if not info.devices}


REQUIRED = tuple(name for name in os.environ.get("NNFWD_REQUIRE", "").split(",") if name)


BACKENDS = tuple(info.name for info in nnfwd.backends())


def need(name: str) -> Any:
    """The library of that name; where it is not installed, a visible skip, or a failure when it is required."""
    try:
        if name in BACKENDS:
            backend.load(name)
        return importlib.import_module(name)
    except (nnfwd.errors.BackendError, ImportError) as error:
        if name in REQUIRED:
            pytest.fail(f"{name} is required (NNFWD_REQUIRE) and cannot be used: {error}")
        pytest.skip(f"{name}: {error}", allow_module_level=True)
