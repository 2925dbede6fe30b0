"""The text format `.nnet` of aircraft collision avoidance networks; https://github.com/sisl/NNet, README and nnet.cpp.

Comments that start with `//`; then, each in a line of its own with commas between and after the numbers, the counts of
layers, inputs, outputs and the largest layer; the layer sizes; a flag; the minima and maxima of the inputs; the means
and ranges of the inputs, each followed by the outputs'; and for every layer the rows of its weight, then its biases,
one a line. Inputs are clipped and normalised, hidden layers are relu, the last one is linear, outputs denormalised.
"""

import re
from itertools import pairwise
from typing import IO

import numpy as np

from nnfwd import activations
from nnfwd.errors import ModelFileError
from nnfwd.io.building import Builder
from nnfwd.io.reading import Given, Limits, check_tensor, file_size
from nnfwd.layers import Dense
from nnfwd.network import Network

# Also nan and infinity, which C's strtod reads; not the underscores and foreign digits that Python's float would.
_NUMBERS = re.compile(rb"[-+.,0-9eEnaityfNAITYF \t]+")
_WIDEST = 64
"""Bytes that one number and what separates it may take."""


def read(file: IO[bytes], given: Given) -> Network:
    """The network of a `.nnet` file, in float64 and in the physical units of its inputs and outputs.

    Around its layers stand a clip and a Scale of the inputs, and a Scale of the outputs. Numbers that are not finite
    are kept as they are, except a range. The flag, which early readers took for a symmetry of the inputs and today's
    ignore, must be 0.
    """
    size = file_size(file)
    lines = _Lines(file, given.limits)
    counts = _whole(lines.first())
    if len(counts) != 4:
        raise ModelFileError(f"{lines.place}: {len(counts)} counts: it must be layers, inputs, outputs, largest layer")
    if counts[0] > given.limits.layers:
        raise ModelFileError(f"{lines.place}: {counts[0]} layers are more than {given.limits.layers}")
    sizes = _whole(lines.next(counts[0] + 1, "layer sizes"))
    if [sizes[0], sizes[-1], max(sizes)] != counts[1:]:
        raise ModelFileError(
            f"{lines.place}: layer sizes from {sizes[0]} to {sizes[-1]}, at most {max(sizes)}: the line before says "
            f"{counts[1]} to {counts[2]}, at most {counts[3]}"
        )
    for i, shape in enumerate(pairwise(sizes)):
        check_tensor(f"the weight of layer {i}", shape, "float64", given.limits)
    count = sum((width + 1) * rows for width, rows in pairwise(sizes))
    if 2 * count > size + 1:  # a digit and what separates it from the next
        raise ModelFileError(
            f"{lines.place}: such layers have {count} weights and biases: {size} bytes cannot hold them"
        )
    if lines.next(1, "flag")[0] != 0:
        raise ModelFileError(f"{lines.place}: the flag for symmetric inputs is set, which is read only where it is 0")

    n = sizes[0]
    minima, maxima = lines.next(n, "input minima"), lines.next(n, "input maxima")
    means, ranges = lines.next(n + 1, "means"), lines.next(n + 1, "ranges")
    if not all(np.isfinite(ranges) & (ranges != 0)):
        raise ModelFileError(f"{lines.place}: a range is 0 or not finite: inputs are divided by it")
    builder = Builder(given.limits)
    builder.activation(activations.clip(lower=minima, upper=maxima))
    builder.scale(1 / ranges[:n], center=means[:n])
    for i, (width, rows) in enumerate(pairwise(sizes)):
        weight, bias = np.empty((rows, width)), np.empty((rows, 1))
        for row in weight:
            row[:] = lines.next(width, f"weights of layer {i}")
        for row in bias:
            row[:] = lines.next(1, f"bias of layer {i}")
        builder.add(Dense(weight, bias[:, 0], "relu" if i < counts[0] - 1 else "identity"))
    builder.scale(float(ranges[n]), shift=float(means[n]))
    lines.end()
    return builder.network()


class _Lines:
    """The lines of numbers, one after the other. No more of the file is held than one line."""

    def __init__(self, file: IO[bytes], limits: Limits) -> None:
        self._file = file
        self._limit = limits.metadata
        self._number = 0

    @property
    def place(self) -> str:
        """Where the last line was."""
        return f"line {self._number}"

    def first(self) -> np.ndarray:
        """The first line after the comments."""
        line = self._line(self._limit)
        while line.startswith(b"//"):
            line = self._line(self._limit)
        return self._numbers(line, "counts")

    def next(self, count: int, what: str) -> np.ndarray:
        """So many numbers, which must be all of the next line."""
        numbers = self._numbers(self._line(_WIDEST * (count + 1)), what)
        if len(numbers) != count:
            raise ModelFileError(f"{self.place}: {len(numbers)} {what}: it must be {count}")
        return numbers

    def end(self) -> None:
        """Raises `ModelFileError` unless nothing but blanks follows."""
        while block := self._file.read(2**16):
            if block.strip():
                raise ModelFileError(f"{self.place} should be the last one: more follows")

    def _line(self, limit: int) -> bytes:
        self._number += 1
        line = self._file.readline(limit)
        if len(line) == limit and not line.endswith(b"\n"):
            raise ModelFileError(f"{self.place} is longer than {limit} bytes")
        return line.strip()

    def _numbers(self, line: bytes, what: str) -> np.ndarray:
        if not line:
            raise ModelFileError(f"{self.place} is blank or missing: it must hold {what}")
        try:
            if _NUMBERS.fullmatch(line):
                return np.array([float(number) for number in line.removesuffix(b",").split(b",")])
        except ValueError:
            pass
        raise ModelFileError(f"{self.place} must hold {what}: numbers with commas between them")


def _whole(numbers: np.ndarray) -> list[int]:
    """Numbers that count something."""
    found = numbers.tolist()
    if not all(number.is_integer() and 0 < number < 2**53 for number in found):
        raise ModelFileError(f"the counts or sizes {found[:5]} must be positive whole numbers")
    return [int(number) for number in found]
