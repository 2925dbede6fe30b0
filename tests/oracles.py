"""Other libraries as oracles, each with the error of its own.

`agree` compares a network of ours with what the library that trained it computes. Both may be off the exact output by
the derived bound (sums in any order), and the library by the errors of its own functions besides: |f~ - f| of each is at
most `ERRORS` u max(1, |f|), u the unit roundoff. These rows are measured, `python tests/oracles.py`, and checked in,
twice the largest that was found, there or in the tests; they enter only here, on the other library's side.
"""

import os
import sys

import numpy as np

import nnfwd
from nnfwd import Activation, Network, Scale, activations

U = {"float32": 2.0**-24, "float64": 2.0**-53}

# In units of u max(1, |f|); a function that is not listed has 0, and is compared as strictly as ours. PyTorch's softplus is
# linear beyond 20, its largest error by far. Keras computes float64's tanh in float32 on JAX, so it is an oracle in float32.
ERRORS: dict[str, dict[str, dict[str, int]]] = {
    "keras": {
        "float32": {
            "leaky_relu": 2, "hard_sigmoid": 3, "sigmoid": 3, "tanh": 9, "softsign": 3, "softplus": 5, "log_sigmoid":
            5, "elu": 2, "selu": 7, "celu": 2, "silu": 5, "hard_silu": 6, "mish": 8, "gelu": 5, "gelu_tanh": 19,
            "exp": 3, "softmax": 7, "log_softmax": 7,
        },
    },
    "onnxruntime": {
        "float32": {
            "leaky_relu": 2, "hard_sigmoid": 2, "sigmoid": 5, "tanh": 9, "softsign": 4, "softplus": 5, "log_sigmoid":
            5, "elu": 2, "selu": 5, "celu": 2, "silu": 67, "hard_silu": 4, "mish": 8, "gelu": 4, "gelu_tanh": 19,
            "exp": 3, "softmax": 7, "log_softmax": 7,
        },
        "float64": {
            "leaky_relu": 4, "hard_sigmoid": 2, "sigmoid": 3, "tanh": 14, "silu": 74, "gelu_tanh": 51, "exp": 4,
            "softmax": 10, "log_softmax": 11,
        },
    },
    "numpy": {
        "float64": {"sigmoid": 2, "tanh": 2, "silu": 4, "softmax": 12},
    },
    "sklearn": {
        "float32": {
            "sigmoid": 3, "tanh": 2, "exp": 7, "softmax": 6,
        },
        "float64": {
            "sigmoid": 2, "tanh": 2, "exp": 4, "softmax": 12,
        },
    },
    "torch": {
        "float32": {
            "leaky_relu": 2, "hard_sigmoid": 3, "sigmoid": 3, "tanh": 2, "softsign": 3, "softplus": 3, "log_sigmoid":
            3, "elu": 1, "selu": 4, "celu": 1, "silu": 4, "hard_silu": 5, "mish": 4, "gelu": 40, "gelu_tanh": 6, "exp":
            3, "softmax": 7, "log_softmax": 7,
        },
        "float64": {
            "leaky_relu": 4, "hard_sigmoid": 2, "sigmoid": 2, "tanh": 2, "softsign": 2, "softplus": 1840992,
            "log_sigmoid": 4, "elu": 1, "selu": 4, "celu": 1, "silu": 4, "hard_silu": 6, "mish": 4, "gelu": 5,
            "gelu_tanh": 7, "exp": 4, "softmax": 10, "log_softmax": 10,
        },
    },
}  # fmt: skip

# How far a small error of z reaches: |f(z + d) - f(z)| <= L |d|.
_LIPSCHITZ = {
    "sigmoid": 0.25, "softsign": 1.0, "silu": 1.1, "gelu": 1.13, "gelu_tanh": 1.13, "mish": 1.09, "hard_silu": 1.5,
    "selu": 1.7581,
}  # fmt: skip


