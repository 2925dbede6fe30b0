"""PyTorch: `.pt` and `.pth` files of state dicts, live modules by `from_torch`, and the hostile files among them.

The pickles of hostile files are put together here, opcode by opcode; nothing of that needs PyTorch.
"""

import argparse
import collections
import datetime
import io
import os
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hostile import ROOM, attempt, damaged, survives
from oracles import agree
from places import need

import nnfwd
from nnfwd import Activation, Dense, Network, Scale, activations
from nnfwd.errors import ModelFileError, ShapeError
from nnfwd.io import Limits

SAMPLE = Path(__file__).parents[2] / "shared" / "samples" / "sb3_ppo_cartpole"
ROWS = 16


@pytest.fixture
def torch():
    return need("torch")


@pytest.mark.skipif(not SAMPLE.is_dir(), reason=f"no samples at {SAMPLE}")
@pytest.mark.parametrize(
    ("net", "head", "output"), [("policy_net", "action_net", "logits"), ("value_net", "value_net", "value")]
)
def test_the_two_networks_of_a_policy(net, head, output):
    prefix = [f"mlp_extractor.{net}", head]
    loaded = nnfwd.load(SAMPLE / "policy.pth", prefix=prefix, activations=["tanh", "tanh", "identity"])
    with np.load(SAMPLE / "expected.npz") as expected:
        y = loaded(expected["x"].astype("float64"))
        assert np.max(np.abs(y - expected[output].reshape(y.shape))) <= 1e-12


# Networks built in PyTorch


def shared(torch):
    """Every activation PyTorch shares with us: the module, and ours where it follows a layer of a state dict."""
    nn, f = torch.nn, activations
    return [
        (lambda n: nn.Identity(), "identity"),
        (lambda n: nn.ReLU(inplace=True), "relu"),
        (lambda n: nn.ReLU6(), "relu6"),
        (lambda n: nn.LeakyReLU(0.2), f.leaky_relu(negative_slope=0.2)),
        (lambda n: nn.PReLU(init=0.3), "prelu"),
        (lambda n: nn.PReLU(n), "prelu"),
        (lambda n: nn.Threshold(0.3, 0), f.thresholded_relu(alpha=0.3)),
        (lambda n: nn.Hardtanh(), "hard_tanh"),
        (lambda n: nn.Hardtanh(-0.5, 2), f.clip(lower=-0.5, upper=2)),
        (lambda n: nn.Hardsigmoid(), "hard_sigmoid"),
        (lambda n: nn.Sigmoid(), "sigmoid"),
        (lambda n: nn.Tanh(), "tanh"),
        (lambda n: nn.Softsign(), "softsign"),
        (lambda n: nn.Softplus(), "softplus"),
        (lambda n: nn.LogSigmoid(), "log_sigmoid"),
        (lambda n: nn.ELU(0.5), f.elu(alpha=0.5)),
        (lambda n: nn.SELU(), "selu"),
        (lambda n: nn.CELU(0.7), f.celu(alpha=0.7)),
        (lambda n: nn.SiLU(), "silu"),
        (lambda n: nn.Hardswish(), "hard_silu"),
        (lambda n: nn.Mish(), "mish"),
        (lambda n: nn.GELU(), "gelu"),
        (lambda n: nn.GELU("tanh"), "gelu_tanh"),
        (lambda n: nn.Softmax(-1), "softmax"),
        (lambda n: nn.LogSoftmax(dim=1), "log_softmax"),
    ]


