"""Watch: bring files that arrive in a folder, or segments that other processes append to a log, into the store.

    file -> segment of the log (prepare, append) -> incremental refresh -> the published generation

Each file's content enters once: the log remembers its digest, and users' states remember the newest segment that they
cover. So a watch can be killed and restarted at any time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from vista.config import PrepareConfig, WatchConfig
from vista.config.refresh_options import RefreshOptions
from vista.device import resolve_device
from vista.errors import ConfigError, DataError, LogBusyError, LogWriteError, TakenError
from vista.log.event_log import EventLog
from vista.log.ingest.prepare import prepare
from vista.model.vista_model import VistaModel
from vista.refresh.incremental import refresh_incremental
from vista.refresh.watch_report import WatchReport
from vista.store.format.authentication import read_key
from vista.store.reader import published_manifest
from vista.store.shards import stores_in

logger = logging.getLogger(__name__)
SUFFIXES = (".parquet", ".csv", ".tsv")
SETTLED_S = 2.0
"""A file that changed more recently may be incomplete."""

Version = tuple[str, int, int]
"""Name, size and modification time (ns) of a file."""


class Watch:
    """Watches one folder and one log for one store, or for those of its shards that are on this machine.

    Args:
        config: as of `vista watch`; `poll_s` and `once` are not used here.

    Raises:
        ConfigError, CheckpointError: the folder or the model does not exist.
    """

    def __init__(self, config: WatchConfig) -> None:
        self.config = config
        self.folder = None if config.folder is None else Path(config.folder)
        if self.folder is not None and not self.folder.is_dir():
            raise ConfigError(
                f"folder={config.folder}: is not a folder; create it, or omit the key to follow the log alone"
            )
        self.model = VistaModel.from_pretrained(config.model, resolve_device(config.device))
        self._key = read_key(config.authentication_key_file)
        self._handled: set[Version] = set()
        """Files that are in the log, or that cannot be read."""
        self._dated_ahead: set[str] = set()
        """Names that were warned about."""
        self._waiting: list[float] = []
        """Arrival times of files that are in the log but not yet published."""

    def look(self) -> WatchReport:
        """Append the files that have arrived to the log, and refresh each store that does not cover the log.

        A file that cannot be appended for a temporary reason (another writer, a full disk) is tried again by the next
        look.

        Raises:
            VistaError, OSError: log, model or store cannot be read or written at the moment. Nothing is lost, and the
                next look resumes.
        """
        files, refused = 0, 0
        for path, version in self._arrived():
            try:
                files += self._append(path)
                self._handled.add(version)
            except (LogBusyError, LogWriteError, OSError) as error:
                logger.warning("%s: %s; the next check will retry", path, error)
            except (DataError, ConfigError) as error:
                self._handled.add(version)
                refused += 1
                logger.error("%s", error)
        log = EventLog.open(self.config.data)
        reports, arrived = [], list(self._waiting)
        options = RefreshOptions(progress=self.config.progress)
        for root in stores_in(self.config.store):
            covered = published_manifest(root).applied_segment
            if covered < log.last_segment:
                arrived.append(_written_at(log, covered))
                reports.append(refresh_incremental(self.model, log, root, options=options, key=self._key))
        if not reports:
            return WatchReport(files, refused, [], None)
        self._waiting.clear()
        return WatchReport(files, refused, reports, time.time() - min(arrived))

    def _arrived(self) -> Iterator[tuple[Path, Version]]:
        """Files that have settled and were not handled in this version, oldest first."""
        arrived = []
        for path in self.folder.iterdir() if self.folder is not None else ():
            if path.suffix not in SUFFIXES or path.name.startswith("."):
                continue
            try:
                status = path.stat()
            except FileNotFoundError:
                continue  # renamed or removed since the folder was listed
            version, age = (path.name, status.st_size, status.st_mtime_ns), time.time() - status.st_mtime
            if version not in self._handled and age > SETTLED_S:
                arrived.append((status.st_mtime, path.name, path, version))
            elif age < -SETTLED_S and path.name not in self._dated_ahead:
                self._dated_ahead.add(path.name)
                logger.warning(
                    "%s: is dated %.0f s in the future and will be read then; `touch` it, or set the clock", path, -age
                )
        for _, _, path, version in sorted(arrived):
            yield path, version

    def _append(self, path: Path) -> bool:
        """Append a file to the log; False if the log already holds its content."""
        changed_at = path.stat().st_mtime
        config = self.config
        events = replace(config.events, paths=[str(path)])
        try:
            prepare(
                PrepareConfig(
                    out=config.data,
                    events=events,
                    append=True,
                    on_bad_rows=config.on_bad_rows,
                    progress=config.progress,
                )
            )
        except TakenError:
            return False
        self._waiting.append(changed_at)
        return True


def _written_at(log: EventLog, after: int) -> float:
    """Time in seconds when the oldest segment after segment `after` was written."""
    segment = next(segment for segment in log.segments if segment.last > after)
    return (segment.path / "manifest.json").stat().st_mtime
