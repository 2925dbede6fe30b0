"""Bad input: a typed error in one line that names the shapes, dtypes or names, raised before any work.

A row of `CASES` is (id, call, error, text). The parts of text between bars stand in the message, in that order.
"""

import io
import json
import pickle
import re
import struct
import sys
import tracemalloc
import warnings
import zipfile

import array_api_strict as strict
import numpy as np
import pytest
from places import need

import nnfwd
from nnfwd import Activation, Dense, Network, Scale, activations, errors
from nnfwd.bounds import Arithmetic, looped_bound
from nnfwd.errors import (
    ArrayError,
    BackendError,
    DeviceError,
    DtypeError,
    ModelFileError,
    NnfwdError,
    ShapeError,
    UnknownNameError,
)

ones = np.ones
W, B, X = ones((4, 3)), ones(4), ones(3)
DEVICE1, CPU_DEVICE = strict.Device("device1"), strict.Device("CPU_DEVICE")


def double(x, /, *, xp):
    """An activation of one's own, without a scalar form."""
    return 2 * x


class Subclass(np.ndarray):
    """An ndarray of another kind."""


class DataFrame:
    """As pandas has it."""

    def to_numpy(self):
        return W


class DataArray:
    """As xarray has it."""

    data = W


def net(**options):
    return Network([Dense(W, B, "sigmoid", **options), Dense(ones((2, 4)), ones(2))])


def with_parameters(activation="relu", /, **first):
    """A network of a Dense layer with the parameters given in place of its own."""
    network = Network([Dense(W, B, activation)])
    return network.with_parameters([network.parameters[0] | first])


def on_device1(*layers):
    return Network([Dense(strict.ones(shape, device=DEVICE1)) for shape in layers or ((4, 3),)])


def jnp():
    return need("jax").numpy


def without_x64(call):
    with need("jax").enable_x64(False):
        return call()


def lazy(*shape, dtype="float64"):
    """A Dask array that fails the test when it is computed."""
    dask = need("dask")

    def computed():
        pytest.fail("the Dask array was computed")

    return dask.array.from_delayed(dask.delayed(computed)(), shape=shape, dtype=dtype)


def endless(dtype, width):
    """An array with more rows than any memory holds, which takes 8 bytes: a copy of it is a MemoryError."""
    return np.broadcast_to(np.zeros((), dtype), (2**54, width))


LAYERS = [
    ("weight of one dimension", lambda: Dense(ones(3)), ShapeError, "weight (3,)|(out, in)"),
    (
        "weight of four dimensions",
        lambda: Dense(ones((1, 2, 3, 4))),
        ShapeError,
        "weight (1, 2, 3, 4)|(members, out, in)",
    ),
    ("weight a number", lambda: Dense(2.0), ShapeError, "weight ()|(out, in)"),
    ("bias a row", lambda: Dense(W, ones((1, 4))), ShapeError, "bias (1, 4)|weight (4, 3)|(4,)"),
    ("bias of wrong length", lambda: Dense(W, ones(3)), ShapeError, "bias (3,)|weight (4, 3)|(4,)"),
    ("bias a number", lambda: Dense(W, 1.0), ShapeError, "bias ()|weight (4, 3)|(4,)"),
    ("bias without members", lambda: Dense(ones((5, 4, 3)), B), ShapeError, "bias (4,)|weight (5, 4, 3)|(5, 4)"),
    ("bias with members", lambda: Dense(W, ones((5, 4))), ShapeError, "bias (5, 4)|weight (4, 3)|(4,)"),
    ("zero nodes", lambda: Dense(ones((0, 3))), ShapeError, "weight (0, 3)|width of zero"),
    ("zero inputs", lambda: Dense(ones((4, 0))), ShapeError, "weight (4, 0)|width of zero"),
    ("zero members", lambda: Dense(ones((0, 4, 3))), ShapeError, "weight (0, 4, 3)|zero"),
    ("weight ragged", lambda: Dense([[1, 2], [3]]), ShapeError, "weight|ragged"),
    ("weight None", lambda: Dense(None), ArrayError, "weight|NoneType"),
    ("weight complex", lambda: Dense(W.astype(complex)), DtypeError, "weight.dtype|complex128|float32"),
    ("weight object", lambda: Dense(W.astype(object)), DtypeError, "weight.dtype|object|float32"),
    ("weight string", lambda: Dense([["1", "2"]]), DtypeError, "weight.dtype|str|float32"),
    ("weight longdouble", lambda: Dense(W.astype(np.longdouble)), DtypeError, "weight.dtype|float|float64"),
    (
        "weight integer elsewhere",
        lambda: Dense(strict.ones((4, 3), dtype=strict.int64)),
        DtypeError,
        "weight.dtype|int64",
    ),
    ("weight matrix", lambda: Dense(W.view(np.matrix)), ArrayError, "weight|matrix|numpy.asarray(weight)"),
    ("bias masked", lambda: Dense(W, np.ma.ones(4)), ArrayError, "bias|MaskedArray|bias.filled("),
    ("scale of wrong rank", lambda: Scale(ones((1, 3))), ShapeError, "scale (1, 3)|(features,)"),
    ("scale of no rank", lambda: Scale(np.array(2.0)), ShapeError, "scale ()|(features,)"),
    ("scale of no width", lambda: Scale(ones(0)), ShapeError, "scale (0,)|zero"),
    ("center of wrong length", lambda: Scale(X, center=B), ShapeError, "center (4,)|(3,)"),
    ("shift of wrong rank", lambda: Scale(X, shift=ones((3, 1))), ShapeError, "shift (3, 1)|(3,)"),
    ("scale None", lambda: Scale(None), DtypeError, "scale|None|(features,)"),
    ("scale text", lambda: Scale("2"), ArrayError, "scale|str"),
]

