"""Operations on whole stores: copies to serving hosts, rollback, compaction, verification, and statistics."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import lmdb

from vista.errors import RecordError, StoreBusyError, StoreError, StoreUnavailableError, UnfinishedError
from vista.store.backend import Folder, open_backend, settled
from vista.store.folder_files import Tombstones, lock_holders
from vista.store.folder_generation import Batch, FolderGeneration, SharedEnvironment
from vista.store.folder_writer import FolderBuilder
from vista.store.item_values import ItemValues
from vista.store.layout import (
    GROUP,
    PRIVATE,
    Shard,
    StoreUrl,
    check_place,
    environment_path,
    generation_path,
    next_number,
    permissions_of,
    store_address,
    store_path,
)
from vista.store.manifest import CHECKSUM_DIGITS, Manifest, Tally
from vista.store.record import RecordSpec, check_records
from vista.store.record_encoding import restamp_records
from vista.store.state_record import restamp_states
from vista.text_table import fitted

if TYPE_CHECKING:
    from vista.store.backend import Generation, GenerationBuilder, StoreBackend
    from vista.store.server import ServerTombstones

logger = logging.getLogger(__name__)

_LISTED = 20
"""Problems that a report lists."""


@dataclass(frozen=True, slots=True)
class PublishReport:
    """Result of a compaction, rollback, copy, export or import."""

    path: Path | StoreUrl
    generation: int
    num_records: int
    size_bytes: int
    """Of the generation's files; on a server, of its records, about."""
    published: bool = True
    num_resumed: int = 0
    """Records of a copy that an earlier, interrupted run had copied."""

    def __str__(self) -> str:
        resumed = f" ({self.num_resumed:,} of them by an earlier run)" if self.num_resumed else ""
        state = "is published" if self.published else "is complete and verified, but not published yet"
        return (
            f"generation {self.generation} of {self.path} {state}: {self.num_records:,} records{resumed}, "
            f"{self.size_bytes:,} bytes"
        )


def copy_generation(
    root: str | Path | StoreUrl,
    to: str | Path | StoreUrl,
    *,
    generation: int | None = None,
    publish: bool = True,
    key: bytes | None = None,
    shared_with_group: bool = False,
) -> PublishReport:
    """Copy one generation to the store of a serving host, compare and verify it there, then publish it.

    After a kill, the same call resumes with what was copied, if the source still holds it. For a two-step rollout, call
    it with `publish=False` first, and again with True before the scorers get the new model: the second call compares
    the copy and publishes it. If the source's generation has changed in place since an earlier copy, it becomes a new
    generation of the target. The copy keeps the source's number if that is above all numbers that the target ever had,
    and its records are then identical byte for byte. Otherwise it gets the next number, which is all that differs in
    the records. The source is only read.

    Args:
        root: folder or URL of the source store.
        to: folder of the target store, made if it does not exist, or its URL; write only copies to it.
        generation: of the source; by default the published one.
        publish: publish the copy, and keep the generation that the target published before.
        key: 32 bytes, if the source's records are authenticated.
        shared_with_group: let the group of the target folder read it.

    Raises:
        ConfigError: the target folder holds another kind of store: unsharded, or with another number of shards.
        StoreLockedError: another process writes the target.
        StoreBusyError: a refresh writes the source's generation without a pause.
        StoreError: the source is damaged or holds users who were erased in the target, or the target cannot be written.
            The target's published generation is unchanged.
    """
    ends = [store_address(end) for end in (root, to)]
    resolved = [end.resolve() if isinstance(end, Path) else end for end in ends]
    if resolved[0] == resolved[1]:
        raise StoreError(f"to={ends[1]} is the source store itself; name another one")
    source, target = map(open_backend, ends)
    number = source.current() if generation is None else generation
    source.check_structure(number)
    with source.open(number, key):
        pass  # It exists, so the target may be made.
    if isinstance(target.address, Path):
        check_place(target.address)
    with target.locked(GROUP if shared_with_group else PRIVATE):
        copy = settled(source, number, lambda: _copy(source, number, target, key))
        before = target.published_or_none()
        if publish and before != copy.generation:
            target.publish(copy.generation, target.numbers() if before is None else [before])
    return dataclasses.replace(copy, published=publish or before == copy.generation)


