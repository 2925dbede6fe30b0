"""CuPy where there is no GPU: every line of nnfwd_cupy.py against a stand-in, and the real CuPy without a device.

The stand-in (cupy_stand_in.py) is NumPy underneath. It proves the spelling of nnfwd_cupy.py, not its behaviour: which
names it uses, with which arguments, and on which device each array is. That the real libraries have these names is
checked where CuPy is installed. Nothing in this file has run on a GPU; where there is one, test_agreement.py runs on it.

The stand-in takes CuPy's place for a whole process, so its checks run in another one, all at once, and report back: each
`case` below is a test here.
"""

import ast
import functools
import importlib
import importlib.util
import inspect
import os
import re
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import cupy_stand_in
import numpy as np
import pytest
from elsewhere import elsewhere, forked
from places import REQUIRED, places

import nnfwd
from nnfwd import Activation, Dense, Network, Scale, activations, backend
from nnfwd.bounds import Arithmetic, arithmetic_of
from nnfwd.errors import ArrayError, BackendError, DeviceError, DtypeError

FUNCTIONS = {"exp", "expm1", "log1p", "log", "tanh", "erfc"}


# The cases. They run in the other process, where `cupy` is the stand-in and `adapter` is nnfwd_cupy.

Case = Callable[[Any, Any], None]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def raised(kind: type[Exception], call: Callable[[], Any]) -> str:
    """The message of the error that the call must raise, which must be one line."""
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value), caught.value
    return str(caught.value)