def drawn(torch, seed):
    """A Sequential of random sizes; our activations, one for each Linear and BatchNorm1d; and rows to give it."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    nn, choices = torch.nn, shared(torch)
    modules, ours = [nn.Flatten()] if seed % 4 == 0 else [], []
    width = first = int(rng.integers(1, 20))
    for i in range(rng.integers(1, 5)):
        if rng.random() < 0.3:
            modules.append(norm := nn.BatchNorm1d(width, eps=1e-3, affine=bool(rng.random() < 0.7)))
            torch.nn.init.normal_(norm.running_mean)
            torch.nn.init.uniform_(norm.running_var, 0.5, 2)
            if norm.affine:
                torch.nn.init.normal_(norm.weight)
                torch.nn.init.normal_(norm.bias)
        else:
            width, before = int(rng.integers(1, 20)), width
            modules.append(nn.Linear(before, width, bias=bool(rng.random() < 0.8)))
        # Each is drawn in some network, whatever the generator gives.
        module, name = choices[seed % len(choices) if i == 0 else int(rng.integers(len(choices)))]
        modules += [module(width), nn.Dropout(0.5)] if rng.random() < 0.5 else [module(width)]
        ours.append(name)
    return nn.Sequential(*modules), ours, rng.standard_normal((ROWS, first))


def outputs(torch, module, x, dtype):
    """What PyTorch computes at inference."""
    module.eval()
    with torch.no_grad():
        return module(torch.from_numpy(x.astype(dtype))).numpy()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_networks_of_random_sizes_live_and_from_files(dtype, torch, tmp_path, note):
    worst, count = 0.0, 60
    for seed in range(count):
        module, ours, x = drawn(torch, seed)
        module.to(getattr(torch, dtype))
        live = nnfwd.from_torch(module)
        assert all(part.training for part in module.modules())
        worst = max(worst, agree(live, x, outputs(torch, module, x, dtype), "torch", dtype))
        path = tmp_path / "a.pt"
        torch.save(module.state_dict(), path, pickle_protocol=2 + seed % 4)
        normalised = any(isinstance(part, torch.nn.BatchNorm1d) for part in module)
        assert nnfwd.load(path, activations=ours, epsilon=1e-3 if normalised else None) == live
    note(f"{count} networks of PyTorch, {dtype}: live as from their files, at most {worst:.2f} of what both may be off")


def test_every_activation_alone(torch):
    x = np.random.default_rng(0).standard_normal((ROWS, 5)) * 3
    for make, name in shared(torch):
        module = make(5)
        net = nnfwd.from_torch(module)
        if name != "prelu":
            assert net == Network([Activation(name)])
        agree(net, x, outputs(torch, module, x, "float32"), "torch", "float32")


def test_softplus_beyond_pytorchs_threshold(torch):
    x = np.linspace(20.0, 60.0, 1000)[:, None]
    net = nnfwd.from_torch(torch.nn.Softplus())
    difference = np.abs(net(x) - outputs(torch, torch.nn.Softplus(), x, "float64"))
    assert difference.max() <= np.exp(-20.0)  # as the docstring of from_torch says
    agree(net, x, outputs(torch, torch.nn.Softplus(), x, "float32"), "torch", "float32")


def test_dtypes(torch, tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    for dtype, ours in (
        ("float16", "float16"),
        ("bfloat16", "float32"),
        ("float32", "float32"),
        ("float64", "float64"),
    ):
        module.to(getattr(torch, dtype))
        torch.save(module.state_dict(), tmp_path / "a.pth")
        net = nnfwd.load(tmp_path / "a.pth", activations=["relu", "identity"])
        assert net == nnfwd.from_torch(module)
        assert net.dtype == ours
        for layer, theirs in zip(net, module[::2], strict=True):
            assert np.array_equal(layer.weight, theirs.weight.detach().double().numpy())
            assert np.array_equal(layer.bias, theirs.bias.detach().double().numpy())


def test_a_hook_for_all_modules():
    nn = need("torch").nn
    module = nn.Linear(2, 2)
    handle = nn.modules.module.register_module_forward_hook(lambda module, x, y: 2 * y)
    try:
        with pytest.raises(ModelFileError, match="a hook is registered for all modules"):
            nnfwd.from_torch(module)
    finally:
        handle.remove()
    assert nnfwd.from_torch(module).out_features == 2


def test_tuples_that_share_tuples_manifold(tmp_path):
    """Whose whole text has 2**60 times the length of the innermost."""
    for where in ("shape", "metadata"):
        shared = b"K\x01\x85" + b"q\x01h\x01\x86" * 60  # (1,), then pairs of the one before
        plain = {"shape": b"K\x01\x85", "metadata": b""} | {where: shared}
        storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ"
        call = (
            b"ctorch._utils\n_rebuild_tensor_v2\n("
            + storage
            + b"K\x00"
            + plain["shape"]
            + b"K\x01\x85\x89}"
            + plain["metadata"]
        )
        pickled = b"\x80\x02}X\x06\x00\x00\x00weight" + call + b"tRs."
        with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
            archive.writestr("a/data.pkl", pickled)
            archive.writestr("a/data/0", bytes(4))
        outcome = attempt(tmp_path / "a.pt", activations="relu")
        assert isinstance(outcome, ModelFileError)
        assert len(str(outcome)) < 500
        assert ("has shape" if where == "shape" else "metadata") in str(outcome)


def test_any_layout_of_the_weights(torch, tmp_path):
    big = torch.randn(12, 10)
    weights = [big[:3, :4], big.t()[:5, :3], big[::2, 1::2], big[6:, 5:].clone(), torch.randn(4, 1).t().expand(1, 4)]
    torch.save({str(i): {"weight": weight} for i, weight in enumerate(weights)}, tmp_path / "a.pt")
    for i, weight in enumerate(weights):
        net = nnfwd.load(tmp_path / "a.pt", prefix=str(i), activations="identity")
        assert np.array_equal(net[0].weight, weight.numpy())


def test_tied_weights_are_read_twice(torch, tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh(), torch.nn.Linear(3, 3))
    module[2].weight = module[0].weight
    torch.save(module.state_dict(), tmp_path / "a.pt")
    net = nnfwd.load(tmp_path / "a.pt", activations=["tanh", "identity"])
    assert net == nnfwd.from_torch(module)
    assert np.array_equal(net[0].weight, net[1].weight)


def test_a_checkpoint(torch, tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.Adam(module.parameters(), foreach=False)
    module(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    path = tmp_path / "a.pth"
    saved = {"state_dict": {f"net.{k}": v for k, v in module.state_dict().items()}, "optimizer": optimizer.state_dict()}
    saved |= {
        "epoch": 3,
        "best": 0.5,
        "seed": 2**64 - 1,
        "name": "α",
        "history": [1.0, (None, True)],
        "bits": torch.ones(2) > 0,
    }
    saved |= {"parameter": module[0].weight, "half": torch.ones(2).short()}
    torch.save(saved, path)
    net = nnfwd.load(path, prefix="state_dict.net", activations=["identity", "relu", "identity"], epsilon=1e-5)
    assert net == nnfwd.from_torch(torch.nn.Sequential(module[0], module[1], torch.nn.ReLU(), module[2]))
    only = nnfwd.load(path, prefix="state_dict.net.2", activations="identity")
    assert only == Network([Dense(module[2].weight.detach().numpy(), module[2].bias.detach().numpy())])
    with pytest.raises(ModelFileError, match=r"is no array but \w+: choose layers, prefix="):
        nnfwd.load(path, activations="relu")
    with pytest.raises(ModelFileError, match="no array's name starts with 'model.'"):
        nnfwd.load(path, activations="relu", prefix="model")


class Mine:
    """A class of a caller's."""


