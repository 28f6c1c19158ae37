"""Watch: bring arriving files or messages, or segments that other processes append to a log, into the store.

    file or messages -> segment of the log (prepare, append) -> incremental refresh -> the published generation

Each complete file and each message enters once: the log remembers the files' digests and the topics' offsets, and
users' states remember the newest segment that they cover. So a watch can be killed and restarted at any time. A file
that cannot be read is listed in `<folder>/refused` with the reason, and does not hold up the others.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vista.config import PrepareConfig, WatchConfig
from vista.config.checks import to_dict
from vista.config.store_config import RefreshOptions
from vista.device import resolve_device
from vista.errors import ConfigError, DataError, LogBusyError, LogWriteError, TakenError, VistaError
from vista.files import make_folders, read_limited, replace_file
from vista.installation import require_module
from vista.log.event_log import EventLog
from vista.log.ingest.kafka_messages import message_rows
from vista.log.ingest.prepare import prepare, prepare_messages
from vista.log.ingest.source_parser import SourceParser
from vista.log.segment_files import MANIFEST_FILE, StreamPartition, stream_offsets
from vista.model.vista_model import VistaModel
from vista.refresh.full import RefreshReport
from vista.refresh.incremental import check_updatable, refresh_incremental
from vista.store.layout import stores_in
from vista.store.reader import published_manifest
from vista.store.record_encoding import read_key

logger = logging.getLogger(__name__)
SUFFIXES = (".parquet", ".csv", ".tsv")
MARKER_SUFFIX = ".done"
"""Suffix of the empty file that says that a file is complete: day.csv.done for day.csv."""
_PATIENCE_S = 60.0
"""A file that has waited longer than this for its marker is reported in the log, once."""
_TOLERANCE_MS = 60_000
"""An event that is dated this far in the future shows that a producer's clock is wrong."""
_MAX_BYTES = 1 << 16
"""Of the entry of a refused file."""
_NAMED = 3
"""Partitions that a report names."""


