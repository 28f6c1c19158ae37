"""Rollback of a store: publish an earlier generation again."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from vista.errors import StoreError, UnfinishedError
from vista.store.admin.generation_reader import open_generation
from vista.store.admin.publish_report import PublishReport
from vista.store.admin.verification import verify_generation
from vista.store.layout import list_generations, read_current, store_path
from vista.store.locks import locked
from vista.store.publication import publish_generation


def roll_back(*stores: str | Path, to: int | None = None, key: bytes | None = None) -> list[PublishReport]:
    """Publish earlier generations of some stores again, after each of them has passed every check of `verify_store`.

    All generations are kept, including those published before. The stores change one after the other. After an error in
    between, such as that of a disk, call it again with the number of the generation in `to`.

    Args:
        stores: their folders: one store, or the shards of one.
        to: number of the generation; by default the newest complete one before the published one.
        key: 32 bytes, if the stores' records are authenticated.

    Raises:
        StoreLockedError: another process writes the store.
        StoreBusyError: users are being erased without a pause; try again.
        StoreError: there is no such generation, or it is not complete or is damaged. The published generation is
            unchanged.
    """
    roots = [store_path(root) for root in stores]
    for root in roots:
        if not root.is_dir() or not list_generations(root):
            read_current(root)  # raises, so that no lock file is made in a folder that is not a store
    with ExitStack() as locks:
        for root in roots:
            locks.enter_context(locked(root))
        reports = [_verified(root, _generation_before(root, key) if to is None else to, key) for root in roots]
        for report in reports:
            publish_generation(report.path, report.generation, list_generations(report.path))
    return reports


def _verified(root: Path, number: int, key: bytes | None) -> PublishReport:
    report = verify_generation(root, number, key=key)
    if report.num_problems:
        raise StoreError(
            f"{root}: gen-{number} cannot be published: {report.problems[0]} (problems in total: "
            f"{report.num_problems}). The published generation is unchanged"
        )
    return PublishReport.of(root, number, report.records[number])


def _generation_before(root: Path, key: bytes | None) -> int:
    current = read_current(root)
    for number in reversed(list_generations(root)):
        if number < current:
            try:
                with open_generation(root, number, key):
                    return number
            except UnfinishedError:
                continue
    raise StoreError(f"{root}: there is no complete generation before gen-{current}; name one with to=N, or refresh")