def beside():
    """What checkpoints hold beside the weights."""
    return {
        "loss": np.float64(1.5), "args": argparse.Namespace(lr=0.1, path=Path("/x")), "when": datetime.datetime(2026, 1, 1),
        "history": collections.defaultdict(list, {"loss": [1.0]}), "count": collections.Counter("abb"), "set": {1, "a"},
        "frozen": frozenset({2}), "raw": b"\x00\xff", "long": b"\x00" * 300, "rng": np.arange(5), "mine": Mine(), "type": Mine,
        "queue": collections.deque([1, 2]), "complex": 1j, "nested": [{"deep": {Path("/y")}}],
    }  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_objects_beside_the_weights(protocol, torch, tmp_path):
    path, linear = tmp_path / "a.pt", torch.nn.Linear(3, 2)
    saved = beside() | {"shape": torch.Size([2]), "device": torch.device("cpu"), "dtype": torch.float32}
    saved |= {"odd": torch.zeros(2, dtype=torch.complex64), "small": torch.zeros(2).to(torch.float8_e5m2)}
    torch.save(saved | {"net": linear.state_dict(), "hyper": beside()}, path, pickle_protocol=protocol)
    assert nnfwd.load(path, prefix="net", activations="identity") == nnfwd.from_torch(linear)
    torch.save(saved | dict(linear.state_dict()), path, pickle_protocol=protocol)
    assert nnfwd.load(path, activations="identity") == nnfwd.from_torch(linear)


def test_an_object_in_the_place_of_weights_is_refused_by_name(torch, tmp_path):
    path, linear = tmp_path / "a.pt", torch.nn.Linear(3, 2)
    advice = r"save a state dict: torch\.save\(model\.state_dict\(\), path\)"
    history = collections.defaultdict(list, linear.state_dict())
    cases = [
        ({"model": linear}, None, r"model is a .*torch\.nn\.modules\.linear\.Linear"), ({"model": linear, "x": linear.bias}, "model", r"model is a .*Linear"),
        ({"net": {"0": history}, "x": linear.bias}, "net.0", r"net\.0 is a .*collections\.defaultdict"), (history, None, r"unknown object collections\.defaultdict"),
        ({"weight": linear.weight, "bias": np.ones(2)}, None, r"bias is a .*numpy"),
        ({"0.weight": linear.weight, "0.bias": np.ones(2)}, "0", r"0\.bias is a .*numpy"),
        ({"a.0.weight": linear.weight, "a.0.bias": np.ones(2)}, "a.", r"a\.0\.bias is a .*numpy"),
    ]  # fmt: skip
    for saved, prefix, message in cases:
        torch.save(saved, path)
        with pytest.raises(ModelFileError, match=f"{message}.*{advice}"):
            nnfwd.load(path, prefix=prefix, activations="relu")


def test_names_that_share_their_parts(tmp_path):
    """A hundred thousand objects whose long names are the same two strings."""
    one = text("a" * 256) + b"\x94" + text("\N{SNAKE}" * 250) + b"\x94"
    value = b"](" + one + b"\x93" + b"h\x00h\x01\x93" * 60000 + b"e"
    refused(tmp_path, archived(pickled(dictionary({"other": value}))), "no arrays")


# Live modules


def test_a_module_with_a_forward_of_its_own(torch):
    nn, functional = torch.nn, torch.nn.functional

    class Mine(nn.Linear):
        def forward(self, x):
            return functional.linear(x, self.weight)  # not its bias

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.layers = nn.Linear(6, 5), nn.ModuleList([nn.Linear(5, 5), Mine(5, 5)])
            self.norm, self.slope = nn.BatchNorm1d(5), nn.PReLU(5)
            self.head = nn.Sequential(nn.Linear(5, 4), nn.Sequential(nn.GELU(), nn.Linear(4, 3)))

        def forward(self, x, unused=None):
            rows = x.size(0)
            x = x.view(rows, -1)
            x = functional.leaky_relu(self.first(x), 0.2, inplace=True)
            for layer in self.layers:
                x = torch.tanh(layer(x))
            x = functional.dropout(x, 0.5, self.training)
            if self.training:
                x = x * 2
            x = functional.prelu(self.norm(x), self.slope.weight).reshape(x.shape[0], 5)
            x = functional.gelu(x.clamp(min=0), approximate="tanh").flatten(1)
            return functional.softmax(self.head(x), dim=-1)

    module = Chain()
    net = nnfwd.from_torch(module)
    assert module.training
    assert [type(layer) for layer in net] == [
        Dense,
        Dense,
        Dense,
        Scale,
        Activation,
        Activation,
        Activation,
        Dense,
        Dense,
    ]
    assert [layer.activation.name for layer in net] == [
        "leaky_relu", "tanh", "tanh", "identity", "prelu", "relu", "gelu_tanh", "gelu", "softmax",
    ]  # fmt: skip
    assert net[0].activation.parameters["negative_slope"] == 0.2
    assert net[2].bias is None
    for dtype in ("float32", "float64"):
        module.to(getattr(torch, dtype))
        x = np.random.default_rng(0).standard_normal((ROWS, 6))
        agree(nnfwd.from_torch(module), x, outputs(torch, module, x, dtype), "torch", dtype)


def chain(torch, forward, **parts):
    """A module with this forward."""

    class Chain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, part in parts.items():
                setattr(self, name, part)

    Chain.forward = forward
    return Chain()


