"""What an operator does with a store: compact it, go back to a kept generation, and copy one to a serving host."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import lmdb

from vista.errors import StoreError, UnfinishedError
from vista.store.admin.inspection import verify_generation
from vista.store.admin.whole_generations import (
    Batch,
    GenerationBuilder,
    GenerationReader,
    next_number,
    open_generation,
    restamp_records,
    settled,
)
from vista.store.format.record import RecordSpec
from vista.store.format.state_record import restamp_states
from vista.store.generation_files import flip
from vista.store.layout import (
    PARTIAL_PREFIX,
    Manifest,
    environment_path,
    environments_of,
    generation_path,
    kept_beside_a_new_one,
    list_generations,
    read_current,
    remove_leftovers,
    served_or_none,
)
from vista.store.lmdb.data_file import check_structure
from vista.store.lmdb.locks import locked
from vista.store.lmdb.permissions import GROUP, PRIVATE, Modes, modes_of
from vista.store.shards import check_place
from vista.store.tombstones import Tombstones

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PublishReport:
    """What came of a compaction, an import or a copy."""

    path: Path
    generation: int
    num_records: int
    size_bytes: int
    """Of the generation's files."""
    published: bool = True
    num_kept: int = 0
    """Records of a copy that an earlier, interrupted one had brought."""

    def __str__(self) -> str:
        kept = f" ({self.num_kept:,} of them by an earlier run)" if self.num_kept else ""
        state = "is served" if self.published else "is there and verified, not served yet"
        return (
            f"generation {self.generation} of {self.path} {state}: {self.num_records:,} records{kept}, "
            f"{self.size_bytes:,} bytes"
        )


def compact_store(root: str | Path, *, key: bytes | None = None) -> PublishReport:
    """Write the served generation anew under the next number, without free pages, publish it and remove all others.

    Nothing of records that were removed before is in any file afterwards: pages that hold no record are not copied.
    Of users who are erased while it runs, bytes may be left for the next one.
    (What a file system or a disk keeps of deleted files is theirs; readers that have not reloaded hold the old files.)

    Args:
        key: of an authenticated store.

    Raises:
        StoreLockedError: another process writes the store.
        StoreError: nothing is served, it is damaged, or the folder cannot be written; what is served is as before.
    """
    root = Path(root).absolute()
    read_current(root)  # else the lock would be the first thing to miss
    with locked(root):
        current = read_current(root)
        remove_leftovers(root)
        for environment in environments_of(root, current):
            check_structure(environment)
        with open_generation(root, current, key) as source:
            manifest = _compacted(root, source, key)
        flip(root, manifest.generation, ())
    return publish_report(root, manifest.generation, manifest.count)


def _compacted(root: Path, source: GenerationReader, key: bytes | None) -> Manifest:
    """A complete generation under the next number, of the records and states of the source."""
    wanted = dataclasses.replace(source.manifest, generation=next_number(root))
    builder = GenerationBuilder(root, wanted, key, modes_of(generation_path(root, source.manifest.generation)))
    try:
        # An erasure that was killed half-way has left some: here they go.
        tombstones = Tombstones(root)
        for keys, records in source.batches():
            keys, records = _without(tombstones, keys, records)
            builder.put(keys, restamp_records(keys, records, builder.spec))
        for keys, states in source.state_batches():
            keys, states = _without(tombstones, keys, states)
            builder.put_states(keys, restamp_states(states, wanted.generation))
        return builder.finish()
    except BaseException:
        builder.discard()
        raise


def _without(tombstones: Tombstones, keys: list[bytes], values: list[bytes]) -> tuple[list[bytes], list[bytes]]:
    kept = [place for place, erased in enumerate(tombstones.erased(keys)) if not erased]
    return [keys[place] for place in kept], [values[place] for place in kept]


