"""One version of a file, from which a watch tells whether the file has changed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class FileVersion:
    """A file's name, size in bytes and modification time in ns."""

    name: str
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> FileVersion:
        """The current version of a file."""
        status = path.stat()
        return cls(path.name, status.st_size, status.st_mtime_ns)
