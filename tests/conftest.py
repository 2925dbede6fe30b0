"""Hypothesis profiles, the count of networks per place and dtype, and what could not be run here."""

import collections
import importlib.util
import os
import statistics
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from places import BACKENDS, REQUIRED, missing, places

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

Row = collections.namedtuple("Row", "regime elements unclaimed worst")


class Count:
    """The networks run so far at each place, in each dtype and precision."""

    rows: ClassVar[dict[tuple[str, str, str], list[Row]]] = collections.defaultdict(list)

    def __call__(self, place, case, precision, ratio, unclaimed):
        row = Row(case.regime, ratio.size, int(unclaimed.sum()), float(ratio.max(initial=0.0)))
        self.rows[str(place), case.dtype, precision].append(row)

    def networks(self, place, dtype, precision):
        """How many ran there so far."""
        return len(self.rows[str(place), dtype, precision])


def share(rows):
    rows = list(rows)
    return sum(row.unclaimed for row in rows) / max(sum(row.elements for row in rows), 1)


@pytest.fixture(scope="session")
def count():
    """Records one network run: `count(place, case, precision, ratio, unclaimed)`."""
    return Count()


_notes: list[str] = []


@pytest.fixture(scope="session")
def note():
    """Adds a line to what is printed at the end of the run."""
    return _notes.append


def pytest_sessionstart(session):
    absent = [f"{name}: {missing().get(name, 'not installed')}" for name in REQUIRED if not _usable(name)]
    if absent:
        pytest.exit(f"NNFWD_REQUIRE names what cannot be used: {'; '.join(absent)}", returncode=1)


def _usable(name):
    if name in BACKENDS:
        return name in {place.name for place in places()}
    return importlib.util.find_spec(name) is not None


def pytest_terminal_summary(terminalreporter):
    report = terminalreporter
    report.section("nnfwd")
    report.write_line("places: " + ", ".join(map(str, places())))
    for name, reason in missing().items():
        report.write_line(f"not run: {name}, {reason}")
    for line in _notes:
        report.write_line(line)
    if Count.rows:
        report.write_line(
            f"{'place':27}{'dtype':9}{'precision':10}{'networks':>9}{'elements':>9}{'unclaimed':>10}{'in huge':>8}{'worst':>7}{'median':>9}"
        )
        report.write_line(
            "(unclaimed: outside the huge regime; worst, median: of the networks' largest |error| / bound)"
        )
    for (place, dtype, precision), rows in sorted(Count.rows.items()):
        usual = share(row for row in rows if row.regime != "huge")
        huge = share(row for row in rows if row.regime == "huge")
        worst = [row.worst for row in rows]
        report.write_line(
            f"{place:27}{dtype:9}{precision:10}{len(rows):9}{sum(row.elements for row in rows):9}{usual:10.1%}{huge:8.0%}"
            f"{max(worst):7.2f}{statistics.median(worst):9.1e}"
        )