ACTIVATIONS = [
    (
        "activation misspelt",
        lambda: Dense(W, B, "sigmod"),
        UnknownNameError,
        "activation 'sigmod'|did you mean 'sigmoid'?",
    ),
    ("activation unknown", lambda: Dense(W, B, "zzz"), UnknownNameError, "activation 'zzz'|relu|sigmoid"),
    ("activation a number", lambda: Dense(W, B, 3), UnknownNameError, "activation 3"),
    ("activation without xp", lambda: Dense(W, B, np.tanh), ArrayError, "activation tanh|takes no xp|(x, /, *, xp)"),
    ("activation lambda", lambda: Dense(W, B, lambda x: x), ArrayError, "takes no xp"),
    (
        "activation of another shape",
        lambda: Network([Dense(W, B, lambda x, *, xp: x[..., :1])])(X),
        ArrayError,
        "keep both",
    ),
    ("activation of another dtype", lambda: Network([Dense(W, B, lambda x, *, xp: x > 0)])(X), ArrayError, "keep both"),
    ("activation a layer", lambda: Dense(W, B, Activation("relu")), UnknownNameError, "activation Activation(relu)"),
    ("activation of many lines", lambda: Dense(W, B, W), UnknownNameError, "activation"),
    ("slope missing", lambda: Dense(W, B, "prelu"), DtypeError, "prelu needs negative_slope|prelu(negative_slope=...)"),
    ("limits missing", lambda: Activation("clip"), DtypeError, "clip needs lower, upper"),
    ("one limit missing", lambda: Activation(activations.clip(lower=0)), DtypeError, "clip needs upper"),
    ("slope missing at call", lambda: activations.prelu(X), DtypeError, "prelu needs negative_slope"),
    (
        "parameter misspelt",
        lambda: activations.leaky_relu(negative_slop=0.2),
        UnknownNameError,
        "parameter of leaky_relu 'negative_slop'|did you mean 'negative_slope'?",
    ),
    ("parameter of relu", lambda: activations.relu(alpha=1), UnknownNameError, "parameter of relu 'alpha'|none"),
    ("parameter None", lambda: activations.elu(alpha=None), DtypeError, "elu.alpha is None|number"),
    ("parameter bool", lambda: activations.elu(alpha=True), DtypeError, "elu.alpha is True|number"),
    ("parameter text", lambda: activations.elu(alpha="1"), ArrayError, "elu.alpha|str"),
    ("parameter complex", lambda: activations.elu(alpha=1j), ArrayError, "elu.alpha|complex"),
    (
        "parameter of wrong length",
        lambda: Dense(W, B, activations.prelu(negative_slope=X)),
        ShapeError,
        "negative_slope (3,)|weight (4, 3)|(4,)",
    ),
    (
        "parameter of wrong rank",
        lambda: Dense(W, B, activations.prelu(negative_slope=ones((1, 4)))),
        ShapeError,
        "negative_slope (1, 4)|weight (4, 3)|(4,)",
    ),
    ("limits that differ", lambda: Activation(activations.clip(lower=X, upper=B)), ShapeError, "upper (4,)|(3,)"),
    ("no scalar form", lambda: nnfwd.looped_feed_forward(X, [Dense(W, B, double)]), ArrayError, "double|scalar"),
    (
        "no bound",
        lambda: looped_bound(X, [Dense(W, B, double)], arithmetic=Arithmetic("float64")),
        ArrayError,
        "double|the layers before it",
    ),
]

