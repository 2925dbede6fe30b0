"""onnx's own backend suite, case by case, through nnfwd's reader. https://onnx.ai/onnx/repo-docs/OnnxBackendTest.html"""

import unittest
import warnings
from pathlib import Path

import pytest
from places import need

onnx = need("onnx")
need("jax")  # which has bfloat16

from onnx.backend.test import BackendTest  # noqa: E402
from onnx.backend.test.loader import load_model_tests  # noqa: E402
from peers.onnx_backend import AxisMovingBackend, NnfwdBackend  # noqa: E402

from nnfwd.errors import ModelFileError  # noqa: E402

_AS_THEY_ARE = """
ELU LeakyReLU LeakyReLU_with_negval Linear Linear_no_bias LogSoftmax PReLU_1d PReLU_2d PReLU_3d ReLU SELU Sigmoid
Softmax Softmin Softplus Tanh celu celu_bfloat16 celu_float16 clip clip_default_inbounds
clip_default_inbounds_expanded clip_default_max clip_default_min clip_example clip_inbounds clip_min_greater_than_max
clip_outbounds clip_splitbounds dropout_default dropout_default_old dropout_default_ratio dropout_random_old elu
elu_default elu_example exp exp_example flatten_axis0 flatten_axis1 flatten_axis2 flatten_axis3 flatten_default_axis
flatten_negative_axis1 flatten_negative_axis2 flatten_negative_axis3 flatten_negative_axis4 gelu_default_1
gelu_default_2 gelu_tanh_1 gelu_tanh_2 gemm_alpha gemm_beta gemm_default_no_bias gemm_default_scalar_bias
gemm_default_single_elem_vector_bias gemm_default_vector_bias gemm_default_zero_bias gemm_transposeB hardsigmoid
hardsigmoid_default hardsigmoid_example hardswish hardswish_expanded identity leakyrelu leakyrelu_default
leakyrelu_example log_softmax_dim3 log_softmax_lastdim logsoftmax_axis_2 logsoftmax_default_axis logsoftmax_example_1
logsoftmax_large_number logsoftmax_negative_axis matmul_1d_3d matmul_2d mish mish_expanded operator_clip operator_exp
operator_flatten operator_mm operator_selu operator_view prelu_broadcast relu selu selu_default selu_example sigmoid
sigmoid_example single_relu_model softmax_axis_2 softmax_default_axis softmax_example softmax_functional_dim3
softmax_large_number softmax_lastdim softmax_negative_axis softplus softplus_example softsign softsign_example swish
tanh tanh_example thresholdedrelu thresholdedrelu_default thresholdedrelu_example
"""
AS_THEY_ARE = _AS_THEY_ARE.split()

# Cases along another axis than the last, the only one a network has: the backend moves that axis there and back.
_AFTER_MOVING_AN_AXIS = {
    "BatchNorm1d_3d_input_eval BatchNorm2d_eval BatchNorm2d_momentum_eval BatchNorm3d_eval BatchNorm3d_momentum_eval "
    "batchnorm_epsilon batchnorm_example": "channels of images are axis 1",
    "PReLU_1d_multiparam PReLU_2d_multiparam PReLU_3d_multiparam": "slopes for channels, axis 1",
    "gemm_all_attributes gemm_transposeA": "the input comes transposed",
    "logsoftmax_axis_0 logsoftmax_axis_1 softmax_axis_0 softmax_axis_1": "over an axis that the node states",
}
AFTER_MOVING_AN_AXIS = {name: reason for names, reason in _AFTER_MOVING_AN_AXIS.items() for name in names.split()}

# Cases made of the same operators that no network of ours is, and why.
LEFT_OUT = {
    "batchnorm_example_training_mode batchnorm_epsilon_training_mode": "training",
    "training_dropout_default training_dropout_default_mask training_dropout training_dropout_mask training_dropout_zero_ratio training_dropout_zero_ratio_mask": "training",
    "dropout_default_mask dropout_default_mask_ratio": "asks for the mask besides: a second output",
    "clip_default_int8_min clip_default_int8_max clip_default_int8_inbounds clip_default_int8_inbounds_expanded": "whole numbers",
    "gemm_default_matrix_bias": "a bias of its own for each row of the batch",
    "identity_sequence identity_opt": "no tensor goes in",
    "matmul_3d matmul_4d matmul_bcast": "a batch of pairs of matrices: no weight",
    "matmul_4d_1d matmul_1d_1d": "the sum takes away the features: no axis of outputs is left",
    "prelu_example": "one slope an element, over several axes",
    "operator_addmm": "a branch: the inner sum is the bias of the outer one, whose weight is the same",
    "constant": "no input",
}

OPERATORS = {
    *(
        "Gemm",
        "MatMul",
        "BatchNormalization",
        "Dropout",
        "Flatten",
        "Identity",
        "Constant",
        "Relu",
        "LeakyRelu",
        "PRelu",
    ),
    *("ThresholdedRelu", "HardSigmoid", "HardSwish", "Sigmoid", "Tanh", "Softsign", "Softplus", "Elu", "Selu", "Celu"),
    *("Mish", "Gelu", "Swish", "Exp", "Softmax", "LogSoftmax", "Clip"),
}
COMPOSED = {"hardswish_expanded", "mish_expanded", "Softmin", "Linear_no_bias"}
"""Of other operators besides, which together are one of these."""


def _tests(backend):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the suite's own, while it makes its data
        suite = BackendTest(backend, __name__)
    for name in (*AS_THEY_ARE, *AFTER_MOVING_AN_AXIS):
        suite.include(f"^test_{name}_cpu$")
    return {test._testMethodName: test for test in suite.test_suite}


TESTS = _tests(NnfwdBackend)
MOVING = _tests(AxisMovingBackend)


def run(tests, name):
    try:
        tests[f"test_{name}_cpu"].debug()
    except unittest.SkipTest as reason:
        pytest.fail(f"did not run: {reason}")


@pytest.mark.parametrize("name", AS_THEY_ARE)
def test_as_it_is(name):
    run(TESTS, name)


@pytest.mark.parametrize("name", AFTER_MOVING_AN_AXIS)
def test_after_moving_an_axis(name):
    """Without that, it is refused."""
    with pytest.raises(
        ModelFileError, match="must be the last|must be over the last|not transposed|features, . come in"
    ):
        run(TESTS, name)
    run(MOVING, name)


def test_the_lists_are_complete(note):
    """Every case of the suite that is made of these operators, and no other, is in one of the three lists, once."""
    found = set(COMPOSED)
    for kind in ("node", "simple", "pytorch-converted", "pytorch-operator"):
        for case in load_model_tests(kind=kind):
            model = case.model or onnx.load(Path(case.model_dir) / "model.onnx")
            if {node.op_type for node in model.graph.node} <= OPERATORS:
                found.add(case.name.removeprefix("test_"))
    left_out = [name for names in LEFT_OUT for name in names.split()]
    assert sorted(found) == sorted([*AS_THEY_ARE, *AFTER_MOVING_AN_AXIS, *left_out])
    note(
        f"{len(AS_THEY_ARE)} cases of onnx's backend suite as they are, {len(AFTER_MOVING_AN_AXIS)} after moving an "
        f"axis; {len(left_out)} are no network"
    )