class Watch:
    """Watches one folder or some topics, and one log, for one store or for those of its shards on this machine.

    Close it at the end.

    Args:
        config: the settings of `vista watch`; `poll_s`, `once`, and `report_file` are not used here.

    Raises:
        ConfigError, CheckpointError: the folder or the model does not exist, or the settings of the topics are wrong.
        MissingDependencyError: with `source`, the extra `kafka` is not installed.
    """

    def __init__(self, config: WatchConfig) -> None:
        self.config = config
        self.folder = None if config.folder is None else Path(config.folder)
        if self.folder is not None and not self.folder.is_dir():
            raise ConfigError(
                f"folder={config.folder}: is not a folder; create it, or omit the key to follow only the log"
            )
        self.model = VistaModel.from_pretrained(config.model, resolve_device(config.device))
        self._key = read_key(config.authentication_key_file)
        self._taken: set[FileVersion] = set()
        """Files that are already in the log."""
        settings = to_dict(config.events) | {"paths": [], "on_bad_rows": config.on_bad_rows.value}
        self._refused = RefusedFiles(self.folder or Path(), settings)
        self._waited_for: set[str] = set()
        """Names of files that a warning was logged for."""
        self._waiting: list[float] = []
        """Arrival times of files and messages that are in the log but not yet published."""
        self._messages = None if config.source is None else ArrivingMessages(config)

    def close(self) -> None:
        """Close the connections to the servers of topics."""
        if self._messages is not None:
            self._messages.close()

    def look(self) -> WatchReport:
        """Append what has arrived to the log, and refresh each store that does not cover the log.

        A file that cannot be appended for a temporary reason (another writer, a full disk) is retried by the next look.

        Raises:
            ConfigError, StoreError: a store cannot be updated from this log; nothing was appended.
            VistaError, OSError: the topics, the log, the model, or the store cannot be read or written at the moment.
                Nothing is lost, and the next look resumes.
            StreamOffsetError, DataError: the topics do not fit the log, or with on_bad_rows=raise a message is invalid.
                Errors of the topics are raised after the stores cover the log.
        """
        began, files, refused = time.monotonic(), 0, 0
        log = EventLog.open(self.config.data)
        covered = [
            (root, check_updatable(published_manifest(root), log, root)) for root in stores_in(self.config.store)
        ]
        arrived = self._arrived()
        with SourceParser() as parser:
            for arrived_at, path, version in arrived:
                if _changed(path, version):
                    continue  # while other files were appended; the next look checks whether it is complete
                try:
                    files += self._append(path, arrived_at, parser)
                    self._taken.add(version)
                except (LogBusyError, LogWriteError, OSError) as error:
                    logger.warning("%s: %s; the next check will retry", path, error)
                except (DataError, ConfigError) as error:
                    if _changed(path, version):
                        logger.warning("%s: changed while it was read (%s); the next check will retry", path, error)
                        continue
                    self._refused.add(version, str(error))
                    refused += 1
                    logger.error("%s", error)
        if files:
            log = EventLog.open(self.config.data)
        stream, failure = None, None
        if self._messages is not None:
            try:
                stream = self._messages.append(log)
                if stream.oldest_ms is not None:
                    self._waiting.append(min(stream.oldest_ms / 1000, time.time()))
            except VistaError as error:
                failure = error  # The store must cover the log even while the server is down.
            log = EventLog.open(self.config.data)
        reports, since = [], list(self._waiting)
        options = RefreshOptions()
        for root, segment in covered:
            if segment < log.last_segment:
                since.append(_written_at(log, segment))
                reports.append(refresh_incremental(self.model, log, root, options=options, key=self._key))
        self._waiting.clear()
        if failure is not None:
            raise failure
        lag_s = time.time() - min(since) if reports else None
        return WatchReport(files, refused, reports, lag_s, stream, time.monotonic() - began)

    def _arrived(self) -> list[tuple[float, Path, FileVersion]]:
        """Time of arrival (s), path and version of each complete file that is not taken or refused, oldest first."""
        arrived = []
        for path in self.folder.iterdir() if self.folder is not None else ():
            if path.suffix not in SUFFIXES or path.name.startswith("."):
                continue
            try:
                version = FileVersion.of(path)
            except FileNotFoundError:
                continue  # renamed or removed since the folder was listed
            if version in self._taken:
                continue
            arrived_at = self._complete_since(path, version)
            if arrived_at is not None and version not in self._refused:
                arrived.append((arrived_at, path, version))
        return sorted(arrived, key=lambda entry: (entry[0], entry[1].name))

    def _complete_since(self, path: Path, version: FileVersion) -> float | None:
        """Time in seconds when the file was completed; None if it is not complete."""
        settle_s = self.config.settle_s
        if settle_s is None:
            return self._marked_since(path, version)
        age = time.time() - version.mtime_ns / 1e9
        if age < -settle_s:
            self._warn_once(
                path, f"is dated {-age:.0f} s in the future and will be read then; `touch` it, or correct the clock"
            )
        return version.mtime_ns / 1e9 if age > settle_s else None

    def _marked_since(self, path: Path, version: FileVersion) -> float | None:
        marker = path.with_name(path.name + MARKER_SUFFIX)
        try:
            marked_ns = FileVersion.of(marker).mtime_ns
        except FileNotFoundError:
            if time.time() - version.mtime_ns / 1e9 > _PATIENCE_S:
                self._warn_once(
                    path, f"is waiting for {marker.name}; create it when the file is complete, or set settle_s"
                )
            return None
        except OSError as error:  # such as a name that is too long with the suffix
            self._warn_once(path, f"cannot have a marker ({error.strerror}); rename the file, or set settle_s")
            return None
        if marked_ns < version.mtime_ns:
            self._warn_once(path, f"is newer than {marker.name}; `touch` the marker when the file is complete again")
            return None
        return marked_ns / 1e9

    def _warn_once(self, path: Path, problem: str) -> None:
        if path.name not in self._waited_for:
            self._waited_for.add(path.name)
            logger.warning("%s: %s", path, problem)

    def _append(self, path: Path, arrived_at: float, parser: SourceParser) -> bool:
        """Append a file to the log; False if the log already holds its content."""
        config = self.config
        settings = PrepareConfig(
            out=config.data,
            events=replace(config.events, paths=[str(path)]),
            append=True,
            on_bad_rows=config.on_bad_rows,
        )
        try:
            prepare(settings, parser=parser)
        except TakenError:
            return False
        self._waiting.append(arrived_at)
        return True