def _reach(f, z, e):
    """How far errors e of the weighted sums z reach through an activation."""
    slopes = [np.max(np.abs(np.asarray(value))) for value in f.parameters.values() if f.name not in ("clip", "celu")]
    if f.name == "exp":
        return np.exp(z) * np.expm1(e)
    if f.name == "softmax":  # each p_i changes by a factor within exp(+-2 max e)
        return np.expm1(2 * e.max(axis=-1, keepdims=True)) + 0 * e
    if f.name == "log_softmax":
        return e + e.max(axis=-1, keepdims=True)
    if f.name == "thresholded_relu":
        jump = np.abs(z - f.parameters["alpha"]) <= e
        return e + np.where(jump, np.abs(f.parameters["alpha"]), 0.0)
    return _LIPSCHITZ.get(f.name, max([1.0, *slopes])) * e


def allowance(net, x, peer, dtype):
    """How far our output for x and the library's may differ, element by element."""
    u, rows = U[dtype], ERRORS[peer][dtype]
    x = np.asarray(x, dtype=dtype)
    steps = nnfwd.trace([layer.rounded(dtype) for layer in net.to("numpy", dtype="float64")], x.astype("float64"))
    h, e = steps.x, np.zeros_like(steps.x)
    for layer, z, after in zip(net, steps.z, steps.h, strict=True):
        if isinstance(
            layer, Scale
        ):  # however it is multiplied out: (x - c) s + t, x s + (t - c s), with a rounded 1 / s
            scale, center, shift = (np.asarray(v, "float64") for v in (layer.scale, layer.center, layer.shift))
            e = np.abs(scale) * e + 8 * u * (np.abs(h * scale) + np.abs(center * scale) + np.abs(shift))
        elif not isinstance(layer, Activation):
            e = e @ np.swapaxes(np.abs(np.asarray(layer.weight, "float64")), -1, -2)
        e = _reach(layer.activation, z, e) + rows.get(layer.activation.name, 0.0) * u * np.maximum(1, np.abs(after))
        h = after
    bound = nnfwd.error_bound(net, x, dtype=dtype)
    assert not np.any(bound.unclaimed), "an output may overflow: draw smaller numbers"
    return 2 * bound.error + e


def agree(net, x, theirs, peer, dtype):
    """Asserts that our output for x is the other library's within both errors; the largest share of that used."""
    x, theirs = np.asarray(x, dtype=dtype), np.asarray(theirs)
    y = net(x)
    assert theirs.shape == y.shape, f"{peer} gives {theirs.shape}, we give {y.shape}"
    assert theirs.dtype == y.dtype == dtype
    difference, allowed = np.abs(y.astype("float64") - theirs), allowance(net, x, peer, dtype)
    assert np.all(difference <= allowed), (
        f"{peer}: {np.max(difference / np.maximum(allowed, 1e-300)):.3g} of the allowance\n{net!r}"
    )
    return float(np.max(difference / np.maximum(allowed, np.finfo("float64").tiny), initial=0.0))


# Measuring


def _torch():
    import torch
    from torch.nn import functional

    own = {
        "leaky_relu": lambda x: functional.leaky_relu(x, 0.2), "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"), "exp": torch.exp,
        "log_sigmoid": functional.logsigmoid, "hard_tanh": functional.hardtanh, "hard_sigmoid": functional.hardsigmoid, "hard_silu": functional.hardswish,
        "softmax": lambda x: functional.softmax(x, -1), "log_softmax": lambda x: functional.log_softmax(x, -1), "sigmoid": torch.sigmoid,
        "tanh": torch.tanh, "elu": lambda x: functional.elu(x, 0.5), "celu": lambda x: functional.celu(x, 0.5),
    }  # fmt: skip

    def call(f, x):
        function = own.get(f.name) or getattr(functional, f.name)
        return function(torch.from_numpy(x)).numpy()

    return call


