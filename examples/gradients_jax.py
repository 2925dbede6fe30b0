"""Trains the digits network a few steps with JAX: the pass is differentiated over its weights. Needs nnfwd[jax]."""

import jax
import jax.numpy as jnp
import numpy as np

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
).to("jax", dtype="float32")
x, y = jnp.asarray(images, "float32"), jnp.asarray(labels, "int32")


def loss(net):
    return -net(x)[jnp.arange(len(y)), y].mean()


@jax.jit
def step(net):  # a network on JAX is a pytree
    value, gradient = jax.value_and_grad(loss)(net)
    return value, jax.tree.map(lambda a, g: a - 0.5 * g, net, gradient)


for i in range(60):
    value, net = step(net)
    if i % 20 == 0:
        print(f"step {i:3}  loss {value:.4f}")
accuracy = (net(x).argmax(-1) == y).mean()
print(f"after 60 steps: loss {loss(net):.4f}, accuracy {accuracy:.3f} on the rows it was trained on")
