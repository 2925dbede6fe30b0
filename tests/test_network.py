"""Networks, layers, and the rules of where arrays are."""

import pickle

import agreement
import numpy as np
import pytest
from networks import ensemble, inputs, mixed, tutorial
from places import Place, need, places

import nnfwd
from nnfwd import Activation, Dense, Network, Scale, activations
from nnfwd.bounds import arithmetic_of, looped_bound
from nnfwd.errors import ArrayError, DtypeError, ShapeError
from nnfwd.placement import dtype_name

RNG = np.random.default_rng(0)


def test_the_tutorial():
    net, x = tutorial()
    assert f"{net(x)[0]:.8f}" == f"{nnfwd.looped_feed_forward(x, net)[0]:.8f}" == "0.83545566"
    turned = Network.from_arrays([net[0].weight.T, net[1].weight], [net[0].bias, net[1].bias], "sigmoid")
    assert f"{turned(x)[0]:.4f}" == "0.8407"


def test_published_examples():
    """M. Mazur's backpropagation example, and the one of scikit-learn's test_fit."""
    mazur = Network.from_arrays(
        [[[0.15, 0.2], [0.25, 0.3]], [[0.4, 0.45], [0.5, 0.55]]], [[0.35] * 2, [0.6] * 2], "sigmoid"
    )
    t = nnfwd.trace(mazur, [0.05, 0.1])
    assert [f"{v:.9f}" for v in (*t.h[0], *t.y)] == ["0.593269992", "0.596884378", "0.751365070", "0.772928465"]
    assert (len(t.z), len(t.h)) == (2, 2)


def test_slices_length_repr_and_equality():
    net = mixed()
    assert len(net) == 4
    assert isinstance(net[1], Dense)
    assert isinstance(net[:2], Network)
    assert net[:2] == Network([net[0], net[1]])
    assert (net.in_features, net.out_features) == (4, 2)
    assert repr(net).splitlines()[1:-1] == [
        "    Scale(scale=array(4,), center=array(4,)),",
        "    Dense(4 -> 5, prelu(negative_slope=array(5,))),",
        "    Dense(5 -> 6, no bias, gelu),",
        "    Dense(6 -> 2, softmax),",
    ]
    assert net == mixed()
    assert hash(net) == hash(mixed())
    assert net != mixed(seed=1)
    assert net != mixed("float64")
    assert net != net[:3]
    assert Network([Dense([[1.0]], activation="relu")]) != Network([Dense([[1.0]], activation="elu")])
    assert Network([Activation(activations.elu(alpha=2.0))]) != Network([Activation("elu")])


def test_a_slice_is_the_pass_cut_there():
    net, x = mixed(), inputs(5, 4)
    t = nnfwd.trace(net, x)
    assert np.array_equal(net[:2](x), t.h[1])
    assert np.array_equal(net[2:](net[:2](x)), t.y)
    assert np.array_equal(net(x), t.y)
    assert np.array_equal(nnfwd.feed_forward(x, list(net)), t.y)


def test_weights_are_the_networks_own():
    weight = np.ones((1, 2))
    net = Network([Dense(weight)])
    weight[:] = 5
    assert net(np.ones(2)) == 2
    with pytest.raises(ValueError, match="read-only"):
        net[0].weight[0, 0] = 3
    slopes = np.array([0.5])
    f = activations.prelu(negative_slope=slopes)
    slopes[:] = 9
    assert f(np.array([-1.0])) == -0.5


def test_pickling_drops_placed_copies_and_keeps_weights_read_only():
    net = mixed()
    for place in places():
        net(place.put(inputs(4), "float32"))
    assert net.chain.placed
    again = pickle.loads(pickle.dumps(net))
    assert again == net
    assert not again.chain.placed
    assert not again[1].weight.flags.writeable
    assert not again[1].activation.parameters["negative_slope"].flags.writeable
    assert len(pickle.dumps(net)) == len(pickle.dumps(mixed()))


def test_placed_copies_are_kept_under_strings():
    net = mixed()
    for place in places():
        net(place.put(inputs(4), "float32"))
        net(place.put(inputs(4), "float32"))
    assert all(isinstance(part, str) for key in net.chain.placed for part in key)
    assert len(net.chain.placed) == len([place for place in places() if place.name != "dask"])
    kept = {key: [id(layer) for layer in layers] for key, layers in net.chain.placed.items()}
    for place in places():
        net(place.put(inputs(4), "float32"))
    assert kept == {key: [id(layer) for layer in layers] for key, layers in net.chain.placed.items()}


