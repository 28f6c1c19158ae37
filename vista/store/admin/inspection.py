"""What a store holds and who reads it, and whether it is whole: structure, manifests, and every record."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import lmdb

from vista.errors import RecordError, StoreBusyError, StoreError, UnfinishedError
from vista.store.admin.whole_generations import GenerationReader, Tally, open_generation, settled
from vista.store.format.keys import CURSOR_KEY, MANIFEST_KEY
from vista.store.format.record import check_records
from vista.store.layout import (
    Manifest,
    environment_path,
    environments_of,
    generation_path,
    list_generations,
    read_current,
)
from vista.store.lmdb.data_file import check_structure
from vista.store.lmdb.environment import SharedEnvironment
from vista.store.lmdb.flock import lock_holders
from vista.store.reader import read_manifest

_LISTED = 20


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


@dataclass(slots=True)
class VerifyReport:
    """What a check found."""

    path: Path
    records: dict[int, int] = field(default_factory=dict)
    """Sound records of each complete generation that could be opened."""
    unfinished: list[int] = field(default_factory=list)
    """Generations that no reader opens; not checked."""
    num_problems: int = 0
    problems: list[str] = field(default_factory=list)
    """The first twenty."""

    def add(self, problem: str) -> None:
        """Count a problem, and list it if it is among the first."""
        self.num_problems += 1
        if self.num_problems <= _LISTED:
            self.problems.append(problem)

    def include(self, other: VerifyReport) -> None:
        """Take over what another check of the same store found."""
        self.records |= other.records
        self.unfinished += other.unfinished
        self.num_problems += other.num_problems
        self.problems = (self.problems + other.problems)[:_LISTED]

    def __str__(self) -> str:
        sound = ", ".join(f"gen-{number}: {count:,} records" for number, count in self.records.items()) or "none"
        rest = f"; unfinished: {', '.join(f'gen-{number}' for number in self.unfinished)}" if self.unfinished else ""
        if not self.num_problems:
            return f"{self.path}: no problem found; {sound}{rest}"
        found = f"{self.num_problems} problem{'s' * (self.num_problems != 1)}"
        return "\n".join([f"{self.path}: {found}; sound are {sound}{rest}", *self.problems])


def verify_store(root: str | Path, *, key: bytes | None = None) -> VerifyReport:
    """Check CURRENT and every complete generation; nothing is changed, and readers are not disturbed.

    The structure is checked before LMDB opens a file, then each record: length, format, checksum, user, generation,
    and with a key its code.

    Args:
        key: of an authenticated store.

    Raises:
        StoreBusyError: a refresh writes the served generation without a pause.
        StoreError: there is no store, or it is of another key. Faults of what it holds are in the report.
    """
    root = Path(root).absolute()
    report = VerifyReport(root)
    if not root.is_dir():
        read_current(root)
    served = None
    try:
        served = read_current(root)
    except StoreError as error:
        report.add(str(error))
    generations = list_generations(root)
    if served is not None and served not in generations:
        report.add(f"{root / 'CURRENT'} names gen-{served}, which is not there")
    for generation in generations:
        try:
            report.include(verify_generation(root, generation, key=key, must_be_complete=generation == served))
        except StoreBusyError:
            if served is None or generation <= served:
                raise
            report.unfinished.append(generation)
    return report


class _ProblemsError(StoreError):
    def __init__(self, report: VerifyReport) -> None:
        super().__init__(str(report))
        self.report = report


def verify_generation(
    root: Path, generation: int, *, key: bytes | None = None, must_be_complete: bool = True
) -> VerifyReport:
    """Check one generation; whether it is finished may be of no interest.

    Raises:
        StoreBusyError: it is being written, so that what looks wrong may not be.
    """

    def look() -> VerifyReport:
        report = VerifyReport(root)
        if must_be_complete or generation_path(root, generation).is_dir():  # else removed since it was listed
            _verify(root, generation, report, key, must_be_complete)
        if report.num_problems:
            raise _ProblemsError(report)
        return report

    try:
        return settled(root, generation, look)
    except _ProblemsError as error:
        return error.report


def _verify(root: Path, generation: int, report: VerifyReport, key: bytes | None, must_be_complete: bool) -> None:
    folder = environment_path(root, generation)
    try:
        for environment in environments_of(root, generation):
            check_structure(environment)
        with open_generation(root, generation, key) as reader:
            report.records[generation] = _verify_records(reader, report).count
            num_states = sum(len(keys) for keys, _ in reader.state_batches())
            # A few more states than records: an incremental refresh stopped between the two, and goes on. A few less:
            # users who could not be stored, as many as a run puts up with, and are to be recomputed.
            count = reader.manifest.count
            if reader.manifest.state_spec() is not None and count - num_states > max(10, 0.02 * count):
                report.add(f"gen-{generation} holds {num_states} states for {count} records")
            for name in reader.other_keys():
                if not name.startswith(b"!"):
                    report.add(f"{folder}: key {name[:40]!r} is neither a user's nor the store's own")
    except UnfinishedError as error:
        if must_be_complete:
            report.add(f"gen-{generation}: {error}")
        report.unfinished.append(generation)
    except StoreError as error:
        report.add(f"gen-{generation}: {error}")


def _verify_records(reader: GenerationReader, report: VerifyReport) -> Tally:
    tally, bad = Tally(), 0
    for keys, records in reader.raw_batches():
        for index in _faulty(keys, records, reader, report):
            bad += 1
            del keys[index], records[index]
        tally.add(keys, records)
    manifest = reader.manifest
    if tally.count + bad != manifest.count:
        report.add(f"gen-{manifest.generation} holds {tally.count + bad} records, its manifest says {manifest.count}")
    elif not bad and tally.records_digest != manifest.records_digest:
        report.add(f"gen-{manifest.generation}: the records are sound, but not all those that were published")
    return tally


def _faulty(keys: list[bytes], records: list[bytes], reader: GenerationReader, report: VerifyReport) -> list[int]:
    """Positions of the bad ones, descending."""
    try:
        check_records(records, keys, reader.spec)
        return []
    except RecordError:
        faulty = []
    for index in range(len(keys)):
        try:
            check_records(records[index : index + 1], keys[index : index + 1], reader.spec)
        except RecordError as error:
            report.add(f"gen-{reader.manifest.generation}: {error}")
            faulty.append(index)
    return faulty[::-1]
