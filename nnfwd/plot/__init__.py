"""Pictures of networks, with matplotlib (the extra `plot`).

Each takes `ax=`, returns the Axes, and draws nothing global: `plot.network(net, x).figure.savefig("network.svg")`.
"""

from nnfwd.plot.agreement import agreement
from nnfwd.plot.curves import activation, activations, bias_effect, weight_effect
from nnfwd.plot.diagrams import network, node

__all__ = ["activation", "activations", "agreement", "bias_effect", "network", "node", "weight_effect"]
