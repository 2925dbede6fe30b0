"""For mypy: every backend is what the Protocol says. `mypy nnfwd backends tests/typed_backends.py`."""

import nnfwd_cupy
import nnfwd_dask
import nnfwd_jax
import nnfwd_numpy
import nnfwd_torch

from nnfwd.backend import Backend

BACKENDS: tuple[Backend, ...] = (nnfwd_cupy, nnfwd_dask, nnfwd_jax, nnfwd_numpy, nnfwd_torch)
