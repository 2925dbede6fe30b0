"""One line on a terminal that says what is under way; nothing in a pipe."""

import shutil
import sys


class Progress:
    """A line on stderr, written over and over. `with` takes it away at the end."""

    def __init__(self) -> None:
        self.shown = sys.stderr.isatty()

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
