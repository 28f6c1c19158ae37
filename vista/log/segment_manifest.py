"""The manifest of a segment: a JSON file with a checksum. Every field is checked before it is used."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from vista.errors import LogFormatError, shown
from vista.files import read_limited
from vista.json_fields import TABLE, FieldRule, check_fields, hexadecimal, list_of, one_of, text, whole

FORMAT = "vista-event-log"
VERSION = 5
MANIFEST_FILE = "manifest.json"
QUARANTINE_FILE = "quarantine.csv"
DEAD_LETTERS_FILE = "dead_letters.jsonl"
SET_ASIDE_FILES = (QUARANTINE_FILE, DEAD_LETTERS_FILE)
"""Files of invalid rows, and of invalid messages of topics."""
LOG_FIELDS = ("num_users", "num_items", "id_types", "actions", "tasks", "has_time", "timestamp", "has_rating")
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
    "has_time": _FLAG,
    "timestamp": text(),
    "has_rating": _FLAG,
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
    """Read and check the manifest of a segment.

    Raises:
        LogFormatError: it is missing, damaged, or of another format; the message names the file and the remedy.
    """
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
