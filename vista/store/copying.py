"""One generation into the store of a serving host, resumable, proven equal, and flipped only then."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vista.errors import StoreError
from vista.store.administration import PublishReport, publish_report
from vista.store.environment import check_structure
from vista.store.generation_builder import GenerationBuilder, cannot_write, locked, next_number, restamp_records
from vista.store.generation_files import flip
from vista.store.generation_reader import Batch, GenerationReader, open_generation, settled
from vista.store.layout import (
    PARTIAL_PREFIX,
    Manifest,
    environment_path,
    list_generations,
    prepare_root,
    read_current,
    remove_leftovers,
    served_or_none,
    set_store_modes,
)
from vista.store.permissions import GROUP, PRIVATE, Modes
from vista.store.record import RecordSpec
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
    modes = GROUP if shared_with_group else PRIVATE
    try:
        prepare_root(to, modes)
    except OSError as error:
        raise cannot_write(to, error) from error
    with locked(to):
        set_store_modes(to, modes)
        done = settled(root, number, lambda: _bring(root, number, to, key, modes))
        before = served_or_none(to)
        if publish and before != done.generation:
            flip(to, done.generation, () if before is None else (before,))
    return dataclasses.replace(
        publish_report(to, done.generation, done.num_records), published=publish, num_kept=done.num_kept
    )


@dataclass(frozen=True, slots=True)
class _Brought:
    generation: int
    num_records: int
    num_kept: int


def _bring(root: Path, number: int, to: Path, key: bytes | None, modes: Modes) -> _Brought:
    """A complete generation of the other store that holds what the source's does; made if there is none."""
    check_structure(environment_path(root, number))
    with open_generation(root, number, key) as source:
        manifest, tombstones = source.manifest.without_states(), Tombstones(to)
        for there in reversed(list_generations(to)):
            if _is_equal(source, to, there, key):
                return _Brought(there, manifest.count, manifest.count)
        wanted = dataclasses.replace(manifest, generation=max(number, next_number(to)))
        remove_leftovers(to, but=f"{PARTIAL_PREFIX}gen-{wanted.generation}")
        builder = GenerationBuilder(to, wanted, key, modes, resume=True)
        if not _take_held(builder, source, tombstones):
            logger.warning("%s: what an earlier copy had brought is not what %s holds; it begins anew", to, root)
            builder.discard()
            builder = GenerationBuilder(to, wanted, key, modes)
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
    return _Brought(wanted.generation, builder.manifest.count, kept)


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
    return dataclasses.replace(manifest.without_states(), generation=0, records_digest="")


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