def network(name: str = "sigmoid", dtype: str = "float32") -> Network:
    """A network with every kind of layer and of parameter, all its activations the one of that name."""
    rng = np.random.default_rng(1)

    def array(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(dtype)

    def function(width: int | None) -> Any:
        found = activations.named(name)
        values = {key: rng.uniform(0.1, 2, width) * (-1 if key == "lower" else 1) for key in found.parameters}
        values = {key: float(value) if width is None else value.astype(dtype) for key, value in values.items()}
        return found(**values) if values else found

    return Network(
        [
            Activation(function(None)),
            Scale(array(4), center=array(4), shift=0.5),
            Dense(array(5, 4), array(5), function(5)),
            Dense(array(3, 5), None, function(None)),
        ]
    )


def ensemble(dtype: str = "float32") -> Network:
    rng = np.random.default_rng(3)
    layers = [(rng.standard_normal((2, 3, width)), rng.standard_normal((2, 3)), "gelu") for width in (4, 3)]
    return Network(Dense(w.astype(dtype), b.astype(dtype), name) for w, b, name in layers)


def inputs(dtype: str = "float32") -> np.ndarray:
    """Ordinary rows, and one each of large numbers, of zeros and of what is not finite."""
    x = np.random.default_rng(2).standard_normal((8, 4))
    x[1] *= 100
    x[2] = (0.0, -0.0, 1.0, -1.0)
    x[3] = (np.inf, -np.inf, np.nan, 0.0)
    return x.astype(dtype)


def put(cupy: Any, a: Any, device: int) -> Any:
    """The array on a device, as a user of CuPy puts it there."""
    with cupy.cuda.Device(device):
        return cupy.asarray(a)


def check(cupy: Any, y: Any, expected: np.ndarray, device: int) -> None:
    """y is an array of the stand-in on that device, and equal to NumPy's result bit for bit."""
    assert type(y) is cupy.ndarray, type(y)
    assert y.device == cupy.cuda.Device(device), f"the result is on {y.device}, and not on device {device}"
    assert y.dtype == expected.dtype, (y.dtype, expected.dtype)
    assert y.shape == expected.shape, (y.shape, expected.shape)
    assert y.get().tobytes() == expected.tobytes(), (y.get(), expected)


@case
def the_stand_in_refuses_what_cupy_refuses(cupy, adapter):
    here, there = (put(cupy, [1.0, 2.0], device) for device in (0, 1))
    raised(TypeError, lambda: np.asarray(here))
    raised(TypeError, lambda: here + np.ones(2))
    raised(TypeError, lambda: np.ones(2) + here)
    raised(ValueError, lambda: here + there)
    raised(ValueError, lambda: adapter.xp.exp(there))
    raised(cupy.cuda.runtime.CUDARuntimeError, lambda: put(cupy, [1.0], 2))


@case
def devices_are_counted(cupy, adapter):
    assert adapter.devices() == ("cuda:0", "cuda:1")
    assert backend.load("cupy") is adapter
    assert backend.load(cupy) is adapter


@case
def no_driver_is_no_device(cupy, adapter):
    error = cupy.cuda.runtime.CUDARuntimeError("cudaErrorInsufficientDriver")
    with mock.patch.object(cupy.cuda.runtime, "getDeviceCount", side_effect=error):
        assert adapter.devices() == ()
        message = raised(BackendError, lambda: network()(inputs(), backend="cupy"))
    assert "cupy is installed but finds no usable device" in message


@case
def place_goes_where_it_is_told(cupy, adapter):
    host = inputs("float64")
    like = put(cupy, host, 1)
    for device in ("cuda:1", cupy.cuda.Device(1), 1):
        check(cupy, adapter.place(host, dtype="float32", device=device), host.astype("float32"), 1)
        check(
            cupy,
            adapter.place(host, dtype="float32", like=put(cupy, host, 0), device=device),
            host.astype("float32"),
            1,
        )
    check(cupy, adapter.place(host, dtype="float64", like=like), host, 1)
    check(cupy, adapter.place(like, dtype="float64", device="cuda:0"), host, 0)
    check(cupy, adapter.place(like, dtype="float16", like=like), host.astype("float16"), 1)
    assert adapter.place(like, dtype="float64", like=like) is like
    assert cupy.cuda.Device().id == 0


@case
def place_untold_goes_to_the_current_device(cupy, adapter):
    check(cupy, adapter.place(inputs(), dtype="float32"), inputs(), 0)
    with cupy.cuda.Device(1):
        check(cupy, adapter.place(inputs(), dtype="float32"), inputs(), 1)


@case
def bfloat16_is_refused(cupy, adapter):
    assert "CuPy's bfloat16" in raised(DtypeError, lambda: adapter.place(inputs(), dtype="bfloat16"))
    assert "CuPy's bfloat16" in raised(DtypeError, lambda: network()(put(cupy, inputs(), 0), dtype="bfloat16"))


@case
def to_numpy_is_a_numpy_array(cupy, adapter):
    for device in (0, 1):
        home = adapter.to_numpy(put(cupy, inputs(), device))
        assert type(home) is np.ndarray
        assert home.tobytes() == inputs().tobytes()


def math_mode(cupy: Any, device: int = 0) -> int:
    with cupy.cuda.Device(device):
        return cupy.cuda.cublas.getMathMode(cupy.cuda.get_cublas_handle())


def products(function: Callable[..., Any], *args: Any, **options: Any) -> list[tuple[str, int]]:
    """The dtype and the math mode of every matrix product of a call."""
    before = len(cupy_stand_in.products)
    function(*args, **options)
    return cupy_stand_in.products[before:]


EXACT, TF32 = 16, 19  # cublasMath_t: sums of float16 in float32; that and TF32 allowed


@case
def precision_is_the_math_mode_of_every_product(cupy, adapter):
    for dtype in ("float16", "float32", "float64"):
        for make in (network, ensemble):
            net, x = make(dtype=dtype), put(cupy, inputs(dtype), 1)
            run = net.compile(backend="cupy", device="cuda:1")
            for precision, mode in (("highest", EXACT), ("high", TF32), ("medium", TF32)):
                assert products(net, x, precision=precision) == [(dtype, mode)] * 2
                assert products(nnfwd.trace, net, x, precision=precision) == [(dtype, mode)] * 2
            assert products(run, x) == products(net, x) == [(dtype, EXACT)] * 2
    assert math_mode(cupy, 0) == math_mode(cupy, 1) == 0


@case
def the_math_mode_is_put_back(cupy, adapter):
    """Also where passes are nested, one of them fails, and the user had chosen a mode."""

    def inner(x, /, *, xp):
        seen.append(math_mode(cupy, 1))
        network()(put(cupy, inputs(), 1), precision="highest")
        seen.append(math_mode(cupy, 1))
        raise ZeroDivisionError

    with cupy.cuda.Device(1):
        cupy.cuda.cublas.setMathMode(cupy.cuda.get_cublas_handle(), 2)
    seen: list[int] = []
    raised(ZeroDivisionError, lambda: Network([Activation(inner)])(put(cupy, inputs(), 1), precision="high"))
    assert seen == [TF32, TF32]
    assert math_mode(cupy, 1) == 2
    assert math_mode(cupy, 0) == 0
    with cupy.cuda.Device(1):
        cupy.cuda.cublas.setMathMode(cupy.cuda.get_cublas_handle(), 0)


@case
def the_math_mode_is_a_threads_own(cupy, adapter):
    """Passes of three precisions are under way together, and each product has the mode of its own."""
    modes = {"highest": EXACT, "high": TF32, "medium": TF32}
    seen: dict[str, list[int]] = {}

    def run(precision: str) -> None:
        def probe(x, /, *, xp):
            for _ in range(2):
                together.wait(timeout=60)
                seen.setdefault(precision, []).append(math_mode(cupy))
            return x

        Network([Activation(probe)])(put(cupy, inputs(), 0), precision=precision)
        seen[precision].append(math_mode(cupy))

    together = threading.Barrier(len(modes))
    threads = [threading.Thread(target=run, args=(precision,)) for precision in modes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {precision: [mode, mode, 0] for precision, mode in modes.items()}
    assert math_mode(cupy) == 0


@case
def tf32_for_the_whole_process_is_refused_where_highest_is_asked(cupy, adapter):
    settings = cupy._core._routines_linalg
    for chosen, environment in ((settings.COMPUTE_TYPE_TF32, {}), (settings.COMPUTE_TYPE_TBD, {"CUPY_TF32": "1"})):
        cupy._core.set_compute_type("float32", chosen)
        with mock.patch.dict(os.environ, environment):
            for dtype in ("float16", "float32", "float64"):
                net, x = network(dtype=dtype), put(cupy, inputs(dtype), 0)
                for precision in backend.PRECISIONS:
                    if dtype == "float32" and precision == "highest":
                        assert "CUPY_TF32" in raised(BackendError, functools.partial(net, x))
                    else:
                        check(cupy, net(x, precision=precision), net(inputs(dtype)), 0)
    for chosen in (settings.COMPUTE_TYPE_TBD, settings.COMPUTE_TYPE_DEFAULT):
        cupy._core.set_compute_type("float32", chosen)
        check(cupy, network()(put(cupy, inputs(), 0)), network()(inputs()), 0)


@case
def one_row_times_one_column_of_float16_is_summed_in_float32(cupy, adapter):
    """300 * 300 is no number of float16, nor is 1 + 2**-12."""
    for weight, x, y in (([300, -300, 1], [300, 300, 1], 1), ([1 + 2**-10, -1], [1 + 2**-10, 1], 2**-9 + 2**-20)):
        net = Network([Dense(np.asarray([weight], dtype="float16"))])
        for host in (np.asarray(x, dtype="float16"), np.asarray([x], dtype="float16")):
            expected = np.full((*host.shape[:-1], 1), y, dtype="float16")
            check(cupy, net(put(cupy, host, 1)), expected, 1)


@case
def a_forked_process_is_refused(cupy, adapter):
    """A process forked from one that used a GPU is told so, whatever it calls."""
    net, x = network().to("cupy"), put(cupy, inputs(), 0)
    run = net.compile()
    run(x)
    calls = {
        "net(x)": lambda: net(x),
        "host weights": lambda: network()(x),
        "backend=": lambda: network()(inputs(), backend="cupy"),
        "device=": lambda: network()(inputs(), backend="cupy", device="cuda:0"),
        "compiled": lambda: run(x),
        "compile": lambda: network().compile(backend="cupy"),
        "to": lambda: network().to("cupy"),
        "home": lambda: net.to("numpy"),
    }

    if not hasattr(os, "fork"):
        return
    messages = forked(lambda: {name: raised(BackendError, call) for name, call in calls.items()})
    for name, message in messages.items():
        assert message.startswith("cupy was in use when this process was forked"), (name, message)
        assert "spawn" in message
    check(cupy, net(x), network()(inputs()), 0)


@case
def arithmetic_of_every_dtype(cupy, adapter):
    for dtype in ("float16", "float32", "float64"):
        found = arithmetic_of(adapter, dtype)
        assert isinstance(found, Arithmetic)
        assert found.dtype == dtype
        assert found.ulp.keys() == FUNCTIONS
        assert found.flushes == (dtype == "float32")
        assert found.u_in == 0
        assert (found.u_acc, found.u_out) == ((2.0**-23, 2.0**-11) if dtype == "float16" else (None, 0.0))


@case
def arithmetic_follows_the_precision(cupy, adapter):
    """Where TF32 is allowed, operands are rounded to it first; it concerns float32 alone."""
    for precision in ("high", "medium"):
        assert arithmetic_of(adapter, "float32", precision=precision).u_in >= 2.0**-11
        assert arithmetic_of(adapter, "float64", precision=precision) == arithmetic_of(adapter, "float64")


def follows_x(cupy: Any, adapter: Any, *, name: str, dtype: str) -> None:
    """x decides: the result is on its device, wherever the current one is, and is NumPy's bit for bit."""
    net, host = network(name, dtype), inputs(dtype)
    expected = net(host)
    for device in (1, 0, 1):  # one network serves both devices
        check(cupy, net(put(cupy, host, device)), expected, device)
        assert cupy.cuda.Device().id == 0


for _name in activations.names():
    for _dtype in ("float32", "float64", "float16"):
        CASES[f"follows_x[{_name}-{_dtype}]"] = functools.partial(follows_x, name=_name, dtype=_dtype)


@case
def the_current_device_may_be_another(cupy, adapter):
    for current in (0, 1):
        with cupy.cuda.Device(current):
            for device in (0, 1):
                check(cupy, network()(put(cupy, inputs(), device)), network()(inputs()), device)
            assert cupy.cuda.Device().id == current


@case
def an_error_leaves_the_current_device(cupy, adapter):
    def fails(x, /, *, xp):
        raise ZeroDivisionError

    net = Network([Activation(fails)])
    raised(ZeroDivisionError, lambda: net(put(cupy, inputs(), 1)))
    assert cupy.cuda.Device().id == 0


@case
def every_shape_of_x(cupy, adapter):
    for net in (network(dtype="float64"), ensemble("float64")):
        for host in (inputs("float64")[0], inputs("float64").reshape(2, 4, 4), np.zeros((0, 4))):
            check(cupy, net(put(cupy, host, 1)), net(host), 1)


@case
def integers_take_the_dtype_of_the_network(cupy, adapter):
    host = np.arange(8).reshape(2, 4)
    check(cupy, network()(put(cupy, host, 1)), network()(host), 1)


@case
def a_trace_stays_beside_x(cupy, adapter):
    found, expected = nnfwd.trace(network(), put(cupy, inputs(), 1)), nnfwd.trace(network(), inputs())
    for ours, theirs in zip((*found.z, *found.h), (*expected.z, *expected.h), strict=True):
        check(cupy, ours, theirs, 1)


@case
def arguments_move_x(cupy, adapter):
    net, host = network(), inputs()
    check(cupy, net(host, backend="cupy"), net(host), 0)
    for device in ("cuda:1", cupy.cuda.Device(1), 1):
        check(cupy, net(host, backend="cupy", device=device), net(host), 1)
        check(cupy, net(host, backend=cupy, device=device), net(host), 1)
        check(cupy, net(put(cupy, host, 0), device=device), net(host), 1)
    check(cupy, net(put(cupy, host, 1), dtype="float64"), net(host, dtype="float64"), 1)
    check(cupy, net(host.tolist(), backend="cupy", device="cuda:1"), net(host.tolist()), 1)


@case
def an_unknown_device_is_refused(cupy, adapter):
    for device in ("cuda:2", "gpu", "", cupy.cuda.Device(2), 2, -1, object()):
        message = raised(DeviceError, lambda device=device: network()(inputs(), backend="cupy", device=device))
        assert repr(device) in message
        assert "cuda:0, cuda:1" in message or not isinstance(device, str)


@case
def compiled_for_cupy(cupy, adapter):
    net, host = network(dtype="float64"), inputs()
    expected = net(host)
    run = net.compile(backend="cupy", dtype="float32")
    check(cupy, run(host), expected, 0)
    check(cupy, run(put(cupy, host, 0)), expected, 0)
    raised(DtypeError, lambda: run(host.astype("float64")))


@case
def compiled_for_a_device(cupy, adapter):
    net, host = network(), inputs()
    for device in ("cuda:1", cupy.cuda.Device(1), 1):
        run = net.compile(backend="cupy", device=device)
        for x in (host, put(cupy, host, 0), put(cupy, host, 1)):
            check(cupy, run(x), net(host), 1)


@case
def compiled_where_its_weights_are(cupy, adapter):
    net, host = network(), inputs()
    run = net.to("cupy", device="cuda:1").compile()
    check(cupy, run(put(cupy, host, 1)), net(host), 1)
    check(cupy, net.to("cupy", device="cuda:1").compile(backend="cupy")(host), net(host), 1)


@case
def compiled_refuses_x_on_another_device(cupy, adapter):
    run = network().compile(backend="cupy")
    names_both_devices(cupy, adapter, lambda: run(put(cupy, inputs(), 1)))


@case
def weights_and_x_on_two_devices(cupy, adapter):
    net = network().to("cupy", device="cuda:0")
    names_both_devices(cupy, adapter, lambda: net(put(cupy, inputs(), 1)))
    check(cupy, net(put(cupy, inputs(), 0)), network()(inputs()), 0)


def names_both_devices(cupy: Any, adapter: Any, call: Callable[[], Any]) -> None:
    """The error names both devices, and what it says to write can be written."""
    message = raised(DeviceError, call)
    for device in (0, 1):
        assert f"cuda:{device}" in message or repr(cupy.cuda.Device(device)) in message, message
    for given in re.findall(r"device='([^']*)'", message):
        assert given in adapter.devices(), (
            f"device={given!r} is no device of cupy, and this says to write it: {message}"
        )


@case
def weights_and_x_of_two_libraries(cupy, adapter):
    message = raised(ArrayError, lambda: network().to("cupy")(inputs()))
    assert "cupy" in message
    assert "numpy" in message


@case
def there_and_back(cupy, adapter):
    net = network()
    there = net.to("cupy", device="cuda:1")
    assert isinstance(there[2].weight, cupy.ndarray)
    assert there[2].weight.device == cupy.cuda.Device(1)
    check(cupy, there(put(cupy, inputs(), 1)), net(inputs()), 1)
    assert there.to("numpy") == net


def stand_in_report(_: None) -> dict[str, Any]:
    """Runs every case: the traceback of those that fail, and the lines of nnfwd_cupy.py that did not run."""
    source = Path(importlib.util.find_spec("nnfwd_cupy").origin)
    ran: set[int] = set()

    def follow(frame: types.FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != str(source):
            return None
        ran.add(frame.f_lineno)
        return follow

    sys.settrace(follow)
    cupy = cupy_stand_in.install()
    adapter = backend.load("cupy")
    failures = {}
    for name, run in CASES.items():
        try:
            run(cupy, adapter)
            assert cupy.cuda.Device().id == 0, "the current device is another one now"
        except (Exception, pytest.fail.Exception):
            failures[name] = traceback.format_exc()
    sys.settrace(None)
    text = source.read_text(encoding="utf-8")
    unseen = sorted(set(executable(compile(text, source, "exec"))) - ran)
    return {"failures": failures, "unseen": [f"line {n}: {text.splitlines()[n - 1]}" for n in unseen]}


def executable(code: types.CodeType) -> Iterator[int]:
    """The lines a code object and those inside it can execute."""
    yield from (line for _, _, line in code.co_lines() if line)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from executable(inner)


@functools.cache
def report() -> dict[str, Any]:
    return elsewhere(stand_in_report, strict=True)


@pytest.mark.parametrize("name", CASES)
def test_stand_in(name):
    failure = report()["failures"].get(name)
    assert failure is None, f"with a stand-in for CuPy:\n{failure}"


def test_every_line_ran():
    assert report()["unseen"] == []


# Against the CuPy that is installed.


@pytest.fixture(scope="module")
def installed():
    """CuPy is installed, or the test is skipped visibly; it fails where CuPy is required."""
    info = next(info for info in nnfwd.backends() if info.name == "cupy")
    if info.version is None:
        (pytest.fail if "cupy" in REQUIRED else pytest.skip)(f"cupy: {info.status}")


@pytest.fixture(scope="module")
def no_device(installed):
    """CuPy finds no device here, or the test is skipped visibly."""
    found = [place.device for place in places() if place.name == "cupy"]
    if found:
        pytest.skip(f"cupy has a device here: {', '.join(found)}")


def used(path: Path, root: str) -> dict[str, list[str]]:
    """Every dotted name `root.a.b` in a file, and the keywords it is called with."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and _dotted(node).startswith(f"{root}."):
            found.setdefault(_dotted(node), set())
        if isinstance(node, ast.Call) and _dotted(node.func).startswith(f"{root}."):
            found.setdefault(_dotted(node.func), set()).update(k.arg for k in node.keywords if k.arg)
    return {name: sorted(keywords) for name, keywords in found.items()}


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Name):
        return node.id
    return f"{_dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def absent(names: dict[str, list[str]]) -> list[str]:
    """The dotted names, and the keywords of functions, that the installed libraries do not have."""
    missing = []
    # It cannot be imported without NVIDIA's library, but the signatures stand in its file.
    cublas = Path(importlib.util.find_spec("cupy_backends.cuda.libs.cublas").origin).read_text("latin-1")
    for name, keywords in names.items():
        if name.startswith("cupy.cuda.cublas"):
            if f"{name.removeprefix('cupy.cuda.cublas').lstrip('.')}(intptr_t handle" not in cublas:
                missing.append(name)
            continue
        module = next(m for m in ("array_api_compat.cupy", "cupy") if name.startswith(f"{m}."))
        try:
            found = functools.reduce(
                getattr, name.removeprefix(f"{module}.").split("."), importlib.import_module(module)
            )
        except AttributeError:
            missing.append(name)
            continue
        if keywords:
            known = inspect.signature(found).parameters
            missing += [f"{name}(..., {keyword}=...)" for keyword in keywords if keyword not in known]
    return missing


@pytest.mark.usefixtures("installed")
def test_the_stand_in_offers_only_what_cupy_has():
    assert elsewhere(absent, {name: [] for name in cupy_stand_in.offered()}) == []


@pytest.mark.usefixtures("installed")
def test_cupy_has_what_the_backend_uses():
    names = used(Path(importlib.util.find_spec("nnfwd_cupy").origin), "cupy")
    assert {"cupy.asarray", "cupy.asnumpy", "cupy.cuda.Device", "cupy.cuda.runtime.getDeviceCount"} <= names.keys()
    assert "cupy.cuda.cublas.setMathMode" in names
    assert elsewhere(absent, names) == []


def compute_types(_: None) -> list[int]:
    """The numbers of CuPy's compute types, and the one in force."""
    cupy = importlib.import_module("cupy")
    numbers = vars(cupy_stand_in.CUPY["_core"]._routines_linalg)
    return [*(getattr(cupy._core._routines_linalg, name) for name in numbers), cupy._core.get_compute_type("float32")]


@pytest.mark.usefixtures("installed")
def test_the_stand_in_numbers_compute_types_as_cupy_does():
    stand_in = cupy_stand_in.CUPY["_core"]
    numbers = vars(stand_in._routines_linalg)
    assert elsewhere(compute_types) == [*numbers.values(), numbers["COMPUTE_TYPE_DEFAULT"]]


@pytest.mark.usefixtures("installed")
def test_cupy_has_what_the_pass_uses():
    names: dict[str, list[str]] = {}
    for path in Path(nnfwd.__file__).parent.glob("*.py"):
        for name, keywords in used(path, "xp").items():
            names.setdefault(name.replace("xp", "array_api_compat.cupy", 1), []).extend(keywords)
    assert {"array_api_compat.cupy.matmul", "array_api_compat.cupy.exp"} <= names.keys()
    assert "keepdims" in names["array_api_compat.cupy.sum"]
    assert elsewhere(absent, names) == []


def without_a_device(_: None) -> dict[str, Any]:
    """What a user meets who has CuPy and no GPU."""
    after_import = "cupy" in sys.modules
    listed = next(info for info in nnfwd.backends() if info.name == "cupy")
    after_listing = "cupy" in sys.modules
    probed = next(info for info in nnfwd.backends(devices=True) if info.name == "cupy")
    net, x = network(), inputs()
    calls = {
        "net(x)": lambda: net(x, backend="cupy"),
        "a device": lambda: net(x, backend="cupy", device="cuda:0"),
        "the module": lambda: net(x, backend=sys.modules["cupy"]),
        "compile": lambda: net.compile(backend="cupy"),
        "to": lambda: net.to("cupy"),
    }
    return {
        "imported": [after_import, after_listing],
        "listed": [listed.version, listed.devices, listed.status],
        "probed": [probed.version, probed.devices, probed.status],
        "version": sys.modules["cupy"].__version__,
        "errors": {name: raised(BackendError, call) for name, call in calls.items()},
    }


@pytest.fixture(scope="module")
def found_without_a_device():
    return functools.cache(lambda: elsewhere(without_a_device))


@pytest.mark.usefixtures("installed")
def test_importing_nnfwd_does_not_import_cupy():
    assert not elsewhere(imports_cupy)


def imports_cupy(_: None) -> bool:
    """Whether CuPy has been imported by importing nnfwd, or by listing the backends."""
    nnfwd.backends()
    return "cupy" in sys.modules


@pytest.mark.usefixtures("no_device")
def test_installed_without_a_device_says_so(found_without_a_device):
    found = found_without_a_device()
    assert found["listed"] == [found["version"], None, "installed"]
    assert found["probed"] == [found["version"], [], "installed, no device"]


@pytest.mark.usefixtures("no_device")
@pytest.mark.parametrize("call", ["net(x)", "a device", "the module", "compile", "to"])
def test_asking_for_it_without_a_device_is_a_clear_error(call, found_without_a_device):
    message = found_without_a_device()["errors"][call]
    assert message == "cupy is installed but finds no usable device here: choose another backend"