def _changed(path: Path, version: FileVersion) -> bool:
    try:
        return FileVersion.of(path) != version
    except FileNotFoundError:
        return True


def _written_at(log: EventLog, after: int) -> float:
    """Time in seconds when the oldest segment after segment `after` was written."""
    segment = next(segment for segment in log.segments if segment.last > after)
    return (segment.path / MANIFEST_FILE).stat().st_mtime


@dataclass(frozen=True, slots=True)
class WatchReport:
    """What one look did."""

    files: int
    """Files appended to the log."""
    refused: int
    """Files that cannot be read; they are listed in `<folder>/refused`, and tried again only after they change."""
    refreshes: list[RefreshReport]
    """One report per store or shard that was updated; empty if nothing was new."""
    lag_s: float | None
    """Seconds from the arrival of the oldest file or message, or of a segment of another process, until all was
    published. The arrival of a message is its time in the topic."""
    stream: StreamReport | None
    """Messages read from topics; None without a source."""
    seconds: float
    """Seconds that the look took."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing had arrived."""
        messages = 0 if self.stream is None else self.stream.messages
        return not (self.files or self.refused or self.refreshes or messages)

    @property
    def is_behind(self) -> bool:
        """Whether more messages are waiting, so that the next look should follow at once."""
        return self.stream is not None and any(self.stream.behind.values())

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values. `checked_at` is the present time in seconds since 1970."""
        fields: dict[str, Any] = {
            "checked_at": round(time.time(), 3),
            "seconds": round(self.seconds, 3),
            "files": self.files,
            "refused": self.refused,
            "refreshed_users": sum(refresh.num_users for refresh in self.refreshes),
            "lag_s": None if self.lag_s is None else round(self.lag_s, 3),
        }
        return fields if self.stream is None else fields | {"stream": self.stream.as_json(self.seconds)}

    def __str__(self) -> str:
        lag = "" if self.lag_s is None else f", {self.lag_s:.1f} s after it arrived"
        refused = f", {self.refused} refused" if self.refused else ""
        arrived = f"{self.files} file(s){refused}" if self.stream is None else self.stream.described(self.seconds)
        return f"{arrived}{lag}: {'; '.join(map(str, self.refreshes)) or 'nothing new'}"


@dataclass(frozen=True, slots=True)
class StreamReport:
    """Messages that one look read. All of them are in the log, as events or as dead letters."""

    messages: int
    dead_letters: int
    """Messages that are not valid events."""
    behind: Mapping[StreamPartition, int]
    """Messages per partition that the topic held when the look began, but that it did not read."""
    oldest_ms: int | None
    """Time of the oldest message in ms; None if no message has a time."""

    def described(self, seconds: float) -> str:
        """One line, with the rate of a look that took so many seconds."""
        letters = f", {self.dead_letters:,} of them dead letters" if self.dead_letters else ""
        rate = f" ({self.messages / max(seconds, 1e-9):,.0f}/s)" if self.messages else ""
        late = sorted(
            ((number, partition) for partition, number in self.behind.items() if number), key=lambda entry: -entry[0]
        )
        behind = ""
        if late:
            named = "; ".join(f"{partition}: {number:,}" for number, partition in late[:_NAMED])
            more = f"; and {len(late) - _NAMED} more partitions" if len(late) > _NAMED else ""
            behind = f", {sum(number for number, _ in late):,} behind ({named}{more})"
        return f"{self.messages:,} message(s){rate}{letters}{behind}"

    def as_json(self, seconds: float) -> dict[str, Any]:
        """The report of a look that took so many seconds, as JSON values; `behind` by topic and partition."""
        behind: dict[str, dict[str, int]] = {}
        for partition, number in sorted(self.behind.items()):
            behind.setdefault(partition.topic, {})[str(partition.number)] = number
        return {
            "messages": self.messages,
            "dead_letters": self.dead_letters,
            "messages_per_s": round(self.messages / max(seconds, 1e-9), 1),
            "behind": behind,
        }


class ArrivingMessages:
    """Appends the messages of topics to a log, each once: a segment holds the offsets after its messages.

    Raises:
        ConfigError: the settings of the topics are wrong.
        MissingDependencyError: the extra `kafka` is not installed.
    """

    def __init__(self, config: WatchConfig) -> None:
        require_module("confluent_kafka", "kafka")  # other watches do not need it
        from vista.log.ingest.kafka_reader import KafkaReader

        assert config.source is not None
        self._config = config
        self._reader = KafkaReader(config.source, config.stream)
        self._has_warned = False

    def append(self, log: EventLog) -> StreamReport:
        """Read the messages after those in the log, and append them as one segment.

        Raises:
            StreamError, StreamOffsetError: see `KafkaReader.read`.
            DataError: with on_bad_rows=raise, a message is invalid; or the events do not fit the log.
            LogBusyError, LogWriteError: the log cannot be written at the moment.
        """
        config = self._config
        batch = self._reader.read(stream_offsets(segment.manifest for segment in log.segments))
        num_letters = 0
        if batch.messages or batch.is_start:
            kinds = {"user": log.users.kind, "item": log.items.kind}
            rows = message_rows(batch, config.events, kinds, config.on_bad_rows)
            report = prepare_messages(rows, config.data, events=config.events)
            self._reader.commit(batch)
            num_letters = len(rows.letters)
            if num_letters:
                logger.warning("%s: the first of %d dead letters: %s", config.data, num_letters, rows.letters[0])
            self._warn_of_clocks(report.last_ms)
        return StreamReport(len(batch.messages), num_letters, batch.behind, batch.oldest_ms)

    def close(self) -> None:
        """Close the connections."""
        self._reader.close()

    def _warn_of_clocks(self, newest_ms: int | None) -> None:
        ahead_ms = 0 if newest_ms is None else newest_ms - time.time() * 1000
        if ahead_ms > _TOLERANCE_MS and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%s: an event is dated %.0f s in the future; correct the clock of its producer, because events are "
                "ordered by their own times",
                self._config.source,
                ahead_ms / 1000,
            )


class RefusedFiles:
    """The refused files of one folder, and why, in one small JSON file each in `<folder>/refused`.

    The list outlives the process, so a restart does not retry a refused file. A file is retried after the file or the
    settings have changed, or after its entry was deleted.

    Args:
        folder: the folder that is watched.
        settings: how its files are read, as JSON values.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self._folder = folder / "refused"
        self._settings = dict(settings)
        self._unwritten: set[FileVersion] = set()
        """Refused files whose entries could not be written."""

    def __contains__(self, version: FileVersion) -> bool:
        if version in self._unwritten:
            return True
        try:
            entry = json.loads(read_limited(self._entry(version), _MAX_BYTES))
        except (OSError, ValueError, RecursionError):
            return False  # no entry, or a damaged one: the file is retried, and its entry is rewritten
        return isinstance(entry, dict) and all(entry.get(key) == value for key, value in self._key(version).items())

    def add(self, version: FileVersion, reason: str) -> None:
        """Remember a file that was refused."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        entry = {"reason": reason, "refused_at": now} | self._key(version)
        try:
            make_folders(self._folder)
            replace_file(self._entry(version), json.dumps(entry, indent=2).encode())
        except OSError as error:
            self._unwritten.add(version)
            logger.warning(
                "%s: cannot be written (%s); the file will be retried after a restart", self._entry(version), error
            )

    def _entry(self, version: FileVersion) -> Path:
        return self._folder / f"{version.name}.json"

    def _key(self, version: FileVersion) -> dict[str, Any]:
        return {"size": version.size, "mtime_ns": version.mtime_ns, "settings": self._settings}


@dataclass(frozen=True, slots=True)
class FileVersion:
    """A file's name, size in bytes and modification time in ns."""

    name: str
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> FileVersion:
        """The current version of a file; of a link that cannot be followed, that of the link. Raises FileNotFoundError
        if there is no such file."""
        try:
            status = path.stat()
        except FileNotFoundError:
            raise
        except OSError:
            status = path.lstat()  # so that the link is refused, as a damaged file is
        return cls(path.name, status.st_size, status.st_mtime_ns)
