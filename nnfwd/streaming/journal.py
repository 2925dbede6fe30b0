"""The name an output gets when it is complete, and what is known of it until then.

While a run goes on there are, beside `OUTPUT`, two things: `OUTPUT.partial`, the rows so far, and `OUTPUT.journal`,
lines of JSON: first what the run is (network, input, backend, versions, height of a block), then how many rows are on
the disk.
A process may be killed between any two steps:

    journal made, partial made, rows written and then noted, the end noted, partial renamed to OUTPUT, journal removed

so a journal without its partial is either that of nothing yet, or that of a complete output.
"""

import json
import os
import secrets
from pathlib import Path
from typing import IO, Any

from nnfwd.errors import DataFileError
from nnfwd.io.files import synced
from nnfwd.streaming.sinks import removed

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be removed or renamed anyway
    fcntl = None  # type: ignore[assignment]


class Journal:
    """Makes `output` appear only when it is complete. `rows` and `state` are what an interrupted run has left.

    Raises:
        DataFileError: where something is in the way, or `resume` is asked of another kind of run than was begun.
    """

    def __init__(self, output: Path, facts: dict[str, Any], *, resume: bool, force: bool) -> None:
        self.output = output
        self.partial = output.with_name(output.name + ".partial")
        self.path = output.with_name(output.name + ".journal")
        self.rows = 0
        self.state: dict[str, int] = {}
        self.complete = False
        """The interrupted run had already made the output: there is nothing to do."""
        self._file: IO[bytes] | None = None
        try:
            if self.path.exists():
                self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115
                self._lock()
                self._go_on(facts, resume=resume, force=force)
            elif self.partial.exists() and not force:
                raise DataFileError(f"{self.partial} is in the way: move it, or replace it with force (--force)")
            if not (self.complete or self.rows):
                self._begin(facts, force=force)
        except BaseException:
            self.close()
            raise

    def _go_on(self, facts: dict[str, Any], *, resume: bool, force: bool) -> None:
        """Takes over what an earlier run has left, or refuses to; does nothing where that is worth nothing."""
        lines = self._lines() or [{}]
        begun, last = lines[0], lines[-1]
        rows, there = last.get("rows", 0), self.partial.exists()
        renamed = last.get("complete") and not there and self.output.exists()
        if not resume and (force or renamed or not (rows and there)):
            return
        if not resume:
            raise DataFileError(
                f"{self.partial} keeps {rows:,} rows of a run that was interrupted: "
                "go on with resume (--resume), or begin anew with force (--force)"
            )
        names = {**begun, **facts} if renamed or (rows and there) else {}
        differing = next((name for name in names if begun.get(name) != facts.get(name)), None)
        if differing is not None:
            raise DataFileError(
                f"{self.partial} was begun with {differing} {begun.get(differing)} and this run has "
                f"{facts.get(differing)}: repeat the run as it was, or begin anew with force (--force)"
            )
        if renamed:
            self.complete = True
            self._remove()
        elif there:
            self.rows, self.state = rows, last.get("state", {})

    def _begin(self, facts: dict[str, Any], *, force: bool) -> None:
        if self.output.exists() and not force:
            raise DataFileError(f"{self.output} exists: choose another name, or replace it with force (--force)")
        removed(self.partial)
        if self._file is None:
            self._file = open(self.path, "x+b", buffering=0)  # noqa: SIM115
            self._lock()
        self._file.truncate(0)
        self._file.seek(0)
        self._add(facts)
        synced(self.path.absolute().parent)

    def _lock(self) -> None:
        """Refuses to write what another process is writing."""
        if fcntl is not None and self._file is not None:
            try:
                fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise DataFileError(f"{self.output} is being written by another run: wait for it") from None

    def _lines(self) -> list[dict[str, Any]]:
        """The whole lines; a last one that was cut off is dropped."""
        assert self._file is not None
        text = self._file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._file.truncate(len(whole))
        self._file.seek(len(whole))
        try:
            return [json.loads(line) for line in whole.splitlines()]
        except ValueError:
            raise DataFileError(f"{self.path} is damaged: begin anew with force (--force)") from None

    def _add(self, line: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(line).encode() + b"\n")
        os.fsync(self._file.fileno())

    def note(self, rows: int, state: dict[str, int], /) -> None:
        """So many rows are on the disk."""
        self._add({"rows": rows, "state": state})
        self.rows, self.state = rows, state

    def finish(self) -> None:
        """The partial output is complete, and on the disk: gives it its name."""
        self._add({"rows": self.rows, "state": self.state, "complete": True})
        self._rename()
        self._remove()

    def _rename(self) -> None:
        if self.output.is_dir():  # a folder cannot be replaced in one step
            old = self.output.with_name(f".{self.output.name}.{secrets.token_hex(4)}")
            os.rename(self.output, old)
            os.rename(self.partial, self.output)
            removed(old)
        else:
            os.replace(self.partial, self.output)
        synced(self.output.absolute().parent)

    def discard(self) -> None:
        """Takes away what there is so far."""
        removed(self.partial)
        self._remove()

    def _remove(self) -> None:
        if os.name == "nt":  # an open file cannot be removed there
            self.close()
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Lets go of the file, and with it of the lock."""
        if self._file is not None:
            self._file.close()
            self._file = None
