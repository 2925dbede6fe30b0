"""What is measured: the published networks, or the caller's own model and inputs."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from nnfwd.errors import ShapeError, UnknownNameError
from nnfwd.network import Network

Built = tuple[Network, np.ndarray]
"""A network and its x `(rows, in)`."""


@dataclass(frozen=True)
class Case:
    """One network at one batch size. It is built when its turn comes: the largest has 537 MB of weights."""

    name: str
    rows: int
    build: Callable[[], Built]


@dataclass(frozen=True)
class Published:
    """A network that others have measured, by its widths; float32, weights random normal / sqrt(fan in)."""

    widths: tuple[int, ...]
    activations: tuple[str, ...]
    rows: int

    def build(self, rows: int) -> Built:
        """The network, always with the same numbers, and as many rows of x."""
        rng = np.random.default_rng(0)
        weights, biases = [], []
        for fan_in, out in itertools.pairwise(self.widths):
            weight = rng.standard_normal((out, fan_in), dtype="float32")
            weight *= np.float32(fan_in**-0.5)
            weights.append(weight)
            biases.append(rng.standard_normal(out, dtype="float32") * np.float32(0.1))
        net = Network.from_arrays(weights, biases, self.activations)
        return net, rng.standard_normal((rows, self.widths[0]), dtype="float32")


def _published() -> dict[str, Published]:
    mlp, coder, block = (784, 512, 512, 10), (640, *[128] * 4, 8, *[128] * 4, 640), (4096, 16384, 4096)
    found = {
        "tutorial": Published((3, 3, 1), ("sigmoid",) * 2, 1_000_000),
        "jets": Published((16, 64, 32, 32, 5), (*["relu"] * 3, "softmax"), 100_000),
        "fused": Published((32, 64, 64, 64, 64, 16), (*["relu"] * 4, "identity"), 65_536),
        "digits": Published(mlp, ("relu", "relu", "softmax"), 10_000),
        "digits-sigmoid": Published(mlp, ("sigmoid",) * 3, 10_000),
        "autoencoder": Published(coder, (*["relu"] * 9, "identity"), 10_000),
        "tanh": Published((256,) * 4, ("tanh",) * 3, 20_000),
        "ranking": Published((479, 1024, 1024, 512, 256, 1), (*["relu"] * 4, "sigmoid"), 4_096),
        "block": Published(block, ("gelu", "identity"), 128),
    }
    one = ("tutorial", "jets", "digits", "autoencoder")
    return found | {f"{name}-1": Published(found[name].widths, found[name].activations, 1) for name in one}


PUBLISHED = _published()
"""By name: the tutorial's, an LHC jet tagger's (hls4ml), tiny-cuda-nn's, Keras' MNIST, MLPerf Tiny's autoencoder, a
recommender's top (DLRM), a transformer's feed-forward block; and four of them at one row."""


def published(names: Iterable[str] | None = None, rows: Sequence[int] | None = None) -> list[Case]:
    """The published cases of these names, all by default, at their own batch sizes or at the given ones.

    Raises `UnknownNameError` with the nearest name, `ShapeError` for rows that are not positive.
    """
    chosen = list(PUBLISHED if names is None else dict.fromkeys(names))
    for name in chosen:
        if name not in PUBLISHED:
            raise UnknownNameError("case", name, PUBLISHED)
    if not chosen:
        raise ShapeError("there is nothing to measure: name at least one case")
    found = ((name, PUBLISHED[name]) for name in chosen)
    return [
        Case(name, n, lambda p=p, n=n: p.build(n))  # type: ignore[misc]
        for name, p in found
        for n in _positive(rows or (p.rows,))
    ]


OWN_ROWS = (1, 10_000)
"""Batch sizes a model of the caller's is measured at, where none are given."""


def own(name: str, net: Network, x: np.ndarray | None = None, rows: Sequence[int] | None = None) -> list[Case]:
    """The caller's model on the caller's x `(..., in)`, or on random rows.

    x is brought to the network's dtype, and to float32 where NumPy has not that one (bfloat16).
    """
    dtype = net.dtype if net.dtype in ("float16", "float32", "float64") else "float32"
    net = net.to("numpy", dtype=dtype)
    if x is None:
        width = net.in_features
        if width is None:
            raise ShapeError(f"{name} takes x of any width: give inputs by --data")
        return [
            Case(name, n, lambda n=n: (net, np.random.default_rng(0).standard_normal((n, width)).astype(dtype)))  # type: ignore[misc]
            for n in _positive(rows or OWN_ROWS)
        ]
    if rows:
        raise ShapeError("--data has rows of its own: leave --rows out")
    if net.input_shape and x.shape[-len(net.input_shape) :] == net.input_shape:  # as it was before a leading flatten
        x = x.reshape(*x.shape[: -len(net.input_shape)], -1)
    if x.ndim == 0 or x.size == 0:
        raise ShapeError(f"x {x.shape} has no rows: there is nothing to measure")
    folded = np.array(x.reshape(-1, x.shape[-1]), dtype=dtype, order="C")  # in memory: x may be mapped from its file
    return [Case(name, len(folded), lambda: (net, folded))]


def _positive(rows: Sequence[int]) -> Sequence[int]:
    for n in rows:
        if n < 1:
            raise ShapeError(f"{n} rows cannot be measured: give positive numbers")
    return rows
