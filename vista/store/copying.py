"""One generation into the store of a serving host, resumable, proven equal, and flipped only then."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

from vista.errors import StoreError, UnfinishedError
from vista.store.administration import PublishReport, publish_report
from vista.store.environment import check_structure
from vista.store.generation_builder import GenerationBuilder, cannot_write, locked
from vista.store.generation_files import flip
from vista.store.generation_reader import Batch, GenerationReader, open_generation
from vista.store.layout import (
    PARTIAL_PREFIX,
    environment_path,
    list_generations,
    prepare_root,
    read_current,
    remove_leftovers,
    served_or_none,
    set_store_modes,
)
from vista.store.permissions import GROUP, PRIVATE
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
    call compares and flips. The source is only read.

    Args:
        to: the other store's folder, made if it is not there; only copies should be written to it.
        generation: by default the one served.
        publish: flip the other store's CURRENT and keep the generation that it served before; False only brings it.
        key: of an authenticated store.
        shared_with_group: let the group of the other folder read it.

    Raises:
        StoreLockedError: another process writes the other store.
        StoreError: the source is damaged, or changed meanwhile; the other folder cannot be written or has another
            generation of that number. What is served there is as before.
    """
    root, to = Path(root).absolute(), Path(to).absolute()
    if root.resolve() == to.resolve():
        raise StoreError(f"to={to} is the store itself; name another folder")
    number = read_current(root) if generation is None else generation
    check_structure(environment_path(root, number))
    with open_generation(root, number, key) as source:
        modes = GROUP if shared_with_group else PRIVATE
        try:
            prepare_root(to, modes)
        except OSError as error:
            raise cannot_write(to, error) from error
        manifest = source.manifest.without_states()
        with locked(to):
            set_store_modes(to, modes)
            kept, tombstones = 0, Tombstones(to)
            num_erased = tombstones.count()
            if number in list_generations(to):
                kept = _compare_complete(source, to, number, key)
            else:
                remove_leftovers(to, but=f"{PARTIAL_PREFIX}gen-{number}")
                builder = GenerationBuilder(to, manifest, key, modes, resume=True)
                if not _take_held(builder, source, tombstones):
                    logger.warning(
                        "%s: what an earlier copy had brought is not what %s holds; it begins anew", to, root
                    )
                    builder.discard()
                    builder = GenerationBuilder(to, manifest, key, modes)
                kept = builder.tally.count
                try:
                    for keys, records in source.batches(builder.last_key):
                        if any(tombstones.erased(keys)):
                            raise StoreError(f"{to}: users were erased here who are still in {root}; erase them there")
                        builder.put(keys, records)
                    if not _equal(source.batches(), builder.held_batches()):
                        raise _changed(root)
                    builder.finish()
                finally:
                    builder.close()
            before = served_or_none(to)
            if publish and before != number:
                flip(to, number, () if before is None else (before,), num_erased)
    return dataclasses.replace(publish_report(to, number, source.manifest.count), published=publish, num_kept=kept)


def _take_held(builder: GenerationBuilder, source: GenerationReader, tombstones: Tombstones) -> bool:
    """Let a builder go on after what it holds, if these are the source's first records, and nobody of them erased."""
    theirs = _flat(source.batches())
    for keys, records in builder.held_batches():
        if any(tombstones.erased(keys)):
            return False
        for pair in zip(keys, records, strict=True):
            if next(theirs, None) != pair:
                return False
        builder.tally.add(keys, records)
        builder.last_key = keys[-1]
    return True


def _compare_complete(source: GenerationReader, to: Path, number: int, key: bytes | None) -> int:
    try:
        with open_generation(to, number, key) as held:
            if _equal(source.batches(), held.batches()):
                return held.manifest.count
    except UnfinishedError:
        pass
    raise StoreError(
        f"{to} has a gen-{number} of its own, with other records; give the source a new number (`vista store compact "
        f"store={source.path.parents[1]}`), or copy to another folder"
    )


def _equal(ours: Iterator[Batch], theirs: Iterator[Batch]) -> bool:
    mine, others = _flat(ours), _flat(theirs)
    return all(pair == next(others, None) for pair in mine) and next(others, None) is None


def _flat(batches: Iterator[Batch]) -> Iterator[tuple[bytes, bytes]]:
    for keys, records in batches:
        yield from zip(keys, records, strict=True)


def _changed(root: Path) -> StoreError:
    return StoreError(f"{root} was written while it was copied; run the same command again")
