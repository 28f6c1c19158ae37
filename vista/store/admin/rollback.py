"""Rollback of a store: publish an earlier generation again."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from vista.errors import StoreError, UnfinishedError
from vista.store.admin.managed_store import ManagedStore, managed_store
from vista.store.admin.publish_report import PublishReport
from vista.store.admin.verification import verify_generation
from vista.store.remote.store_url import StoreUrl


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
    managed = [managed_store(store) for store in stores]
    with ExitStack() as locks:
        for store in managed:
            locks.enter_context(store.locked())
        reports = [_verified(store, _generation_before(store, key) if to is None else to, key) for store in managed]
        for store, report in zip(managed, reports, strict=True):
            store.publish(report.generation, store.numbers())
    return reports


def _verified(store: ManagedStore, number: int, key: bytes | None) -> PublishReport:
    report = verify_generation(store, number, key=key)
    if report.num_problems:
        raise StoreError(
            f"{store.address}: gen-{number} cannot be published: {report.problems[0]} (problems in total: "
            f"{report.num_problems}); name another one with to=N, or run a full `vista refresh`. The published "
            "generation is unchanged"
        )
    return PublishReport(store.address, number, report.records[number], store.size_bytes(number))


def _generation_before(store: ManagedStore, key: bytes | None) -> int:
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
