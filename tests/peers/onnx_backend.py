"""nnfwd as a backend of onnx, for onnx's own test suite: every model is read by nnfwd's reader, from its bytes.

The suite feeds the weights of a node as inputs; here they become initialisers before the model is read. nnfwd computes
along the last axis, so for an operator along another one that axis is moved. Nothing is computed here.
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

    def __init__(self, model):
        self.model = model

    def run(self, inputs, **kwargs):
        model = onnx.ModelProto.FromString(self.model.SerializeToString())
        graph, node = model.graph, model.graph.node[0]
        held = {tensor.name for tensor in graph.initializer}
        first, *others = [value for value in graph.input if value.name not in held]
        x, *weights = inputs
        for value, weight in zip(others, weights, strict=True):
            graph.initializer.append(onnx.numpy_helper.from_array(weight, value.name))
        axis = move_axis(node, model.opset_import[0].version, x.ndim)
        x = np.moveaxis(x, axis, -1)
        # The reader takes what goes along axis 1 on rows only, which any leading axes are.
        rows = axis == 1 and node.op_type in ("BatchNormalization", "PRelu")
        shape = (None, x.shape[-1]) if rows else x.shape
        first.CopyFrom(onnx.helper.make_tensor_value_info(first.name, first.type.tensor_type.elem_type, shape))
        net = reader.read(io.BytesIO(model.SerializeToString()), Given(Limits()))
        if node.op_type == "Flatten":  # which a network leaves to its caller
            x = x.reshape(-1, math.prod(net.input_shape or x.shape[-1:]))
        y = run(net, x)
        return (y if node.op_type == "Gemm" else np.moveaxis(y, -1, axis),)


def move_axis(node, opset, rank):
    """The axis of x that the operator goes along; the node then names the last."""
    stated = {attribute.name: attribute for attribute in node.attribute}
    if node.op_type == "BatchNormalization" or (node.op_type == "PRelu" and opset < 7):
        return 1
    if node.op_type in ("Softmax", "LogSoftmax") and "axis" in stated:
        axis, stated["axis"].i = stated["axis"].i, rank - 1
        return axis
    if node.op_type == "Gemm" and "transA" in stated:
        stated["transA"].i = 0
        return 0
    return -1


def run(net, x):
    """The output for x; bfloat16, which NumPy does not have, by JAX."""
    if x.dtype == "bfloat16":
        import jax.numpy as jnp

        return np.asarray(net(jnp.asarray(x)))
    return net(x)


class NnfwdBackend(Backend):
    @classmethod
    def prepare(cls, model, device="CPU", **kwargs):
        super().prepare(model, device, **kwargs)  # which checks it
        return Prepared(model)

    @classmethod
    def supports_device(cls, device):
        return device == "CPU"