def _copy(source_store: StoreBackend, number: int, target: StoreBackend, key: bytes | None) -> PublishReport:
    """Find or make a complete generation of the target with the source's records."""
    source_store.check_structure(number)
    with source_store.open(number, key) as source:
        manifest, erased_users = source.manifest.without_states(), target.erased_users
        for existing in reversed(target.numbers()):
            if _is_equal(source, target, existing, key):
                return _report(target, existing, manifest.count, num_resumed=manifest.count)
        wanted = dataclasses.replace(manifest, generation=target.number_for(manifest))
        target.remove_leftovers(except_for=wanted.generation)
        builder = _resume_or_start(source, target, wanted, key)
        num_resumed = builder.tally.count
        try:
            for keys, records in _restamped(source, builder.spec, builder.last_key):
                if any(erased_users.erased(keys)):
                    raise StoreError(
                        f"{target.address}: some users were erased here, but are still in {source_store.address}; "
                        "erase them there too, then copy again"
                    )
                builder.put(keys, records)
            if not _same(_restamped(source, builder.spec), builder.held_batches()):
                raise StoreError(f"{source_store.address} was written while it was copied; rerun the command")
            if (items := source.items()) is not None:
                builder.put_items(items)
            builder.finish()
        finally:
            builder.close()
    return _report(target, wanted.generation, builder.manifest.count, num_resumed=num_resumed)


def _report(target: StoreBackend, number: int, num_records: int, *, num_resumed: int) -> PublishReport:
    size = target.size_bytes(number)
    return PublishReport(target.address, number, num_records, size, num_resumed=num_resumed)


def _resume_or_start(
    source: Generation, target: StoreBackend, wanted: Manifest, key: bytes | None
) -> GenerationBuilder:
    """A builder that continues an earlier, interrupted copy, or a new one if that copy is of no use."""
    builder, reason = None, "is not what the source holds"
    try:
        builder = target.builder(wanted, key, resume=True)
        if _take_held(builder, source, target.erased_users):
            return builder
    except StoreUnavailableError:
        raise
    except (StoreError, lmdb.Error) as error:  # such as a file that was truncated within its first page
        reason = f"cannot be read: {error}"
    if builder is not None:
        builder.discard()
    logger.warning("%s: what an earlier run copied %s; the copy starts over", target.address, reason)
    return target.builder(wanted, key, resume=False)


def _take_held(builder: GenerationBuilder, source: Generation, erased_users: Tombstones | ServerTombstones) -> bool:
    """Let a builder continue after the records it holds, if they are the source's first ones and nobody was erased."""
    theirs = _flat(_restamped(source, builder.spec))
    for keys, records in builder.held_batches():
        if any(erased_users.erased(keys)):
            return False
        for pair in zip(keys, records, strict=True):
            if next(theirs, None) != pair:
                return False
        builder.tally.add(keys, records)
        builder.last_key = keys[-1]
    return True


def _is_equal(source: Generation, target: StoreBackend, number: int, key: bytes | None) -> bool:
    """Whether a generation of the target is complete and holds the source's records, apart from the number. One that
    holds users who were erased in the target, as an interrupted erasure leaves it, is of no use."""
    try:
        with target.open(number, key) as held:
            remaining = (batch for batch in held.batches() if not any(target.erased_users.erased(batch[0])))
            return _comparable(source.manifest) == _comparable(held.manifest) and _same(
                _restamped(source, held.spec), remaining
            )
    except StoreUnavailableError:
        raise
    except StoreError as error:
        logger.info("%s: gen-%d differs from the source: %s", target.address, number, error)
        return False


def _comparable(manifest: Manifest) -> Manifest:
    """The manifest without the fields in which two generations of the same records may differ."""
    # Updates only ever widen the kind of the users; a copy determines it from the records that are left.
    return dataclasses.replace(manifest.without_states(), generation=0, records_digest="", user_kind=None)


def _restamped(source: Generation, spec: RecordSpec, after: bytes = b"u") -> Iterator[Batch]:
    """The source's records beyond a key, moved to the generation of `spec`; unchanged if it has the same number."""
    for keys, records in source.batches(after):
        yield keys, records if spec.generation == source.spec.generation else restamp_records(keys, records, spec)


