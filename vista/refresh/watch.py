"""Watch: what arrives in a folder, or in a log that others append to, is served soon after.

    file -> segment of the log (prepare, append) -> incremental refresh -> the served generation

A file's content is taken once: the log remembers its digest, and users' states remember the last segment that is in
them. So a watch can be killed and started again at any moment.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from vista.config_data import PrepareConfig, WatchConfig
from vista.data.event_log import EventLog
from vista.data.ingest import prepare
from vista.device import announce, cpu_settings, resolve_device
from vista.errors import ConfigError, DataError
from vista.model.recommender import Recommender
from vista.refresh.incremental import refresh_incremental
from vista.refresh.report import RefreshReport
from vista.store.lmdb_store import SummaryStore

logger = logging.getLogger(__name__)
SUFFIXES = (".parquet", ".csv", ".tsv")
SETTLED_S = 2.0
"""A file that was changed more recently may still be being written."""


@dataclass(frozen=True, slots=True)
class Served:
    """What one look has brought into the store."""

    files: int
    refused: int
    """Files with rows that could not be read; they are logged, and tried again only when they change."""
    refresh: RefreshReport | None
    """None where nothing was new."""
    lag_s: float | None
    """From the oldest file's arrival to the moment that all of it was served."""

    def __str__(self) -> str:
        lag = "" if self.lag_s is None else f", {self.lag_s:.1f} s after it arrived"
        refused = f", {self.refused} refused" if self.refused else ""
        return f"{self.files} file(s){refused}{lag}: {self.refresh or 'nothing new'}"


class Watch:
    """One folder, one log, one store; `look` does what there is to do."""

    def __init__(self, config: WatchConfig) -> None:
        self.config = config
        self.folder = None if config.folder is None else Path(config.folder)
        if self.folder is not None and not self.folder.is_dir():
            raise ConfigError(f"folder={config.folder}: is no folder; make it, or leave the key out to follow the log")
        self.model = Recommender.from_pretrained(config.model, resolve_device(config.device))
        self._seen: set[tuple[str, int, int]] = set()
        self._taken = _taken(EventLog.open(config.data))

    def look(self) -> Served:
        """Take what has arrived, and serve what the store has not seen.

        Raises:
            StoreError: another writer holds the store, or it cannot be written; the next look tries again.
        """
        arrived, refused = [], 0
        for path, changed_at in self._arrived():
            try:
                self._append(path)
                arrived.append(changed_at)
            except DataError as error:
                refused += 1
                logger.error("%s", error)
        log = EventLog.open(self.config.data)
        with SummaryStore.open(self.config.store) as store:
            behind = store.manifest.applied_segment < log.last_segment
        if not behind:
            return Served(len(arrived), refused, None, None)
        report = refresh_incremental(self.model, log, self.config.store, progress=self.config.progress)
        return Served(len(arrived), refused, report, time.time() - min(arrived) if arrived else None)

    def _arrived(self) -> Iterator[tuple[Path, float]]:
        """Files that have settled and were not looked at in this form, with their times of change, oldest first."""
        if self.folder is None:
            return
        found = []
        for path in self.folder.iterdir():
            if path.suffix in SUFFIXES and not path.name.startswith("."):
                status = path.stat()
                form = (path.name, status.st_size, status.st_mtime_ns)
                if form not in self._seen and time.time() - status.st_mtime > SETTLED_S:
                    found.append((status.st_mtime, path.name, path, form))
        for changed_at, _, path, form in sorted(found):
            self._seen.add(form)
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest not in self._taken:
                self._taken.add(digest)
                yield path, changed_at

    def _append(self, path: Path) -> None:
        config = self.config
        events = replace(config.events, paths=[str(path)])
        prepare(
            PrepareConfig(
                out=config.data, events=events, append=True, on_bad_rows=config.on_bad_rows, progress=config.progress
            )
        )


def watch(config: WatchConfig) -> Served:
    """`vista watch`: look every `poll_s` seconds until interrupted, or once.

    Raises:
        ConfigError, LogFormatError, StoreError: what must be there is not: a log, and a store that a full refresh made.
    """
    with cpu_settings(config.num_threads):
        announce(resolve_device(config.device))
        watching = Watch(config)
        while True:
            served = watching.look()
            if config.once:
                return served
            if served.files or served.refused or served.refresh:
                logger.info("%s", served)
            time.sleep(config.poll_s)


def _taken(log: EventLog) -> set[str]:
    """Digests of all files that are in the log."""
    return {source["sha256"] for manifest in log.manifests for source in manifest["sources"]}
