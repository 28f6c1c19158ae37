"""What an operator does with a store: compact it, and go back to a kept generation."""

from __future__ import annotations

import dataclasses
import logging
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from vista.errors import StoreError, UnfinishedError
from vista.store.environment import check_structure
from vista.store.generation_builder import (
    GenerationBuilder,
    locked,
    next_number,
    restamp_records,
)
from vista.store.generation_files import flip
from vista.store.generation_reader import GenerationReader, open_generation
from vista.store.layout import (
    Manifest,
    environments_of,
    generation_path,
    list_generations,
    read_current,
    remove_leftovers,
)
from vista.store.permissions import modes_of
from vista.store.state_record import restamp_states
from vista.store.tombstones import Tombstones
from vista.store.verification import verify_generation

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
    """Serve kept generations of some stores again, all of them or none, after every check of `verify`.

    The generations that are served now are kept too.

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


def publish_report(root: Path, generation: int, count: int) -> PublishReport:
    """Report of a generation that is there."""
    files = generation_path(root, generation).rglob("*")
    return PublishReport(root, generation, count, sum(file.stat().st_size for file in files if file.is_file()))
