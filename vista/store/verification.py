"""Whether a store is whole: structure, manifests, and every record of its complete generations."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from vista.errors import RecordError, StoreBusyError, StoreError, UnfinishedError
from vista.store.environment import check_structure
from vista.store.generation_reader import GenerationReader, Tally, open_generation, settled
from vista.store.layout import environment_path, environments_of, generation_path, list_generations, read_current
from vista.store.record import check_records

_LISTED = 20


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
            # users who could not be stored, and are to be recomputed.
            if reader.manifest.state_spec() is not None and num_states < 0.98 * reader.manifest.count:
                report.add(f"gen-{generation} holds {num_states} states for {reader.manifest.count} records")
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
        check_records([memoryview(record) for record in records], keys, reader.spec)
        return []
    except RecordError:
        faulty = []
    for index in range(len(keys)):
        try:
            check_records([memoryview(records[index])], keys[index : index + 1], reader.spec)
        except RecordError as error:
            report.add(f"gen-{reader.manifest.generation}: {error}")
            faulty.append(index)
    return faulty[::-1]
