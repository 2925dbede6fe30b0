"""nnfwd as a backend of onnx, for onnx's own test suite: every model is read by nnfwd's reader, from its bytes.

The suite feeds the weights of a node as inputs; here they become initialisers before the model is read. What a network
leaves to its caller is done here: the reshape of a leading Flatten, and JAX for bfloat16. Nothing is computed here.
"""

import io
import math

import numpy as np
import onnx
from onnx.backend.base import Backend, BackendRep

from nnfwd.io import onnx as reader
from nnfwd.io.reading import Given, Limits


class Prepared(BackendRep):
    """A model that waits for its inputs."""

    def __init__(self, model, moves_axes):
        self.model = model
        self.moves_axes = moves_axes

    def run(self, inputs, **kwargs):
        model = onnx.ModelProto.FromString(self.model.SerializeToString())
        held = {tensor.name for tensor in model.graph.initializer}
        others = [value for value in model.graph.input if value.name not in held][1:]
        x, *weights = inputs
        for value, weight in zip(others, weights, strict=True):
            model.graph.initializer.append(onnx.numpy_helper.from_array(weight, value.name))
        if not self.moves_axes:
            return (run(model, x),)
        x, back = along_the_last_axis(model, x)
        return (np.moveaxis(run(model, x), -1, back),)


def run(model, x):
    """The output for x."""
    net = reader.read(io.BytesIO(model.SerializeToString()), Given(Limits()))
    if model.graph.node[0].op_type == "Flatten":
        x = x.reshape(-1, math.prod(net.input_shape or x.shape[-1:]))
    if x.dtype == "bfloat16":  # which NumPy does not have
        import jax.numpy as jnp

        return np.asarray(net(jnp.asarray(x)))
    return net(x)


def along_the_last_axis(model, x):
    """Changes a model of one node so that it goes along the last axis of x; x that way, and where y has that axis."""
    node, value = model.graph.node[0], model.graph.input[0]
    stated = {attribute.name: attribute for attribute in node.attribute}
    axis, back, shape = 1, 1, None
    if node.op_type == "Gemm":
        axis, back, stated["transA"].i = 0, -1, 0
    elif "axis" in stated:
        axis = back = stated["axis"].i
        stated["axis"].i = x.ndim - 1
    else:  # BatchNormalization and PRelu name no axis: x is stated as rows, which leading axes are to a network
        shape = (None, x.shape[1])
    x = np.moveaxis(x, axis, -1)
    shape = shape or x.shape
    value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, shape))
    return x, back


class NnfwdBackend(Backend):
    """Takes the cases as they are."""

    moves_axes = False

    @classmethod
    def prepare(cls, model, device="CPU", **kwargs):
        super().prepare(model, device, **kwargs)  # which checks it
        return Prepared(model, cls.moves_axes)

    @classmethod
    def supports_device(cls, device):
        return device == "CPU"


class AxisMovingBackend(NnfwdBackend):
    """Takes the cases that go along another axis than the last."""

    moves_axes = True