def test_functions_and_methods(torch):
    functional = torch.nn.functional
    steps = [
        (torch.relu, "relu"), (lambda x: x.relu(), "relu"), (lambda x: x.relu_(), "relu"), (functional.relu_, "relu"),
        (torch.sigmoid, "sigmoid"), (lambda x: x.sigmoid(), "sigmoid"), (functional.sigmoid, "sigmoid"), (lambda x: x.tanh(), "tanh"),
        (functional.tanh, "tanh"), (functional.relu6, "relu6"), (functional.selu, "selu"), (torch.selu, "selu"),
        (functional.silu, "silu"), (functional.mish, "mish"), (functional.hardswish, "hard_silu"), (torch.exp, "exp"),
        (functional.hardsigmoid, "hard_sigmoid"), (functional.softsign, "softsign"), (functional.logsigmoid, "log_sigmoid"),
        (functional.softplus, "softplus"), (functional.hardtanh, "hard_tanh"), (functional.gelu, "gelu"),
        (lambda x: functional.hardtanh(x, -2.0, 0.5), activations.clip(lower=-2, upper=0.5)),
        (lambda x: torch.clamp(x, -2.0, 0.5), activations.clip(lower=-2, upper=0.5)), (lambda x: x.clip(0), "relu"),
        (lambda x: functional.leaky_relu(input=x), activations.leaky_relu(negative_slope=0.01)),
        (lambda x: functional.elu(x, 0.5), activations.elu(alpha=0.5)), (functional.elu, "elu"),
        (lambda x: functional.celu(x, alpha=0.5), activations.celu(alpha=0.5)), (functional.celu, "celu"),
        (lambda x: functional.threshold(x, 0.1, 0), activations.thresholded_relu(alpha=0.1)),
        (lambda x: functional.log_softmax(x, dim=1), "log_softmax"), (lambda x: torch.softmax(x, -1), "softmax"),
        (lambda x: x.softmax(dim=-1), "softmax"), (lambda x: x.view(x.shape[0], -1).tanh(), "tanh"),
        (lambda x: torch.reshape(x, (-1, 4)).tanh(), "tanh"), (lambda x: torch.flatten(x, start_dim=1).tanh(), "tanh"),
        (lambda x: x.view(x.size()[0], 4).tanh(), "tanh"),
    ]  # fmt: skip
    x = np.random.default_rng(0).standard_normal((ROWS, 4)) * 3
    for step, name in steps:
        module = chain(torch, lambda self, x, step=step: step(x))
        net = nnfwd.from_torch(module)
        assert net == Network([Activation(name)])
        agree(net, x, outputs(torch, module, x, "float32"), "torch", "float32")


def test_what_is_no_chain_is_refused_by_name(torch):
    nn, functional = torch.nn, torch.nn.functional
    linear, wide = nn.Linear(4, 4), nn.Linear(2, 8)

    def hooked():
        module = nn.Sequential(nn.Linear(4, 4))
        module[0].register_forward_hook(lambda *_: None)
        return module

    def replaced():
        module = nn.Sequential(nn.Linear(4, 4))
        module[0].forward = lambda x: x
        return module

    def quantised():
        with warnings.catch_warnings(action="ignore"):  # deprecated, and still met
            return torch.ao.nn.quantized.Linear(4, 4)

    cases = [
        (nn.LayerNorm(4), "torch.nn.modules.normalization.LayerNorm is not known"),
        (nn.Sequential(linear, nn.Conv1d(1, 1, 1)), r"1, torch.nn.modules.conv.Conv1d, is not known"),
        (nn.Sequential(nn.Sequential(linear, nn.LSTM(4, 4))), r"0\.1, torch.nn.modules.rnn.LSTM, is not known"),
        (nn.Sequential(linear, nn.Softmin(1)), "Softmin"), (nn.RReLU(), "RReLU"), (nn.GLU(), "GLU"),
        (nn.Softmax(dim=0), "dim=0"), (nn.Softmax(), "dim=None"), (nn.Flatten(0), "from dimension 0"),
        (nn.Unflatten(1, (2, 2)), "Unflatten"), (nn.Softplus(beta=2), "beta=2"), (nn.Softplus(threshold=5), "threshold=5"),
        (nn.Threshold(0.5, 1), "value=1"), (nn.BatchNorm1d(4, track_running_stats=False), "no running statistics"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "ParametrizedLinear"), (hooked(), "0, .*Linear, has a hook"),
        (replaced(), "0, .*Linear, has a hook or a forward of its own"), (nn.Linear(4, 4, device="meta"), "device meta"),
        (nn.LazyLinear(4), "LazyLinear"), (nn.Linear(4, 4, dtype=torch.complex64), "weight is complex64"), (quantised(), "quantized.*Linear is not known"),
        (chain(torch, lambda self, x: self.a(x) + x, a=linear), "function add"),
        (chain(torch, lambda self, x: x + self.a(x), a=linear), "function add.*a branch"),
        (chain(torch, lambda self, x: (self.a(x), self.b(x))[1], a=linear, b=nn.Linear(4, 4)), "b, .*Linear, .*a branch"),
        (chain(torch, lambda self, x: torch.cat([self.a(x), x], 1), a=linear), "function cat.*a branch"),
        (chain(torch, lambda self, x: (self.a(x), x), a=linear), "the output .*a branch"),
        (chain(torch, lambda self, x: x * torch.sigmoid(x)), "function mul.*a branch"),
        (chain(torch, lambda self, x: functional.linear(x, torch.relu(self.a.weight)), a=linear), "relu is given .* where x belongs"),
        (chain(torch, lambda self, x: functional.linear(weight=x, input=self.a.weight), a=linear), "where x belongs"),
        (chain(torch, lambda self, x: x if x.sum() > 0 else -x), "forward of Chain cannot be traced"),
        (chain(torch, lambda self, x: self.a(x).numpy(), a=linear), "function numpy"),
        (chain(torch, lambda self, x: x @ self.a.weight, a=linear), "function matmul"),
        (chain(torch, lambda self, x: functional.dropout(x)), "drops at inference"),
        (chain(torch, lambda self, x: functional.softmax(x, 1, dtype=torch.float64)), "dtype=torch.float64"),
        (chain(torch, lambda self, x: x.softmax(1, torch.float64)), "function softmax with"),
        (chain(torch, lambda self, x: x.clamp(max=1)), "max=1"),
        (chain(torch, lambda self, x: x.clamp(self.a.bias, self.a.bias), a=linear), "function clamp takes the tensor 0.a.bias"),
        (chain(torch, lambda self, x: x.view(2, -1)), "may move numbers"), (chain(torch, lambda self, x: x.t()), "function t "),
        (chain(torch, lambda self, x: self.a(x).view(-1, 4), a=wide), "may move numbers"),
        (chain(torch, lambda self, x: torch.flatten(x)), "from dimension 0"),
        (chain(torch, lambda self, x: x.size(1)), "function size|the output"),
        (chain(torch, lambda self, x, *others: self.a(x), a=linear).state_dict(), "not a OrderedDict.*from_state_dict"),
        (linear.weight, "not a Parameter"), (nn.Linear, "not a type"),
    ]  # fmt: skip
    for module, message in cases:
        with pytest.raises(ModelFileError, match=message) as error:
            nnfwd.from_torch(module)
        assert "\n" not in str(error.value)
        assert getattr(module, "training", True)
    with pytest.raises(ShapeError, match="layer 1"):
        nnfwd.from_torch(nn.Sequential(nn.Linear(4, 3), nn.Flatten(), nn.Linear(6, 1)))


