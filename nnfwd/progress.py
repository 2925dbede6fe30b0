"""One line on a terminal that says what is under way; nothing in a pipe."""

import shutil
import sys
import time


class Progress:
    """A line on stderr, written over and over. `with` takes it away at the end."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.shown = sys.stderr.isatty() and not quiet

    def __call__(self, text: str) -> None:
        """Replaces the line; an empty text takes it away."""
        if self.shown:
            width = shutil.get_terminal_size((80, 24)).columns - 1  # a line that wraps cannot be written over
            sys.stderr.write(f"\r{text[:width]}\x1b[K")
            sys.stderr.flush()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self("")


_WIDTH = 10  # characters of a bar


class Bar:
    """Rows done of all, their rate and the time that is left, on such a line, ten times a second at most."""

    def __init__(self, line: Progress, name: str) -> None:
        self._line, self._name = line, name
        self._start: tuple[float, int] | None = None
        self._next = 0.0

    def __call__(self, done: int, total: int) -> None:
        """Shows them."""
        now = time.monotonic()
        self._start = self._start or (now, done)
        if now < self._next:
            return
        self._next = now + 0.1
        since, first = self._start
        share = done / max(total, 1)
        text = f"{share:4.0%} {'#' * int(share * _WIDTH):-<{_WIDTH}}  {_count(done)} of {_count(total)} rows"
        if now > since and done > first:
            rate = (done - first) / (now - since)
            text += f"  {_count(rate)} rows/s  {_time((total - done) / rate)} left"
        self._line(f"{text}  {self._name}")  # the name last: a narrow terminal cuts it off


def _count(n: float) -> str:
    """1.2 k, 34 M."""
    for unit in ("", " k", " M", " G"):
        if n < 999.5:
            return f"{n:.3g}{unit}"
        n /= 1000
    return f"{n:.3g} T"


def _time(seconds: float) -> str:
    """0:07, 12:34, 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
