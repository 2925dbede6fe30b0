"""The name an output gets when it is complete, and what is known of it until then.

While a run goes on there are, beside `OUTPUT`, two things: `OUTPUT.partial`, the rows so far, and `OUTPUT.journal`,
lines of JSON: first what the run is (network, input, backend, versions, height of a block), then how many rows are on
the disk. A process may be killed between any two steps:

    journal made and locked, partial made, rows written and then noted, the end noted, partial renamed, journal removed

so a journal without its partial is either that of nothing yet, or that of a complete output. Nothing is touched before
the journal is locked, and nothing is removed that a journal of ours does not vouch for.
"""

import contextlib
import errno
import json
import os
import secrets
from pathlib import Path
from typing import IO, Any

from nnfwd.errors import DataFileError
from nnfwd.io.files import synced
from nnfwd.streaming.sinks import removed, written

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be removed or renamed anyway
    fcntl = None  # type: ignore[assignment]

_MARK = b'{"nnfwd": "'  # how each begins


class Journal:
    """Makes `output` appear only when it is complete. `rows` and `state` are what an interrupted run has left.

    Raises:
        DataFileError: where something is in the way, or `resume` is asked of another kind of run than was begun.
    """

    def __init__(self, output: Path, facts: dict[str, Any], *, resume: bool, force: bool) -> None:
        self.output = output
        self.partial, self.path = names(output)[1:]
        self.rows = 0
        self.state: dict[str, int] = {}
        self.complete = False
        """The interrupted run had already made the output: there is nothing to do."""
        self._replaces = force
        self._old: str | None = None  # the name that a folder which is replaced has for a moment
        self._file = self._locked()
        with contextlib.ExitStack() as refused:
            refused.callback(self.close)
            refused.callback(self._remove_empty)
            lines = self._lines(force=force)
            self._go_on(lines, facts, resume=resume, force=force)
            if not (self.complete or self.rows):
                self._begin(facts, known=bool(lines))
            refused.pop_all()

    def _locked(self) -> IO[bytes]:
        """The file, made if there is none, and locked: of two runs that begin together, one."""
        while True:
            file = open(self.path, "a+b", buffering=0)  # noqa: SIM115
            try:
                if fcntl is not None:
                    fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    file.close()
                    raise DataFileError(f"{self.output} is being written by another run: wait for it") from None
                # some file systems have no locks
            if self.path.exists() and os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                return file
            file.close()  # the run that had it ended, and removed it, between our opening and our locking it

    def _remove_empty(self) -> None:
        """Takes away a journal that was made just now."""
        if not self._size():
            self._remove()

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _lines(self, *, force: bool) -> list[dict[str, Any]]:
        """The whole lines of it; a last one that was cut off is dropped. With `force`, none where it is damaged."""
        self._file.seek(0)
        text = self._file.read()
        if text and not (text.startswith(_MARK) or _MARK.startswith(text)):
            raise DataFileError(f"{self.path} is in the way, and no journal of ours: move it")
        whole = text[: text.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            damaged = not all(isinstance(line, dict) for line in lines)
        except ValueError:
            damaged = True
        if damaged and not force:
            raise DataFileError(f"{self.path} is damaged: begin anew with force (--force)")
        if damaged:
            return [{}]
        self._file.truncate(len(whole))
        return lines

    def _go_on(self, lines: list[dict[str, Any]], facts: dict[str, Any], *, resume: bool, force: bool) -> None:
        """Takes over what an earlier run has left, or refuses to; does nothing where that is worth nothing."""
        begun, last = (lines[0], lines[-1]) if lines else ({}, {})
        rows, there = last.get("rows", 0), self.partial.exists()
        named = self.output.exists() and (not there or self.output.samefile(self.partial))
        renamed = bool(last.get("complete")) and named
        if not resume and (force or renamed or not (rows and there)):
            return
        if not resume:
            raise DataFileError(
                f"{self.partial} keeps {rows:,} rows of a run that was interrupted: "
                "go on with resume (--resume), or begin anew with force (--force)"
            )
        if not (renamed or (rows and there)):
            return
        self._replaces = force or bool(begun.pop("replaces", False))
        differing = next((name for name in {**begun, **facts} if begun.get(name) != facts.get(name)), None)
        if differing is not None:
            raise DataFileError(
                f"{self.partial} was begun with {differing} {begun.get(differing)} and this run has "
                f"{facts.get(differing)}: repeat the run as it was, or begin anew with force (--force)"
            )
        self._old = last.get("old")
        if renamed:
            self.complete = True
            self._end()
            return
        self._check_free()
        self.rows, self.state = rows, last.get("state", {})

    def _check_free(self) -> None:
        if self.output.exists() and not self._replaces:
            raise DataFileError(f"{self.output} exists: choose another name, or replace it with force (--force)")

    def _begin(self, facts: dict[str, Any], *, known: bool) -> None:
        """Writes what the run is. What is there of a partial output must belong to an earlier one, that is `known`."""
        if self.partial.exists() and not known:
            raise DataFileError(f"{self.partial} is in the way, and there is no journal of it: move it")
        self._check_free()
        removed(self.partial)
        self._file.truncate(0)
        self._add(facts | {"replaces": self._replaces})
        synced(self.path.parent)

    def _add(self, line: dict[str, Any]) -> None:
        """Appends a line, whole or not at all."""
        before = self._size()
        try:
            written(self._file, json.dumps(line).encode() + b"\n")
        except OSError:
            self._file.truncate(before)
            raise
        os.fsync(self._file.fileno())

    def note(self, rows: int, state: dict[str, int], /) -> None:
        """So many rows are on the disk."""
        self._add({"rows": rows, "state": state})
        self.rows, self.state = rows, state

    def finish(self) -> None:
        """The partial output is complete, and on the disk: gives it its name."""
        self._old = self._old or f".{self.output.name}.{secrets.token_hex(4)}"
        self._add({"rows": self.rows, "state": self.state, "complete": True, "old": self._old})
        self._rename()
        self._end()

    def _rename(self) -> None:
        if self._replaces:
            if self.output.is_dir():  # a folder cannot be replaced in one step
                os.rename(self.output, self.output.with_name(str(self._old)))
            os.replace(self.partial, self.output)
            return
        try:
            if self.partial.is_dir():
                self._check_free()
                os.rename(self.partial, self.output)
                return
            try:
                os.link(self.partial, self.output)  # which replaces nothing
            except FileExistsError:
                raise
            except OSError:  # some file systems have no links
                self._check_free()
                os.rename(self.partial, self.output)
        except (FileExistsError, DataFileError):
            raise DataFileError(
                f"{self.output} has appeared meanwhile: move it, then give the complete {self.partial} its name "
                "with resume (--resume)"
            ) from None

    def _end(self) -> None:
        """The output has its name: takes away what else there is."""
        synced(self.output.parent)
        removed(self.partial)
        if self._old is not None:
            removed(self.output.with_name(self._old))
        self._remove()

    def discard(self) -> None:
        """Takes away what there is so far."""
        removed(self.partial)
        self._remove()

    def _remove(self) -> None:
        if os.name == "nt":  # an open file cannot be removed there
            self.close()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Lets go of the file, and with it of the lock."""
        self._file.close()


def names(output: Path, /) -> tuple[Path, Path, Path]:
    """An output's own name, and those of what is there until it is complete."""
    return output, output.with_name(output.name + ".partial"), output.with_name(output.name + ".journal")
