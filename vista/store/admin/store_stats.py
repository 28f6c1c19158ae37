"""Statistics of a store: its generations, their sizes and ages, and how many processes have them open."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from vista.errors import StoreError, StoreUnavailableError
from vista.store.admin.managed_store import ManagedStore, managed_store
from vista.store.layout import environment_path, generation_path
from vista.store.lmdb.environment import SharedEnvironment
from vista.store.lmdb.flock import lock_holders
from vista.store.manifest import Manifest
from vista.store.remote.store_url import StoreUrl
from vista.text_table import fitted


@dataclass(frozen=True, slots=True)
class GenerationStats:
    """One generation. Only number and problem are known of a damaged one."""

    number: int
    manifest: Manifest | None
    complete: bool = False
    num_records: int = 0
    """In an unfinished generation, the number of users done."""
    live_bytes: int = 0
    """Of the pages in use; on a server, of the records, from the mean of the first 1,000."""
    size_bytes: int | None = 0
    """What the files take on disk; None if there are no files."""
    num_open: int | None = 0
    """Other processes on this machine that have it open; None if the system does not tell."""
    problem: str = ""
    expires_at: int | None = None
    """ms; None if it does not expire."""


@dataclass(frozen=True, slots=True)
class StoreStats:
    """What a store holds."""

    path: Path | StoreUrl
    published: int | None
    """Number of the published generation; None if CURRENT is damaged, which `problem` then describes."""
    generations: list[GenerationStats]
    now: int
    """ms, for ages."""
    problem: str = ""

    def __str__(self) -> str:
        head = f"gen-{self.published} is published" if self.published is not None else self.problem
        return "\n".join(map(fitted, [f"{self.path}: {head}", *map(self._line, self.generations)]))

    def _line(self, stats: GenerationStats) -> str:
        if stats.manifest is None:
            return f"gen-{stats.number}: {stats.problem}"
        manifest = stats.manifest
        state = "published" if stats.number == self.published else "kept" if stats.complete else "unfinished"
        return ", ".join(
            [
                f"gen-{stats.number} ({state}): {stats.num_records:,} {'records' if stats.complete else 'users done'}",
                f"{manifest.codec} {manifest.num_tokens} x {manifest.dim}, tails of {manifest.tail_len}",
                f"states {manifest.state_dtype}",
                f"until {manifest.until or 'the end of the log'}",
                f"started {_date(manifest.created_at)} ({(self.now - manifest.created_at) / 3_600_000:.1f} h ago)",
                f"about {stats.live_bytes:,} bytes of records"
                if stats.size_bytes is None
                else f"{stats.live_bytes:,} bytes in use of {stats.size_bytes:,} on disk",
                *([f"open in {stats.num_open} other processes"] if stats.num_open is not None else []),
                *([f"expires {_date(stats.expires_at)} unless it is refreshed"] if stats.expires_at else []),
                f"summarizer {manifest.summarizer_id[:12]}…",
                *([f"key {manifest.key_id}"] if manifest.key_id else []),
            ]
        )


def store_stats(root: str | Path | StoreUrl) -> StoreStats:
    """Describe a store; nothing is changed, and no key is needed.

    Raises:
        StoreError: there is no store.
    """
    store = managed_store(root)
    published, problem = None, ""
    try:
        published = store.current()
    except StoreError as error:
        if not store.numbers():
            raise
        problem = str(error)
    generations = [_generation_stats(store, number) for number in store.numbers()]
    return StoreStats(store.address, published, generations, time.time_ns() // 1_000_000, problem)


def _generation_stats(store: ManagedStore, number: int) -> GenerationStats:
    try:
        live, size, num_open = store.size_bytes(number), None, None
        if isinstance(store.address, Path):
            live, size, num_open = _of_files(store.address, number)
        manifest, complete, num_records = store.progress(number)
        expires_at = store.expires_at(number)
    except StoreUnavailableError:
        raise
    except StoreError as error:
        return GenerationStats(number, None, problem=str(error))
    return GenerationStats(number, manifest, complete, num_records, live, size, num_open, "", expires_at)


def _date(time_ms: int) -> str:
    return f"{datetime.fromtimestamp(time_ms / 1000, UTC):%Y-%m-%d %H:%M} UTC"


def _of_files(root: Path, number: int) -> tuple[int, int, int | None]:
    """Bytes in use, bytes on disk, and the number of other processes that have the generation open."""
    path = environment_path(root, number)
    environment = SharedEnvironment.acquire(path)
    try:
        live, num_open = environment.live_bytes(), _num_open(path)
    finally:
        environment.release()
    size = sum(512 * file.stat().st_blocks for file in generation_path(root, number).rglob("*") if file.is_file())
    return live, size, num_open


def _num_open(path: Path) -> int | None:
    """Number of other processes that hold LMDB's lock on a lock file; its reader table lists only open transactions."""
    holders = lock_holders(path / "lock.mdb")
    return None if holders is None else len(holders - {os.getpid()})
