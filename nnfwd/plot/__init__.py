"""Pictures of networks, with matplotlib (the extra `plot`).

Each takes `ax=`, returns the Axes, and draws nothing global.
"""

from nnfwd.plot.diagrams import network

__all__ = ["network"]
