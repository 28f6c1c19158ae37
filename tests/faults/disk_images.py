"""What a disk may hold after a power cut, from the log of system calls up to it.

The model is a strict reading of POSIX, in the manner of SQLite's test6.c and ALICE (OSDI 2014):

- a write since the file's last fsync, fdatasync or O_DSYNC write reaches the disk in any subset of its sectors of 512
  bytes: lost, torn and reordered; a sector itself is whole or not at all;
- a truncation since then may be lost;
- names (files created, renamed, removed) of one folder reach the disk in their order, up to any point since the
  folder's last fsync, whatever became of other folders and of the files' content;
- a failed fsync leaves the pages clean (fsyncgate): what it should have written never reaches the disk, whatever
  later ones say.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tests.faults.preload import Call

SECTOR_BYTES = 512


@dataclass
class File:
    """Durable bytes, and (offset, data) of the writes beyond; data of None is a truncation."""

    durable: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)

    def sync(self) -> None:
        for place, data in self.pending:
            _apply(self.durable, place, data)
        self.pending = []

    def image(self, chance: random.Random) -> bytes:
        """One of the contents that a power cut may leave."""
        content = bytearray(self.durable)
        share = chance.choice([0.0, 0.1, 0.5, 0.9, 1.0])
        for place, data in self.pending:
            if data is None:
                if chance.random() < share:
                    _apply(content, place, None)
                continue
            for piece_begin, piece in _sectors(place, data):
                if chance.random() < share:
                    _apply(content, piece_begin, piece)
        return bytes(content)


@dataclass
class Folder:
    """Entries now, durable ones, and the changes between: (name, what it names from then on)."""

    entries: dict[str, File | Folder] = field(default_factory=dict)
    durable: dict[str, File | Folder] = field(default_factory=dict)
    pending: list[list[tuple[str, File | Folder | None]]] = field(default_factory=list)
    """Changes that happen at once (a rename is two) lie in one list."""

    def change(self, *changes: tuple[str, File | Folder | None]) -> None:
        _change(self.entries, changes)
        self.pending.append(list(changes))

    def sync(self) -> None:
        for changes in self.pending:
            _change(self.durable, changes)
        self.pending = []


class Disk:
    """Follows a log below one folder, which is there and durable at first."""

    def __init__(self, root: Path) -> None:
        self.root = Folder()
        self._prefix = PurePosixPath(root)

    def take(self, calls: Iterable[Call]) -> None:
        """Follow some calls."""
        for call in calls:
            self._take(call)

    def _take(self, call: Call) -> None:
        path = PurePosixPath(call.path)
        match call.name:
            case "c":
                self._folder(path.parent).change((path.name, File()))
            case "m":
                self._folder(path.parent).change((path.name, Folder()))
            case "u":
                self._folder(path.parent).change((path.name, None))
            case "r":
                other = PurePosixPath(call.other)
                assert other.parent == path.parent, "renames across folders are not modelled"
                folder = self._folder(path.parent)
                folder.change((other.name, folder.entries[path.name]), (path.name, None))
            case "w" | "t":
                file = self._folder(path.parent).entries[path.name]
                assert isinstance(file, File)
                if call.synchronous:
                    _apply(file.durable, call.offset, call.data)
                else:
                    file.pending.append((call.offset, call.data if call.name == "w" else None))
            case "s":
                found = self._find(path)
                if call.failed and isinstance(found, File):
                    found.pending = []
                elif not call.failed and found is not None:
                    found.sync()

    def tear(self, call: Call) -> None:
        """Take a call that the power cut interrupts: a synchronous write is not durable yet, a sync is not done."""
        if call.name in "wt" and call.synchronous:
            path = PurePosixPath(call.path)
            file = self._folder(path.parent).entries[path.name]
            assert isinstance(file, File)
            file.pending.append((call.offset, call.data))
        elif call.name != "s":
            self._take(call)

    def write_image(self, target: Path, chance: random.Random) -> None:
        """Write one of the states that a power cut may leave into an empty folder."""
        _write(self.root, target, chance)

    def _folder(self, path: PurePosixPath) -> Folder:
        found = self._find(path)
        assert isinstance(found, Folder), path
        return found

    def _find(self, path: PurePosixPath) -> File | Folder | None:
        """None for what lies above the root (its name is durable) or has no name any more."""
        if path != self._prefix and self._prefix not in path.parents:
            return None
        found: File | Folder | None = self.root
        for name in path.relative_to(self._prefix).parts:
            found = found.entries.get(name) if isinstance(found, Folder) else None
        return found


def _write(folder: Folder, target: Path, chance: random.Random) -> None:
    entries = dict(folder.durable)
    for changes in folder.pending[: chance.randint(0, len(folder.pending))]:
        _change(entries, changes)
    for name, entry in entries.items():
        if isinstance(entry, Folder):
            (target / name).mkdir()
            _write(entry, target / name, chance)
        else:
            (target / name).write_bytes(entry.image(chance))


def _change(entries: dict[str, File | Folder], changes: Iterable[tuple[str, File | Folder | None]]) -> None:
    for name, entry in changes:
        if entry is None:
            entries.pop(name, None)
        else:
            entries[name] = entry


def _apply(content: bytearray, place: int, data: bytes | None) -> None:
    if data is None:
        del content[place:]
        content.extend(bytes(place - len(content)))
        return
    if len(content) < place:
        content.extend(bytes(place - len(content)))
    content[place : place + len(data)] = data


def _sectors(place: int, data: bytes) -> Iterable[tuple[int, bytes]]:
    begin = 0
    while begin < len(data):
        end = min(begin + SECTOR_BYTES - (place + begin) % SECTOR_BYTES, len(data))
        yield place + begin, data[begin:end]
        begin = end
