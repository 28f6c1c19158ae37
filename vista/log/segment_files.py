"""The files of a segment as its manifest lists them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import xxhash
from numpy.typing import DTypeLike, NDArray

from vista.arrays import Content, Int, array_in, map_file
from vista.errors import LogFormatError, shown
from vista.files import (
    NUMBER,
    TABLE,
    FieldRule,
    check_fields,
    either,
    hexadecimal,
    list_of,
    one_of,
    read_limited,
    text,
    whole,
)
from vista.log.histories import PackedTable
from vista.log.vocabulary import Vocabulary
from vista.progress_bar import progress_bar

FORMAT = "vista-event-log"
VERSION = 8
MANIFEST_FILE = "manifest.json"
QUARANTINE_FILE = "quarantine.csv"
DEAD_LETTERS_FILE = "dead_letters.jsonl"
SET_ASIDE_FILES = (QUARANTINE_FILE, DEAD_LETTERS_FILE)
"""Files of invalid rows, and of invalid messages of topics."""
LOG_FIELDS = (
    *("num_users", "num_items", "id_types", "actions", "tasks", "again_days", "as_events", "has_time", "timestamp"),
    *("has_rating", "read_with"),
)
"""Entries that describe the log up to the segment; segments without new sources copy them."""
REMEDY = "prepare the log again from its sources"
_MAX_BYTES = 64 << 20
"""A larger manifest is not read."""
_MAX_ACTIONS = 256
"""Codes of actions are uint8."""
MAX_FEATURES = 1_000
"""Columns of features of one kind: each is up to four files."""
_ARRAY_NAME = re.compile(
    r"((impressions|deletions)/)?[a-z_]+(\.(ids|offsets|blank))?\.npy"
    r"|(user_)?features/(items|users|[0-9]{1,3}\.(codes|offsets|numbers|vectors|values\.ids|values\.offsets))\.npy"
    r"|(event|request)_features/[0-9]{1,3}\.(codes|numbers|values\.ids|values\.offsets)\.npy"
)


def _fields(rules: Mapping[str, FieldRule]) -> FieldRule:
    def holds(value: Any) -> bool:
        try:
            check_fields(value, rules)
        except ValueError:
            return False
        return True

    return FieldRule(f"a mapping with the fields {', '.join(rules)}", holds)


def _features(*kinds: str) -> FieldRule:
    return list_of(_fields({"name": text(), "kind": one_of(*kinds)}), most=MAX_FEATURES)


_SEGMENT, _FLAG, _ID_KIND = whole(1, 999_999), one_of(True, False), one_of("int", "str")
_COUNTS = _fields({"rows": whole(), "users": whole()})
_SOURCE = {
    "table": one_of("events", "impressions", "items", "users"),
    "name": text(),
    "bytes": whole(),
    "sha256": hexadecimal(64),
    "rows": whole(),
    "bad_rows": whole(),
}
_OFFSET = {"cluster": text(), "topic": text(), "partition": whole(), "next": whole()}
_RULES = {
    "format": one_of(FORMAT),
    "version": one_of(VERSION),
    "checksum": hexadecimal(16),
    "first_segment": _SEGMENT,
    "last_segment": _SEGMENT,
    "num_users": whole(),
    "num_items": whole(),
    "id_types": _fields({"users": _ID_KIND, "items": _ID_KIND}),
    "actions": list_of(text(), most=_MAX_ACTIONS),
    "tasks": list_of(text()),
    "again_days": either(one_of(None), NUMBER),
    "as_events": either(one_of(None), text()),
    "has_time": _FLAG,
    "timestamp": text(),
    "has_rating": _FLAG,
    "read_with": TABLE,
    "counts": _fields({"events": _COUNTS, "impressions": _COUNTS}),
    "features": _features("category", "number", "vector"),
    "user_features": _features("category", "number"),
    "event_features": _features("category", "number"),
    "request_features": _features("category", "number"),
    "deletions": whole(),
    "quarantined": whole(),
    "sources": list_of(_fields(_SOURCE)),
    "offsets": list_of(_fields(_OFFSET)),
    "files": TABLE,
}
_FILE = {"bytes": whole(), "xxh3": hexadecimal(16)}
_ARRAY_FILE = {**_FILE, "dtype": text(8), "shape": list_of(whole(), 1, 2)}


def manifest_bytes(fields: Mapping[str, Any]) -> bytes:
    """The content of manifest.json: these fields, the format, its version, and a checksum of them all."""
    content = {"format": FORMAT, "version": VERSION, **fields}
    checksum = xxhash.xxh3_64_hexdigest(_serialized(content))
    return _serialized(content | {"checksum": checksum})


def read_segment_manifest(folder: Path) -> dict[str, Any]:
    """Read and check the manifest of a segment. Raises LogFormatError if it is missing, damaged, or of another format;
    the message names the file and the remedy."""
    file = folder / MANIFEST_FILE
    try:
        content = read_limited(file, _MAX_BYTES)
        manifest = json.loads(content)
    except FileNotFoundError:
        raise LogFormatError(f"{file}: missing; {REMEDY}") from None
    except (ValueError, OSError, RecursionError, MemoryError) as error:  # JSON that is nested too deeply, or too large
        reason = str(error) or "it needs too much memory"
        raise LogFormatError(f"{file}: cannot be read ({reason}); restore it from a copy, or {REMEDY}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise LogFormatError(f"{file}: not the manifest of an EventLog segment; check the path")
    if manifest.get("version") != VERSION:
        raise LogFormatError(
            f"{file}: format version {shown(manifest.get('version'))}, but this version of vista reads {VERSION}; "
            f"install a matching vista, or {REMEDY}"
        )
    try:
        check_manifest(manifest, content)
    except ValueError as error:
        raise LogFormatError(f"{file}: is damaged ({error}); restore it from a copy, or {REMEDY}") from error
    return manifest


def check_manifest(manifest: Mapping[str, Any], content: bytes) -> None:
    """Check all fields of a manifest, and its checksum.

    Args:
        content: the file that holds it.

    Raises:
        ValueError: naming the field.
    """
    if len(content) > _MAX_BYTES:
        raise ValueError(f"it holds {len(content)} bytes, but at most {_MAX_BYTES} are read")
    check_fields(manifest, _RULES)
    for name, entry in manifest["files"].items():
        _check_file(name, entry)
    if content != manifest_bytes({name: value for name, value in manifest.items() if name != "checksum"}):
        raise ValueError("its checksum does not match")


def _check_file(name: str, entry: object) -> None:
    if name not in SET_ASIDE_FILES and not _ARRAY_NAME.fullmatch(name):
        raise ValueError(f"files: {shown(name)} is not a file of a segment")
    try:
        check_fields(entry, _FILE if name in SET_ASIDE_FILES else _ARRAY_FILE)
    except ValueError as error:
        raise ValueError(f"files: {name}: {error}") from None


def _serialized(fields: Mapping[str, Any]) -> bytes:
    return (json.dumps(fields, indent=1, sort_keys=True) + "\n").encode()


@dataclass(frozen=True, slots=True)
class FeatureOwner:
    """What features belong to: items, users, events, or impressions."""

    name: str
    """item | user | event | impression. Of items and users, also the canonical column of ids."""
    field: str
    """Of the columns in a segment's manifest."""
    prefix: str | None = None
    """Folder of the packed table whose rows have the features; None for items and users."""

    @property
    def table(self) -> str:
        """Name of the table: in the configuration, and among the sources in a manifest."""
        return f"{self.name}s"

    @property
    def title(self) -> str:
        """What has the columns, in messages."""
        return f"{self.name} features" if self.prefix is None else self.table

    @property
    def folder(self) -> str:
        """Of the files in a segment."""
        return f"{self.field}/"

    @property
    def rows_file(self) -> str:
        """The file of the rows of items or users with features, in a segment."""
        return f"{self.folder}{self.table}.npy"


