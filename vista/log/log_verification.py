"""Check of all files of an EventLog, even if they are too damaged to open it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vista.errors import LogFormatError
from vista.files import checked_path
from vista.log.event_log import EventLog
from vista.log.segment import find_segments
from vista.log.segment_files import SegmentFile
from vista.log.segment_manifest import MANIFEST_FILE, REMEDY, read_segment_manifest
from vista.progress_bar import progress_bar


@dataclass(frozen=True, slots=True)
class LogVerification:
    """What a check of a log found.

    num_files, num_bytes: of the intact files that manifests list; damaged: the other listed files, and damaged
    manifests, relative to the log's folder.
    """

    path: Path
    num_files: int
    num_bytes: int
    damaged: list[str]

    def __str__(self) -> str:
        if not self.damaged:
            return f"{self.path}: {self.num_files:,} files with {self.num_bytes:,} bytes are intact"
        return (
            f"{self.path}: {len(self.damaged)} damaged or missing file(s): {', '.join(self.damaged)}; "
            f"restore them from a copy, or {REMEDY}"
        )


def verify_log(path: str | os.PathLike[str]) -> LogVerification:
    """Compare every file of a log with its manifest.

    Raises:
        LogFormatError: there is no log, a segment is missing, or manifests contradict each other.
    """
    place = checked_path(path, LogFormatError)
    while True:
        folders = find_segments(place)
        report = _verify(place, folders)
        if report.damaged and find_segments(place) != folders:
            continue  # A compaction has replaced these segments in the meantime; check the new one.
        if not report.damaged:
            EventLog.open(place)
        return report


def _verify(path: Path, folders: Sequence[Path]) -> LogVerification:
    damaged: list[str] = []
    sizes: list[int] = []
    files: list[tuple[Path, dict[str, Any]]] = []
    for folder in folders:
        try:
            entries = read_segment_manifest(folder)["files"]
        except LogFormatError:
            damaged.append(f"{folder.name}/{MANIFEST_FILE}")
            continue
        files += [(folder / name, entry) for name, entry in entries.items()]
    total = sum(entry["bytes"] for _, entry in files)
    with progress_bar(total=total, desc="verify log", unit="B", unit_scale=True) as bar:
        for file, entry in files:
            try:
                sizes.append(SegmentFile.open(file, entry).verify())
            except LogFormatError:
                damaged.append(str(file.relative_to(path)))
            bar.update(entry["bytes"])
    return LogVerification(path, len(sizes), sum(sizes), damaged)
