"""PyTorch: autograd, torch.func, torch.compile without graph breaks, inference mode, and its process-wide settings."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from networks import ensemble, inputs, mixed, tutorial
from places import need

from nnfwd import backend
from nnfwd.bounds import arithmetic_of, error_bound, looped_bound
from nnfwd.errors import BackendError


@pytest.fixture
def torch():
    return need("torch")


def inside(y, net, x):
    bounded = looped_bound(x, net, arithmetic=arithmetic_of(backend.load("torch"), "float32"))
    return bounded.ratio(y.detach().numpy()).max() <= 1


@pytest.mark.parametrize(
    ("make", "placed_before", "compiler"),
    [
        (mixed, False, "inductor"),
        (mixed, True, "aot_eager"),
        (ensemble, False, "aot_eager"),
        (ensemble, True, "aot_eager"),
    ],
)
def test_compile_without_a_graph_break(torch, make, placed_before, compiler):
    torch._dynamo.reset()
    net, x = make(), torch.tensor(inputs(2, 3, 4))
    if placed_before:
        net(x)
    compiled = torch.compile(lambda x: net(x), fullgraph=True, backend=compiler)
    x.requires_grad_()
    y = compiled(x)
    assert inside(y, net, x.detach().numpy())
    (gradient,) = torch.autograd.grad((y**2).sum(), x)
    (eager,) = torch.autograd.grad((net(x) ** 2).sum(), x)
    assert gradient.shape == eager.shape
    assert torch.isfinite(gradient).all()
    assert inside(compiled(torch.tensor(inputs(5, 3, 4))), net, inputs(5, 3, 4))


def test_the_first_call_of_a_process_may_be_compiled(torch):
    """Nothing of nnfwd has seen a tensor before: the backend itself is found while PyTorch traces."""
    program = (
        "import torch, nnfwd\n"
        "net = nnfwd.Network([nnfwd.Dense([[1.0, 2.0]], [0.5], nnfwd.activations.elu(alpha=0.5))])\n"
        "run = torch.compile(lambda x: net(x), fullgraph=True, backend='aot_eager')\n"
        "assert run(torch.ones(2)) == 3.5 and net(torch.ones(2)) == 3.5"
    )
    root = Path(__file__).parent.parent
    path = os.pathsep.join((str(root), str(root / "backends")))
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Dynamo detected" not in done.stderr


def test_first_call_in_inference_mode_leaves_autograd_usable(torch):
    net, x = mixed(), torch.tensor(inputs(4))
    with torch.inference_mode():
        net(x)
    x = x.requires_grad_()
    (gradient,) = torch.autograd.grad(net(x)[0], x)
    assert torch.isfinite(gradient).all()


def test_gradients_pass_gradcheck(torch):
    net = mixed("float64")
    x = torch.tensor(inputs(3, 4, dtype="float64"), requires_grad=True)
    assert torch.autograd.gradcheck(net, (x,))
    placed = net.to("torch")
    weight = placed[1].weight.clone().requires_grad_()

    def of_weight(weight):
        parameters = placed.parameters
        parameters[1] = {**parameters[1], "weight": weight}
        return placed.with_parameters(parameters)(x.detach())

    assert torch.autograd.gradcheck(of_weight, (weight,))


def test_torch_func_over_the_weights(torch):
    net, x = mixed().to("torch"), torch.tensor(inputs(3, 4))
    gradients = torch.func.grad(lambda p: (net.with_parameters(p)(x) ** 2).sum())(net.parameters)
    weights = [p["weight"].clone().requires_grad_() for p in net.parameters[1:]]
    parameters = [net.parameters[0], *({**p, "weight": w} for p, w in zip(net.parameters[1:], weights, strict=True))]
    expected = torch.autograd.grad((net.with_parameters(parameters)(x) ** 2).sum(), weights)
    for found, wanted in zip(gradients[1:], expected, strict=True):
        assert torch.equal(found["weight"], wanted)


@pytest.fixture
def settings(torch):
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def test_a_looser_setting_raises_and_is_not_changed(torch, settings):
    net, x = tutorial()
    x = torch.tensor(x)
    for setting in ("high", "medium"):
        settings(setting)
        with pytest.raises(BackendError, match=r"torch.set_float32_matmul_precision\(\"highest\"\)"):
            net(x)
        assert torch.get_float32_matmul_precision() == setting
        net(x, precision="medium")
    settings("high")
    net(x, precision="high")
    settings("highest")
    net(x)


def test_the_bound_follows_the_precision(torch, settings, note):
    """On processors with bfloat16 instructions "medium" really multiplies bfloat16 numbers."""
    net, x = mixed(), inputs(64, 4)
    settings("medium")
    y = net(torch.tensor(x), precision="medium").numpy()
    loose, tight = (error_bound(net, torch.tensor(x), precision=p) for p in ("medium", "highest"))
    assert loose.ratio(y).max() <= 1
    note(
        f"torch, precision medium: {tight.ratio(y).max():.2g} float32 bounds away, {loose.ratio(y).max():.2g} of its own"
    )


def test_autocast_raises(torch):
    net, x = tutorial()
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(BackendError, match="autocast"):
        net(torch.tensor(x))


def test_inputs_that_are_no_plain_tensor(torch):
    net, x = mixed(), inputs(3, 4)
    parameter = torch.nn.Parameter(torch.tensor(x))
    assert net(parameter).requires_grad
    assert np.array_equal(net(parameter).detach().numpy(), net(torch.tensor(x)).numpy())


def test_weights_that_require_gradients_stay_in_the_graph(torch):
    net = mixed().to("torch")
    weight = net[3].weight.clone().requires_grad_()
    trained = net.with_parameters([*net.parameters[:3], {**net[3].parameters, "weight": weight}])
    (gradient,) = torch.autograd.grad((trained(torch.tensor(inputs(4))) ** 2).sum(), weight)
    assert gradient.abs().max() > 0


def test_a_trace_of_export_is_not_kept(torch):
    """torch.export calls the pass with tensors that hold nothing; the next real call must not meet them."""
    net, x = mixed(), torch.tensor(inputs(3, 4))

    class Module(torch.nn.Module):
        def forward(self, x):
            return net(x)

    exported = torch.export.export(Module(), (x,))
    assert inside(exported.module()(x), net, x.numpy())
    assert inside(net(x), net, x.numpy())


def test_float64_does_not_mind_the_setting(torch, settings):
    net, x = tutorial()
    settings("high")
    assert net(torch.tensor(x, dtype=torch.float64)).dtype == torch.float64
