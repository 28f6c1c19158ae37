"""A segment of an EventLog on disk: a folder of `.npy` files and a manifest, written once and never changed.

    segment-000001/                     or segment-000001-000004/ after a compaction
        manifest.json                   format, range, counts, sources, and each file's dtype, shape, bytes, XXH3-64
        new_users.ids.npy [+ .offsets]  ids that this segment adds to the user vocabulary; likewise new_items
        users.npy       int64 [U]       user rows with events here, ascending
        offsets.npy     int64 [U + 1]   where each user's events start
        item.npy        int32 [T]       item rows
        timestamp.npy   int64 [T]       milliseconds, or the ordinal if the log has no times
        action.npy      uint8 [T]       codes into the manifest's `actions`
        rating.npy      float32 [T]     if the log has ratings
        impressions/                    the same for impressions: users, offsets, item, timestamp, and
            label.npy   uint8 [N, tasks]; mask.npy uint8 [N, tasks]; probability.npy float32 [N, tasks], if known
        deletions/                      forgotten events: users, offsets, item, timestamp, action (event_keys.py)
        features/                       of items; `K` counts the columns that the manifest lists under `features`
            items.npy   int64 [F]       item rows with features here, ascending
            K.numbers.npy float32 [F]; K.vectors.npy float32 [F, D]; or
            K.codes.npy int32, K.offsets.npy int64 [F + 1], and the new values, K.values.ids.npy and .offsets
        user_features/                  the same for users, whose rows are in users.npy; under `user_features`
        event_features/                 of events; `K` counts the columns that the manifest lists under `event_features`
            K.numbers.npy float32 [T]; or
            K.codes.npy int8, int16, or int32 [T], and the new values, K.values.ids.npy and .offsets
        request_features/               the same for impressions
        erased.npy      int64 [E]       rows of erased users, ascending
        changed.npy     int64 [users]   after a compaction: the last segment that changed each user, or 0
        quarantine.csv                  rows that failed validation, if any
        dead_letters.jsonl              messages of Kafka topics that failed it, if any

A user's events are contiguous and sorted by time, then sequence, then input order. A vocabulary is the concatenation of
the segments' new ids, so that renaming one folder publishes everything at once. The manifest's `deletions` counts
forgotten events and erased users. docs/reference/file-formats.md has the details.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
from vista.errors import LogFormatError
from vista.files import require_log_folder
from vista.log.features import Declared, SegmentFeatures, declared_columns
from vista.log.histories import PackedTable
from vista.log.segment_files import (
    EVENT_COLUMNS,
    EVENTS,
    FORGOTTEN_COLUMNS,
    IMPRESSION_COLUMNS,
    IMPRESSIONS,
    ITEMS,
    REMEDY,
    USERS,
    FeatureOwner,
    SegmentFiles,
    read_segment_manifest,
)
from vista.log.vocabulary import Vocabulary

_NAME = re.compile(r"segment-(\d{6})(?:-(\d{6}))?")


def segment_name(first: int, last: int | None = None) -> str:
    """Folder name of one segment, or of a compacted range."""
    return f"segment-{first:06d}" + ("" if last in (None, first) else f"-{last:06d}")


@dataclass(frozen=True, slots=True)
class Segment:
    """An open segment. Arrays are memory-mapped."""

    path: Path
    first: int
    last: int
    manifest: dict[str, Any]
    files: SegmentFiles
    events: PackedTable
    impressions: PackedTable | None
    forgotten: PackedTable | None
    """Events that this segment deletes from earlier segments."""
    erased: Int
    """int64 [E] users that this segment deletes from earlier segments."""
    changed: Int | None
    """int64 [users], if compacted: the last segment that changed each user, or 0."""
    features: Mapping[FeatureOwner, SegmentFeatures]
    """Of items, users, events, and impressions, as far as the segment has any."""
    new_users: Vocabulary
    new_items: Vocabulary

    @property
    def num_deletions(self) -> int:
        """Number of forgotten events and erased users."""
        return len(self.erased) + (0 if self.forgotten is None else self.forgotten.num_rows)

    def changed_users(self, after: int) -> Int:
        """Users with new events, features, or deletions here, in segments above `after`: int64 [U], ascending."""
        if self.changed is not None:
            return np.flatnonzero(self.changed > after)
        if self.last <= after:
            return np.empty(0, np.int64)
        others = [] if self.forgotten is None else [self.forgotten.users]
        others += [self.features[USERS].rows] if USERS in self.features else []
        return np.unique(np.concatenate([self.events.users, self.erased, *others]))


def read_segment(path: Path) -> Segment:
    """Open one segment and check the size and the type of every file against its manifest. Raises LogFormatError naming
    the file, the expected and actual content, and the remedy."""
    manifest = read_segment_manifest(path)
    files = SegmentFiles(path, manifest["files"])
    try:
        segment = _segment(path, manifest, files)
        _check_counts(segment)
    except LogFormatError:
        files.verify()  # names the damaged file, if the reason is one
        raise
    return segment


def _segment(path: Path, manifest: dict[str, Any], files: SegmentFiles) -> Segment:
    erased, kinds = files.rows("erased.npy"), manifest["id_types"]
    events, impressions = files.table("", EVENT_COLUMNS), None
    if "impressions/users.npy" in files:
        impressions = files.table("impressions/", IMPRESSION_COLUMNS)
    num_rows = {
        ITEMS: None,
        USERS: None,
        EVENTS: events.num_rows,
        IMPRESSIONS: 0 if impressions is None else impressions.num_rows,
    }
    features = {
        owner: read
        for owner, count in num_rows.items()
        if (read := SegmentFeatures.read(path, files, owner, manifest[owner.field], count)) is not None
    }
    row_features = {
        owner: {name: column.data for name, column in features[owner].columns.items()}
        for owner in (EVENTS, IMPRESSIONS)
        if owner in features
    }
    if EVENTS in features:
        events = replace(events, features=row_features[EVENTS])
    if IMPRESSIONS in features and impressions is not None:
        impressions = replace(impressions, features=row_features[IMPRESSIONS])
    return Segment(
        path,
        manifest["first_segment"],
        manifest["last_segment"],
        manifest,
        files,
        events,
        impressions,
        files.table("deletions/", FORGOTTEN_COLUMNS) if "deletions/users.npy" in files else None,
        np.empty(0, np.int64) if erased is None else erased,
        files.rows("changed.npy"),
        features,
        files.vocabulary("new_users", kinds["users"]),
        files.vocabulary("new_items", kinds["items"]),
    )


def read_segments(path: Path, last_segment: int | None = None) -> list[Segment]:
    """Open the current segments, oldest first, up to number `last_segment`. Raises LogFormatError if one is missing or
    damaged, or none ends at `last_segment`."""
    while True:
        present = _segment_folders(path)
        try:
            segments: list[Segment] = []
            for folder in find_segments(path):
                if last_segment is not None and segments and segments[-1].last >= last_segment:
                    break
                segments.append(read_segment(folder))
            break
        except LogFormatError:
            if _segment_folders(path) == present:
                raise
            # Meanwhile a compaction replaced these segments; try again.
    if last_segment is not None and segments[-1].last != last_segment:
        newest = segments[-1]
        inside = newest.first <= last_segment < newest.last
        why = f"it is inside the compacted {newest.path.name}" if inside else f"the log ends at {newest.last}"
        raise LogFormatError(f"{path}: no segment ends at number {last_segment}, because {why}; read the whole log")
    return segments


def read_vocabularies(segments: Sequence[Segment]) -> tuple[Vocabulary, Vocabulary]:
    """The user and item vocabularies of a log with these segments: the concatenation of their new ids. Raises
    LogFormatError if the numbers of ids differ from the newest manifest."""
    users = Vocabulary.concatenated([segment.new_users for segment in segments])
    items = Vocabulary.concatenated([segment.new_items for segment in segments])
    newest = segments[-1]
    counts = newest.manifest["num_users"], newest.manifest["num_items"]
    if (len(users), len(items)) != counts:
        raise LogFormatError(
            f"{newest.path.parent}: the vocabularies contain {len(users)} users and {len(items)} items, but the "
            f"manifest of {newest.path.name} says {counts[0]} and {counts[1]}; {REMEDY}"
        )
    return users, items


def features_of(segments: Iterable[Segment], owner: FeatureOwner) -> list[SegmentFeatures]:
    """The features that segments have, in their order."""
    return [segment.features[owner] for segment in segments if owner in segment.features]


def with_row_features(segments: Sequence[Segment]) -> list[Segment]:
    """The segments with all columns of the log in each. Those that a segment lacks are missing in all of its rows.

    Args:
        segments: oldest first.

    Raises:
        LogFormatError: if a column is not of one kind.
    """
    of_events, of_impressions = (declared_columns(features_of(segments, owner)) for owner in (EVENTS, IMPRESSIONS))
    return [
        replace(
            segment,
            events=_completed(segment.events, of_events),
            impressions=None if segment.impressions is None else _completed(segment.impressions, of_impressions),
        )
        for segment in segments
    ]


def _completed(table: PackedTable, columns: Declared) -> PackedTable:
    """The table with all of these columns. Those that it lacks take no memory."""
    num_rows = table.num_rows + table.num_deleted
    missing: dict[str, NDArray[Any]] = {"number": np.array(np.nan, np.float32), "category": np.array(-1, np.int8)}
    features = {
        name: table.features[name]
        if name in table.features
        else np.broadcast_to(missing[parts[0].columns[name].kind], num_rows)
        for name, parts in columns.items()
    }
    return replace(table, features=features)


def find_segments(path: Path) -> list[Path]:
    """Folders of the current segments, oldest first. A compacted range replaces the segments inside it. Raises
    LogFormatError if `path` is not a log, or a segment is missing."""
    chosen: list[Path] = []
    last = 0
    for first, end, entry in _segment_folders(path):
        if end <= last:
            continue
        if first != last + 1:
            raise LogFormatError(
                f"{path}: {segment_name(last + 1)} is missing, but {entry.name} is there; restore the whole folder"
            )
        chosen.append(entry)
        last = end
    if not chosen:
        raise LogFormatError(
            f"{path}: not an EventLog, because it has no segment; make one with `vista prepare out={path} ...`"
        )
    return chosen


def superseded_segments(path: Path) -> list[Path]:
    """Folders of segments that a compacted segment has replaced; readers ignore them."""
    in_force = set(find_segments(path))
    return [folder for _, _, folder in _segment_folders(path) if folder not in in_force]


def _segment_folders(path: Path) -> list[tuple[int, int, Path]]:
    """(first number, last number, folder) of all folders named like a segment; longer ranges before shorter ones."""
    require_log_folder(path)
    folders = []
    try:
        entries = list(path.iterdir())
    except OSError as error:
        raise LogFormatError(f"{path}: cannot be read ({error.strerror}); correct its permissions") from error
    for entry in entries:
        if match := _NAME.fullmatch(entry.name):
            folders.append((int(match[1]), int(match[2] or match[1]), entry))
    return sorted(folders, key=lambda range_: (range_[0], -range_[1]))


def _check_counts(segment: Segment) -> None:
    """Refuse a segment whose manifest does not match its name and its files."""
    manifest, impressions = segment.manifest, segment.impressions
    counts = manifest["counts"]
    expected_and_actual = {
        "name": (segment_name(segment.first, segment.last), segment.path.name),
        "events": (counts["events"]["rows"], segment.events.num_rows),
        "impressions": (counts["impressions"]["rows"], 0 if impressions is None else impressions.num_rows),
        "deletions": (manifest["deletions"], segment.num_deletions),
        "ratings": (manifest["has_rating"], "rating" in segment.events.columns),
    }
    if impressions is not None:
        expected_and_actual["columns of labels"] = (len(manifest["tasks"]), impressions.columns["label"].shape[1])
    if segment.last > segment.first:
        expected_and_actual["rows of changed.npy"] = (
            manifest["num_users"],
            None if segment.changed is None else len(segment.changed),
        )
    for what, (expected, actual) in expected_and_actual.items():
        if expected != actual:
            raise LogFormatError(
                f"{segment.path}: {what}: the manifest says {expected}, found {actual}; restore the folder, or {REMEDY}"
            )
    for owner in (ITEMS, USERS):
        features, count = segment.features.get(owner), manifest[f"num_{owner.table}"]
        if features is not None and features.rows[-1] >= count:
            raise LogFormatError(
                f"{segment.path}: has features of {owner.name} row {features.rows[-1]}, but the manifest says {count} "
                f"{owner.table}; restore the folder, or {REMEDY}"
            )
    tables = [segment.events, impressions, segment.forgotten]
    users = [table.users[-1:] for table in tables if table is not None]
    highest = max((int(rows[-1]) for rows in [*users, segment.erased[-1:]] if len(rows)), default=-1)
    if highest >= manifest["num_users"]:
        raise LogFormatError(
            f"{segment.path}: contains user row {highest}, but the manifest says {manifest['num_users']} users; "
            f"restore the folder, or {REMEDY}"
        )
