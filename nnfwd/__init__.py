"""nnfwd runs a trained feed-forward network on whatever array you hold.

The pass is written once, against the Python Array API standard (`nnfwd.forward`), and executed by the library x belongs
to. See `Network`, `Dense`, `feed_forward`.
"""

from typing import TYPE_CHECKING, Any

from nnfwd import activations, errors
from nnfwd.backend import backends
from nnfwd.forward import Trace, feed_forward, trace
from nnfwd.layers import Activation, Dense, Scale
from nnfwd.network import Network

if TYPE_CHECKING:
    from nnfwd.bounds import Bounded, error_bound
    from nnfwd.checking import Failure, Report, Row, check
    from nnfwd.classes import labels
    from nnfwd.io import Limits, load, save
    from nnfwd.io.keras import from_keras
    from nnfwd.io.sklearn import from_sklearn
    from nnfwd.io.state_dict import from_state_dict
    from nnfwd.io.torch_module import from_torch
    from nnfwd.reference import looped_feed_forward
    from nnfwd.streaming import Streamed, stream

__version__ = "0.1.0"

__all__ = [
    "Activation",
    "Bounded",
    "Dense",
    "Failure",
    "Limits",
    "Network",
    "Report",
    "Row",
    "Scale",
    "Streamed",
    "Trace",
    "activations",
    "backends",
    "check",
    "error_bound",
    "errors",
    "feed_forward",
    "from_keras",
    "from_sklearn",
    "from_state_dict",
    "from_torch",
    "labels",
    "load",
    "looped_feed_forward",
    "save",
    "stream",
    "trace",
]

_LAZY = {
    "Bounded": "nnfwd.bounds",
    "Failure": "nnfwd.checking",
    "Limits": "nnfwd.io",
    "Report": "nnfwd.checking",
    "Row": "nnfwd.checking",
    "Streamed": "nnfwd.streaming",
    "check": "nnfwd.checking",
    "error_bound": "nnfwd.bounds",
    "from_keras": "nnfwd.io.keras",
    "from_sklearn": "nnfwd.io.sklearn",
    "from_state_dict": "nnfwd.io.state_dict",
    "from_torch": "nnfwd.io.torch_module",
    "labels": "nnfwd.classes",
    "load": "nnfwd.io",
    "looped_feed_forward": "nnfwd.reference",
    "save": "nnfwd.io",
    "stream": "nnfwd.streaming",
}
_MODULES = ("bounds", "demo", "explain", "io", "plot", "reference")


def __getattr__(name: str) -> Any:
    import importlib

    if name in _MODULES:
        return importlib.import_module(f"nnfwd.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module 'nnfwd' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})
