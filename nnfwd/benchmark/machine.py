"""What machine this is, and which releases are installed: without it a measurement says nothing."""

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import threadpoolctl

from nnfwd import backend as _backend
from nnfwd.benchmark.peers import PEERS


def machine(threads: int) -> dict[str, Any]:
    """Processor, cores, threads, system, Python, releases, BLAS and date, as plain data."""
    names = ["nnfwd", "numpy", *(info.name for info in _backend.backends() if info.version is not None)]
    names += [peer.distribution for peer in PEERS] + ["scipy"]
    blas = [f"{pool['internal_api']} {pool['version']}" for pool in threadpoolctl.threadpool_info() if _is_blas(pool)]
    return {
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "threads": threads,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version for name in dict.fromkeys(names) if (version := _version(name)) is not None},
        "blas": ", ".join(dict.fromkeys(blas)) or "no BLAS known",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _is_blas(pool: dict[str, Any]) -> bool:
    return pool["user_api"] == "blas"


def _version(name: str) -> str | None:
    if name == "nnfwd":
        from nnfwd import __version__

        return __version__
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """Linux says it in a file; elsewhere Python knows something of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