NETWORKS = [
    ("no layers", lambda: Network([]), ShapeError, "at least one layer"),
    ("empty slice", lambda: net()[2:], ShapeError, "at least one layer"),
    ("array for a layer", lambda: Network([Dense(W), W]), ArrayError, "layer 1|ndarray|Dense"),
    ("network for a layer", lambda: Network([net()]), ArrayError, "layer 0|Network|Dense"),
    ("bare layer", lambda: Network(Dense(W)), ArrayError, "Dense"),
    ("no network", lambda: nnfwd.feed_forward(X, None), ArrayError, "None"),
    ("trace, arguments swapped", lambda: nnfwd.trace(X, net()), ArrayError, "layer 0|Dense"),
    ("chain", lambda: Network([Dense(W), Dense(W)]), ShapeError, "layer 1|weight (4, 3)|(..., 4)"),
    ("chain with Scale", lambda: Network([Dense(W), Scale(X)]), ShapeError, "layer 1|scale=array(3,)|(..., 4)"),
    (
        "chain across an activation",
        lambda: Network([Dense(W), Activation("relu"), Dense(W)]),
        ShapeError,
        "layer 2|weight (4, 3)|(..., 4)",
    ),
    (
        "members that differ",
        lambda: Network([Dense(ones((5, 4, 3))), Dense(ones((6, 2, 4)))]),
        ShapeError,
        "layer 1|6|members|5",
    ),
    ("too many biases", lambda: Network.from_arrays([W], [B, B]), ShapeError, "2 biases|1 weights"),
    (
        "too many activations",
        lambda: Network.from_arrays([W], [B], ["relu"] * 2),
        ShapeError,
        "2 activations|1 weights",
    ),
    ("array of weights", lambda: Network.from_arrays(W), ShapeError, "weight (3,)|(out, in)"),
    ("parameters of too few layers", lambda: net().with_parameters([{}]), ShapeError, "1 layers|2"),
    ("parameters, None", lambda: net().with_parameters(None), NnfwdError, "parameters"),
    (
        "parameters without bias",
        lambda: net().with_parameters([{"weight": W}, net().parameters[1]]),
        ShapeError,
        "layer 0|weight|weight, bias",
    ),
    (
        "parameters as a list",
        lambda: net().with_parameters([[W, B], [ones((2, 4)), ones(2)]]),
        ShapeError,
        "layer 0|weight, bias",
    ),
    ("parameters, weight of one dimension", lambda: with_parameters(weight=X), ShapeError, "weight (3,)|(out, in)"),
    ("parameters, bias a row", lambda: with_parameters(bias=ones((1, 4))), ShapeError, "bias (1, 4)|weight (4, 3)"),
    ("parameters, weight complex", lambda: with_parameters(weight=W + 0j), DtypeError, "weight.dtype|complex128"),
    ("parameters, weight None", lambda: with_parameters(weight=None), ArrayError, "weight|NoneType"),
    (
        "parameters, slope of wrong length",
        lambda: with_parameters(activations.prelu(negative_slope=B), activation={"negative_slope": X}),
        ShapeError,
        "negative_slope (3,)|(4,)",
    ),
    (
        "parameters, unknown slope",
        lambda: with_parameters(activations.prelu(negative_slope=B), activation={"alpha": B}),
        NnfwdError,
        "alpha|negative_slope",
    ),
    (
        "parameters, one limit",
        lambda: with_parameters(activations.clip(lower=B, upper=B), activation={"lower": B}),
        NnfwdError,
        "upper",
    ),
    ("save, callable", lambda: nnfwd.save(Network([Dense(W, B, double)]), "no.npz"), ModelFileError, "layer 0|double"),
    ("save, extension", lambda: nnfwd.save(net(), "no.xyz"), ModelFileError, "no.xyz|.npz"),
    ("save, no extension", lambda: nnfwd.save(net(), "no"), ModelFileError, "no|.npz"),
    (
        "save, bfloat16",
        lambda: nnfwd.save(Network([Dense(jnp().ones((4, 3), "bfloat16"))]), "no.npz"),
        ModelFileError,
        "bfloat16|float32",
    ),
]

SHAPES = [
    ("x of wrong width", lambda: net()(ones(5)), ShapeError, "layer 0|weight (4, 3)|x (5,)"),
    ("x of wrong width, rows", lambda: net()(ones((7, 5))), ShapeError, "layer 0|weight (4, 3)|x (7, 5)"),
    ("x of wrong width, Scale", lambda: Network([Scale(X)])(B), ShapeError, "layer 0|scale=array(3,)|x (4,)"),
    ("x a number", lambda: net()(1.0), ShapeError, "layer 0|x ()"),
    ("x of no dimension", lambda: Network([Activation("relu")])(np.array(1.0)), ShapeError, "layer 0|relu|x ()"),
    ("x without features", lambda: Network([Activation("relu")])(ones((2, 0))), ShapeError, "x (2, 0)|no features"),
    ("x ragged", lambda: net()([[1, 2, 3], [1, 2]]), ShapeError, "x|ragged"),
    ("x ragged, deep", lambda: net()([[[1, 2, 3]], [[1, 2, 3], [1, 2, 3]]]), ShapeError, "x|ragged"),
    ("x an empty list", lambda: net()([]), ShapeError, "layer 0|x (0,)"),
    ("trace, width", lambda: nnfwd.trace(net(), ones(5)), ShapeError, "layer 0|weight (4, 3)|x (5,)"),
    ("compiled, width", lambda: net().compile()(ones(5)), ShapeError, "layer 0|weight (4, 3)|x (5,)"),
    ("loop, width", lambda: nnfwd.looped_feed_forward([1, 2], net()), ShapeError, "layer 0|weight (4, 3)|x (2,)"),
    ("loop, no dimension", lambda: nnfwd.looped_feed_forward(np.array(1.0), net()), ShapeError, "x ()"),
    ("loop, no features", lambda: nnfwd.looped_feed_forward(ones((2, 0)), net()), ShapeError, "x (2, 0)"),
    ("loop, ragged depth", lambda: nnfwd.looped_feed_forward([[1, 2, 3], 2], net()), ShapeError, "ragged"),
]