ITEMS: Final = FeatureOwner("item", "features")
USERS: Final = FeatureOwner("user", "user_features")
EVENTS: Final = FeatureOwner("event", "event_features", "")
IMPRESSIONS: Final = FeatureOwner("impression", "request_features", "impressions/")
OWNERS: Final = {owner.table: owner for owner in (ITEMS, USERS)}
"""Items and users, by table."""
EVENT_COLUMNS = {"item": np.int32, "timestamp": np.int64, "action": np.uint8, "rating": np.float32}
IMPRESSION_COLUMNS = {
    "item": np.int32,
    "timestamp": np.int64,
    "label": np.uint8,
    "mask": np.uint8,
    "probability": np.float32,
}
FORGOTTEN_COLUMNS = {"item": np.int32, "timestamp": np.int64, "action": np.uint8}
_PER_TASK = ("label", "mask", "probability")
"""Columns with one value per row and task."""
_OPTIONAL = ("rating", "probability")
_LARGE = {
    *SET_ASIDE_FILES,
    *(f"{name}.npy" for name in EVENT_COLUMNS),
    *(f"impressions/{name}.npy" for name in IMPRESSION_COLUMNS),
}
"""Files with an entry per event, impression, or invalid row. Those of features are large too, except for the values
of categories, from which an appended segment continues."""


