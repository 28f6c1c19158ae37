"""Possible contents of a disk after a power cut, from the log of system calls before it.

The model is a strict reading of POSIX, as in SQLite's test6.c and ALICE (OSDI 2014):

- A write since the file's last fsync, fdatasync or O_DSYNC write reaches the disk in any subset of its 512-byte
  sectors: lost, torn or reordered. A single sector is atomic.
- A truncation since then may be lost.
- Changes of names in a folder (files created, renamed, removed) reach the disk in order, up to any point since the
  folder's last fsync, independent of other folders and of the files' contents.
- A failed fsync leaves the pages clean (fsyncgate): their data never reach the disk, even if a later fsync succeeds.

What a folder holds before the first call is durable. A model that differs from the real files would prove nothing, so a
sync checks the size of its file, and `unseen` compares everything at the end.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tests.faults.preload import Call

SECTOR_BYTES = 512


@dataclass
class File:
    """Durable bytes, and pending writes as (offset, data); data of None is a truncation."""

    durable: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)

    def sync(self) -> None:
        for place, data in self.pending:
            _apply(self.durable, place, data)
        self.pending = []

    def lose_pending(self) -> None:
        """A failed sync: data are lost although pages count as written. The process still sees the file's size."""
        size = self.size()
        self.pending = [] if size == len(self.durable) else [(size, None)]

    def size(self) -> int:
        """The size that a process sees, bytes."""
        size = len(self.durable)
        for place, data in self.pending:
            size = place if data is None else max(size, place + len(data))
        return size

    def content(self) -> bytearray:
        """What a process reads."""
        content = bytearray(self.durable)
        for place, data in self.pending:
            _apply(content, place, data)
        return content

    def image(self, chance: random.Random) -> bytes:
        """A content that a power cut may leave."""
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
    """Current entries, durable entries, and the pending changes as (name, its new entry)."""

    entries: dict[str, File | Folder] = field(default_factory=dict)
    durable: dict[str, File | Folder] = field(default_factory=dict)
    pending: list[list[tuple[str, File | Folder | None]]] = field(default_factory=list)
    """Each list is one atomic change; a rename or an exchange has two parts."""

    def change(self, *changes: tuple[str, File | Folder | None]) -> None:
        _change(self.entries, changes)
        self.pending.append(list(changes))

    def sync(self) -> None:
        for changes in self.pending:
            _change(self.durable, changes)
        self.pending = []


class Disk:
    """Replays a log of calls below one folder, which exists at first."""

    def __init__(self, root: Path, before: Path | None = None) -> None:
        """Make a model of a folder.

        Args:
            root: its path in the log.
            before: a copy of what it held before the first call; None if it was empty.
        """
        self.root = Folder() if before is None else _loaded(before)
        self._prefix = PurePosixPath(root)

    def take(self, calls: Iterable[Call]) -> None:
        """Replay calls."""
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
            case "r" | "x":
                other = PurePosixPath(call.other)
                assert other.parent == path.parent, "renames across folders are not modeled"
                folder = self._folder(path.parent)
                left = folder.entries[other.name] if call.name == "x" else None
                folder.change((other.name, folder.entries[path.name]), (path.name, left))
            case "w" | "t":
                file = self._folder(path.parent).entries[path.name]
                assert isinstance(file, File)
                if call.synchronous:
                    _apply(file.durable, call.offset, call.data)
                else:
                    file.pending.append((call.offset, call.data if call.name == "w" else None))
            case "s":
                entry = self._find(path)
                if isinstance(entry, File):
                    seen = entry.size()
                    assert seen == call.offset, f"{path} has {call.offset} bytes, and {seen} of them were seen"
                if call.failed and isinstance(entry, File):
                    entry.lose_pending()
                elif not call.failed and entry is not None:
                    entry.sync()

    def tear(self, call: Call) -> None:
        """Replay a call that the power cut interrupts: a synchronous write is not durable yet, a sync has no effect."""
        if call.name in "wt" and call.synchronous:
            path = PurePosixPath(call.path)
            file = self._folder(path.parent).entries[path.name]
            assert isinstance(file, File)
            file.pending.append((call.offset, call.data))
        elif call.name != "s":
            self._take(call)

    def move(self, root: Path) -> None:
        """Continue with calls of a process that knows the folder by another path."""
        self._prefix = PurePosixPath(root)

    def write_current(self, target: Path) -> None:
        """Write what processes see to a new folder, such as what a killed one leaves."""
        target.mkdir()
        for path, content in _contents(self.root, PurePosixPath()):
            if path.endswith("/"):
                (target / path).mkdir()
            else:
                (target / path).write_bytes(content)

    def write_image(self, target: Path, chance: random.Random) -> None:
        """Write a state that a power cut may leave to an empty folder."""
        _write(self.root, target, chance)

    def not_durable(self) -> list[str]:
        """Names and contents that a power cut may undo, below the root."""
        return sorted(_not_durable(self.root, PurePosixPath()))

    def unseen(self, folder: Path) -> list[str]:
        """Paths whose content or existence differs between the model and the real folder."""
        model, real = dict(_contents(self.root, PurePosixPath())), dict(_contents(_loaded(folder), PurePosixPath()))
        return sorted(path for path in model.keys() | real.keys() if model.get(path) != real.get(path))

    def _folder(self, path: PurePosixPath) -> Folder:
        folder = self._find(path)
        assert isinstance(folder, Folder), path
        return folder

    def _find(self, path: PurePosixPath) -> File | Folder | None:
        """The entry of a path; None for paths above the root, whose names are durable, and for removed names."""
        if path != self._prefix and self._prefix not in path.parents:
            return None
        entry: File | Folder | None = self.root
        for name in path.relative_to(self._prefix).parts:
            entry = entry.entries.get(name) if isinstance(entry, Folder) else None
        return entry


def _loaded(path: Path) -> Folder:
    """All that is durable in a real folder, without reader tables."""
    folder = Folder()
    for entry in sorted(path.iterdir()):
        if "lock.mdb" in entry.name:
            continue
        folder.entries[entry.name] = _loaded(entry) if entry.is_dir() else File(bytearray(entry.read_bytes()))
    folder.durable = dict(folder.entries)
    return folder


def _contents(folder: Folder, above: PurePosixPath) -> Iterator[tuple[str, bytes]]:
    """Path and content of all files; folders have a slash at the end and no content."""
    for name, entry in folder.entries.items():
        if isinstance(entry, Folder):
            yield f"{above / name}/", b""
            yield from _contents(entry, above / name)
        else:
            yield str(above / name), bytes(entry.content())


def _not_durable(folder: Folder, above: PurePosixPath) -> Iterator[str]:
    for name in folder.entries.keys() | folder.durable.keys():
        entry = folder.entries.get(name)
        if folder.durable.get(name) is not entry:
            yield f"the name {above / name}" if entry is not None else f"the removal of {above / name}"
        if isinstance(entry, Folder):
            yield from _not_durable(entry, above / name)
        elif entry is not None and entry.pending:
            yield f"the content of {above / name}"


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