@pytest.mark.parametrize("place", places(), ids=str)
def test_array_in_array_out(place):
    """Rule 1: x decides library, device and dtype."""
    net = mixed("float64")
    for dtype in ("float32", "float64", "float16", "bfloat16"):
        if place.has(dtype):
            with place.context(dtype):
                x = place.put(inputs(3, 4), dtype)
                for y in (
                    net(x),
                    nnfwd.trace(net, x).h[0],
                    net.compile(backend=place.name, device=place.device, dtype=dtype)(x),
                ):
                    assert place.holds(y)
                    assert dtype_name(y.dtype) == dtype


@pytest.mark.parametrize("place", places(), ids=str)
def test_integers_and_bools_take_the_networks_dtype(place):
    net = mixed("float32")
    for dtype in ("int32", "uint8", "bool"):
        x = place.put(np.array([[1, 0, 1, 1]]), dtype)
        assert dtype_name(net(x).dtype) == "float32"
        assert np.array_equal(
            place.adapter.to_numpy(net(x)),
            place.adapter.to_numpy(net(place.put(np.array([[1.0, 0, 1, 1]]), "float32"))),
        )
    assert dtype_name(Network([Dense(np.ones((1, 1), "float32")), Dense(np.ones((1, 1)))]).dtype) == "float64"
    assert Network([Dense(np.ones((1, 1), "float16"))]).dtype == "float16"


def test_lists_are_of_the_librarys_default_dtype():
    net, x = tutorial()
    assert net(x).dtype == "float64"
    for name, dtype in (("numpy", "float64"), ("jax", "float32"), ("torch", "float32")):
        if name in {place.name for place in places()}:
            assert dtype_name(net(x, backend=name).dtype) == dtype


@pytest.mark.parametrize("place", places(), ids=str)
def test_chosen_by_argument(place):
    """Rule 2: an explicit argument moves data, from any library."""
    net, x = tutorial()
    bounded = looped_bound(x, net, arithmetic=arithmetic_of(place.adapter, "float64"))
    narrow = net.to(dtype="float32")
    for source in places():
        moved = net(source.put(np.array(x), "float32"), backend=place.name, device=place.device)
        assert place.holds(moved)
        exact = looped_bound(x, narrow, arithmetic=arithmetic_of(place.adapter, "float32"))
        agreement.check(moved, place, "float32", exact)
    if place.has("float64"):
        with place.context("float64"):
            agreement.check(net(x, backend=place.name, device=place.device, dtype="float64"), place, "float64", bounded)


def test_a_namespace_module_names_a_backend():
    net, x = tutorial()
    assert isinstance(net(x, backend=np), np.ndarray)
    jax = need("jax")
    assert isinstance(net(x, backend=jax.numpy), jax.Array)


def test_no_setting_outlives_a_call():
    """Rule 3."""
    before = np.geterr()
    Network([Dense([[1e300]]), Dense([[1e300]])])(np.array([1e300]))
    assert np.geterr() == before


def test_overflow_does_not_warn_and_does_not_raise():
    with np.errstate(all="raise"):
        assert np.isinf(Network([Dense([[1e300]])])(np.array([1e300])))


@pytest.mark.parametrize("place", places(), ids=str)
def test_leading_axes_fold_and_unfold(place):
    net = mixed()
    whole = inputs(2, 3, 4)
    for shape in ((4,), (1, 4), (0, 4), (2, 3, 4), (2, 0, 4), (1, 1, 1, 4)):
        x = whole.ravel()[: int(np.prod(shape))].reshape(shape)
        y = net(place.put(x, "float32"))
        bounded = looped_bound(x, net, arithmetic=arithmetic_of(place.adapter, "float32"))
        agreement.check(y, place, "float32", bounded)


@pytest.mark.parametrize("place", places(), ids=str)
@pytest.mark.parametrize("shape", [(4,), (5, 4), (2, 3, 4), (0, 4)])
def test_ensembles(place, shape):
    net = ensemble()
    x = inputs(*shape)
    y = net(place.put(x, "float32"))
    assert tuple(y.shape) == (3, *shape[:-1], 2)
    agreement.check(y, place, "float32", looped_bound(x, net, arithmetic=arithmetic_of(place.adapter, "float32")))
    mixed_in = Network([Scale(2.0), Dense(np.ones((4, 4), "float32")), *net, Dense(np.ones((1, 2), "float32"))])
    y = mixed_in(place.put(x, "float32"))
    bounded = looped_bound(x, mixed_in, arithmetic=arithmetic_of(place.adapter, "float32"))
    agreement.check(y, place, "float32", bounded)