def test_constants_become_scales(torch):
    """Each chain and the layers it is read as: a Scale, or the bias of a Linear without one."""
    nn = torch.nn
    torch.manual_seed(0)
    mean, std = torch.randn(4), torch.rand(1, 4) + 0.5
    bare = nn.Linear(4, 4, bias=False)
    m, s = mean.numpy(), 1 / std[0].numpy()
    cases = [
        (lambda self, x: (x - self.mean) / self.std, [Scale(s, center=m)]),
        (lambda self, x: torch.tanh(self.bare(x)) * 2 + 0.5, [Dense(bare.weight.detach().numpy(), None, "tanh"), Scale(2.0, shift=0.5)]),
        (lambda self, x: 2 * x, [Scale(2.0)]), (lambda self, x: x + self.mean, [Scale(1.0, shift=m)]), (lambda self, x: self.mean + x, [Scale(1.0, shift=m)]),
        (lambda self, x: 1 - x, [Scale(-1.0, center=1.0)]), (lambda self, x: self.mean - x, [Scale(-1.0, center=m)]),
        (lambda self, x: -x, [Scale(-1.0)]), (lambda self, x: x.neg(), [Scale(-1.0)]), (lambda self, x: x / 4, [Scale(0.25)]),
        (lambda self, x: torch.div(torch.sub(x, self.mean), self.std), [Scale(s, center=m)]),
        (lambda self, x: torch.add(torch.mul(input=x, other=self.one), other=3), [Scale(1.5, shift=3.0)]),
        (lambda self, x: torch.neg(x).add(1).mul_(self.mean), [Scale(-1.0, shift=1.0), Scale(m)]),
        (lambda self, x: self.mean.mul(x).sub(self.mean).div(2), [Scale(m), Scale(0.5, center=m)]),
        (lambda self, x: (x + 1) * 2 - self.one, [Scale(1.0, shift=1.0), Scale(2.0), Scale(1.0, center=1.5)]),
        (lambda self, x: self.bare(x) + self.mean, [Dense(bare.weight.detach().numpy(), m)]),
        (lambda self, x: self.bare(x) + 1, [Dense(bare.weight.detach().numpy()), Scale(1.0, shift=1.0)]),
        (lambda self, x: (x - self.mean) / torch.sqrt(self.std + 1), [Scale(1 / torch.sqrt(std[0] + 1).numpy(), center=m)]),
    ]  # fmt: skip
    x = np.random.default_rng(0).standard_normal((ROWS, 4))
    for forward, layers in cases:
        module = chain(torch, forward, bare=bare)
        module.mean, module.one = nn.Parameter(mean), torch.tensor(1.5)
        module.register_buffer("std", std)
        net = nnfwd.from_torch(module)
        assert [type(layer) for layer in net] == [type(layer) for layer in layers]
        assert net == Network(layers), net
        agree(net, x, outputs(torch, module, x, "float32"), "torch", "float32")
    for forward, message in (
        (lambda self, x: 1 / x, "divides by x"), (lambda self, x: torch.add(x, self.mean, alpha=2), "add with .*alpha"),
        (lambda self, x: torch.div(x, 2, rounding_mode="floor"), "div with .*rounding_mode"),
        (lambda self, x: x * self.bare.weight, r"mul takes 0.bare.weight of shape \(4, 4\)"), (lambda self, x: x.float(), "function float is not known"),
        (lambda self, x: x.to(torch.float64), "function to is not known"), (lambda self, x: self.bare.weight @ x, "where x belongs"),
        (lambda self, x: 2**x, "where x belongs"), (lambda self, x: x**2, "function pow is not known"), (lambda self, x: x * 1j, "function mul with .*1j.* is not known"),
    ):  # fmt: skip
        module = chain(torch, forward, bare=bare)
        module.mean = mean
        with pytest.raises(ModelFileError, match=message):
            nnfwd.from_torch(module)
    for both in (lambda self, x: x + x, lambda self, x: x * self.bare(x), lambda self, x: self.bare(x) - x):
        with pytest.raises(ModelFileError, match="a branch"):
            nnfwd.from_torch(chain(torch, both, bare=bare))


def test_what_to_pass_instead_is_said(torch):
    linear = torch.nn.Linear(2, 1)
    for given, message in (
        ("net.pt", r"nnfwd\.load"), (Path("net.pt"), r"nnfwd\.load"), (torch.nn.DataParallel(linear), r"pass model\.module"),
        (torch.compile(linear), r"pass m\._orig_mod"), (chain(torch, lambda self, x: self.a(x).squeeze(-1), a=linear), "leave it out"),
        (chain(torch, lambda self, x: torch.squeeze(self.a(x), 1), a=linear), r"leave it out, nnfwd gives \(\.\.\., 1\)"),
    ):  # fmt: skip
        with pytest.raises(ModelFileError, match=message):
            nnfwd.from_torch(given)