def bad_x(call, prefix=""):
    """The same rows for everything that takes x."""
    rows = [
        ("matrix", lambda: X.view(np.matrix), ArrayError, "x is a numpy.matrix|numpy.asarray(x)"),
        ("masked", lambda: np.ma.masked_array(X, [0, 1, 0]), ArrayError, "x is a numpy.ma.MaskedArray|x.filled("),
        ("subclass", lambda: X.view(Subclass), ArrayError, "Subclass|numpy.asarray(x)"),
        ("recarray", lambda: np.rec.array([(1.0,)] * 3, dtype=[("a", "f8")]), ArrayError, "recarray|numpy.asarray(x)"),
        ("object", lambda: np.array([1, None, 3]), DtypeError, "x.dtype is object|float32"),
        ("text array", lambda: np.array(["1", "2", "3"]), DtypeError, "x.dtype is str|float32"),
        ("bytes array", lambda: np.array([b"1", b"2", b"3"]), DtypeError, "x.dtype is bytes|float32"),
        ("dates", lambda: np.zeros(3, "datetime64[D]"), DtypeError, "x.dtype is datetime64[D]|float32"),
        ("durations", lambda: np.zeros(3, "timedelta64[s]"), DtypeError, "x.dtype is timedelta64[s]|float32"),
        ("complex", lambda: X + 0j, DtypeError, "x.dtype is complex128|float32"),
        ("structured", lambda: np.zeros(3, [("a", "f8")]), DtypeError, "x.dtype is void|float32"),
        ("longdouble", lambda: X.astype(np.longdouble), DtypeError, "x.dtype is float|float32"),
        ("list of text", lambda: ["1", "2", "3"], DtypeError, "x.dtype is str|float32"),
        ("list of complex", lambda: [1j, 2, 3], DtypeError, "x.dtype is complex128|float32"),
        ("list with None", lambda: [1, None, 3], DtypeError, "x.dtype is object|float32"),
        ("list of masked", lambda: [np.ma.masked_array(X, [0, 1, 0])] * 2, ArrayError, "x|MaskedArray"),
        ("list of another library's", lambda: [strict.ones(3)] * 2, ArrayError, "x|array_api_strict"),
        ("DataFrame", DataFrame, ArrayError, "x is a|DataFrame|x.to_numpy()"),
        ("DataArray", DataArray, ArrayError, "x is a|DataArray|x.data"),
        ("None", lambda: None, ArrayError, "x is a|NoneType"),
        ("dict", lambda: {"x": [1, 2, 3]}, ArrayError, "x is a|dict"),
        ("set", lambda: {1, 2, 3}, ArrayError, "x is a|set"),
        ("text", lambda: "1, 2, 3", ArrayError, "x is a|str"),
        ("bytes", lambda: b"123", ArrayError, "x is a|bytes"),
        ("generator", lambda: (i for i in range(3)), ArrayError, "x is a|generator"),
        ("float8", lambda: jnp().ones(3, "float8_e4m3fn"), DtypeError, "x.dtype is float8_e4m3fn|float32"),
        ("key", lambda: need("jax").random.key(0), DtypeError, "x.dtype is key|float32"),
    ]
    return [(f"{prefix}x {name}", lambda make=make: call(make()), error, text) for name, make, error, text in rows]


BACKENDS = [
    ("backend misspelt", lambda: net()(X, backend="numpi"), UnknownNameError, "backend 'numpi'|did you mean 'numpy'?"),
    ("backend unknown", lambda: net()(X, backend="zzzzz"), UnknownNameError, "backend 'zzzzz'|dask|jax|numpy"),
    ("backend a number", lambda: net()(X, backend=3), UnknownNameError, "backend 3|numpy"),
    ("backend a list", lambda: net()(X, backend=["jax"]), UnknownNameError, "backend ['jax']"),
    ("backend another module", lambda: net()(X, backend=json), UnknownNameError, "backend 'json'|numpy"),
    ("backend empty", lambda: net()(X, backend=""), UnknownNameError, "backend ''|numpy"),
    ("backend dotted", lambda: net()(X, backend="jax.numpy"), UnknownNameError, "backend 'jax.numpy'"),
    ("backend a path", lambda: net()(X, backend="../x"), UnknownNameError, "backend '../x'|numpy"),
    ("backend of two lines", lambda: net()(X, backend="ja\nx"), UnknownNameError, r"backend 'ja\nx'"),
    ("backend, compile", lambda: net().compile(backend="numpi"), UnknownNameError, "backend 'numpi'|'numpy'"),
    ("backend, to", lambda: net().to("numpi"), UnknownNameError, "backend 'numpi'|'numpy'"),
    ("device unknown", lambda: net()(X, device="cuda:7"), DeviceError, "numpy|'cuda:7'|cpu"),
    (
        "device unknown, jax",
        lambda: net()(X, backend="jax", device="tpu:9", dtype="float32"),
        DeviceError,
        "jax|'tpu:9'",
    ),
    ("device empty", lambda: net()(X, device=""), DeviceError, "numpy|''|cpu"),
    ("device a number", lambda: net()(X, device=3), DeviceError, "numpy|3|cpu"),
    ("device another library's", lambda: net()(X, device=DEVICE1), DeviceError, "numpy|device1|cpu"),
    (
        "device another library's, jax",
        lambda: net()(X, backend=need("jax").numpy, device=DEVICE1, dtype="float32"),
        DeviceError,
        "jax|device1",
    ),
    ("device, compile", lambda: net().compile(device="gpu"), DeviceError, "numpy|'gpu'|cpu"),
    (
        "device, compile on Dask",
        lambda: need("dask") and net().compile(backend="dask", device="gpu"),
        DeviceError,
        "'gpu'",
    ),
    (
        "device, to, without weights",
        lambda: Network([Activation("relu")]).to("numpy", device="gpu"),
        DeviceError,
        "'gpu'",
    ),
    ("precision misspelt", lambda: net()(X, precision="hihgest"), UnknownNameError, "precision 'hihgest'|'highest'"),
    ("precision None", lambda: net()(X, precision=None), UnknownNameError, "precision None|highest"),
    ("precision, compile", lambda: net().compile(precision="float32"), UnknownNameError, "precision 'float32'|highest"),
]