def _same(ours: Iterator[Batch], theirs: Iterator[Batch]) -> bool:
    mine, others = _flat(ours), _flat(theirs)
    return all(pair == next(others, None) for pair in mine) and next(others, None) is None


def _flat(batches: Iterator[Batch]) -> Iterator[tuple[bytes, bytes]]:
    for keys, records in batches:
        yield from zip(keys, records, strict=True)


def roll_back(*stores: str | Path | StoreUrl, to: int | None = None, key: bytes | None = None) -> list[PublishReport]:
    """Publish earlier generations of some stores again, after each of them has passed every check of `verify_store`.

    All generations are kept, including those published before. The stores change one after the other. After an error in
    between, such as that of a disk, call it again with the number of the generation in `to`.

    Args:
        stores: their folders or URLs: one store, or the shards of one.
        to: number of the generation; by default the newest complete one before the published one.
        key: 32 bytes, if the stores' records are authenticated.

    Raises:
        StoreLockedError: another process writes the store.
        StoreBusyError: users are being erased without a pause; try again.
        StoreError: there is no such generation, or it is not complete or is damaged. The published generation is
            unchanged.
    """
    managed = [open_backend(store) for store in stores]
    with ExitStack() as locks:
        for store in managed:
            locks.enter_context(store.locked())
        reports = [_verified(store, _generation_before(store, key) if to is None else to, key) for store in managed]
        for store, report in zip(managed, reports, strict=True):
            store.publish(report.generation, store.numbers())
    return reports


def _verified(store: StoreBackend, number: int, key: bytes | None) -> PublishReport:
    report = verify_generation(store, number, key=key)
    if report.num_problems:
        raise StoreError(
            f"{store.address}: gen-{number} cannot be published: {report.problems[0]} (problems in total: "
            f"{report.num_problems}); name another one with to=N, or run a full `vista refresh`. The published "
            "generation is unchanged"
        )
    return PublishReport(store.address, number, report.records[number], store.size_bytes(number))


def _generation_before(store: StoreBackend, key: bytes | None) -> int:
    current = store.current()
    for number in reversed(store.numbers()):
        if number < current:
            try:
                with store.open(number, key):
                    return number
            except UnfinishedError:
                continue
    raise StoreError(
        f"{store.address}: there is no complete generation before gen-{current}; name one with to=N, or refresh"
    )


def compact_store(root: str | Path | StoreUrl, *, key: bytes | None = None) -> PublishReport:
    """Rewrite the published generation under the next number without free pages, publish it, and remove all others.

    Afterwards no file holds bytes of records that were removed before, because pages in use are the only ones copied.
    Bytes of users who are erased during the compaction may remain until the next one. What the file system or the disk
    keeps of deleted files is beyond this function, and readers that have not reloaded still hold the old files.

    Args:
        root: the store's folder.
        key: 32 bytes, if the store's records are authenticated.

    Raises:
        StoreLockedError: another process writes the store.
        StoreError: nothing is published, it is damaged, or the folder cannot be written. The published generation is
            unchanged.
    """
    folder = Folder(store_path(root))
    folder.current()  # first, so that no lock file is made in a folder that is not a store
    with folder.locked():
        current = folder.current()
        folder.remove_leftovers()
        folder.check_structure(current)
        with folder.open(current, key) as source:
            manifest = _compacted(source, key)
        folder.publish(manifest.generation, ())
    size = folder.size_bytes(manifest.generation)
    return PublishReport(folder.address, manifest.generation, manifest.count, size)


def _compacted(source: FolderGeneration, key: bytes | None) -> Manifest:
    """Build a complete generation with the next number from the records and states of the source."""
    root = source.root
    wanted = dataclasses.replace(source.manifest, generation=next_number(root))
    permissions = permissions_of(generation_path(root, source.manifest.generation))
    builder = FolderBuilder(root, wanted, key, permissions)
    try:
        tombstones = Tombstones(root)  # An interrupted erasure may have left some of its users.
        for keys, records in source.batches():
            keys, records = _without_erased(tombstones, keys, records)
            builder.put(keys, restamp_records(keys, records, builder.spec))
        for keys, states in source.state_batches():
            keys, states = _without_erased(tombstones, keys, states)
            builder.put_states(keys, restamp_states(states, wanted.generation))
        if (items := source.items()) is not None:
            builder.put_items(items)
        return builder.finish()
    except BaseException:
        builder.discard()
        raise