def test_ensemble_loops_member_by_member():
    net, x = ensemble("float64"), inputs(2, 4, dtype="float64")
    loops = np.array(nnfwd.looped_feed_forward(x, net))
    assert loops.shape == (3, 2, 2)
    bounded = looped_bound(x, net, arithmetic=arithmetic_of(None, "float64"))
    assert bounded.ratio(loops).max() <= 1


def test_numpy_inputs_of_every_layout():
    net, x = mixed(), inputs(8, 4)
    bounded = looped_bound(x, net, arithmetic=arithmetic_of(nnfwd.backend.load("numpy"), "float32"))
    read_only = x.copy()
    read_only.flags.writeable = False
    wide = np.zeros((16, 8), "float32")
    wide[::2, ::2] = x
    for given in (x, np.asfortranarray(x), read_only, wide[::2, ::2], x[::-1][::-1], x.astype(">f4")):
        before = given.tobytes()
        agreement.check(net(given), Place("numpy", "cpu"), "float32", bounded)
        assert given.tobytes() == before


def test_parameters_round_trip():
    net = mixed()
    assert [sorted(layer) for layer in net.parameters] == [
        ["center", "scale"], ["activation", "bias", "weight"], ["weight"], ["bias", "weight"],
    ]  # fmt: skip
    assert net.with_parameters(net.parameters) == net
    doubled = net.with_parameters([*net.parameters[:3], {**net[3].parameters, "bias": 2 * net[3].bias}])
    assert np.array_equal(doubled[3].bias, 2 * net[3].bias)


@pytest.mark.parametrize("place", places(), ids=str)
def test_to_and_home_again(place):
    net = mixed()
    away = net.to(place.name, device=place.device)
    x = inputs(3, 4)
    assert np.array_equal(
        place.adapter.to_numpy(away(place.put(x, "float32"))), place.adapter.to_numpy(net(place.put(x, "float32")))
    )
    where = Place("numpy", "cpu") if place.name == "dask" else place  # whose chunks are run by NumPy
    assert all(where.holds(a) for a in (away[0].scale, away[1].weight, away[1].activation.parameters["negative_slope"]))
    assert away.to("numpy") == net
    assert net.to(dtype="float64").dtype == "float64"


@pytest.mark.parametrize("place", places(), ids=str)
def test_compiled(place):
    net = mixed()
    x = inputs(3, 4)
    run = net.compile(backend=place.name, device=place.device, dtype="float32")
    bounded = looped_bound(x, net, arithmetic=arithmetic_of(place.adapter, "float32"))
    for source in (place, Place("numpy", "cpu")):
        agreement.check(run(source.put(x, "float32")), place, "float32", bounded)
    agreement.check(run(x.tolist()), place, "float32", bounded)
    assert dtype_name(run(place.put(np.ones((1, 4)), "int32")).dtype) == "float32"
    with pytest.raises(ShapeError, match=r"weight|scale"):
        run(np.ones((3, 5), "float32"))
    again = pickle.loads(pickle.dumps(run))
    assert np.array_equal(place.adapter.to_numpy(again(x)), place.adapter.to_numpy(run(x)))
    assert place.name in repr(run)
    with pytest.raises(DtypeError, match="float16"):
        run(x.astype("float16"))


def test_compiled_lives_where_its_weights_are():
    strict = need("array_api_strict")
    there = Place("array_api_strict", "device1")
    run = mixed().to("array_api_strict", device="device1").compile()
    with pytest.raises(nnfwd.errors.ArrayError, match=r"compile\(backend='numpy'\)"):
        run(inputs(3, 4))  # nothing moves that was not asked to
    assert there.holds(run(inputs(3, 4).tolist()))
    assert there.holds(
        mixed().to("array_api_strict", device="device1").compile(backend="array_api_strict")(inputs(3, 4))
    )
    assert there.holds(run(strict.asarray(inputs(3, 4), device=strict.Device("device1"))))
    with pytest.raises(nnfwd.errors.DeviceError, match=r"device1.*CPU_DEVICE"):
        run(strict.asarray(inputs(3, 4)))