DTYPES = [
    ("dtype unknown", lambda: net()(X, dtype="float31"), DtypeError, "dtype is float31|float32"),
    ("dtype integer", lambda: net()(X, dtype="int32"), DtypeError, "dtype is int32|float32"),
    ("dtype integer, object", lambda: net()(X, dtype=np.int64), DtypeError, "dtype is int64|float32"),
    ("dtype complex", lambda: net()(X, dtype=complex), DtypeError, "dtype is complex128|float32"),
    ("dtype a number", lambda: net()(X, dtype=3), DtypeError, "dtype is 3|float32"),
    ("dtype a list", lambda: net()(X, dtype=["float32"]), DtypeError, "dtype is ['float32']"),
    ("dtype of two lines", lambda: net()(X, dtype="float\n32"), DtypeError, "dtype is|float32"),
    ("dtype, compile", lambda: net().compile(dtype="int8"), DtypeError, "dtype is int8|float32"),
    ("dtype, to", lambda: net().to("numpy", dtype="int8"), DtypeError, "dtype is int8|float32"),
    ("bfloat16 of NumPy", lambda: net()(X, dtype="bfloat16"), DtypeError, "numpy has no bfloat16|float32"),
    (
        "bfloat16 of NumPy, compile",
        lambda: net().compile(dtype="bfloat16"),
        DtypeError,
        "numpy has no bfloat16|float32",
    ),
    (
        "bfloat16 of Dask",
        lambda: need("dask") and net().compile(backend="dask", dtype="bfloat16"),
        DtypeError,
        "bfloat16",
    ),
    ("compiled for another", lambda: net().compile()(ones(3, "float32")), DtypeError, "float32|compiled for float64"),
    *[
        (
            f"float64, x64 off, {name}",
            lambda call=call: without_x64(call),
            DtypeError,
            'x64|dtype="float32"|jax_enable_x64',
        )
        for name, call in {
            "call": lambda: net()(X, backend="jax"),
            "compile": lambda: net().compile(backend="jax"),
            "to": lambda: net().to("jax"),
            "dtype": lambda: net()(jnp().ones(3), dtype="float64"),
            "integers": lambda: net()([1, 2, 3], backend="jax", dtype=float),
        }.items()
    ],
]

MIXED = [
    (
        "NumPy x, JAX weights",
        lambda: Network([Dense(jnp().ones((4, 3)))])(X),
        ArrayError,
        "weights are jax|x is a numpy|network.to('numpy')|backend='jax'",
    ),
    (
        "strict x, JAX weights",
        lambda: Network([Dense(jnp().ones((4, 3)))])(strict.ones(3)),
        ArrayError,
        "weights are jax|x is a array_api_strict",
    ),
    (
        "JAX x, strict weights",
        lambda: on_device1()(jnp().ones(3)),
        ArrayError,
        "weights are array_api_strict|x is a jax",
    ),
    ("weight and bias", lambda: Network([Dense(jnp().ones((4, 3)), B)]), ArrayError, "jax and numpy|one library"),
    (
        "weight and slope",
        lambda: Network([Dense(strict.ones((4, 3)), activation=activations.prelu(negative_slope=B))]),
        ArrayError,
        "array_api_strict and numpy|one library",
    ),
    (
        "layers",
        lambda: Network([Dense(jnp().ones((4, 3))), Dense(ones((2, 4)))]),
        ArrayError,
        "jax and numpy|one library",
    ),
    (
        "layers, at call",
        lambda: nnfwd.feed_forward(X, [Dense(strict.ones((4, 3))), Dense(ones((2, 4)))]),
        ArrayError,
        "array_api_strict and numpy|one library",
    ),
    ("devices", lambda: on_device1()(strict.ones(3)), DeviceError, "weights are on|device1|x is on|CPU_DEVICE|move"),
    (
        "devices, trace",
        lambda: nnfwd.trace(on_device1(), strict.ones(3)),
        DeviceError,
        "weights are on|device1|x is on|CPU_DEVICE|move",
    ),
    (
        "devices, layers",
        lambda: Network([*on_device1(), Dense(strict.ones((2, 4)))])(strict.ones(3, device=DEVICE1)),
        DeviceError,
        "CPU_DEVICE|device1",
    ),
]

