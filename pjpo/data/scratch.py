"""Bytes on disk instead of in memory, for as long as someone holds the object."""

import os
import tempfile
import weakref


class Scratch:
    """A file without a name in the folder for temporary files (TMPDIR): appended to, and read at any place."""

    def __init__(self):
        with tempfile.TemporaryFile(prefix="pjpo-") as file:
            self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)
        self.size = 0

    def append(self, data: bytes) -> int:
        """Where it begins.

        Raises:
            OSError: the disk is full, by the folder's name.
        """
        start, rest = self.size, memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except OSError as error:
                reason = f"{error.strerror}, for temporary data; make room, or set TMPDIR to another folder"
                raise OSError(error.errno, reason, tempfile.gettempdir()) from error
        self.size += len(data)
        return start

    def read(self, start: int, length: int) -> bytes:
        return os.pread(self._descriptor, length, start)