def _without_erased(tombstones: Tombstones, keys: list[bytes], values: list[bytes]) -> tuple[list[bytes], list[bytes]]:
    remaining = [place for place, erased in enumerate(tombstones.erased(keys)) if not erased]
    return [keys[place] for place in remaining], [values[place] for place in remaining]


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
    user, generation and, with a key, its authentication code. Nobody in it may have been erased.

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
        if generation in report.records and (num_erased := _num_erased(store, generation, key)):
            report.add(
                f"gen-{generation} holds {num_erased} users who were erased; an erasure is running, or was interrupted "
                "and must be repeated"
            )
    return report


def _num_erased(store: StoreBackend, generation: int, key: bytes | None) -> int:
    """How many users of a complete generation were erased; 0 if the tombstones cannot be read."""
    try:
        if not len(store.erased_users):
            return 0
        with store.open(generation, key) as reader:
            return sum(sum(store.erased_users.erased(keys)) for keys in reader.key_batches())
    except StoreUnavailableError:
        raise
    except StoreError:  # Other checks report damage. Another account cannot read the tombstones.
        return 0


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
            if (items := reader.items()) is not None:
                ItemValues.from_bytes(items, f"gen-{generation}")
            if ("" if items is None else items[:CHECKSUM_DIGITS].decode()) != reader.manifest.items_digest:
                report.add(f"gen-{generation}: its manifest names other values of items than it holds")
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
        if must_be_complete or _was_complete(store, generation):
            report.add(f"gen-{generation}: {error}")
        else:  # A refresh that was stopped may have left files that LMDB had not begun to fill.
            report.unfinished.append(generation)


def _was_complete(store: StoreBackend, generation: int) -> bool:
    try:
        return generation <= max(store.last_complete(), store.published_or_none() or 0)
    except StoreUnavailableError:
        raise
    except StoreError:  # LAST is damaged, so nothing is known.
        return True


def _verify_records(reader: Generation, report: VerificationReport) -> Tally:
    tally, num_invalid, num_strangers = Tally(), 0, 0
    shard = Shard.named(report.path)
    for keys, records in reader.raw_batches():
        num_strangers += 0 if shard is None else int((~shard.holds(keys)).sum())
        for index in _invalid(keys, records, reader, report):
            num_invalid += 1
            del keys[index], records[index]
        tally.add(keys, records)
    manifest, count = reader.manifest, tally.count + num_invalid
    if num_strangers:
        report.add(
            f"gen-{manifest.generation} holds {num_strangers} users of other shards, whom readers do not find here; "
            "give the folder the number of its shard, or refresh the shard in full"
        )
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
                f"summarizer {manifest.summarizer_id[:12]}…",
                *([f"key {manifest.key_id}"] if manifest.key_id else []),
            ]
        )


def store_stats(root: str | Path | StoreUrl) -> StoreStats:
    """Describe a store; nothing is changed, and no key is needed. Raises StoreError if there is no store."""
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
    except StoreUnavailableError:
        raise
    except StoreError as error:
        return GenerationStats(number, None, problem=str(error))
    return GenerationStats(number, manifest, complete, num_records, live, size, num_open)


def _date(time_ms: int) -> str:
    return f"{datetime.fromtimestamp(time_ms / 1000, UTC):%Y-%m-%d %H:%M} UTC"


def _of_files(root: Path, number: int) -> tuple[int, int, int | None]:
    """Bytes in use, bytes on disk, and the number of other processes that have the generation open."""
    path = environment_path(root, number)
    with SharedEnvironment.acquire(path) as environment:
        live, num_open = environment.live_bytes(), _num_open(path)
    size = sum(512 * file.stat().st_blocks for file in generation_path(root, number).rglob("*") if file.is_file())
    return live, size, num_open


def _num_open(path: Path) -> int | None:
    """Number of other processes that hold LMDB's lock on a lock file; its reader table lists only open transactions."""
    holders = lock_holders(path / "lock.mdb")
    return None if holders is None else len(holders - {os.getpid()})
