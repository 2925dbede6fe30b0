"""Trains the digits network a few steps with PyTorch: autograd follows the pass to its weights. Needs nnfwd[torch]."""

import numpy as np
import torch

import nnfwd
from nnfwd.demo import digits

trained, images, labels = digits()
rng = np.random.default_rng(0)
net = nnfwd.Network(
    [
        nnfwd.Scale(1 / 16),
        nnfwd.Dense(rng.normal(0, 0.2, (32, 64)), np.zeros(32), "relu"),
        nnfwd.Dense(rng.normal(0, 0.2, (10, 32)), np.zeros(10), "log_softmax"),
    ]
).to("torch", dtype="float32")
x, y = torch.tensor(images, dtype=torch.float32), torch.tensor(labels, dtype=torch.int64)

parameters = [{name: a.requires_grad_() for name, a in layer.items()} for layer in net.parameters]
weights = [a for layer in parameters for a in layer.values()]
net = net.with_parameters(parameters)
optimiser = torch.optim.SGD(weights, lr=0.5)

for i in range(60):
    optimiser.zero_grad()
    loss = torch.nn.functional.nll_loss(net(x), y)
    loss.backward()
    optimiser.step()
    if i % 20 == 0:
        print(f"step {i:3}  loss {loss:.4f}")
accuracy = (net(x).argmax(-1) == y).float().mean()
print(f"after 60 steps: loss {loss:.4f}, accuracy {accuracy:.3f} on the rows it was trained on")