def _keras():
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    names = {"exp": "exponential", "gelu": "gelu"}
    own = {
        "leaky_relu": lambda x: keras.activations.leaky_relu(x, negative_slope=0.2), "elu": lambda x: keras.activations.elu(x, alpha=0.5),
        "gelu": lambda x: keras.activations.gelu(x, approximate=False), "gelu_tanh": lambda x: keras.activations.gelu(x, approximate=True),
        "celu": lambda x: keras.activations.celu(x, alpha=0.5),
    }  # fmt: skip

    def call(f, x):
        function = own.get(f.name) or getattr(keras.activations, names.get(f.name, f.name))
        return np.asarray(function(keras.ops.convert_to_tensor(x)))

    return call


def _onnxruntime():
    import tempfile
    from pathlib import Path

    import onnxruntime

    from nnfwd.io.onnx_writer import write

    def call(f, x):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "f.onnx")
            width = x.shape[-1]
            one = np.asarray(1, x.dtype)
            write(Network([Scale(np.full(width, one)), Activation(f)]), path)
            session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
            return session.run(None, {"x": x})[0]

    return call


def _sklearn():
    from sklearn.neural_network._base import ACTIVATIONS

    names = {"sigmoid": "logistic"}

    def call(f, x):
        y = x.copy()
        ACTIVATIONS[names.get(f.name, f.name)](y)
        return y

    return call


def _numpy():
    """The formulas written down plainly, as the sample networks were computed."""

    def softmax(x):
        e = np.exp(x - x.max(axis=-1, keepdims=True))
        return e / e.sum(axis=-1, keepdims=True)

    plain = {"sigmoid": lambda x: 1 / (1 + np.exp(-x)), "silu": lambda x: x / (1 + np.exp(-x)), "tanh": np.tanh}
    return lambda f, x: {**plain, "softmax": softmax}[f.name](x)


PEERS = {"numpy": _numpy, "torch": _torch, "keras": _keras, "onnxruntime": _onnxruntime, "sklearn": _sklearn}
_SET = {"leaky_relu": {"negative_slope": 0.2}, "elu": {"alpha": 0.5}, "celu": {"alpha": 0.5}}
_NOT_MEASURED = ("clip", "prelu", "thresholded_relu")  # exact: comparisons, and one product


def points(name, dtype):
    """Inputs to measure at, in rows."""
    rng = np.random.default_rng(0)
    if "softmax" in name:
        return np.concatenate([rng.standard_normal((300, 40)) * s for s in (0.1, 1, 10)]).astype(dtype)
    far = 80 if name != "exp" else 5
    x = np.concatenate(
        [
            np.linspace(-far, far, 20001),
            np.linspace(-6, 0, 20001),
            rng.standard_normal(20000),
            10.0 ** rng.uniform(-20, 1, 5000),
        ]
    )
    return np.repeat(x.astype(dtype)[:, None], 2, axis=1)  # rows of two: PyTorch treats a single column in another way


def measured(call, name, dtype):
    """The largest |f~ - f| / (u max(1, |f|)) of a library's function."""
    f = activations.named(name)(**_SET.get(name, {}))
    x = points(name, dtype)
    exact = np.asarray(nnfwd.error_bound([Activation(f)], x, dtype=dtype).exact, "float64")
    return float(np.max(np.abs(np.asarray(call(f, x), "float64") - exact) / np.maximum(1, np.abs(exact))) / U[dtype])


def main(peers):
    """Prints the rows of these libraries."""
    for peer in peers:
        call = PEERS[peer]()
        for dtype in U:
            found = {}
            for name in activations.names():
                if name in _NOT_MEASURED:
                    continue
                try:
                    found[name] = measured(call, name, dtype)
                except Exception as error:  # the library has no such function, or not in this dtype
                    print(f"# {peer} {dtype} {name}: {type(error).__name__} {str(error)[:70]}", file=sys.stderr)
            print(f'ERRORS["{peer}"]["{dtype}"]:', {k: int(np.ceil(2 * v)) for k, v in found.items() if v > 0})


if __name__ == "__main__":
    if "keras" in (sys.argv[1:] or PEERS):
        os.environ.setdefault("JAX_ENABLE_X64", "1")
    main(sys.argv[1:] or list(PEERS))
