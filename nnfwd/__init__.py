"""nnfwd runs a trained feed-forward network on whatever array you hold.

The pass is written once, against the Python Array API standard (`nnfwd.forward`), and executed by the library x belongs
to. See `Network`, `Dense`, `feed_forward`.
"""

from nnfwd import activations, errors
from nnfwd.backend import backends
from nnfwd.forward import Trace, feed_forward, trace
from nnfwd.io import load, save
from nnfwd.layers import Activation, Dense, Scale
from nnfwd.network import Network
from nnfwd.reference import looped_feed_forward

__version__ = "0.1.0"

__all__ = [
    "Activation",
    "Dense",
    "Network",
    "Scale",
    "Trace",
    "activations",
    "backends",
    "errors",
    "feed_forward",
    "load",
    "looped_feed_forward",
    "save",
    "trace",
]
