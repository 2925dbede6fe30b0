"""Hypothesis profiles, the count of networks per place and dtype, and what could not be run here."""

import collections
import os
import statistics

import pytest
from hypothesis import HealthCheck, settings
from places import REQUIRED, missing, places

EXAMPLES = int(os.environ.get("NNFWD_EXAMPLES", "300"))
settings.register_profile(
    "nnfwd",
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="NNFWD_RANDOM" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    database=None,
)
settings.load_profile("nnfwd")

Row = collections.namedtuple("Row", "elements unclaimed worst")
_rows: dict[tuple[str, str], list[Row]] = collections.defaultdict(list)


@pytest.fixture(scope="session")
def count():
    """Records one network run at a place in a dtype: `count(place, dtype, ratio, unclaimed)`."""

    def record(place, dtype, ratio, unclaimed):
        _rows[str(place), dtype].append(Row(ratio.size, int(unclaimed.sum()), float(ratio.max(initial=0.0))))

    return record


_notes: list[str] = []


@pytest.fixture(scope="session")
def note():
    """Adds a line to what is printed at the end of the run."""
    return _notes.append


def pytest_sessionstart(session):
    absent = [f"{name}: {missing().get(name, 'no such backend')}" for name in REQUIRED if name not in _usable()]
    if absent:
        pytest.exit(f"NNFWD_REQUIRE names what cannot be used: {'; '.join(absent)}", returncode=1)


def _usable():
    return {place.name for place in places()}


def pytest_terminal_summary(terminalreporter):
    report = terminalreporter
    report.section("nnfwd")
    report.write_line("places: " + ", ".join(map(str, places())))
    for name, reason in missing().items():
        report.write_line(f"not run: {name}, {reason}")
    for line in _notes:
        report.write_line(line)
    if _rows:
        report.write_line(
            f"{'place':32}{'dtype':10}{'networks':>9}{'elements':>10}{'unclaimed':>10}{'worst':>8}{'median':>9}"
        )
        report.write_line("(worst and median: a network's largest |error| / bound; inside is <= 1)")
    for (place, dtype), rows in sorted(_rows.items()):
        elements = sum(row.elements for row in rows)
        worst = [row.worst for row in rows]
        report.write_line(
            f"{place:32}{dtype:10}{len(rows):9}{elements:10}{sum(row.unclaimed for row in rows) / max(elements, 1):10.1%}"
            f"{max(worst):8.2f}{statistics.median(worst):9.1e}"
        )