# Refused while x costs too much to be touched: reading or copying it would compute, or run out of memory.
UNTOUCHED = [
    ("Dask, width", lambda: net()(lazy(5, 2)), ShapeError, "layer 0|weight (4, 3)|x (5, 2)"),
    ("Dask, width, moved", lambda: net()(lazy(5, 2), backend="numpy"), ShapeError, "weight (4, 3)|x (5, 2)"),
    ("Dask, width, compiled", lambda: net().compile(backend="numpy")(lazy(5, 2)), ShapeError, "weight (4, 3)|x (5, 2)"),
    ("Dask, width, trace", lambda: nnfwd.trace(net(), lazy(5, 2)), ShapeError, "weight (4, 3)|x (5, 2)"),
    ("Dask, width, loop", lambda: nnfwd.looped_feed_forward(lazy(5, 2), net()), ShapeError, "weight (4, 3)|x (5, 2)"),
    ("Dask, dtype", lambda: net()(lazy(5, 3, dtype="complex128")), DtypeError, "x.dtype is complex128"),
    ("Dask, weight", lambda: Dense(lazy(4, 3)), ArrayError, "weight is a lazy array|weight.compute()"),
    ("Dask, chunks", lambda: net()(lazy(5, 3).rechunk((5, 1))), ShapeError, "3 chunks|x.rechunk({-1: -1})"),
    ("Dask, device", lambda: net()(lazy(5, 3), backend="numpy", device="gpu"), DeviceError, "numpy|'gpu'|cpu"),
    ("Dask, bfloat16", lambda: net()(lazy(5, 3), backend="numpy", dtype="bfloat16"), DtypeError, "bfloat16"),
    ("Dask, x64 off", lambda: without_x64(lambda: net()(lazy(5, 3), backend="jax")), DtypeError, "x64"),
    ("Dask, JAX weights", lambda: Network([Dense(jnp().ones((4, 3)))])(lazy(5, 3)), ArrayError, "jax|dask"),
    (
        "Dask, JAX weights, moved",
        lambda: Network([Dense(jnp().ones((4, 3)))])(lazy(5, 3), backend="numpy"),
        ArrayError,
        "jax|numpy",
    ),
    ("Dask, list of arrays", lambda: net()([lazy(3), lazy(3)]), ArrayError, "x|dask"),
    (
        "tracer, width",
        lambda: need("jax").eval_shape(lambda x: net()(x), jnp().zeros(5)),
        ShapeError,
        "layer 0|weight (4, 3)|x (5,)",
    ),
    ("endless, width", lambda: net()(endless("float64", 5)), ShapeError, "weight (4, 3)|, 5)"),
    ("endless, width, cast", lambda: net()(endless("float32", 5), dtype="float64"), ShapeError, "weight (4, 3)|, 5)"),
    ("endless, width, integers", lambda: net()(endless("int8", 5)), ShapeError, "weight (4, 3)|, 5)"),
    ("endless, width, compiled", lambda: net().compile()(endless("int8", 5)), ShapeError, "weight (4, 3)|, 5)"),
    ("endless, dtype", lambda: net()(endless("complex128", 3)), DtypeError, "x.dtype is complex128"),
    ("endless, compiled", lambda: net().compile()(endless("float32", 3)), DtypeError, "float32|compiled for float64"),
]

CASES = [
    *LAYERS,
    *ACTIVATIONS,
    *NETWORKS,
    *SHAPES,
    *bad_x(lambda x: net()(x)),
    *bad_x(lambda x: net().compile()(x), "compiled, "),
    *bad_x(lambda x: nnfwd.looped_feed_forward(x, net()), "loop, "),
    *BACKENDS,
    *DTYPES,
    *MIXED,
    *UNTOUCHED,
]


def refused(call, error, text):
    """The call raises that error, in one line with the parts of text."""
    with pytest.raises(error, match=".*".join(map(re.escape, text.split("|")))) as caught:
        call()
    message = str(caught.value)
    assert message
    assert "\n" not in message
    assert isinstance(caught.value, NnfwdError)


@pytest.mark.parametrize(("call", "error", "text"), [pytest.param(*row, id=name) for name, *row in CASES])
def test_bad_input(call, error, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(call, error, text)
    assert not list(tmp_path.iterdir()), "something was written"


def test_there_are_forty_kinds():
    names = [name for name, *_ in CASES]
    assert len(set(names)) == len(names) >= 40


@pytest.mark.parametrize("error", [e for e in vars(errors).values() if e in NnfwdError.__subclasses__()])
def test_every_error_is_also_one_of_pythons(error):
    assert issubclass(error, NnfwdError)
    assert any(
        base.__module__ == "builtins" for base in error.__mro__ if base not in (Exception, BaseException, object)
    )


def test_the_device_advised_is_one_that_is_taken():
    with pytest.raises(DeviceError) as caught:
        on_device1()(strict.ones(3))
    for _, device in re.findall(r"device=(['\"])(.*?)\1", str(caught.value)):
        assert on_device1()(strict.ones(3), device=device).device == DEVICE1


def test_an_error_travels_between_processes():
    with pytest.raises(UnknownNameError) as caught:
        net()(X, backend="numpi")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


LIBRARIES = [
    ("missing", {}, "madeup is not installed|pip install madeup"),
    (
        "broken",
        {"madeup": "raise OSError('libmadeup.so.2: no such file\\nsecond line')"},
        "madeup|broken|libmadeup.so.2",
    ),
    ("broken by another", {"madeup": "import another_missing"}, "madeup|broken|another_missing"),
    ("without a device", {"madeup": ""}, "madeup|no usable device"),
    (
        "no backend at all",
        {"madeup": "", "nnfwd_madeup": "devices = None"},
        "nnfwd_madeup is no backend|xp, place, to_numpy, scope",
    ),
]


@pytest.mark.parametrize(("modules", "text"), [pytest.param(*row, id=name) for name, *row in LIBRARIES])
def test_a_library_that_cannot_be_used(modules, text, tmp_path, monkeypatch):
    for name, code in {
        "nnfwd_madeup": "import madeup\nxp = place = to_numpy = scope = None\ndef devices(): return ()",
        **modules,
    }.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        refused(lambda: net()(X, backend="madeup"), BackendError, text)
        assert "madeup" in {info.name for info in nnfwd.backends()}
    finally:
        for name in ("nnfwd_madeup", "madeup"):
            sys.modules.pop(name, None)


# Model files.


def npy(a):
    file = io.BytesIO()
    np.save(file, a)
    return file.getvalue()


def header(text, data=b""):
    """An .npy member with that header."""
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + data


def claims(shape, descr="<f8"):
    return header(f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}}}", bytes(96))


