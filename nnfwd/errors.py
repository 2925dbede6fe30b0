"""The errors nnfwd raises: one line each, saying what was given, what was needed and what to do.

Each is also one of Python's own (`ValueError`, `TypeError`, ...), so code that knows nothing of nnfwd catches it too.
"""

from collections.abc import Iterable
from typing import Any


class NnfwdError(Exception):
    """Base of every error raised on purpose. Its message is one printable line, whatever names it quotes."""

    def __init__(self, message: str, /) -> None:
        line = " ".join(line.strip() for line in message.splitlines())
        if not line.isprintable():  # a name from a file could hold what a terminal obeys
            line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
        super().__init__(line)


class ShapeError(NnfwdError, ValueError):
    """Shapes that do not fit together."""


class DtypeError(NnfwdError, TypeError):
    """A dtype that cannot be computed with, or that the library would change silently."""


class ArrayError(NnfwdError, TypeError):
    """Something that is not an array we can compute with, or arrays of two libraries in one call."""


class DeviceError(NnfwdError, ValueError):
    """A device that does not exist, or two devices in one call."""


class BackendError(NnfwdError, RuntimeError):
    """An array library that is missing, finds no device, is broken, or is set against what was asked."""


class UnknownNameError(NnfwdError, ValueError):
    """A name (activation, backend, precision, ...) that does not exist; says which ones do."""

    def __init__(self, what: str, given: object, known: Iterable[str]) -> None:
        import difflib  # only on this path: it is slow to import

        names = sorted(known)
        near = difflib.get_close_matches(str(given).lower(), names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
        super().__init__(f"unknown {what} {given!r}: {hint}")

    def __reduce__(self) -> tuple[Any, ...]:
        return (_unknown, self.args)


def _unknown(message: str) -> UnknownNameError:
    error = UnknownNameError.__new__(UnknownNameError)
    NnfwdError.__init__(error, message)
    return error


class ModelFileError(NnfwdError, ValueError):
    """A model, mostly a file, that is damaged, too large, or holds what cannot be represented."""


class DataFileError(NnfwdError, ValueError):
    """A file of inputs or outputs that is damaged, of an unknown format, or in the way."""
