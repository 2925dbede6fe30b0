"""`nnfwd demo`: the tutorial's network by loops and by matrices, then handwritten digits, on every usable backend."""

import importlib.resources
import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nnfwd import backend as _backend
from nnfwd.bounds import error_bound
from nnfwd.forward import trace
from nnfwd.io import load
from nnfwd.network import Network
from nnfwd.reference import looped_steps


def tutorial() -> tuple[Network, list[float]]:
    """The tutorial's 3-3-1 network and its input."""
    w1, w2 = [[0.2] * 3, [0.4] * 3, [0.6] * 3], [[0.5] * 3]
    return Network.from_arrays([w1, w2], [[0.8] * 3, [0.2]], "sigmoid"), [1.5, 2, 3]


def digits() -> tuple[Network, np.ndarray, np.ndarray]:
    """A trained 64-32-10 network, 450 held-out images `(450, 64)` from 0 to 16, and their labels `(450,)`."""
    data = importlib.resources.files("nnfwd") / "data"
    with importlib.resources.as_file(data / "digits.npz") as path:
        net = load(path)
    with importlib.resources.as_file(data / "digits_heldout.npz") as path, np.load(path) as held_out:
        return net, held_out["images"], held_out["labels"]


def demo(folder: Path) -> Iterator[str]:
    """Runs the demo and yields what it prints, line by line. Pictures are written to `folder`."""
    yield from _tutorial()
    yield ""
    yield from _digits()
    yield ""
    yield from _pictures(folder)


def _tutorial() -> Iterator[str]:
    net, x = tutorial()
    yield "1. The tutorial: a 3-3-1 network, sigmoid, x = (1.5, 2, 3)"
    yield ""
    yield "   layer node   by loops, plain Python            by matrices, NumPy"
    looped, matrix = list(looped_steps(tuple(net), x)), trace(net, np.array(x))
    for i, (z, h) in enumerate(looped):
        for j in range(len(z)):
            left = f"z = {z[j]:.8f}  h = {h[j]:.8f}"
            yield f"   {i + 1:5} {j + 1:4}   {left}   z = {matrix.z[i][j]:.8f}  h = {matrix.h[i][j]:.8f}"
    yield ""
    yield "   The same network, the same line of code, on every array library found here:"
    yield ""
    for info in _backend.backends(devices=True):
        for device in info.devices or ():
            adapter = _backend.load(info.name)
            y = net(x, backend=info.name, device=device, dtype="float32")
            kind = f"{type(y).__module__.partition('.')[0]}.{type(y).__name__}"
            yield f"   {info.name:8}{device:10}{adapter.to_numpy(y)[0]:.8f}   {kind}"
        if not info.devices:
            yield f"   {info.name:8}{info.status}"


def _digits() -> Iterator[str]:
    net, images, labels = digits()
    yield f"2. {len(images)} handwritten digits it was not trained on, {net.in_features}-32-{net.out_features}, float32"
    yield ""
    yield "   backend device     rows  accuracy  time a pass  largest error, in units of its bound"
    x = images.astype("float32")
    predicted = np.zeros(len(x), dtype=int)
    for info in _backend.backends(devices=True):
        for device in info.devices or ():
            adapter = _backend.load(info.name)
            run = net.compile(backend=info.name, device=device, dtype="float32")
            placed = adapter.place(x, dtype="float32", device=device)
            y = adapter.to_numpy(run(placed))
            times = []
            for _ in range(5):
                start = time.perf_counter()
                y = adapter.to_numpy(run(placed))
                times.append(time.perf_counter() - start)
            predicted = y.argmax(axis=-1)
            accuracy, worst = np.mean(predicted == labels), error_bound(net, placed).ratio(y).max()
            verdict = "inside" if worst <= 1 else "OUTSIDE"
            middle = sorted(times)[2] * 1e3
            yield f"   {info.name:8}{device:10}{len(x):5}{accuracy:10.2%}{middle:10.2f} ms   {worst:.2f}, {verdict}"
    yield ""
    wrong = np.flatnonzero(predicted != labels)
    chosen = [*range(5), *wrong[:1]]
    yield from _drawn(images[chosen])
    shown = (f"is {labels[i]}, read as {predicted[i]}" for i in chosen)
    yield "   " + "".join(f"{text:<19}" for text in shown)


def _drawn(images: np.ndarray) -> Iterator[str]:
    """Images side by side in characters, two a pixel."""
    shades = " .:-=+*#%@"
    for row in range(8):
        lines = ("".join(2 * shades[min(int(v * 10) // 17, 9)] for v in image.reshape(8, 8)[row]) for image in images)
        yield "   " + "".join(f"{line:<19}" for line in lines)


def _pictures(folder: Path) -> Iterator[str]:
    if importlib.util.find_spec("matplotlib") is None:
        yield "A picture of the network needs matplotlib: pip install 'nnfwd[plot]'"
        return
    from nnfwd import plot

    net, x = tutorial()
    trained, images, _ = digits()
    pictures: dict[str, Callable[[], Any]] = {
        "activation": plot.activation,
        "activations": plot.activations,
        "node": lambda: plot.node(x, [0.2, 0.2, 0.2], 0.8),
        "weight": plot.weight_effect,
        "bias": plot.bias_effect,
        "network": lambda: plot.network(net, x),
        "digits": lambda: plot.network(trained[1:], images[0] / 16),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in pictures.items():
        figure = draw().figure
        for extension in ("png", "svg"):
            figure.savefig(folder / f"{name}.{extension}", dpi=160)
    yield f"Pictures, each as PNG and SVG, in {folder}{os.sep}: {', '.join(pictures)}"
