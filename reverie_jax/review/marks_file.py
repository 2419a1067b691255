"""Marks while they are made: lines are appended to the marks file, also by several processes at once."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from reverie_jax.data.sources.marks import Mark, Marks, RowMarks, is_cut_off
from reverie_jax.errors import UserError

_TAIL = 1 << 12


class MarksFile:
    """A marks file that others may write at the same time.

    A mark is on the disk when `append` returns. What a process that was killed wrote in part is removed by the next one.

    Args:
        path: The file; created with its folder if it does not exist. None for no marks at all, as in an exported page.

    Raises:
        UserError: It cannot be read or written, or holds a line that is no mark.
    """

    def __init__(self, path: Path | None):
        self.path = path or Path(os.devnull)
        self._lock = threading.RLock()
        self._marks, self._offset, self._inode = Marks(self.path), 0, -1
        self._changed: set[str] = set()
        if path is not None:
            with self._locked():
                pass

    @property
    def rows(self) -> dict[str, RowMarks]:
        """The marks by row."""
        return self._marks.rows

    def get(self, digest: str) -> RowMarks:
        """Return the marks of a row."""
        return self.rows.get(digest) or RowMarks()

    def changed(self) -> set[str]:
        """Read what was added, by whomever; return the digests of the rows that changed since the last call.

        Raises:
            UserError: The file cannot be read, or a line is no mark.
        """
        with self._lock:
            self._read()
            changed, self._changed = self._changed - {""}, set()
            return changed

    def _read(self) -> None:
        with self._lock:
            try:
                with self.path.open("rb") as file:
                    stat = os.fstat(file.fileno())
                    if stat.st_ino != self._inode or stat.st_size < self._offset:  # an editor wrote it anew
                        self._changed |= self.rows.keys()
                        self._marks, self._offset, self._inode = Marks(self.path), 0, stat.st_ino
                    file.seek(self._offset)
                    lines = file.read().split(b"\n")[:-1]
            except OSError as error:
                raise UserError(f"{self.path}: cannot be read ({error.strerror})") from None
            try:
                for line in lines:
                    self._changed.add(self._marks.add_line(line))
                    self._offset += len(line) + 1
            except UserError:
                self._inode = -1  # from the beginning, once it is corrected
                raise

    def append(self, mark: Mark) -> None:
        """Add a line, unless it would change nothing; it is complete on the disk, or the file stays as it was.

        Raises:
            UserError: The file cannot be written.
        """
        with self._lock, self._locked() as descriptor:
            if not self.get(mark.row).changes(mark):
                return
            line = mark.model_dump_json(exclude_defaults=True).encode() + b"\n"
            size = os.fstat(descriptor).st_size
            try:
                if os.write(descriptor, line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(descriptor)
            except OSError as error:
                os.ftruncate(descriptor, size)
                raise UserError(f"{self.path}: cannot be written ({error.strerror})") from None
            self._read()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """Yield the file, locked and open for appending; all of it is read, and half a line at its end is gone."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            self._read()  # before anything is changed: is it a marks file at all?
            size, length, end = os.fstat(descriptor).st_size, 0, b""
            while length < size and b"\n" not in end:
                length = min(size, 2 * length + _TAIL)
                end = os.pread(descriptor, length, size - length)
            if (last := end.rpartition(b"\n")[2]) and is_cut_off(last):
                os.ftruncate(descriptor, size - len(last))  # nobody was told that it was kept
            elif last:
                Marks(self.path).add_line(last)
                os.write(descriptor, b"\n")
            self._read()
            yield descriptor
        finally:
            os.close(descriptor)  # which unlocks it
