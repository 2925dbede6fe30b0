"""Cases: a network, an input, and the exact output with its bound. Drawn once with NumPy, run at every place."""

import dataclasses
import random
from typing import Any

import numpy as np
from hypothesis import strategies as st

from nnfwd import Activation, Dense, Network, Scale, activations
from nnfwd.bounds import Arithmetic, Bounded, looped_bound

REGIMES = ("ordinary", "cancelling", "tiny", "huge", "small-integer")
LAYOUTS = ("C", "transposed", "strided", "read-only")
SPECIALS = ("none", "signed zeros", "subnormals", "infinities", "nans")
INTEGER_SAFE = ("identity", "relu", "relu6", "hard_tanh", "clip", "thresholded_relu", "leaky_relu", "prelu")
# Scale of weights and inputs in the tiny and huge regimes; a fifth of the exponent range.
EXTREME = {"float16": 1e3, "bfloat16": 1e30, "float32": 1e30, "float64": 1e290}


@dataclasses.dataclass(frozen=True)
class Signature:
    """Everything that fixes shapes and functions: what JAX compiles for."""

    in_features: int
    lead: tuple[int, ...]
    layers: tuple[tuple[str, int, str, bool, bool], ...]
    """(kind, width, activation, bias, array parameters) a layer."""
    members: int


@dataclasses.dataclass(frozen=True)
class Case:
    signature: Signature
    dtype: str
    regime: str
    special: str
    layout: str
    seed: int

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        object.__setattr__(self, "network", self._network(rng))
        object.__setattr__(self, "x", self._x(rng))

    network: Network = dataclasses.field(init=False, repr=False)
    x: np.ndarray = dataclasses.field(init=False, repr=False)

    def bounded(self, arithmetic: Arithmetic) -> Bounded:
        return looped_bound(self.x, self.network, arithmetic=arithmetic)

    def _array(self, rng: np.random.Generator, shape: tuple[int, ...], fan_in: int) -> np.ndarray:
        if self.regime == "small-integer":
            return rounded(rng.integers(-3, 4, shape).astype("float64"), self.dtype)
        a = rng.standard_normal(shape) / np.sqrt(fan_in)
        if self.regime == "cancelling" and shape and shape[-1] > 1:
            half = shape[-1] // 2
            a[..., half : 2 * half] = -a[..., :half] * (1 + 1e-3 * a[..., :half])
        if self.regime in ("tiny", "huge"):
            a = a * EXTREME[self.dtype] ** (rng.uniform(-1, 0) if self.regime == "tiny" else rng.uniform(0, 1))
        return rounded(a, self.dtype)

    def _network(self, rng: np.random.Generator) -> Network:
        layers: list[Any] = []
        width = self.signature.in_features
        for kind, out, name, bias, per_feature in self.signature.layers:
            if self.regime == "small-integer" and name not in INTEGER_SAFE:
                name = "relu"
            if kind == "dense":
                shape = (self.signature.members, out, width) if self.signature.members else (out, width)
                b = self._array(rng, shape[:-1], 1) if bias else None
                layers.append(Dense(self._array(rng, shape, width), b, self._function(rng, name, out, per_feature)))
                width = out
            elif kind == "scale":
                scale, center, shift = (self._array(rng, (width,), 1) for _ in range(3))
                layers.append(
                    Scale(scale, center=center, shift=shift) if per_feature else Scale(rng.normal(), shift=0.3)
                )
            else:
                layers.append(Activation(self._function(rng, name, width, per_feature)))
        return Network(layers)

    def _function(self, rng: np.random.Generator, name: str, width: int, per_feature: bool) -> Any:
        function = activations.named(name)
        whole = self.regime == "small-integer"
        values = {}
        for key in function.parameters:
            value = rng.integers(1, 3, width).astype("float64") if whole else rng.uniform(0.05, 2, width)
            if key in ("negative_slope", "alpha") and not whole:
                value = value * rng.choice([-1.0, 1.0, 10.0, 1e-3])
            value = -value if key == "lower" else value
            values[key] = rounded(value, self.dtype) if per_feature else float(value[0])  # the library rounds a scalar
        return function(**values) if values else function

    def _x(self, rng: np.random.Generator) -> np.ndarray:
        x = self._array(rng, (*self.signature.lead, self.signature.in_features), 1)
        where = rng.random(x.shape) < 0.1
        smallest = 2.0 ** {"float16": -24, "bfloat16": -133, "float32": -149, "float64": -1074}[self.dtype]
        values = {
            "none": x,
            "signed zeros": -0.0,
            "subnormals": rng.integers(1, 100, x.shape) * smallest,
            "infinities": rng.choice([-np.inf, np.inf], x.shape),
            "nans": np.nan,
        }
        return np.where(where, values[self.special], x).astype(x.dtype)


def rounded(a: np.ndarray, dtype: str) -> np.ndarray:
    """The array in the dtype; bfloat16 values in a float32 array, since NumPy has no bfloat16."""
    with np.errstate(all="ignore"):
        if dtype != "bfloat16":
            return a.astype(dtype)
        bits = a.astype("float32").view("uint32")
        return (bits & np.uint32(0xFFFF0000)).view("float32")


NAMES = activations.names()


def _signature(rng: random.Random) -> Signature:
    depth = rng.randint(1, 5)
    layers = []
    for _ in range(depth):
        kind = rng.choices(("dense", "scale", "activation"), (8, 1, 1))[0]
        layers.append(
            (kind, rng.choice((1, 2, 3, 8, 17, 64)), rng.choice(NAMES), rng.random() < 0.8, rng.random() < 0.5)
        )
    lead = rng.choice(((), (1,), (3,), (2, 2), (0,)))
    return Signature(rng.choice((1, 3, 7, 33)), lead, tuple(layers), rng.choice((0, 0, 0, 3)))


def pool() -> tuple[Signature, ...]:
    """About twenty signatures, with every activation among them: JAX compiles once for each."""
    rng = random.Random(1)
    found = [_signature(rng) for _ in range(14)]
    chosen = {layer[2] for signature in found for layer in signature.layers}
    left = [name for name in NAMES if name not in chosen]
    for i in range(0, len(left), 3):
        layers = tuple(("dense", 5, name, True, i % 2 == 0) for name in left[i : i + 3])
        found.append(Signature(4, (3,), layers, 0))
    return tuple(found)


POOL = pool()

widths = st.one_of(st.integers(1, 8), st.integers(1, 64))
layers = st.tuples(
    st.sampled_from(("dense",) * 8 + ("scale", "activation")),
    widths,
    st.sampled_from(NAMES),
    st.booleans(),
    st.booleans(),
)
free_signatures = st.builds(
    Signature,
    in_features=widths,
    lead=st.sampled_from(((), (1,), (2,), (3,), (0,), (2, 2), (1, 0, 2))),
    layers=st.lists(layers, min_size=1, max_size=5).map(tuple),
    members=st.sampled_from((0, 0, 0, 1, 3)),
)


def cases(dtype: str, signatures: st.SearchStrategy[Signature] = free_signatures) -> st.SearchStrategy[Case]:
    """A network and an input in one dtype."""
    return st.builds(
        Case,
        signature=signatures,
        dtype=st.just(dtype),
        regime=st.sampled_from(REGIMES),
        special=st.sampled_from(("none",) * 4 + SPECIALS),
        layout=st.sampled_from(LAYOUTS),
        seed=st.integers(0, 2**32 - 1),
    )
