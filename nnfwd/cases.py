"""Networks drawn at random, in five regimes: what `nnfwd.check` and the property tests run.

A case is drawn from its seed with NumPy, once, and is the same on every array library.
"""

import dataclasses
import random
from typing import Any

import numpy as np

from nnfwd import activations
from nnfwd.bounds import Arithmetic
from nnfwd.layers import Activation, Dense, Scale, mapped
from nnfwd.network import Network
from nnfwd.placement import rounded

REGIMES = ("ordinary", "cancelling", "tiny", "huge", "small-integer")
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
    """A network and an input of one dtype (bfloat16 values stand in float32 arrays, since NumPy has no bfloat16)."""

    signature: Signature
    dtype: str
    regime: str
    """One of `REGIMES`: the scale of weights and inputs."""
    special: str
    """One of `SPECIALS`: what a tenth of the inputs are."""
    seed: int

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        object.__setattr__(self, "network", self._network(rng))
        object.__setattr__(self, "x", self._x(rng))

    network: Network = dataclasses.field(init=False, repr=False)
    x: np.ndarray = dataclasses.field(init=False, repr=False)

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
        values: dict[str, Any] = {
            "none": x,
            "signed zeros": -0.0,
            "subnormals": rng.integers(1, 100, x.shape) * Arithmetic(self.dtype).smallest,
            "infinities": rng.choice([-np.inf, np.inf], x.shape),
            "nans": np.nan,
        }
        return np.where(where, values[self.special], x).astype(x.dtype)


NAMES = activations.names()


def rounded_network(net: Network, dtype: str) -> Network:
    """A network of NumPy arrays with its arrays rounded to a dtype (bfloat16 values stand in float32 arrays)."""
    return net.with_parameters([mapped(lambda a: rounded(a, dtype), layer) for layer in net.parameters])


def _pool() -> tuple[Signature, ...]:
    """About twenty signatures, with every activation among them.

    Most have three rows and six features throughout, so that JAX, which compiles every operation for every shape it
    meets, compiles few.
    """
    rng = random.Random(1)
    names = rng.sample(NAMES, len(NAMES))
    chains = [names[i : i + 3] for i in range(0, len(names), 3)] + [rng.choices(NAMES, k=5) for _ in range(5)]
    kinds = ("dense", "dense", "scale", "dense", "dense", "activation")
    alike = tuple(
        Signature(
            6, (3,), tuple((kinds[(i + j) % 6], 6, name, (i + j) % 4 > 0, (i + j) % 2 == 0) for j, name in chain), 0
        )
        for i, chain in enumerate(map(enumerate, chains))
    )
    others = (
        Signature(33, (2,), (("dense", 64, "relu", True, False), ("dense", 17, "tanh", True, False)), 0),
        Signature(3, (), (("dense", 8, "gelu", False, False), ("dense", 2, "softmax", True, False)), 0),
        Signature(7, (2, 2), (("dense", 6, "silu", True, False), ("scale", 6, "identity", True, True)), 3),
        Signature(3, (0,), (("dense", 3, "sigmoid", True, False),), 0),
        Signature(1, (1,), (("dense", 1, "softplus", True, True),), 0),
    )
    return alike + others


POOL = _pool()
