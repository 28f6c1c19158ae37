"""Copies of generations, from one store to that of a serving host."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import lmdb

from vista.errors import StoreError, StoreUnavailableError
from vista.store.admin.generation_builder import restamp_records
from vista.store.admin.generation_reader import Batch
from vista.store.admin.managed_store import ManagedStore, managed_store
from vista.store.admin.publish_report import PublishReport
from vista.store.admin.whole_generation import NewGeneration, WholeGeneration
from vista.store.erased_users import ErasedUsers
from vista.store.format.record_spec import RecordSpec
from vista.store.layout import store_address
from vista.store.lmdb.permissions import GROUP, PRIVATE
from vista.store.manifest import Manifest
from vista.store.remote.store_url import StoreUrl

logger = logging.getLogger(__name__)


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
    it with `publish=False` first, and again with True once the models are in place: the second call compares the copy
    and publishes it. If the source's generation has changed in place since an earlier copy, it becomes a new generation
    of the target. The copy keeps the source's number if that is above all numbers that the target ever had, and its
    records are then identical byte for byte. Otherwise it gets the next number, which is all that differs in the
    records. The source is only read.

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
    source, target = map(managed_store, ends)
    number = source.current() if generation is None else generation
    source.check_structure(number)
    with source.open(number, key):
        pass  # It exists, so the target may be made.
    with target.locked(GROUP if shared_with_group else PRIVATE):
        copy = source.settled(number, lambda: _copy(source, number, target, key))
        before = target.published_or_none()
        if publish and before != copy.generation:
            target.publish(copy.generation, target.numbers() if before is None else [before])
    return dataclasses.replace(copy, published=publish or before == copy.generation)


def _copy(source_store: ManagedStore, number: int, target: ManagedStore, key: bytes | None) -> PublishReport:
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
            builder.finish()
        finally:
            builder.close()
    return _report(target, wanted.generation, builder.manifest.count, num_resumed=num_resumed)


def _report(target: ManagedStore, number: int, num_records: int, *, num_resumed: int) -> PublishReport:
    size = target.size_bytes(number)
    return PublishReport(target.address, number, num_records, size, num_resumed=num_resumed)


def _resume_or_start(
    source: WholeGeneration, target: ManagedStore, wanted: Manifest, key: bytes | None
) -> NewGeneration:
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


def _take_held(builder: NewGeneration, source: WholeGeneration, erased_users: ErasedUsers) -> bool:
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


def _is_equal(source: WholeGeneration, target: ManagedStore, number: int, key: bytes | None) -> bool:
    """Whether a generation of the target is complete and holds the source's records, apart from the number."""
    try:
        with target.open(number, key) as held:
            return _comparable(source.manifest) == _comparable(held.manifest) and _same(
                _restamped(source, held.spec), held.batches()
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


def _restamped(source: WholeGeneration, spec: RecordSpec, after: bytes = b"u") -> Iterator[Batch]:
    """The source's records beyond a key, moved to the generation of `spec`; unchanged if it has the same number."""
    for keys, records in source.batches(after):
        yield keys, records if spec.generation == source.spec.generation else restamp_records(keys, records, spec)


def _same(ours: Iterator[Batch], theirs: Iterator[Batch]) -> bool:
    mine, others = _flat(ours), _flat(theirs)
    return all(pair == next(others, None) for pair in mine) and next(others, None) is None


def _flat(batches: Iterator[Batch]) -> Iterator[tuple[bytes, bytes]]:
    for keys, records in batches:
        yield from zip(keys, records, strict=True)
