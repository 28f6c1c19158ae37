"""Watch: what arrives in a folder, or in a log that others append to, is served soon after.

    file -> segment of the log (prepare, append) -> incremental refresh -> the served generation

A file's content is taken once: the log remembers its digest, and users' states remember the last segment that is in
them. So a watch can be killed and started again at any moment.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from vista.config import PrepareConfig, WatchConfig
from vista.device import announce, cpu_settings, resolve_device
from vista.errors import ConfigError, DataError, LogBusyError, LogWriteError, TakenError, VistaError
from vista.log.event_log import EventLog
from vista.log.ingest.prepare import prepare
from vista.model.vista_model import VistaModel
from vista.refresh.incremental import refresh_incremental
from vista.refresh.refresh_report import RefreshReport
from vista.store.format.authentication import read_key
from vista.store.shards import stores_in
from vista.store.updates import served_manifest

logger = logging.getLogger(__name__)
SUFFIXES = (".parquet", ".csv", ".tsv")
SETTLED_S = 2.0
"""A file that was changed more recently may still be being written."""


@dataclass(frozen=True, slots=True)
class WatchReport:
    """What one look has brought into the store."""

    files: int
    refused: int
    """Files with rows that could not be read; they are logged, and tried again only when they change."""
    refreshes: list[RefreshReport]
    """Of the store, or of its parts; none where nothing was new."""
    lag_s: float | None
    """From the arrival of the oldest file, or segment that others appended, to the moment that all was served."""

    def __str__(self) -> str:
        lag = "" if self.lag_s is None else f", {self.lag_s:.1f} s after it arrived"
        refused = f", {self.refused} refused" if self.refused else ""
        return f"{self.files} file(s){refused}{lag}: {'; '.join(map(str, self.refreshes)) or 'nothing new'}"


class Watch:
    """One folder, one log, one store or the parts of one that are here; `look` does what there is to do."""

    def __init__(self, config: WatchConfig) -> None:
        self.config = config
        self.folder = None if config.folder is None else Path(config.folder)
        if self.folder is not None and not self.folder.is_dir():
            raise ConfigError(f"folder={config.folder}: is no folder; make it, or leave the key out to follow the log")
        self.model = VistaModel.from_pretrained(config.model, resolve_device(config.device))
        self._key = read_key(config.authentication_key_file)
        self._judged: set[tuple[str, int, int]] = set()
        """Names, sizes and times of files that are in the log, or cannot be."""
        self._of_the_future: set[str] = set()
        """Names that were warned of."""
        self._waiting: list[float] = []
        """When those arrived that are in the log but not served yet."""

    def look(self) -> WatchReport:
        """Take what has arrived, and serve what the store has not seen.

        A file that cannot be taken for a passing reason (another writer, a full disk) is tried again by the next look.

        Raises:
            VistaError, OSError: log, model or store cannot be read or written just now; nothing is lost, the next look
                goes on.
        """
        files, refused = 0, 0
        for path, form in self._arrived():
            try:
                files += self._take(path)
                self._judged.add(form)
            except (LogBusyError, LogWriteError, OSError) as error:
                logger.warning("%s: %s; the next look tries again", path, error)
            except (DataError, ConfigError) as error:
                self._judged.add(form)
                refused += 1
                logger.error("%s", error)
        log = EventLog.open(self.config.data)
        reports, arrived = [], list(self._waiting)
        for root in stores_in(self.config.store):
            applied = served_manifest(root).applied_segment
            if applied < log.last_segment:
                arrived.append(_written_at(log, applied))
                reports.append(refresh_incremental(self.model, log, root, progress=self.config.progress, key=self._key))
        if not reports:
            return WatchReport(files, refused, [], None)
        self._waiting.clear()
        return WatchReport(files, refused, reports, time.time() - min(arrived))

    def _arrived(self) -> Iterator[tuple[Path, tuple[str, int, int]]]:
        """Files that have settled and were not judged in this form, oldest first."""
        found = []
        for path in self.folder.iterdir() if self.folder is not None else ():
            if path.suffix not in SUFFIXES or path.name.startswith("."):
                continue
            try:
                status = path.stat()
            except FileNotFoundError:
                continue  # Renamed or removed since the folder was read.
            form, age = (path.name, status.st_size, status.st_mtime_ns), time.time() - status.st_mtime
            if form not in self._judged and age > SETTLED_S:
                found.append((status.st_mtime, path.name, path, form))
            elif age < -SETTLED_S and path.name not in self._of_the_future:
                self._of_the_future.add(path.name)
                logger.warning(
                    "%s: is dated %.0f s in the future, and waits until then; `touch` it, or set the clock", path, -age
                )
        for _, _, path, form in sorted(found):
            yield path, form

    def _take(self, path: Path) -> bool:
        """Append a file to the log; False if its content is there already."""
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
    """When the oldest segment was written that holds what came after one, seconds."""
    segment = next(segment for segment in log.segments if segment.last > after)
    return (segment.path / "manifest.json").stat().st_mtime


def watch(config: WatchConfig) -> WatchReport:
    """`vista watch`: look every `poll_s` seconds until interrupted, or once.

    Raises:
        ConfigError, CheckpointError: the folder or the model is not there.
        VistaError: `once`, and a look failed. A service logs that and goes on.
    """
    with cpu_settings(config.num_threads):
        announce(resolve_device(config.device))
        watching = Watch(config)
        while True:
            try:
                served = watching.look()
                if config.once:
                    return served
                if served.files or served.refused or served.refreshes:
                    logger.info("%s", served)
            except (VistaError, OSError) as error:
                if config.once:
                    raise
                logger.error("%s", error)
            time.sleep(config.poll_s)
