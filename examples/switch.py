"""One program for a laptop and a GPU machine: the array library is a command-line argument.

python examples/switch.py numpy|jax|cupy|torch
"""

import importlib
import sys

from nnfwd.demo import digits

name = sys.argv[1] if len(sys.argv) > 1 else "numpy"
xp = importlib.import_module({"jax": "jax.numpy"}.get(name, name))  # the rest of the program is the same

net, images, labels = digits()
x = xp.asarray(images / 16, dtype=xp.float32)
y = net[1:](x)  # a slice is a network: here without the scaling of the pixels, done above
print(f"{type(y).__module__}.{type(y).__name__} of {y.dtype}: the first ten digits are", y[:10].argmax(-1).tolist())