def test_a_library_without_a_backend_of_ours(monkeypatch):
    """Any conforming library runs: here array-api-strict with its adapter hidden."""
    strict = need("array_api_strict")
    from nnfwd import backend

    monkeypatch.setattr(backend, "_name_by_type", {})
    monkeypatch.setattr(backend, "_found", {})
    known = backend.importlib.util.find_spec
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None if "strict" in name else known(name))
    net, x = mixed("float64"), strict.asarray(inputs(3, 4, dtype="float64"), device=strict.Device("device1"))
    y = net(x)
    assert (y.dtype, y.device, y.shape) == (strict.float64, strict.Device("device1"), (3, 2))


def test_backends_reads_metadata_and_probes_when_asked():
    found = {info.name: info for info in nnfwd.backends()}
    assert {"numpy", "jax", "torch", "dask", "cupy", "array_api_strict"} <= set(found)
    assert found["numpy"].version == np.__version__
    assert found["numpy"].devices is None
    assert {info.name: info for info in nnfwd.backends(devices=True)}["numpy"].devices == ("cpu",)
    for info in nnfwd.backends(devices=True):
        assert info.status in ("usable", "installed, no device") or info.status.startswith(
            ("missing: pip install", "broken: ")
        )


def test_a_callable_is_never_taken_for_one_of_ours_of_the_same_name():
    def relu(x, /, *, xp):
        return xp.where(x > 0, x, 0.1 * x)

    net = Network([Dense([[1.0]], None, relu)])
    assert net([-1.0]) == -0.1
    with pytest.raises(nnfwd.errors.ArrayError, match="relu has no scalar form"):
        nnfwd.looped_feed_forward([-1.0], net)
    with pytest.raises(nnfwd.errors.ArrayError, match="rounding of the activation relu"):
        looped_bound([-1.0], net, arithmetic=arithmetic_of(None, "float64"))


def test_scalars_are_rounded_to_the_dtype_once():
    """So that a library that widens a scalar, or does not, computes the same."""
    net = Network([Scale(0.1, center=0.3), Activation(activations.leaky_relu(negative_slope=2.7e-7))])
    for place in places():
        for dtype in ("float16", "float32"):
            if place.has(dtype):
                x = np.array([[-6e4], [0.3], [5.0]]).astype(dtype)
                bounded = looped_bound(x, net, arithmetic=arithmetic_of(place.adapter, dtype))
                agreement.check(net(place.put(x, dtype)), place, dtype, bounded)


def test_a_network_without_weights_takes_any_dtype():
    net = Network([Scale(1 / 16), Activation("relu")])
    assert net.dtype is None
    assert net(np.ones((2, 3), "float32")).dtype == "float32"
    assert net(np.ones((2, 3), "uint8")).dtype == "float64"
    assert net.compile(dtype="float32")(np.ones((2, 3), "uint8")).dtype == "float32"
    jax = need("jax")
    assert net(jax.numpy.ones((2, 3), "int32")).dtype == "float32"


def test_modules_are_at_hand():
    import subprocess
    import sys

    program = "import nnfwd; nnfwd.plot.network; nnfwd.io.Limits; nnfwd.bounds.Arithmetic; nnfwd.activations.swish; dir(nnfwd)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_an_ensemble_and_its_members():
    members = [Network([Scale(2.0), *Network.from_arrays([w1, w2], [None, b2], ["relu", "softmax"])], classes="abc")
               for w1, w2, b2 in ((RNG.standard_normal((4, 2)), RNG.standard_normal((3, 4)), RNG.standard_normal(3))
                                  for _ in range(5))]  # fmt: skip
    net = Network.stack(members)
    assert net[1].weight.shape == (5, 4, 2)
    assert net.classes == ("a", "b", "c")
    assert net.members() == members
    x = RNG.standard_normal((7, 2))
    for m, member in enumerate(members):
        assert np.array_equal(net(x)[m], member(x))
    assert members[0].members() == [members[0]]
    with pytest.raises(ShapeError, match="network 1 is an ensemble: stack its members"):
        Network.stack([members[0], net])


@pytest.mark.parametrize("library", ["jax", "torch", "array_api_strict"])
def test_an_ensemble_of_another_library(library):
    need(library)
    weights = [np.float32([[m, 1], [2, 3]]) for m in (1, 2, 3)]
    members = [Network([Dense(w, w[0], "relu")]).to(library) for w in weights]
    net = Network.stack(members)
    assert type(net[0].weight) is type(members[0][0].weight)
    assert net.members() == members