def roll_back(*stores: str | Path, to: int | None = None, key: bytes | None = None) -> list[PublishReport]:
    """Serve kept generations of some stores again, once each of them has passed every check of `verify`.

    The generations that are served now are kept too. Stores flip one after the other: after an error in between, such
    as of a disk, name the generations with `to` when you call again.

    Args:
        stores: their folders: of one store, or of the parts of one.
        to: its number; by default the newest complete one before the served one.
        key: of an authenticated store.

    Raises:
        StoreLockedError: another process writes the store.
        StoreBusyError: users are being erased without a pause; try again.
        StoreError: there is no such generation, it is not complete or not sound; what is served is as before.
    """
    roots = [Path(root).absolute() for root in stores]
    for root in roots:
        if not root.is_dir() or not list_generations(root):
            read_current(root)  # else the lock would be made in a folder that is no store
    with ExitStack() as held:
        for root in roots:
            held.enter_context(locked(root))
        reports = [_verified(root, _generation_before(root, key) if to is None else to, key) for root in roots]
        for report in reports:
            flip(report.path, report.generation, list_generations(report.path))
    return reports


def _verified(root: Path, number: int, key: bytes | None) -> PublishReport:
    report = verify_generation(root, number, key=key)
    if report.num_problems:
        raise StoreError(
            f"{root}: gen-{number} cannot be served: {report.problems[0]}. Problems in all: {report.num_problems}. "
            "What is served is as before"
        )
    return publish_report(root, number, report.records[number])


def _generation_before(root: Path, key: bytes | None) -> int:
    current = read_current(root)
    for number in reversed(list_generations(root)):
        if number < current:
            try:
                with open_generation(root, number, key):
                    return number
            except UnfinishedError:
                continue
    raise StoreError(f"{root}: no complete generation before gen-{current} is kept; name one with to=N, or refresh")


def publish_report(root: Path, generation: int, count: int, *, num_kept: int = 0) -> PublishReport:
    """Report of a generation that is there."""
    files = generation_path(root, generation).rglob("*")
    size = sum(file.stat().st_size for file in files if file.is_file())
    return PublishReport(root, generation, count, size, num_kept=num_kept)


def copy_generation(
    root: str | Path,
    to: str | Path,
    *,
    generation: int | None = None,
    publish: bool = True,
    key: bytes | None = None,
    shared_with_group: bool = False,
) -> PublishReport:
    """Bring one generation into the store of a serving host: copied, proven equal and verified there, then published.

    After a kill the same call goes on with what is there, if that is still what the source holds. Called with
    `publish=False` first, and again with True when the models have followed, it is a rollout in two steps: the second
    call compares and flips. What the source's generation became in place since an earlier copy is a new generation
    there. Its number is the source's if that is beyond all that were there, and its records are the source's byte for
    byte; else it is the next number, and the records differ in it. The source is only read.

    Args:
        to: the other store's folder, made if it is not there; only copies should be written to it.
        generation: of the source; by default the one served.
        publish: flip the other store's CURRENT and keep the generation that it served before; False only brings it.
        key: of an authenticated store.
        shared_with_group: let the group of the other folder read it.

    Raises:
        ConfigError: that folder holds another kind of store, undivided or divided in other parts.
        StoreLockedError: another process writes the other store.
        StoreBusyError: a refresh writes the source's generation without a pause.
        StoreError: the source is damaged, or holds users who were erased in the other store, or that cannot be written.
            What is served there is as before.
    """
    root, to = Path(root).absolute(), Path(to).absolute()
    if root.resolve() == to.resolve():
        raise StoreError(f"to={to} is the store itself; name another folder")
    number = read_current(root) if generation is None else generation
    check_structure(environment_path(root, number))  # before a folder is made
    check_place(to)
    modes = GROUP if shared_with_group else PRIVATE
    with locked(to, modes):
        done = settled(root, number, lambda: _bring(root, number, to, key, modes))
        before = served_or_none(to)
        if publish and before != done.generation:
            flip(to, done.generation, kept_beside_a_new_one(to))
    return dataclasses.replace(done, published=publish or before == done.generation)


