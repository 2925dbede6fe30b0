"""A pytest plugin: the forward passes of scikit-learn's multi-layer perceptrons go through nnfwd, and are counted."""

import collections

import numpy as np
import pytest
from scipy.sparse import issparse
from sklearn.neural_network._multilayer_perceptron import BaseMultilayerPerceptron

import nnfwd

try:
    from sklearn.utils.validation import validate_data
except ImportError:  # scikit-learn 1.5
    validate_data = BaseMultilayerPerceptron._validate_data

passes = collections.Counter()


def activations_of(mlp):
    """The name of each layer's activation."""
    return [mlp.activation] * (mlp.n_layers_ - 2) + [mlp.out_activation_]


def network(mlp):
    """The perceptron as it is now: training changes its weights after every pass."""
    return nnfwd.Network.from_arrays([w.T for w in mlp.coefs_], mlp.intercepts_, activations_of(mlp))


def dense(mlp, x):
    """x as nnfwd takes it, never sparse, in the dtype of the product x @ W."""
    return (x.toarray() if issparse(x) else x).astype(np.result_type(x.dtype, *mlp.coefs_), copy=False)


def forward_pass(self, activations):
    activations[1:] = nnfwd.trace(network(self), dense(self, activations[0])).h
    passes["training"] += 1
    return activations


def forward_pass_fast(self, x, check_input=True):
    if check_input:
        x = validate_data(self, x, accept_sparse=["csr", "csc"], reset=False)
    y = nnfwd.feed_forward(dense(self, x), network(self))
    passes["prediction"] += 1
    return y


BaseMultilayerPerceptron._forward_pass = forward_pass
BaseMultilayerPerceptron._forward_pass_fast = forward_pass_fast


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish():
    yield
    if not passes:
        pytest.exit("sklearn_through_nnfwd was loaded, and nothing went through nnfwd", returncode=1)


def pytest_terminal_summary(terminalreporter):
    parts = ", ".join(f"{n:,} in {name}" for name, n in passes.items())
    terminalreporter.write_line(f"{passes.total():,} passes through nnfwd ({parts})")
