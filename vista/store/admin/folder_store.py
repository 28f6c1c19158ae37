"""A store in a folder, as operations on whole generations use it (`vista.store.admin.managed_store.ManagedStore`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TypeVar

import lmdb

from vista.errors import StoreError, UnfinishedError
from vista.store.admin.generation_builder import GenerationBuilder
from vista.store.admin.generation_reader import GenerationReader, open_generation, read_settled
from vista.store.format.keys import MANIFEST_KEY
from vista.store.layout import (
    PARTIAL_PREFIX,
    TOMBSTONES,
    entries_like_generations,
    environment_path,
    environments_of,
    generation_path,
    last_complete,
    list_generations,
    next_number,
    published_or_none,
    read_current,
    remove_store_leftovers,
)
from vista.store.lmdb.data_file import check_structure
from vista.store.lmdb.environment import SharedEnvironment
from vista.store.lmdb.permissions import PRIVATE, Permissions
from vista.store.locks import locked
from vista.store.manifest import Manifest, read_cursor, read_manifest
from vista.store.publication import publish_generation
from vista.store.shards import check_place
from vista.store.tombstones import Tombstones

T = TypeVar("T")


class FolderStore:
    """Delegates to the functions for folders."""

    def __init__(self, address: Path) -> None:
        self.address = address
        self._permissions = PRIVATE

    @property
    def erased_users(self) -> Tombstones:
        """The store's tombstones."""
        return Tombstones(self.address)

    def current(self) -> int:
        """Number of the published generation."""
        return read_current(self.address)

    def published_or_none(self) -> int | None:
        """Like `current`, but None if nothing is published or CURRENT is damaged."""
        return published_or_none(self.address)

    def numbers(self) -> list[int]:
        """Numbers of all generations; none if the folder does not exist."""
        return list_generations(self.address) if self.address.is_dir() else []

    def open(self, number: int, key: bytes | None) -> AbstractContextManager[GenerationReader]:
        """Open a complete generation."""
        return open_generation(self.address, number, key)

    def check_structure(self, number: int) -> None:
        """Check the files of a generation before LMDB opens them."""
        for environment in environments_of(self.address, number):
            check_structure(environment)

    def settled(self, number: int, read: Callable[[], T]) -> T:
        """See `read_settled`."""
        return read_settled(self.address, number, read)

    @contextmanager
    def locked(self, permissions: Permissions | None = None) -> Iterator[None]:
        """Context of the one writer; `permissions` also makes the folder."""
        if permissions is None:
            if not self.numbers():
                self.current()  # raises, so that no lock file is made in a folder that is not a store
        else:
            check_place(self.address)
            self._permissions = permissions
        with locked(self.address, permissions):
            yield

    def number_for(self, manifest: Manifest) -> int:
        """The manifest's number if it is above all that ever were complete; otherwise the next one."""
        return next_number(self.address, least=manifest.generation)

    def remove_leftovers(self, except_for: int) -> None:
        """Remove temporary folders of killed processes, except for that of a copy."""
        remove_store_leftovers(self.address, except_for=f"{PARTIAL_PREFIX}gen-{except_for}")

    def builder(self, manifest: Manifest, key: bytes | None, *, resume: bool) -> GenerationBuilder:
        """Make a generation in a temporary folder, or resume there."""
        return GenerationBuilder(self.address, manifest, key, self._permissions, resume=resume)

    def publish(self, number: int, keep: Collection[int]) -> None:
        """See `publish_generation`."""
        publish_generation(self.address, number, list(keep))

    def progress(self, number: int) -> tuple[Manifest, bool, int]:
        """Manifest, whether the generation is complete, and the number of records or of users done."""
        path = environment_path(self.address, number)
        environment = SharedEnvironment.acquire(path)
        try:
            return environment.read(lambda transaction: _progress(transaction, path))
        finally:
            environment.release()

    def expires_at(self, number: int) -> int | None:
        """None: files do not expire."""
        return None

    def size_bytes(self, number: int) -> int:
        """Size of the generation's files."""
        files = generation_path(self.address, number).rglob("*")
        return sum(file.stat().st_size for file in files if file.is_file())

    def problems(self) -> list[str]:
        """What is wrong with LAST, the tombstones, and the names in the folder."""
        problems = []
        try:
            last_complete(self.address)
        except StoreError as error:
            problems.append(str(error))
        if os.access(self.address / TOMBSTONES, os.R_OK):  # Another account cannot read them.
            try:
                len(self.erased_users)
            except StoreError as error:
                problems.append(str(error))
        for name in entries_like_generations(self.address):
            problems.append(
                f"{self.address / name} is ignored, because it is not the folder of a generation; rename or remove it"
            )
        return problems


def _progress(transaction: lmdb.Transaction[memoryview], path: Path) -> tuple[Manifest, bool, int]:
    """Manifest, whether the generation is complete, and the number of records or of users done."""
    try:
        manifest = read_manifest(transaction, path)
        return manifest, True, manifest.count
    except UnfinishedError:
        value = transaction.get(MANIFEST_KEY)
        if value is None:
            raise
        manifest = Manifest.from_bytes(bytes(value), path)
        return manifest, False, read_cursor(transaction, manifest, path)
