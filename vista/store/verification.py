"""Verification of a store: CURRENT, tombstones, manifests, the structure of the files, and every record."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from vista.errors import RecordError, StoreBusyError, StoreError, StoreUnavailableError, UnfinishedError
from vista.store.backend import StoreBackend, open_backend, settled
from vista.store.layout import StoreUrl, environment_path, generation_path
from vista.store.lmdb_environment import SharedEnvironment, lock_holders
from vista.store.manifest import Manifest, Tally
from vista.store.record import check_records
from vista.text_table import fitted

if TYPE_CHECKING:
    from vista.store.backend import Generation

_LISTED = 20


@dataclass(slots=True)
class VerificationReport:
    """What a verification found."""

    path: Path | StoreUrl
    records: dict[int, int] = field(default_factory=dict)
    """Number of valid records per complete generation that could be opened."""
    unfinished: list[int] = field(default_factory=list)
    """Generations that no reader opens; they are not checked."""
    num_problems: int = 0
    problems: list[str] = field(default_factory=list)
    """The first twenty."""

    def add(self, problem: str) -> None:
        """Count a problem, and list it if it is one of the first."""
        self.num_problems += 1
        if self.num_problems <= _LISTED:
            self.problems.append(problem)

    def include(self, other: VerificationReport) -> None:
        """Add what another verification of the same store found."""
        self.records |= other.records
        self.unfinished += other.unfinished
        self.num_problems += other.num_problems
        self.problems = (self.problems + other.problems)[:_LISTED]

    def __str__(self) -> str:
        valid = ", ".join(f"gen-{number}: {count:,} records" for number, count in self.records.items()) or "none"
        rest = f"; unfinished: {', '.join(f'gen-{number}' for number in self.unfinished)}" if self.unfinished else ""
        if not self.num_problems:
            return f"{self.path}: no problem found; {valid}{rest}"
        problems = f"{self.num_problems} problem{'s' * (self.num_problems != 1)}"
        return "\n".join([f"{self.path}: {problems}; valid: {valid}{rest}", *self.problems])


def verify_store(root: str | Path | StoreUrl, *, key: bytes | None = None) -> VerificationReport:
    """Check CURRENT, LAST, the tombstones and every complete generation; nothing is changed, and readers can continue.

    The structure of each file is checked before LMDB opens it. Then each record is checked: length, format, checksum,
    user, generation and, with a key, its authentication code.

    Args:
        root: the store's folder or URL.
        key: 32 bytes, if the store's records are authenticated.

    Raises:
        StoreBusyError: a refresh writes the published generation without a pause.
        StoreError: there is no store, or it is of another key. All other problems are in the report.
    """
    store = open_backend(root)
    report = VerificationReport(store.address)
    published, generations = None, store.numbers()
    try:
        published = store.current()
    except StoreUnavailableError:
        raise
    except StoreError as error:
        is_folder = isinstance(store.address, Path) and store.address.is_dir()
        if not generations and not is_folder:
            raise
        report.add(str(error))
    for problem in store.problems():
        report.add(problem)
    if published is not None and published not in generations:
        report.add(f"{store.address}: CURRENT names gen-{published}, which does not exist")
    for generation in generations:
        try:
            report.include(verify_generation(store, generation, key=key, must_be_complete=generation == published))
        except StoreBusyError:
            if published is None or generation <= published:
                raise
            report.unfinished.append(generation)
    return report


class _ProblemsError(StoreError):
    def __init__(self, report: VerificationReport) -> None:
        super().__init__(str(report))
        self.report = report


def verify_generation(
    store: StoreBackend, generation: int, *, key: bytes | None = None, must_be_complete: bool = True
) -> VerificationReport:
    """Check one generation.

    Args:
        store: where it is.
        generation: its number.
        key: 32 bytes, if the store's records are authenticated.
        must_be_complete: report an unfinished or missing generation as a problem.

    Raises:
        StoreBusyError: the generation is being written, so what looks wrong may not be.
    """

    def check() -> VerificationReport:
        report = VerificationReport(store.address)
        if must_be_complete or generation in store.numbers():  # otherwise removed since it was listed
            _verify(store, generation, report, key, must_be_complete)
        if report.num_problems:
            raise _ProblemsError(report)
        return report

    try:
        return settled(store, generation, check)
    except _ProblemsError as error:
        return error.report


def _verify(
    store: StoreBackend, generation: int, report: VerificationReport, key: bytes | None, must_be_complete: bool
) -> None:
    try:
        store.check_structure(generation)
        with store.open(generation, key) as reader:
            report.records[generation] = _verify_records(reader, report).count
            num_states = sum(len(keys) for keys, _ in reader.state_batches())
            # There may be a few more states than records, after an incremental refresh that was interrupted between the
            # two. There may be a few less, of users who could not be stored, up to the limit at which a run stops.
            count = reader.manifest.count
            if reader.manifest.state_spec() is not None and count - num_states > max(10, 0.02 * count):
                report.add(f"gen-{generation} holds {num_states} states for {count} records")
            for name in reader.other_keys():
                if not name.startswith(b"!"):
                    report.add(
                        f"gen-{generation}: key {name[:40]!r} is neither a user key nor one of the store's own keys"
                    )
    except StoreUnavailableError:
        raise
    except UnfinishedError as error:
        if must_be_complete:
            report.add(f"gen-{generation}: {error}")
        report.unfinished.append(generation)
    except StoreError as error:
        report.add(f"gen-{generation}: {error}")


def _verify_records(reader: Generation, report: VerificationReport) -> Tally:
    tally, num_invalid = Tally(), 0
    for keys, records in reader.raw_batches():
        for index in _invalid(keys, records, reader, report):
            num_invalid += 1
            del keys[index], records[index]
        tally.add(keys, records)
    manifest, count = reader.manifest, tally.count + num_invalid
    if count != manifest.count:
        report.add(f"gen-{manifest.generation} holds {count} records, but its manifest says {manifest.count}")
    elif not num_invalid and tally.records_digest != manifest.records_digest:
        report.add(f"gen-{manifest.generation}: all records are valid, but they are not the ones that were published")
    return tally


def _invalid(keys: list[bytes], records: list[bytes], reader: Generation, report: VerificationReport) -> list[int]:
    """Positions of the invalid records, descending."""
    try:
        check_records(records, keys, reader.spec)
        return []
    except RecordError:
        invalid = []
    for index in range(len(keys)):
        try:
            check_records(records[index : index + 1], keys[index : index + 1], reader.spec)
        except RecordError as error:
            report.add(f"gen-{reader.manifest.generation}: {error}")
            invalid.append(index)
    return invalid[::-1]


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
    store = open_backend(root)
    published, problem = None, ""
    try:
        published = store.current()
    except StoreError as error:
        if not store.numbers():
            raise
        problem = str(error)
    generations = [_generation_stats(store, number) for number in store.numbers()]
    return StoreStats(store.address, published, generations, time.time_ns() // 1_000_000, problem)


def _generation_stats(store: StoreBackend, number: int) -> GenerationStats:
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
