"""One network, every array library found on this machine: the result is that library's array, on its device."""

import numpy as np

import nnfwd

rng = np.random.default_rng(0)
net = nnfwd.Network.from_arrays(
    [rng.standard_normal((16, 4)), rng.standard_normal((2, 16))], [np.zeros(16), np.zeros(2)], ["gelu", "softmax"]
)
x = rng.standard_normal((3, 4)).astype("float32")

for info in nnfwd.backends(devices=True):
    for device in info.devices or ():
        y = net(x, backend=info.name, device=device)
        print(f"{info.name:8} {device:8} {type(y).__module__}.{type(y).__name__}  {y.dtype}  {tuple(y.shape)}")
    if not info.devices:
        print(f"{info.name:8} {info.status}")
