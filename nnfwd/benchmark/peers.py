"""Other people's ways of running a network, to measure ours against.

This is the one module of nnfwd that names array libraries and multiplies matrices beside the pass: a comparison needs
what it compares with, written as its own users write it. Nothing but the benchmark imports it.

Each peer is handed a network of Dense layers and gives `(call, argument)`: `call(argument)` computes the output, and is
done when it returns. The argument holds x `(rows, in)` in the form that is cheapest for the peer, and weights are
placed, transposed and compiled beforehand, so that nothing but the pass is timed.
"""

import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnfwd.io import save
from nnfwd.layers import Dense, to_numpy
from nnfwd.network import Network

Prepared = tuple[Callable[[Any], Any], Any]


class InexpressibleError(Exception):
    """A network that a peer cannot run; the message says what it has not."""


@dataclass(frozen=True)
class Peer:
    """One way of running a network."""

    name: str
    module: str
    distribution: str
    prepare: Callable[[Network, np.ndarray, int], Prepared]
    """network, x and threads to `(call, argument)`. Raises `InexpressibleError`."""

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None


def gemm(n: int, dtype: str) -> tuple[Callable[[], Any], int]:
    """A product of two n x n matrices by NumPy, and its floating-point operations: what this machine can do at best."""
    a, b = np.random.default_rng(0).random((2, n, n), dtype="float64").astype(dtype)
    out = np.empty_like(a)
    return lambda: np.matmul(a, b, out=out), 2 * n**3


def _naive(net: Network, x: np.ndarray, threads: int) -> Prepared:
    """As a user writes it down."""

    def softmax(z: np.ndarray) -> np.ndarray:
        e = np.exp(z - z.max(axis=-1, keepdims=True))
        return e / e.sum(axis=-1, keepdims=True)

    known: dict[str, Callable[[Any], Any]] = {
        "identity": lambda z: z,
        "relu": lambda z: np.maximum(z, 0),
        "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
        "tanh": np.tanh,
        "softmax": softmax,
    }
    if importlib.util.find_spec("scipy") is not None:
        erf = importlib.import_module("scipy.special").erf
        known["gelu"] = lambda z: 0.5 * z * (1 + erf(z * np.float32(0.5**0.5)))
    layers = [(w, b, _known(known, name)) for w, b, name in _dense(net)]

    def run(h: np.ndarray) -> np.ndarray:
        for w, b, act in layers:
            h = act(h @ w.T if b is None else h @ w.T + b)
        return h

    return run, x


def _scikit_learn(net: Network, x: np.ndarray, threads: int) -> Prepared:
    """The pass inside MLPClassifier, without the checks of x before it."""
    neural_network = importlib.import_module("sklearn.neural_network")
    layers = _dense(net)
    names = {"identity": "identity", "relu": "relu", "tanh": "tanh", "sigmoid": "logistic", "softmax": "softmax"}
    *hidden, out = [_known(names, name) for _, _, name in layers]
    if len(set(hidden)) > 1 or "softmax" in hidden or out in ("relu", "tanh"):
        raise InexpressibleError("it has one hidden activation, and identity, sigmoid or softmax at the end")
    mlp = neural_network.MLPClassifier(activation=(hidden or ["identity"])[0])
    mlp.coefs_ = [np.ascontiguousarray(w.T) for w, _, _ in layers]
    mlp.intercepts_ = [np.zeros(len(w), w.dtype) if b is None else b for w, b, _ in layers]
    mlp.n_layers_, mlp.out_activation_ = len(layers) + 1, out
    return lambda x: mlp._forward_pass_fast(x, check_input=False), x


def _onnx_runtime(net: Network, x: np.ndarray, threads: int) -> Prepared:
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder, "model.onnx")
        save(net, path)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0], x


def _torch(net: Network, x: np.ndarray, threads: int, *, compiled: bool = False) -> Prepared:
    import torch

    torch.set_num_threads(threads)
    functional = torch.nn.functional
    known: dict[str, Callable[[Any], Any]] = {
        "identity": lambda z: z,
        "relu": torch.relu,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "softmax": lambda z: torch.softmax(z, -1),
        "gelu": functional.gelu,
    }
    layers = [
        (torch.tensor(w), None if b is None else torch.tensor(b), _known(known, name)) for w, b, name in _dense(net)
    ]

    def forward(h: Any) -> Any:
        for w, b, act in layers:
            h = act(functional.linear(h, w, b))
        return h

    if compiled:
        torch._dynamo.reset()  # it falls back to eager, silently, at the ninth network that one function has run
        forward = torch.compile(forward, dynamic=False)

    def run(x: Any) -> Any:
        with torch.inference_mode():
            return forward(x)

    if compiled:
        run(torch.from_numpy(x))
    return run, torch.from_numpy(x)


def _torch_compile(net: Network, x: np.ndarray, threads: int) -> Prepared:
    return _torch(net, x, threads, compiled=True)


def _jax_jit(net: Network, x: np.ndarray, threads: int) -> Prepared:
    """Written by hand: weights `(in, out)`, as Flax has them, and as arguments."""
    import jax
    import jax.numpy as jnp

    known: dict[str, Callable[[Any], Any]] = {
        "identity": lambda z: z,
        "relu": jax.nn.relu,
        "sigmoid": jax.nn.sigmoid,
        "tanh": jnp.tanh,
        "softmax": jax.nn.softmax,
        "gelu": lambda z: jax.nn.gelu(z, approximate=False),
    }
    layers = _dense(net)
    acts = [_known(known, name) for _, _, name in layers]
    cpu = jax.devices("cpu")[0]

    def put(a: np.ndarray | None) -> Any:
        placed = None if a is None else jax.device_put(a, cpu)
        if placed is not None and placed.dtype != x.dtype:
            raise InexpressibleError(f"it has {x.dtype} only with x64 enabled")
        return placed

    weights = [(put(np.ascontiguousarray(w.T)), put(b)) for w, b, _ in layers]

    def forward(weights: Any, h: Any) -> Any:
        for (w, b), act in zip(weights, acts, strict=True):
            h = act(h @ w if b is None else h @ w + b)
        return h

    run = jax.jit(forward)
    return lambda x: run(weights, x).block_until_ready(), put(x)


def _dense(net: Network) -> list[tuple[np.ndarray, np.ndarray | None, str]]:
    """Weight `(out, in)`, bias and name of the activation of each layer."""
    layers = []
    for layer in net:
        if not isinstance(layer, Dense) or layer.members is not None:
            what = "an ensemble" if layer.members is not None else f"a {type(layer).__name__} layer"
            raise InexpressibleError(f"it is set up here for Dense layers alone, and this is {what}")
        act = layer.activation
        name = act.name if act.is_named else f"{act.name} of the caller's"
        layers.append((to_numpy(layer.weight), None if layer.bias is None else to_numpy(layer.bias), name))
    return layers


def _known(known: dict[str, Any], name: str) -> Any:
    if name not in known:
        raise InexpressibleError(f"it has no {name} here")
    return known[name]


PEERS = (
    Peer("ONNX Runtime", "onnxruntime", "onnxruntime", _onnx_runtime),
    Peer("PyTorch", "torch", "torch", _torch),
    Peer("torch.compile", "torch", "torch", _torch_compile),
    Peer("jax.jit", "jax", "jax", _jax_jit),
    Peer("scikit-learn", "sklearn", "scikit-learn", _scikit_learn),
    Peer("naive NumPy", "numpy", "numpy", _naive),
)


def release() -> None:
    """Lets go of what the libraries keep of the networks they compiled."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