# Files that are no state dicts


def test_other_files_of_pytorch_are_refused_with_advice(torch, tmp_path):
    path, module = tmp_path / "a.pt", torch.nn.Linear(3, 2)
    advice = r"torch\.save\(model\.state_dict\(\), path\)"
    torch.save(module.state_dict(), path, _use_new_zipfile_serialization=False)
    with pytest.raises(ModelFileError, match=f"not a zip.*{advice}"):
        nnfwd.load(path, activations="relu")
    torch.save(module, path)
    with pytest.raises(ModelFileError, match=rf"unknown object torch\.nn\.modules\.linear\.Linear: .*{advice}"):
        nnfwd.load(path, activations="relu")
    for other in ([module.weight], module.weight):
        torch.save(other, path)
        with pytest.raises(ModelFileError, match=f"not a state dict: {advice}"):
            nnfwd.load(path, activations="relu")
    for odd, name in (
        (torch.zeros(2, dtype=torch.complex64), "ComplexFloatStorage"),
        (torch.zeros(2).to_sparse(), "sparse"),
    ):
        torch.save({"weight": odd}, path)
        with pytest.raises(ModelFileError, match=name):
            nnfwd.load(path, activations="relu")
    negative = torch.ones(2, 2, dtype=torch.complex64).conj().imag
    torch.save({"weight": negative}, path)
    with pytest.raises(ModelFileError, match="'neg'"):
        nnfwd.load(path, activations="relu")


def test_old_and_strange_archives(tmp_path):
    path = tmp_path / "a.pth"
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    for content in (path.read_bytes(), b"\x80\x02}.", b"junk" + archived(state())):
        path.write_bytes(content)
        with pytest.raises(ModelFileError, match="not a zip"):
            nnfwd.load(path, activations="relu")
    others = [
        ({"a/data.pkl": state(), "b/data.pkl": state()}, "2 members data.pkl"), ({"a/x": b""}, "0 members data.pkl"),
        ({"a/data.pkl": state(), "a/constants.pkl": b""}, "TorchScript"),
        ({"a/data.pkl": state(), "a/byteorder": b"middle"}, "byte order"),
    ]  # fmt: skip
    for members, message in others:
        path.write_bytes(zipped(members))
        with pytest.raises(ModelFileError, match=message):
            nnfwd.load(path, activations="relu")


# Pickles by hand


def text(value):
    value = value.encode()
    return b"X" + struct.pack("<I", len(value)) + value


def number(value):
    return b"J" + struct.pack("<i", value)


def several(*items):
    return b"(" + b"".join(items) + b"t"


def dictionary(items):
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def named(module, name):
    return b"c" + f"{module}\n{name}\n".encode()


ORDERED = named("collections", "OrderedDict") + b")R"


def storage(count, kind="FloatStorage", key="0"):
    return several(text("storage"), named("torch", kind), text(key), text("cpu"), number(count)) + b"Q"


def tensor(where, shape, strides, offset=0, extra=b""):
    sizes = several(*map(number, shape)), several(*map(number, strides))
    return (
        named("torch._utils", "_rebuild_tensor_v2")
        + several(where, number(offset), *sizes, b"\x89", ORDERED, extra)
        + b"R"
    )


def pickled(value):
    return b"\x80\x02" + value + b"."


def state(weight=None):
    return pickled(dictionary({"weight": tensor(storage(6), (2, 3), (3, 1)) if weight is None else weight}))


def zipped(members, compression=zipfile.ZIP_STORED):
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return whole.getvalue()


VALUES = np.arange(6, dtype="<f4")


def archived(pickle, **members):
    return zipped({"a/data.pkl": pickle, "a/data/0": VALUES.tobytes()} | members)


def load(tmp_path, content, **arguments):
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    return nnfwd.load(path, **({"activations": "identity"} | arguments))


def test_a_file_by_hand_is_read_without_pytorch(tmp_path):
    assert load(tmp_path, archived(state())) == Network([Dense(VALUES.reshape(2, 3))])
    program = f"import sys, nnfwd\nnnfwd.load({os.fspath(tmp_path / 'a.pt')!r}, activations='relu')\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])


def test_big_endian_storages(tmp_path):
    big = {"a/byteorder": b"big", "a/data/0": VALUES.astype(">f4").tobytes()}
    assert load(tmp_path, archived(state(), **big)) == Network([Dense(VALUES.reshape(2, 3))])
    half = {"a/byteorder": b"big", "a/data/0": (VALUES.view("u4") >> 16).astype(">u2").tobytes()}
    weight = tensor(storage(6, "BFloat16Storage"), (2, 3), (3, 1))
    assert load(tmp_path, archived(state(weight), **half)) == Network([Dense(VALUES.reshape(2, 3))])


