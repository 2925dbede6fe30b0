"""Small networks that several tests share."""

from typing import Any

import numpy as np

from nnfwd import Dense, Network, Scale, activations


def tutorial() -> tuple[Network, list[float]]:
    """The tutorial's 3-3-1 network and its input; the output is published as 0.8354 (cut off)."""
    return Network.from_arrays([[[0.2] * 3, [0.4] * 3, [0.6] * 3], [[0.5] * 3]], [[0.8] * 3, [0.2]], "sigmoid"), [
        1.5,
        2,
        3,
    ]


def mixed(dtype: str = "float32", seed: int = 0) -> Network:
    """A network of every kind of layer and parameter, 4 -> 2."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(dtype)

    slopes = rng.uniform(0.1, 0.5, 5).astype(dtype)
    return Network(
        [
            Scale(draw(4), center=draw(4)),
            Dense(draw(5, 4), draw(5), activations.prelu(negative_slope=slopes)),
            Dense(draw(6, 5), None, "gelu"),
            Dense(draw(2, 6), draw(2), "softmax"),
        ]
    )


def ensemble(dtype: str = "float32") -> Network:
    """Three members of a 4-5-2 network."""
    rng = np.random.default_rng(1)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(dtype)

    return Network([Dense(draw(3, 5, 4), draw(3, 5), "tanh"), Dense(draw(3, 2, 5), draw(3, 2))])


def inputs(*shape: int, dtype: str = "float32", seed: int = 2) -> Any:
    """Random inputs."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)
