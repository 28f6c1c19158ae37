"""LMDB without vista's store, as the baseline of the store's benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import lmdb

from vista.store.lmdb_environment import MAP_SIZE_BYTES


class RawLmdb:
    """A durable LMDB environment with the same options as the store's."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True)
        self.environment = lmdb.open(str(path), map_size=MAP_SIZE_BYTES, lib_version=0)

    def put(self, keys: Sequence[bytes], values: Sequence[bytes]) -> None:
        """Write all values in one durable transaction."""
        with self.environment.begin(write=True) as transaction:
            for key, value in zip(keys, values, strict=True):
                transaction.put(key, value)

    def copies(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Copies of the values, read in one transaction."""
        with self.environment.begin() as transaction:
            return [transaction.get(key) for key in keys]

    def __enter__(self) -> RawLmdb:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.environment.close()