def refused(tmp_path, content, message, **arguments):
    """The file is refused with this message, soon, with little memory, and nothing is opened, imported or executed."""
    path = tmp_path / "a.pt"
    load(tmp_path, archived(state()))  # the warm-up
    path.write_bytes(content)
    arguments = {"activations": "identity"} | arguments
    outcome = attempt(path, **arguments)
    assert isinstance(outcome, ModelFileError), outcome
    assert message in str(outcome), outcome
    tracemalloc.start()  # which takes time of its own
    try:
        with pytest.raises(ModelFileError):
            nnfwd.load(path, **arguments)
        assert tracemalloc.get_traced_memory()[1] <= 2 * len(content) + ROOM
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (named("os", "system") + several(text("true")) + b"R", "unknown object os.system"),
        (named("builtins", "eval") + several(text("1")) + b"R", "unknown object builtins.eval"),
        (named("torch._utils\nx", "y"), "opcode 0x79"),
        (named("torch", "_utils._rebuild_tensor_v2"), "unknown object torch._utils._rebuild_tensor_v2"),
        (named("torch\x1b[2J", "FloatStorage"), r"unknown object torch\x1b[2J.FloatStorage"),
        (b"c" + b"a" * 10**6, "a name without an end"),
        (text("os") + text("system") + b"\x93", "unknown object os.system"),
        (text("a" * 10**6) + text("b") + b"\x93", "a name of more than 256 characters"),
        (number(1) + text("system") + b"\x93", "a int where a str belongs"),
        (named("torch", "FloatStorage") + b")R", "calls a str"),
        (named("collections", "OrderedDict") + b"]R", "a list where a tuple belongs"),
        (named("torch._utils", "_rebuild_parameter") + several(*[b"N"] * 9) + b"R", "takes 3 positional arguments"),
        (named("torch", "Tensor") + b")\x81", "unknown object torch.Tensor"),
        (named("collections", "OrderedDict") + b")\x81", "a function where a UnknownObject belongs"),
        (named("os", "system") + b")}\x92", "unknown object os.system"),
        (named("collections", "OrderedDict") + b")}\x92", "a function where a UnknownObject belongs"),
        (ORDERED + b"(N\x90", "a dict where a UnknownObject belongs"),
        (b"\x8f(Ntb", "unknown object builtins.set"),
        (b"(N\x91", "unknown object builtins.frozenset"),
        (b"B\xff\xff\xff\xff", "ends early"),
        (b"\x96" + b"\xff" * 8, "ends early"),
        (b"C\x01a", "weight is a bytes, no tensor"),
        (b"i" + b"os\nsystem\n", "opcode 0x69"),
        (b"\x82\x01", "opcode 0x82"),
        (b"\x8b\xff\xff\xff\x7f", "opcode 0x8b"),
        (b"\x8a\xff" + b"\x01" * 9, "ends early"),
        (b"X\xff\xff\xff\xff", "a string of 4294967295 bytes"),
        (b"X\xff\xff\x00\x00a", "ends early"),
        (b"\x95" + b"\xff" * 8 + b"N", "ends inside a frame"),
        (b"\x80\x01N", "unknown version of pickle"),
        (b"h\x05", "its object 5"),
        (b"r\xff\xff\xff\xff" + b"j\xfe\xff\xff\xff", "its object 4294967294"),
        (ORDERED + dictionary({"_metadata": b"N", "x": b"N"}) + b"b", "sets attributes of a dict"),
        (b"]" + dictionary({"_metadata": b"N"}) + b"b", "sets attributes of a list"),
        (b"}" + several(number(1)) + number(1) + b"s", "a tuple as key"),
        (b"}\x8a\x09" + b"\x01" * 9 + b"Ns", "a int as key"),
        (b"}(" + text("a") + b"u", "not a valid .pt file"),
        (number(0) + number(1) + b"a", "a int where a list belongs"),
        (text("cpu") + b"Q", "no storage"),
        (b"0" * 3, "opcode 0x30"),
        (b"t", "not a valid .pt file"),
        (b"N.", "does not end"),
    ],
)  # fmt: skip
def test_a_pickle_that_wants_more(value, message, tmp_path):
    refused(tmp_path, archived(state(value)), message)


def test_pickles_without_end(tmp_path):
    for endless, message in (
        (b"(" * 10**6, "more than 262144 opcodes"), (b"]" * 10**7, "more than 262144 opcodes"),
        (b"(" * 10**5 + b"t" * 10**5, "weight is a tuple"), (b"}(" * 10**5, "does not end"),
        (b"}q\x00X\x01\x00\x00\x00ah\x00s", "nested deeper than 32"),  # a dict that holds itself
        (b"]q\x00h\x00a", "weight is a list"),
    ):  # fmt: skip
        refused(tmp_path, archived(state(endless)), message)
    deep = b"N"
    for _ in range(40):
        deep = dictionary({"a": deep})
    refused(tmp_path, archived(state(deep)), "nested deeper than 32")


def test_dicts_that_share_dicts_manifold(tmp_path):
    """Two entries on each of thirty levels, each the level below: a thousand million names in a kilobyte."""
    value = dictionary({"x": b"N"}) + b"q\x00"
    for level in range(30):
        above = dictionary({"a": value, "b": b"h" + bytes([level])})
        value = above + b"q" + bytes([level + 1])
    refused(tmp_path, archived(pickled(value)), "more than limits.metadata")


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (tensor(storage(6), (10**6, 10**6), (0, 0)), "weight (1000000, 1000000) has"),
        (tensor(storage(6), (1000, 1000), (0, 0)), "share memory"),
        (tensor(storage(6), (2, 3), (1, 1)), "share memory"),
        (tensor(storage(6), (2, 3), (-3, 1), 3), "strides and an offset that do not fit"),
        (tensor(storage(6), (2, 3), (3, 1), -1), "strides and an offset that do not fit"),
        (tensor(storage(6), (2, 3), (3,)), "strides and an offset that do not fit"),
        (tensor(storage(6), (2, 3), (3, 1), 1), "does not fit into its storage of 6 elements"),
        (tensor(storage(6), (2, 3), (2**31 - 1, 1)), "does not fit into its storage of 6 elements"),
        (tensor(storage(6), (-2, 3), (3, 1)), "beyond the limits"),
        (tensor(storage(6), (2,) * 9, (1,) * 9), "beyond the limits"),
        (tensor(b"N", (2, 3), (3, 1)), "weight is no tensor in a storage"),
        (tensor(storage(10**9), (2, 3), (3, 1)), "a/data/0 has 24 bytes, not those of 1000000000 float32"),
        (tensor(storage(6, "DoubleStorage"), (2, 3), (3, 1)), "not those of 6 float64"),
        (tensor(storage(6, "QInt8Storage"), (2, 3), (3, 1)), "unknown object torch.QInt8Storage"),
        (tensor(storage(6, key="1"), (2, 3), (3, 1)), "no member a/data/1"),
        (tensor(storage(6, key="../data.pkl"), (2, 3), (3, 1)), "no member a/data/../data.pkl"),
        (tensor(storage(6, key="/etc/passwd"), (2, 3), (3, 1)), "no member a/data//etc/passwd"),
        (tensor(storage(6), (2, 3), (3, 1), extra=dictionary({"neg": b"\x88"})), "'neg'"),
        (tensor(storage(6, "IntStorage"), (2, 3), (3, 1)), "weight is int32"),
        (storage(6), "weight is a _Storage"),
    ],
)  # fmt: skip
def test_a_tensor_that_is_not_in_its_storage(weight, message, tmp_path):
    refused(tmp_path, archived(state(weight)), message)