@dataclass(frozen=True, slots=True)
class SegmentFile:
    """A file of a segment, mapped into memory, with the manifest's entry for it."""

    path: Path
    entry: Mapping[str, Any]
    content: Content

    @classmethod
    def open(cls, path: Path, entry: Mapping[str, Any]) -> SegmentFile:
        """Map a file. Raises LogFormatError if it is missing, is not a regular file, or does not have the size in the
        manifest."""
        return cls(path, entry, map_file(path, REMEDY, entry["bytes"]))

    def array(self, dtype: DTypeLike, num_dims: int) -> NDArray[Any]:
        """The array of a `.npy` file, as a read-only view. Raises LogFormatError if it has another type or shape than
        expected, or than the manifest says."""
        array = array_in(self.content, self.path, REMEDY)
        if array.dtype != dtype or array.ndim != num_dims:
            raise LogFormatError(
                f"{self.path}: has type {array.dtype} and {array.ndim} dimensions instead of {np.dtype(dtype)} and "
                f"{num_dims}; {REMEDY}"
            )
        if (array.dtype.str, list(array.shape)) != (self.entry["dtype"], self.entry["shape"]):
            raise LogFormatError(f"{self.path}: has another type or shape than the manifest says; {REMEDY}")
        return array

    def verify(self) -> int:
        """Compare the content with the manifest; returns the number of bytes that were read. Raises LogFormatError if a
        byte has changed."""
        digest = xxhash.xxh3_64_hexdigest(self.content)
        if digest != self.entry["xxh3"]:
            raise LogFormatError(
                f"{self.path}: its content has changed since it was written (XXH3-64 {digest}, the manifest says "
                f"{self.entry['xxh3']}); restore the file from a copy, or {REMEDY}"
            )
        return len(self.content)


