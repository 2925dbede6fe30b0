"""How a reader puts a network together, layer by layer, in the order of the pass."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nnfwd import activations
from nnfwd.activations import Function
from nnfwd.errors import ModelFileError
from nnfwd.io.reading import Limits
from nnfwd.layers import Activation, Dense, Layer, Scale
from nnfwd.network import Network


def clip(lower: float, upper: float) -> Function:
    """min(max(x, lower), upper) by the name it has where it has one, so that one model is one network in any format."""
    named = {(0.0, math.inf): "relu", (0.0, 6.0): "relu6", (-1.0, 1.0): "hard_tanh"}.get((lower, upper))
    return activations.clip(lower=lower, upper=upper) if named is None else activations.named(named)


def prelu(slopes: np.ndarray) -> Function:
    """A prelu of these slopes, `(features,)`; a single one is a number."""
    return activations.prelu(negative_slope=float(slopes.reshape(())) if slopes.size == 1 else slopes)


def reciprocal(a: Any) -> Any:
    """1 / a, of a's dtype; infinite where a is 0."""
    with np.errstate(all="ignore"):
        return 1 / a


class Builder:
    """Collects layers as they are stated. An activation joins a Dense layer right before it that has none yet.

    Nothing else is merged or folded. An error names the layer.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.layers: list[Layer] = []
        self.classes: Sequence[Any] | None = None
        self.input_shape: tuple[int, ...] | None = None
        self._limit = (limits or Limits()).layers
        self._stages: dict[int, Any] = {}

    @property
    def last(self) -> Layer | None:
        """The layer that was added last; None before the first one, and while a Scale is put together by `affine`."""
        return None if self._stages or not self.layers else self.layers[-1]

    @property
    def begun(self) -> bool:
        """Whether anything was added."""
        return bool(self.layers or self._stages)

    def add(self, layer: Layer) -> None:
        """Any layer, as it is."""
        self.flush()
        if len(self.layers) == self._limit:
            raise ModelFileError(f"more than {self._limit} layers: raise limits.layers if you trust it")
        self.layers.append(layer)

    def dense(self, weight: Any, bias: Any = None) -> None:
        """A weighted sum, weight `(out, in)`."""
        self.add(Dense(weight, bias))

    def scale(self, scale: Any, *, center: Any = 0.0, shift: Any = 0.0) -> None:
        """An element-wise `(x - center) * scale + shift`."""
        self.add(Scale(scale, center=center, shift=shift))

    def affine(self, stage: int, value: Any) -> None:
        """One step of a Scale: `x - value`, `x * value`, `x + value` as stage 0, 1, 2. A lower stage begins another."""
        if any(stage <= other for other in self._stages):
            self.flush()
        self._stages[stage] = value

    def flush(self) -> None:
        """Ends the Scale that `affine` put together."""
        stages, self._stages = self._stages, {}
        if stages:
            self.scale(stages.get(1, 1.0), center=stages.get(0, 0.0), shift=stages.get(2, 0.0))

    def activation(self, function: str | Function) -> None:
        """An activation; an identity leaves nothing behind."""
        function = activations.get(function)
        if function.name == "identity":
            return
        self.flush()
        last = self.last
        if isinstance(last, Dense) and last.activation.name == "identity":
            self.layers[-1] = Dense(last.weight, last.bias, function)
        else:
            self.add(Activation(function))

    def batch_normalisation(
        self, mean: Any, variance: Any, epsilon: float, gamma: Any = None, beta: Any = None
    ) -> None:
        """`gamma * (x - mean) / sqrt(variance + epsilon) + beta`, Ioffe & Szegedy 2015, arXiv 1502.03167, as a Scale.

        `scale` is computed in float64 and rounded once to the dtype of the arrays.
        """
        mean, variance = np.asarray(mean), np.asarray(variance)
        with np.errstate(all="ignore"):
            wide = reciprocal(np.sqrt(variance.astype("float64") + epsilon))
            if gamma is not None:
                wide = wide * np.asarray(gamma, dtype="float64")
            scale = wide.astype(variance.dtype)
        if np.any(np.isinf(scale) & np.isfinite(wide)):
            raise ModelFileError(
                f"layer {len(self.layers)}: a batch normalisation multiplies by {np.max(np.abs(wide)):.3g}, "
                f"more than {variance.dtype} holds"
            )
        self.scale(scale, center=mean, shift=0.0 if beta is None else beta)

    def network(self) -> Network:
        """The network; a file without a single layer is an identity, which needs one."""
        self.flush()
        layers = self.layers or [Activation("identity")]
        return Network(layers, classes=self.classes, input_shape=self.input_shape)