def test_tensors_that_share_one_storage_a_thousand_times(tmp_path):
    count = 300 * 300
    where = storage(count) + b"q\x00"
    layers = {"0.weight": tensor(where, (300, 300), (300, 1))}
    layers |= {f"{i}.weight": tensor(b"h\x00", (300, 300), (300, 1)) for i in range(1, 1000)}
    refused(
        tmp_path,
        archived(pickled(dictionary(layers)), **{"a/data/0": bytes(4 * count)}),
        "shares its storage with others too often",
    )


def test_limits(tmp_path):
    whole = archived(state())
    for limits in (Limits(file=10), Limits(metadata=10), Limits(tensors=1), Limits(dimension=2), Limits(tensor=20)):
        refused(tmp_path, whole, "", limits=limits)
    many = pickled(dictionary({f"{i}.weight": tensor(storage(6), (2, 3), (3, 1)) for i in range(5)}))
    refused(tmp_path, archived(many), "5 tensors are more than 4", limits=Limits(tensors=4))
    refused(tmp_path, archived(many), "more than 4 layers", limits=Limits(layers=4))


def test_zip_bombs(tmp_path):
    refused(tmp_path, zipped({"a/data.pkl": state(), "a/data/0": bytes(24)}, zipfile.ZIP_DEFLATED), "is compressed")
    refused(tmp_path, zipped({"a/data.pkl": b"]" * 10**8}, zipfile.ZIP_DEFLATED), "it expands")
    refused(tmp_path, zipped({"a/data.pkl": b"]" * 10**7}, zipfile.ZIP_DEFLATED), "is compressed")


def test_strings_that_grow_in_memory(tmp_path):
    wide = text("\N{SNAKE}" + "a" * (2**20 - 4))
    refused(tmp_path, archived(pickled(b"]" + (wide + b"a") * 15)), "holds a list")


def test_two_entries_of_one_name(tmp_path):
    weight = tensor(storage(6), (2, 3), (3, 1))
    refused(
        tmp_path,
        archived(pickled(dictionary({"a.weight": weight, "a": dictionary({"weight": weight})}))),
        "two entries have the name 'a.weight'",
    )


def test_damaged_files(tmp_path, note):
    net = {
        "0.weight": tensor(storage(6) + b"q\x00", (2, 3), (3, 1)),
        "0.bias": tensor(b"h\x00", (2,), (2,)),
        "epoch": number(3),
    }
    survives(
        tmp_path,
        ".pth",
        archived(pickled(dictionary({"net": dictionary(net)}))),
        note,
        prefix="net.0",
        activations="relu",
    )


def test_damaged_pickles_in_whole_archives(tmp_path, note):
    """Of the files above, few are damaged in the pickle and get past the zip's checksum."""
    net = {
        "0.weight": tensor(storage(6) + b"q\x00", (2, 3), (3, 1)),
        "0.bias": tensor(b"h\x00", (2,), (2,)),
        "epoch": number(3),
    }
    classic = pickled(
        ORDERED + dictionary(net)[1:] + dictionary({"_metadata": dictionary({"version": b"K\x01"})}) + b"b"
    )
    body = classic[2:].replace(b"q\x00", b"\x94")
    framed = b"\x80\x04\x95" + struct.pack("<Q", len(body)) + body
    path, count, found = tmp_path / "a.pt", 0, 0
    for seed in (classic, framed):
        assert load(tmp_path, archived(seed), prefix="0") == Network([Dense(VALUES.reshape(2, 3), VALUES[:4:2])])
        for data in damaged(seed, np.random.default_rng(0)):
            path.write_bytes(archived(data))
            count += 1
            found += isinstance(attempt(path, activations="identity", prefix="0"), Network)
    parts = [
        *b"(()}]NtueasRbQ.",
        b"\x85",
        b"\x86",
        b"\x93",
        b"h\x00",
        b"q\x00",
        text("weight"),
        number(3),
        storage(6),
        ORDERED,
    ]
    parts += [
        named("torch", "FloatStorage"),
        named("torch._utils", "_rebuild_tensor_v2"),
        tensor(storage(6), (2, 3), (3, 1)),
    ]
    parts = [bytes([part]) if isinstance(part, int) else part for part in parts]
    for seed in range(2000):
        rng = np.random.default_rng(seed)
        path.write_bytes(
            archived(pickled(b"".join(parts[i] for i in rng.integers(len(parts), size=rng.integers(1, 20)))))
        )
        count += 1
        found += isinstance(attempt(path, activations="identity"), Network)
    note(f"{count} damaged pickles in whole .pt files: {count - found} refused, no other error")
    assert 0 < found < count / 2


def test_damaged_files_of_pytorch(torch, tmp_path, note):
    torch.save(torch.nn.Linear(2, 1).state_dict(), tmp_path / "a.pt")
    survives(tmp_path, ".pt", (tmp_path / "a.pt").read_bytes(), note, activations="relu")