def _bring(root: Path, number: int, to: Path, key: bytes | None, modes: Modes) -> PublishReport:
    """A complete generation of the other store that holds what the source's does; made if there is none."""
    check_structure(environment_path(root, number))
    with open_generation(root, number, key) as source:
        manifest, tombstones = source.manifest.without_states(), Tombstones(to)
        for there in reversed(list_generations(to)):
            if _is_equal(source, to, there, key):
                return publish_report(to, there, manifest.count, num_kept=manifest.count)
        wanted = dataclasses.replace(manifest, generation=max(number, next_number(to)))
        remove_leftovers(to, but=f"{PARTIAL_PREFIX}gen-{wanted.generation}")
        builder = _resumed(source, to, wanted, key, modes)
        kept = builder.tally.count
        try:
            for keys, records in _restamped(source, builder.spec, builder.last_key):
                if any(tombstones.erased(keys)):
                    raise StoreError(f"{to}: users were erased here who are still in {root}; erase them there")
                builder.put(keys, records)
            if not _same(_restamped(source, builder.spec), builder.held_batches()):
                raise StoreError(f"{root} was written while it was copied; run the same command again")
            builder.finish()
        finally:
            builder.close()
    return publish_report(to, wanted.generation, builder.manifest.count, num_kept=kept)


def _resumed(
    source: GenerationReader, to: Path, wanted: Manifest, key: bytes | None, modes: Modes
) -> GenerationBuilder:
    """A builder that goes on after what an earlier copy had brought; one that begins anew where that is of no use."""
    builder, reason = None, "is not what the source holds"
    try:
        builder = GenerationBuilder(to, wanted, key, modes, resume=True)
        if _take_held(builder, source, Tombstones(to)):
            return builder
    except (StoreError, lmdb.Error) as error:  # such as a file that was cut off before its first page
        reason = f"cannot be read: {error}"
    if builder is not None:
        builder.discard()
    logger.warning("%s: what an earlier copy had brought %s; it begins anew", to, reason)
    return GenerationBuilder(to, wanted, key, modes)


def _take_held(builder: GenerationBuilder, source: GenerationReader, tombstones: Tombstones) -> bool:
    """Let a builder go on after what it holds, if these are the source's first records, and nobody of them erased."""
    theirs = _flat(_restamped(source, builder.spec))
    for keys, records in builder.held_batches():
        if any(tombstones.erased(keys)):
            return False
        for pair in zip(keys, records, strict=True):
            if next(theirs, None) != pair:
                return False
        builder.tally.add(keys, records)
        builder.last_key = keys[-1]
    return True


def _is_equal(source: GenerationReader, to: Path, number: int, key: bytes | None) -> bool:
    """Whether a generation of the other store is complete and holds what the source does, but for its number."""
    try:
        with open_generation(to, number, key) as held:
            return _about(source.manifest) == _about(held.manifest) and _same(
                _restamped(source, held.spec), held.batches()
            )
    except StoreError as error:
        logger.info("%s: gen-%d is not what is copied: %s", to, number, error)
        return False


def _about(manifest: Manifest) -> Manifest:
    """What two generations of the same records agree in, whatever their numbers."""
    # An update only ever widens the kind; a copy counts it anew.
    return dataclasses.replace(manifest.without_states(), generation=0, records_digest="", user_kind=None)


def _restamped(source: GenerationReader, spec: RecordSpec, after: bytes = b"u") -> Iterator[Batch]:
    """The source's records beyond a key as those of another generation; of one with its number, as they are."""
    for keys, records in source.batches(after):
        yield keys, records if spec.generation == source.spec.generation else restamp_records(keys, records, spec)


def _same(ours: Iterator[Batch], theirs: Iterator[Batch]) -> bool:
    mine, others = _flat(ours), _flat(theirs)
    return all(pair == next(others, None) for pair in mine) and next(others, None) is None


def _flat(batches: Iterator[Batch]) -> Iterator[tuple[bytes, bytes]]:
    for keys, records in batches:
        yield from zip(keys, records, strict=True)
