"""The tutorial's code, with its lists and its three nested loops, beside the library's."""

import math

import nnfwd

n_layers = 3
x = [1.5, 2.0, 3.0]
w = [
    [[0.2, 0.2, 0.2], [0.4, 0.4, 0.4], [0.6, 0.6, 0.6]],
    [[0.5, 0.5, 0.5]],
]
b = [[0.8, 0.8, 0.8], [0.2]]


def f(z):
    return 1 / (1 + math.exp(-z))


h = x
for layer in range(n_layers - 1):
    node_in = h
    h = []
    for i in range(len(w[layer])):
        node_sum = 0.0
        for j in range(len(node_in)):
            node_sum += w[layer][i][j] * node_in[j]
        h.append(f(node_sum + b[layer][i]))

net = nnfwd.Network.from_arrays(w, b, "sigmoid")
print(f"the tutorial's loops   {h[0]:.8f}")
print(f"looped_feed_forward    {nnfwd.looped_feed_forward(x, net)[0]:.8f}")
print(f"net(x), as matrices    {net(x)[0]:.8f}")
