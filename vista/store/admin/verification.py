"""Verification of a store: CURRENT, tombstones, manifests, the structure of the files, and every record."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from vista.errors import RecordError, StoreBusyError, StoreError, StoreUnavailableError, UnfinishedError
from vista.store.admin.managed_store import ManagedStore, managed_store
from vista.store.admin.whole_generation import WholeGeneration
from vista.store.format.record import check_records
from vista.store.remote.store_url import StoreUrl
from vista.store.tally import Tally

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
    store = managed_store(root)
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
    store: ManagedStore, generation: int, *, key: bytes | None = None, must_be_complete: bool = True
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
        return store.settled(generation, check)
    except _ProblemsError as error:
        return error.report


def _verify(
    store: ManagedStore, generation: int, report: VerificationReport, key: bytes | None, must_be_complete: bool
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


def _verify_records(reader: WholeGeneration, report: VerificationReport) -> Tally:
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


def _invalid(keys: list[bytes], records: list[bytes], reader: WholeGeneration, report: VerificationReport) -> list[int]:
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
