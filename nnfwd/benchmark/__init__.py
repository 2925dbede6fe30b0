"""`nnfwd bench`: how fast this machine runs a network, on every backend, beside what others would run it with."""

from nnfwd.benchmark.against import LIMIT, Change, Earlier
from nnfwd.benchmark.cases import PUBLISHED, Case, own, published
from nnfwd.benchmark.machine import machine
from nnfwd.benchmark.measure import ROUNDS, benchmarked
from nnfwd.benchmark.report import HEADER, Report, Result, Timing, described_machine

__all__ = [
    "HEADER",
    "LIMIT",
    "PUBLISHED",
    "ROUNDS",
    "Case",
    "Change",
    "Earlier",
    "Report",
    "Result",
    "Timing",
    "benchmarked",
    "described_machine",
    "machine",
    "own",
    "published",
]