@pytest.mark.parametrize(
    ("other", "match"),
    [
        ([Dense([[1.0, 2.0]], [0.0], "tanh")], "layer 0: .*tanh.* of network 1 does not fit .*relu.* of network 0"),
        ([Dense([[1.0, 2.0]], None, "relu")], "layer 0: .*no bias"),
        ([Dense([[1.0]], [0.0], "relu")], "layer 0"),
        ([Dense([[1.0, 2.0]], [0.0], "relu"), Scale(2.0)], "network 1 has 2 layers, network 0 has 1"),
    ],
)
def test_members_that_do_not_fit(other, match):
    with pytest.raises(ShapeError, match=match):
        Network.stack([Network([Dense([[1.0, 2.0]], [0.0], "relu")]), Network(other)])


def test_members_of_other_scalings_or_classes_do_not_fit():
    scaled = [Network([Scale([1.0, s])]) for s in (2.0, 3.0)]
    with pytest.raises(ShapeError, match="layer 0: Scale.*members may differ in the weights and biases of Dense"):
        Network.stack(scaled)
    named = [Network([Dense([[1.0], [2.0]])], classes=c) for c in ("ab", "ac")]
    with pytest.raises(ShapeError, match="network 1 has other classes"):
        Network.stack(named)
    with pytest.raises(ShapeError, match="at least one"):
        Network.stack([])
    for wrong, match in ((named[0], "a list of networks, not a Network"), (["a.npz"], "network 0 is a str")):
        with pytest.raises(ArrayError, match=match):
            Network.stack(wrong)


def test_classes_and_input_shape_stay():
    layers = [Dense(np.ones((3, 4)), None, "relu"), Dense(np.ones((2, 3)), None, "softmax")]
    net = Network(layers, classes=np.array(["no", "yes"]), input_shape=(2, 2))
    assert (net.classes, net.input_shape) == (("no", "yes"), (2, 2))
    assert repr(net).endswith("], classes=('no', 'yes'), input_shape=(2, 2))")
    assert net != Network(layers)
    assert net.to(dtype="float32").classes == net.classes
    assert net.with_parameters(net.parameters) == net
    assert pickle.loads(pickle.dumps(net)) == net
    assert (net[:1].classes, net[:1].input_shape) == (None, (2, 2))
    assert (net[1:].classes, net[1:].input_shape) == (("no", "yes"), None)
    assert (net[:].classes, net[:].input_shape) == (net.classes, net.input_shape)
    assert (net[::2].classes, net[::2].input_shape) == (None, None)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"classes": ["a", "b"]}, ShapeError, "2 classes do not fit 3 outputs: give 3"),
        ({"classes": ["a", "b", "a"]}, ShapeError, "two of the classes .* are the same"),
        ({"classes": ["a", "b", None]}, ArrayError, "a class is None: it must be a string or a number"),
        ({"input_shape": (3, 2)}, ShapeError, r"input_shape \(3, 2\) has 6 numbers, the network takes 4"),
        ({"input_shape": (-2, -2)}, ShapeError, "positive whole numbers"),
        ({"input_shape": ()}, ShapeError, "positive whole numbers"),
    ],
)
def test_classes_and_input_shape_that_do_not_fit(arguments, error, match):
    with pytest.raises(error, match=match):
        Network([Dense(np.ones((3, 4)))], **arguments)


def test_labels():
    net = Network([Dense(np.eye(3))], classes=["a", "b", "c"])
    assert nnfwd.labels(net, [[0.0, 1.0, 0.5], [2.0, 1.0, 2.0]]).tolist() == ["b", "a"]
    assert nnfwd.labels(net, np.zeros((2, 5, 3))).shape == (2, 5)
    assert nnfwd.labels(net, net([0.0, 0.0, 9.0])).tolist() == "c"
    one = Network([Dense(np.ones((1, 2)), None, "sigmoid")], classes=[-1, 1])
    assert nnfwd.labels(one, [[0.5], [0.6]]).tolist() == [-1, 1]
    for network, y, match in (
        (Network([Dense(np.eye(3))]), np.zeros((1, 3)), "the network has no classes"),
        (net, np.zeros((3, 2)), r"y \(3, 2\) must be \(..., 3\)"),
        (net, np.zeros(()), "must be"),
        (net, np.full((2, 3), np.nan), "NaN in 2 rows"),
    ):
        with pytest.raises(ShapeError, match=match):
            nnfwd.labels(network, y)
