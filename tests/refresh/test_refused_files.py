"""The list of refused files, when a power cut has torn an entry."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

from vista.refresh.file_version import FileVersion
from vista.refresh.refused_files import RefusedFiles

SECTOR_BYTES = 512
VERSION = FileVersion("day.csv", 1000, 1_700_000_000_000_000_000)


def test_a_torn_entry_is_retried_and_rewritten(tmp_path: Path) -> None:
    refused, entry = RefusedFiles(tmp_path, {"paths": []}), tmp_path / "refused" / "day.csv.json"
    contents = []
    for version, reason in ((replace(VERSION, size=900), "a" * 700), (VERSION, "é" * 200)):
        refused.add(version, reason)
        contents.append(entry.read_bytes())
    old, new = contents
    torn = [new[:size] for size in range(0, len(new), 7)]
    for sectors in product((old, new, bytes(len(new))), repeat=-(-len(new) // SECTOR_BYTES)):
        parts = (part[i * SECTOR_BYTES :][:SECTOR_BYTES] for i, part in enumerate(sectors))
        torn.append(b"".join(parts)[: len(new)])
    listed = 0
    for content in torn:
        entry.write_bytes(content)
        listed += VERSION in refused
        assert replace(VERSION, mtime_ns=VERSION.mtime_ns + 1) not in refused
    assert 1 <= listed < 10  # among them the new entry itself
    entry.write_bytes(torn[5])
    assert VERSION not in refused
    refused.add(VERSION, "again")
    assert VERSION in refused and entry.read_bytes() != torn[5]
