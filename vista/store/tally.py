"""Counting records: the numbers in a manifest, computed from the records themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vista.progress_bar import progress_bar
from vista.store.format.keys import common_kind, kinds_of
from vista.store.format.record import check_records, sum_of_checksums
from vista.store.format.record_spec import RecordSpec
from vista.store.lmdb.transactions import ReadTransactions, walk


@dataclass(slots=True)
class Tally:
    """What a manifest says about all records, accumulated batch by batch."""

    count: int = 0
    digest: int = 0
    user_kind: str | None = None
    """int, str, mixed, or None without records."""

    def add(self, keys: Sequence[bytes], records: Sequence[bytes | memoryview]) -> None:
        """Count a batch."""
        self.count += len(keys)
        self.digest = (self.digest + sum_of_checksums(records)) % (1 << 64)
        self.user_kind = common_kind([self.user_kind, *kinds_of(keys)])

    @property
    def records_digest(self) -> str:
        """Sum mod 2^64 of the checksums, in hex."""
        return f"{self.digest:016x}"


def tally_of(read: ReadTransactions, spec: RecordSpec, *, num_users: int | None = None) -> Tally:
    """Check and count all records of an environment.

    Args:
        read: of an environment.
        spec: what its records hold.
        num_users: how many there should be, for the progress.

    Raises:
        RecordError: a record is corrupt; the message names the first one's user.
    """
    tally = Tally()

    def add(keys: list[bytes], records: list[memoryview]) -> None:
        check_records(records, keys, spec)
        tally.add(keys, records)

    with progress_bar(total=num_users, desc="check records", unit="user", leave=False) as bar:
        for keys, _ in walk(read, add):
            bar.update(len(keys))
    return tally
