"""Copies of generations, from one store to that of a serving host."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import lmdb

from vista.errors import StoreError
from vista.store.admin.generation_builder import GenerationBuilder, restamp_records
from vista.store.admin.generation_reader import Batch, GenerationReader, open_generation, read_settled
from vista.store.admin.publish_report import PublishReport
from vista.store.format.record_spec import RecordSpec
from vista.store.layout import (
    PARTIAL_PREFIX,
    environment_path,
    generations_to_keep,
    list_generations,
    next_number,
    published_or_none,
    read_current,
    remove_store_leftovers,
    store_path,
)
from vista.store.lmdb.data_file import check_structure
from vista.store.lmdb.permissions import GROUP, PRIVATE, Permissions
from vista.store.locks import locked
from vista.store.manifest import Manifest
from vista.store.publication import publish_generation
from vista.store.shards import check_place
from vista.store.tombstones import Tombstones

logger = logging.getLogger(__name__)


def copy_generation(
    root: str | Path,
    to: str | Path,
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
        root: folder of the source store.
        to: folder of the target store, made if it does not exist; write only copies to it.
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
    root, to = store_path(root), store_path(to)
    if root.resolve() == to.resolve():
        raise StoreError(f"to={to} is the source store itself; name another folder")
    number = read_current(root) if generation is None else generation
    check_structure(environment_path(root, number))  # before a folder is made
    check_place(to)
    permissions = GROUP if shared_with_group else PRIVATE
    with locked(to, permissions):
        copy = read_settled(root, number, lambda: _copy(root, number, to, key, permissions))
        before = published_or_none(to)
        if publish and before != copy.generation:
            publish_generation(to, copy.generation, generations_to_keep(to))
    return dataclasses.replace(copy, published=publish or before == copy.generation)


def _copy(root: Path, number: int, to: Path, key: bytes | None, permissions: Permissions) -> PublishReport:
    """Find or make a complete generation of the target with the source's records."""
    check_structure(environment_path(root, number))
    with open_generation(root, number, key) as source:
        manifest, tombstones = source.manifest.without_states(), Tombstones(to)
        for existing in reversed(list_generations(to)):
            if _is_equal(source, to, existing, key):
                return PublishReport.of(to, existing, manifest.count, num_resumed=manifest.count)
        wanted = dataclasses.replace(manifest, generation=next_number(to, least=number))
        remove_store_leftovers(to, except_for=f"{PARTIAL_PREFIX}gen-{wanted.generation}")
        builder = _resume_or_start(source, to, wanted, key, permissions)
        num_resumed = builder.tally.count
        try:
            for keys, records in _restamped(source, builder.spec, builder.last_key):
                if any(tombstones.erased(keys)):
                    raise StoreError(
                        f"{to}: some users were erased here, but are still in {root}; erase them there too, then copy "
                        "again"
                    )
                builder.put(keys, records)
            if not _same(_restamped(source, builder.spec), builder.held_batches()):
                raise StoreError(f"{root} was written while it was copied; rerun the command")
            builder.finish()
        finally:
            builder.close()
    return PublishReport.of(to, wanted.generation, builder.manifest.count, num_resumed=num_resumed)


def _resume_or_start(
    source: GenerationReader, to: Path, wanted: Manifest, key: bytes | None, permissions: Permissions
) -> GenerationBuilder:
    """A builder that continues an earlier, interrupted copy, or a new one if that copy is of no use."""
    builder, reason = None, "is not what the source holds"
    try:
        builder = GenerationBuilder(to, wanted, key, permissions, resume=True)
        if _take_held(builder, source, Tombstones(to)):
            return builder
    except (StoreError, lmdb.Error) as error:  # such as a file that was truncated within its first page
        reason = f"cannot be read: {error}"
    if builder is not None:
        builder.discard()
    logger.warning("%s: what an earlier run copied %s; the copy starts over", to, reason)
    return GenerationBuilder(to, wanted, key, permissions)


def _take_held(builder: GenerationBuilder, source: GenerationReader, tombstones: Tombstones) -> bool:
    """Let a builder continue after the records it holds, if they are the source's first ones and nobody was erased."""
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
    """Whether a generation of the target is complete and holds the source's records, apart from the number."""
    try:
        with open_generation(to, number, key) as held:
            return _comparable(source.manifest) == _comparable(held.manifest) and _same(
                _restamped(source, held.spec), held.batches()
            )
    except StoreError as error:
        logger.info("%s: gen-%d differs from the source: %s", to, number, error)
        return False


def _comparable(manifest: Manifest) -> Manifest:
    """The manifest without the fields in which two generations of the same records may differ."""
    # Updates only ever widen the kind of the users; a copy determines it from the records that are left.
    return dataclasses.replace(manifest.without_states(), generation=0, records_digest="", user_kind=None)


def _restamped(source: GenerationReader, spec: RecordSpec, after: bytes = b"u") -> Iterator[Batch]:
    """The source's records beyond a key, moved to the generation of `spec`; unchanged if it has the same number."""
    for keys, records in source.batches(after):
        yield keys, records if spec.generation == source.spec.generation else restamp_records(keys, records, spec)


def _same(ours: Iterator[Batch], theirs: Iterator[Batch]) -> bool:
    mine, others = _flat(ours), _flat(theirs)
    return all(pair == next(others, None) for pair in mine) and next(others, None) is None


def _flat(batches: Iterator[Batch]) -> Iterator[tuple[bytes, bytes]]:
    for keys, records in batches:
        yield from zip(keys, records, strict=True)
