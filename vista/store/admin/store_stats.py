"""Statistics of a store: its generations, their sizes and ages, and how many processes have them open."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import lmdb

from vista.errors import StoreError, UnfinishedError
from vista.store.format.keys import MANIFEST_KEY
from vista.store.layout import environment_path, generation_path, list_generations, read_current, store_path
from vista.store.lmdb.environment import SharedEnvironment
from vista.store.lmdb.flock import lock_holders
from vista.store.manifest import Manifest, read_cursor, read_manifest


@dataclass(frozen=True, slots=True)
class GenerationStats:
    """One generation. Only number and problem are known of a damaged one."""

    number: int
    manifest: Manifest | None
    complete: bool = False
    num_records: int = 0
    """In an unfinished generation, the number of users done."""
    live_bytes: int = 0
    """Of the pages in use."""
    size_bytes: int = 0
    """What the files take on disk."""
    num_open: int | None = 0
    """Other processes on this machine that have it open; None if the system does not tell."""
    problem: str = ""


@dataclass(frozen=True, slots=True)
class StoreStats:
    """What a store holds."""

    path: Path
    published: int | None
    """Number of the published generation; None if CURRENT is damaged, which `problem` then describes."""
    generations: list[GenerationStats]
    now: int
    """ms, for ages."""
    problem: str = ""

    def __str__(self) -> str:
        head = f"gen-{self.published} is published" if self.published is not None else self.problem
        return "\n".join([f"{self.path}: {head}", *map(self._line, self.generations)])

    def _line(self, stats: GenerationStats) -> str:
        if stats.manifest is None:
            return f"gen-{stats.number}: {stats.problem}"
        manifest = stats.manifest
        state = "published" if stats.number == self.published else "kept" if stats.complete else "unfinished"
        made = datetime.fromtimestamp(manifest.created_at / 1000, UTC)
        return ", ".join(
            [
                f"gen-{stats.number} ({state}): {stats.num_records:,} {'records' if stats.complete else 'users done'}",
                f"{manifest.codec} {manifest.num_tokens} x {manifest.dim}, tails of {manifest.tail_len}",
                f"states {manifest.state_dtype}",
                f"until {manifest.until or 'the end of the log'}",
                f"started {made:%Y-%m-%d %H:%M} UTC ({(self.now - manifest.created_at) / 3_600_000:.1f} h ago)",
                f"{stats.live_bytes:,} bytes in use of {stats.size_bytes:,} on disk",
                *([f"open in {stats.num_open} other processes"] if stats.num_open is not None else []),
                f"summarizer {manifest.summarizer_id[:12]}…",
                *([f"key {manifest.key_id}"] if manifest.key_id else []),
            ]
        )


def store_stats(root: str | Path) -> StoreStats:
    """Describe a store; nothing is changed, and no key is needed.

    Raises:
        StoreError: there is no store.
    """
    root = store_path(root)
    published, problem = None, ""
    try:
        published = read_current(root)
    except StoreError as error:
        if not root.is_dir() or not list_generations(root):
            raise
        problem = str(error)
    generations = [_generation_stats(root, number) for number in list_generations(root)]
    return StoreStats(root, published, generations, time.time_ns() // 1_000_000, problem)


def _generation_stats(root: Path, number: int) -> GenerationStats:
    path = environment_path(root, number)
    try:
        environment = SharedEnvironment.acquire(path)
    except StoreError as error:
        return GenerationStats(number, None, problem=str(error))
    try:
        live, num_open = environment.live_bytes(), _num_open(path)
        manifest, complete, num_records = environment.read(lambda transaction: _progress(transaction, path))
    except StoreError as error:
        return GenerationStats(number, None, problem=str(error))
    finally:
        environment.release()
    size = sum(512 * file.stat().st_blocks for file in generation_path(root, number).rglob("*") if file.is_file())
    return GenerationStats(number, manifest, complete, num_records, live, size, num_open)


def _num_open(path: Path) -> int | None:
    """Number of other processes that hold LMDB's lock on a lock file; its reader table lists only open transactions."""
    holders = lock_holders(path / "lock.mdb")
    return None if holders is None else len(holders - {os.getpid()})


def _progress(transaction: lmdb.Transaction[memoryview], path: Path) -> tuple[Manifest, bool, int]:
    """Manifest, whether the generation is complete, and the number of records or of users done."""
    try:
        manifest = read_manifest(transaction, path)
        return manifest, True, manifest.count
    except UnfinishedError:
        value = transaction.get(MANIFEST_KEY)
        if value is None:
            raise
        manifest = Manifest.from_bytes(bytes(value), path)
        return manifest, False, read_cursor(transaction, manifest, path)