class SegmentFiles:
    """All files of a segment that its manifest lists, by their path in the segment's folder.

    They are opened together, so a reader that has them keeps reading them after a compaction removed the segment.

    Raises:
        LogFormatError: as `SegmentFile.open`.
    """

    def __init__(self, folder: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
        self._folder = folder
        self._files = {name: SegmentFile.open(folder / name, entry) for name, entry in entries.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def array(self, name: str, dtype: DTypeLike, num_dims: int = 1) -> NDArray[Any]:
        """An array, as a read-only view. Raises LogFormatError if the manifest does not list it, or as
        `SegmentFile.array`."""
        if name not in self._files:
            raise LogFormatError(f"{self._folder / MANIFEST_FILE}: does not list {name}; {REMEDY}")
        return self._files[name].array(dtype, num_dims)

    def type_of(self, name: str, allowed: Sequence[type[np.generic]]) -> DTypeLike:
        """The one of these types that an array has by the manifest; the first if it has none of them."""
        entry = self._files[name].entry if name in self._files else {}
        return next((dtype for dtype in allowed if np.dtype(dtype).str == entry.get("dtype")), allowed[0])

    def table(self, prefix: str, columns: Mapping[str, DTypeLike]) -> PackedTable:
        """A table, with these columns. Ratings and probabilities may be missing. Raises LogFormatError as `array` does,
        or if the arrays do not match."""
        users, offsets = (self.array(f"{prefix}{name}.npy", np.int64) for name in ("users", "offsets"))
        values = {
            name: self.array(f"{prefix}{name}.npy", dtype, 2 if name in _PER_TASK else 1)
            for name, dtype in columns.items()
            if name not in _OPTIONAL or f"{prefix}{name}.npy" in self._files
        }
        end = int(offsets[-1]) if len(offsets) else -1
        lengths = {len(array) for array in values.values()}
        if len(offsets) != len(users) + 1 or lengths != {end}:
            raise LogFormatError(
                f"{self._folder / prefix}: {len(users)} users, {len(offsets)} offsets that end at {end}, and columns "
                f"of {sorted(lengths)} rows do not match; {REMEDY}"
            )
        return PackedTable(users, offsets, values)

    def rows(self, name: str) -> Int | None:
        """An int64 array; None if the segment has none of this name."""
        return self.array(name, np.int64) if name in self._files else None

    def vocabulary(self, name: str, kind: str) -> Vocabulary:
        """The vocabulary `name`, with ids of the given kind ("int" or "str"). Raises LogFormatError as `array`
        does, or if the arrays do not match."""
        ids = self.array(f"{name}.ids.npy", np.int64 if kind == "int" else np.uint8)
        offsets = None if kind == "int" else self.array(f"{name}.offsets.npy", np.int64)
        return Vocabulary.of_arrays(ids, offsets, self.rows(f"{name}.blank.npy"), self._folder / name, REMEDY)

    def verify(self, *, large: bool = True) -> int:
        """Compare the content of every file with the manifest.

        Args:
            large: also read the files with an entry per event, impression, quarantined row, item, or user. Without
                them, the ids, the offsets, and the deletions are checked.

        Returns:
            The number of bytes that were read.

        Raises:
            LogFormatError: naming the first file with a byte that has changed.
        """
        files = [file for name, file in self._files.items() if large or not _is_large(name)]
        total = sum(len(file.content) for file in files)
        with progress_bar(total=total, desc="verify log", unit="B", unit_scale=True, leave=False) as bar:
            for file in files:
                bar.update(file.verify())
        return total

    def verify_folder(self, folder: str) -> None:
        """Compare the content of the files in a folder of the segment with the manifest. Raises LogFormatError naming
        the first file with a byte that has changed."""
        for name, file in self._files.items():
            if name.startswith(folder):
                file.verify()


def _is_large(name: str) -> bool:
    in_features = name.startswith(tuple(owner.folder for owner in (ITEMS, USERS, EVENTS, IMPRESSIONS)))
    return name in _LARGE or (in_features and ".values." not in name)


class StreamPartition(NamedTuple):
    """A partition of a topic."""

    topic: str
    number: int

    def __str__(self) -> str:
        return f"{self.topic}, partition {self.number}"


class StreamOffset(NamedTuple):
    """The offset of the next message of a partition, and the id of the cluster that numbered its messages.

    A segment made from messages stores the offsets after them, so both are published by the same rename: each message
    is in the log exactly once, whenever a process is killed.
    """

    cluster: str
    next: int


def sources_of_events(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The sources of a segment's events, as its manifest has them; not those without rows."""
    return [source for source in manifest["sources"] if source["table"] == EVENTS.table and source["rows"]]


def stream_offsets(manifests: Iterable[Mapping[str, Any]]) -> dict[StreamPartition, StreamOffset]:
    """The offsets after all messages of a log. The newest segment with a topic replaces all offsets of that topic.
    `manifests`: of the log's segments, oldest first."""
    offsets: dict[StreamPartition, StreamOffset] = {}
    for manifest in manifests:
        topics = {entry["topic"] for entry in manifest["offsets"]}
        offsets = {partition: offset for partition, offset in offsets.items() if partition.topic not in topics}
        for entry in manifest["offsets"]:
            partition = StreamPartition(entry["topic"], entry["partition"])
            offsets[partition] = StreamOffset(entry["cluster"], entry["next"])
    return offsets


def offset_entries(offsets: Mapping[StreamPartition, StreamOffset]) -> list[dict[str, Any]]:
    """A manifest's entries for these offsets, in the order of topics and partitions."""
    return [
        {"cluster": offset.cluster, "topic": partition.topic, "partition": partition.number, "next": offset.next}
        for partition, offset in sorted(offsets.items())
    ]