DENSE = {"type": "dense", "activation": {"name": "relu"}, "weight": None}
WEIGHT = "layers.0.weight"


def model(*layers, text=None, weight=None, more=(), compression=zipfile.ZIP_STORED):
    """A model file: its layers described (or the text that should), one weight, and more members."""
    text = json.dumps({"format": 1, "layers": layers or [DENSE]}) if text is None else text
    members = [
        ("nnfwd", npy(np.frombuffer(text.encode(), "u1"))),
        (WEIGHT, npy(W) if weight is None else weight),
        *more,
    ]
    return packed(members, compression)


def packed(members, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members:
            archive.writestr(f"{name}.npy", data)
    return file.getvalue()


def large_dictionary():
    """A member whose LZMA header asks for a dictionary of 2 GiB."""
    data = model(compression=zipfile.ZIP_LZMA)
    at = data.rindex(
        b"\x05\x00\x5d"
    )  # two bytes for the size of the properties, then lc, lp, pb; the dictionary's size
    return data[: at + 3] + struct.pack("<I", 2**31) + data[at + 7 :]


FILES = [
    ("empty", lambda: b"", "the file is empty"),
    ("not a zip", lambda: b"hello", "not a valid .npz"),
    ("truncated", lambda: model()[:-100], "not a valid .npz"),
    ("a byte changed", lambda: model().replace(b'"relu"', b'"selu"'), "nnfwd.npy"),
    ("huge shape", lambda: model(weight=claims((2**24, 2**24))), f"{WEIGHT}|(16777216, 16777216)"),
    ("huge dimension", lambda: model(weight=claims((2**40,))), f"{WEIGHT}|(1099511627776,)"),
    ("negative shape", lambda: model(weight=claims((-4, -3))), f"{WEIGHT}|(-4, -3)"),
    ("shape a number", lambda: model(weight=claims(12)), WEIGHT),
    (
        "shape of two lines",
        lambda: model(weight=header("{'shape': '\\n', 'descr': '<f8', 'fortran_order': 0}")),
        WEIGHT,
    ),
    ("pickled objects", lambda: model(weight=claims((4, 3), "|O")), f"{WEIGHT}|O|float32"),
    ("integers", lambda: model(weight=claims((4, 3), "<i8")), f"{WEIGHT}|int64|float32"),
    ("bytes for weights", lambda: model(weight=npy(W.astype("u1"))), f"{WEIGHT}|uint8|float32"),
    ("unknown dtype", lambda: model(weight=claims((4, 3), "zz")), WEIGHT),
    ("member not .npy", lambda: model(weight=b"hello"), WEIGHT),
    ("header a lot of parentheses", lambda: model(weight=header("(" * 9000)), WEIGHT),
    ("header a lot of signs", lambda: model(weight=header("-" * 9000 + "1")), WEIGHT),
    ("header of zeros", lambda: model(weight=header("\0" * 64)), WEIGHT),
    ("header no dictionary", lambda: model(weight=header("12")), WEIGHT),
    ("version 9", lambda: model(weight=b"\x93NUMPY\x09" + bytes(90)), WEIGHT),
    ("no description", lambda: packed([(WEIGHT, npy(W))]), "activations=|layers.0 (3 -> 4)"),
    ("description not JSON", lambda: model(text="{"), "not a valid .npz"),
    ("description deep", lambda: model(text="[" * 100_000), "deeper than 32"),
    ("description of many lists", lambda: model(text=f"[{'[],' * 2**18}0]"), "more than 262144 objects and lists"),
    ("description a list", lambda: model(text="[]"), "format"),
    ("another format", lambda: model(text='{"format": 2, "layers": []}'), "format"),
    ("no layers", lambda: model(text='{"format": 1, "layers": []}'), "no layers"),
    ("layer a number", lambda: model(3), "layer 0"),
    ("layer without type", lambda: model({"activation": {"name": "relu"}}), "layer 0|type"),
    ("unknown type", lambda: model({**DENSE, "type": "conv"}), "layer 0|'conv'|dense"),
    ("unknown activation", lambda: model({**DENSE, "activation": {"name": "rellu"}}), "'rellu'|'relu'"),
    ("activation a text", lambda: model({**DENSE, "activation": "relu"}), "layer 0|activation"),
    ("activation without name", lambda: model({**DENSE, "activation": {"name": None}}), "layer 0|None"),
    ("no slope", lambda: model({**DENSE, "activation": {"name": "leaky_relu"}}), "layer 0|leaky_relu|negative_slope"),
    ("no weight", lambda: model({"type": "dense", "activation": {"name": "relu"}}), "layer 0|dense|weight"),
    ("brackets closed", lambda: model(text="]" * 10**6), "deeper than"),
    ("a string without an end", lambda: model(text='"' + '\\"' * 10**5), "not a valid .npz"),
    (
        "header that warns",
        lambda: model(weight=header("{'descr': '<f8', 'fortran_order': False, 'shape': (2or 2, 2)}")),
        WEIGHT,
    ),
    ("header of an old string", lambda: model(weight=claims((4, 3), "|a4")), f"{WEIGHT}|a4"),
    (
        "unknown parameter",
        lambda: model({**DENSE, "activation": {"name": "relu", "alpha": 1}}),
        "relu|'alpha'",
    ),
    (
        "activation of a scale",
        lambda: model(DENSE, {"type": "scale", "scale": 2, "center": 0, "shift": 0, "activation": {"name": "tanh"}}),
        "tanh",
    ),
    ("unknown field of two lines", lambda: model({**DENSE, "bi\nas": 1}), "bi"),
    ("bias a text", lambda: model({**DENSE, "bias": "1"}), "bias"),
    ("missing member", lambda: model({**DENSE, "bias": None}), "layers.0.bias"),
    (
        "shapes that do not fit",
        lambda: model(DENSE, DENSE, more=[("layers.1.weight", npy(W))]),
        "layer 1|weight (4, 3)",
    ),
    ("two members of one name", lambda: model(more=[(WEIGHT, npy(W))]), f"two members|{WEIGHT}"),
    ("extra member", lambda: model(more=[("extra", npy(W))]), "extra|no layer"),
    ("extra member of two lines", lambda: model(more=[("ex\ntra", npy(W))]), "no layer"),
    ("many members", lambda: model(more=[(f"extra{i}", b"") for i in range(4100)]), "4102 members|4096"),
    (
        "bomb",
        lambda: model(weight=npy(ones((4096, 1024))), compression=zipfile.ZIP_DEFLATED),
        "expands|33554780 bytes|limits.expansion",
    ),
    ("bomb in the description", lambda: model(text=" " * 2**24, compression=zipfile.ZIP_DEFLATED), "bytes"),
    ("description too long", lambda: model(text=" " * (2**24 + 1)), "nnfwd.npy|(16777217,)|limits"),
    ("large dictionary", large_dictionary, "npy"),
]
ROOM = 2**22
"""Bytes that reading a damaged file may take: far less than what the files above ask for."""


@pytest.mark.parametrize(("make", "text"), [pytest.param(*row, id=name) for name, *row in FILES])
def test_damaged_model_file(make, text, tmp_path):
    path = tmp_path / "m.npz"
    path.write_bytes(make())
    tracemalloc.start()
    try:
        refused(lambda: nnfwd.load(path), ModelFileError, f"m.npz|{text}")
        assert tracemalloc.get_traced_memory()[1] < ROOM
    finally:
        tracemalloc.stop()


def test_the_undamaged_model_file(tmp_path):
    path = tmp_path / "m.npz"
    path.write_bytes(model())
    assert nnfwd.load(path) == Network([Dense(W, activation="relu")])


@pytest.mark.parametrize("name", ["m.xyz", "m", "two\nlines.npz"])
def test_model_file_name(name, tmp_path):
    (tmp_path / name).write_bytes(b"")
    refused(lambda: nnfwd.load(tmp_path / name), ModelFileError, ".npz")


def test_model_file_limits(tmp_path):
    path = tmp_path / "m.npz"
    nnfwd.save(net(), path)
    for limits in ({"file": 100}, {"metadata": 10}, {"tensors": 3}, {"layers": 1}, {"tensor": 64}):
        refused(lambda limits=limits: nnfwd.load(path, limits=nnfwd.io.Limits(**limits)), ModelFileError, "m.npz")


# What is built stays as it is.


def elu():
    return Dense(W, B, activations.elu(alpha=2.0))


def prelu():
    return Dense(W, B, activations.prelu(negative_slope=B))


def write(a):
    a[...] = 9


IMMUTABLE = {
    "attribute of a layer": lambda: setattr(net()[0], "bias", None),
    "new attribute of a layer": lambda: setattr(net()[0], "name", "first"),
    "attribute deleted": lambda: delattr(net()[0], "bias"),
    "attribute of a network": lambda: setattr(net(), "dtype", "float32"),
    "new attribute of a network": lambda: setattr(net(), "name", "n"),
    "layers of a network": lambda: setattr(net(), "_layers", ()),
    "layer of a network": lambda: net().__setitem__(0, Dense(W)),
    "weight": lambda: write(net()[0].weight),
    "bias": lambda: write(net()[0].bias),
    "scale": lambda: write(Scale([1.0, 2]).scale),
    "slope": lambda: write(prelu().activation.parameters["negative_slope"]),
    "weight of with_parameters": lambda: write(with_parameters(weight=W.copy())[0].weight),
    "weight brought home": lambda: write(net().to("numpy")[0].weight),
    "activation": lambda: setattr(elu().activation, "name", "relu"),
    "parameter of an activation": lambda: elu().activation.parameters.__setitem__("alpha", 3.0),
}


@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in IMMUTABLE.items()])
def test_immutable(change):
    with pytest.raises((AttributeError, TypeError, ValueError)):
        change()
