"""What a store holds, and who reads it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import lmdb

from vista.errors import StoreError, UnfinishedError
from vista.store.environment import SharedEnvironment
from vista.store.keys import CURSOR_KEY, MANIFEST_KEY
from vista.store.layout import Manifest, environment_path, generation_path, list_generations, read_current
from vista.store.lmdb_store import read_manifest
from vista.store.permissions import lock_holders


@dataclass(frozen=True, slots=True)
class GenerationStats:
    """One generation. Of a damaged one, only number and problem are known."""

    number: int
    manifest: Manifest | None
    complete: bool = False
    num_records: int = 0
    """Of an unfinished one, users done."""
    live_bytes: int = 0
    """Of the pages that hold records."""
    size_bytes: int = 0
    """What its files occupy on disk."""
    num_open: int | None = 0
    """Other processes of this machine that have it open; None where the system does not say."""
    problem: str = ""


@dataclass(frozen=True, slots=True)
class StoreStats:
    """What a store holds."""

    path: Path
    served: int | None
    """None: nothing is, or CURRENT is damaged (then `problem` says how)."""
    generations: list[GenerationStats]
    now: int
    """ms, for ages."""
    problem: str = ""

    def __str__(self) -> str:
        head = f"{self.path}: " + (f"serves gen-{self.served}" if self.served is not None else self.problem)
        return "\n".join([head, *map(self._line, self.generations)])

    def _line(self, stats: GenerationStats) -> str:
        if stats.manifest is None:
            return f"gen-{stats.number}: {stats.problem}"
        manifest = stats.manifest
        state = "served" if stats.number == self.served else "kept" if stats.complete else "unfinished"
        made = datetime.fromtimestamp(manifest.created_at / 1000, UTC)
        return ", ".join(
            [
                f"gen-{stats.number} ({state}): {stats.num_records:,} {'records' if stats.complete else 'users done'}",
                f"{manifest.codec} {manifest.num_tokens} x {manifest.dim}, tails of {manifest.tail_len}",
                f"states {manifest.state_dtype}",
                f"until {manifest.until or 'the end of the log'}",
                f"begun {made:%Y-%m-%d %H:%M} UTC ({(self.now - manifest.created_at) / 3_600_000:.1f} h ago)",
                f"{stats.live_bytes:,} bytes live of {stats.size_bytes:,} on disk",
                *([f"open in {stats.num_open} other processes"] if stats.num_open is not None else []),
                f"summarizer {manifest.summarizer_id[:12]}…",
                *([f"key {manifest.key_id}"] if manifest.key_id else []),
            ]
        )


def store_stats(root: str | Path) -> StoreStats:
    """What a store holds; nothing is changed, and no key is needed.

    Raises:
        StoreError: there is no store.
    """
    root = Path(root).absolute()
    served, problem = None, ""
    try:
        served = read_current(root)
    except StoreError as error:
        if not root.is_dir() or not list_generations(root):
            raise
        problem = str(error)
    generations = [_generation_stats(root, number) for number in list_generations(root)]
    return StoreStats(root, served, generations, time.time_ns() // 1_000_000, problem)


def _generation_stats(root: Path, number: int) -> GenerationStats:
    path = environment_path(root, number)
    try:
        environment = SharedEnvironment.acquire(path)
    except StoreError as error:
        return GenerationStats(number, None, problem=str(error))
    try:
        live, num_open = environment.live_bytes(), _processes(path)
        manifest, complete, num_records = environment.read(lambda transaction: _state(transaction, path))
    except StoreError as error:
        return GenerationStats(number, None, problem=str(error))
    finally:
        environment.release()
    size = sum(512 * file.stat().st_blocks for file in generation_path(root, number).rglob("*") if file.is_file())
    return GenerationStats(number, manifest, complete, num_records, live, size, num_open)


def _processes(path: Path) -> int | None:
    """Processes but this one that hold LMDB's lock on a lock file: the reader table shows only running transactions."""
    held = lock_holders(path / "lock.mdb")
    return None if held is None else len(held - {os.getpid()})


def _state(transaction: lmdb.Transaction[memoryview], path: Path) -> tuple[Manifest, bool, int]:
    try:
        manifest = read_manifest(transaction, path)
        return manifest, True, manifest.count
    except UnfinishedError:
        value = transaction.get(MANIFEST_KEY)
        if value is None:
            raise
        return Manifest.from_bytes(bytes(value), path), False, int(bytes(transaction.get(CURSOR_KEY) or b"0"))
