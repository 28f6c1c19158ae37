"""Building a generation from existing records.

It is built in store/.partial-gen-8/ and renamed once it is complete and verified. After a kill, a copy resumes in that
folder; all other operations start over.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import lmdb
import numpy as np

from vista.errors import StoreError
from vista.files import remove_renamed, sync
from vista.store.admin.generation_reader import Batch
from vista.store.format.keys import COMPLETE_KEY, CURSOR_KEY, MANIFEST_KEY
from vista.store.format.record import seal_record
from vista.store.format.record_spec import HEADER, HEADER_BYTES, RecordSpec
from vista.store.layout import PARTIAL_PREFIX, generation_path, record_complete
from vista.store.lmdb.data_file import check_structure, complete_size, open_environment
from vista.store.lmdb.permissions import Permissions, make_folder
from vista.store.lmdb.transactions import copied, walk
from vista.store.manifest import Manifest
from vista.store.tally import Tally, tally_of

T = TypeVar("T")


class GenerationBuilder:
    """Fills one generation; only under `locked`. `finish` does not publish it: `publish_generation` does."""

    def __init__(
        self, root: Path, manifest: Manifest, key: bytes | None, permissions: Permissions, *, resume: bool = False
    ) -> None:
        self.root = root
        self.manifest = manifest
        self.spec = manifest.spec(key)
        self.tally = Tally()
        self.last_key = b"u"
        """Of the last record; only larger keys can be added."""
        self.path = root / f"{PARTIAL_PREFIX}gen-{manifest.generation}"
        self.folder = self.path / "summary"
        if not resume or self.path.is_symlink():
            remove_renamed(self.path)
        if not self.path.exists():
            make_folder(self.path, permissions)
        if not self.folder.exists():
            make_folder(self.folder, permissions)
        self._environment: lmdb.Environment | None = open_environment(self.folder, readonly=False)
        self._states: lmdb.Environment | None = None
        if manifest.state_spec() is not None:
            make_folder(self.path / "state", permissions)
            self._states = open_environment(self.path / "state", readonly=False)

    @property
    def environment(self) -> lmdb.Environment:
        """Open until `finish` or `close`."""
        assert self._environment is not None
        return self._environment

    def put(self, keys: Sequence[bytes], records: Sequence[bytes]) -> None:
        """Append checked records of this generation in one durable transaction.

        Raises:
            StoreError: a key is not larger than the last one.
        """
        with self.environment.begin(write=True) as transaction:
            for key, record in zip(keys, records, strict=True):
                if key <= self.last_key:
                    raise StoreError(f"{self.root}: keys must ascend, but {key!r} follows {self.last_key!r}")
                transaction.put(key, record, append=True)
                self.last_key = key
        self.tally.add(keys, records)

    def put_states(self, keys: Sequence[bytes], states: Sequence[bytes]) -> None:
        """Append checked states of this generation, in the order of their keys, in one durable transaction."""
        assert self._states is not None
        with self._states.begin(write=True) as transaction:
            for key, state in zip(keys, states, strict=True):
                transaction.put(key, state, append=True)

    def finish(self) -> Manifest:
        """Read all records back, check the structure of the files, and give the generation its final name.

        Raises:
            StoreError: the file does not hold what was put; call `discard`.
        """
        self.manifest = dataclasses.replace(
            self.manifest,
            count=self.tally.count,
            user_kind=self.tally.user_kind,
            records_digest=self.tally.records_digest,
        )
        self._read_back()
        with self.environment.begin(write=True) as transaction:
            transaction.put(MANIFEST_KEY, self.manifest.to_bytes())
            transaction.put(CURSOR_KEY, b"%d" % self.manifest.total_users)
            transaction.put(COMPLETE_KEY, b"1")
        self.close()
        environments = [path for path in self.path.iterdir() if path.is_dir()]
        for path in environments:
            complete_size(path)
            check_structure(path)
        for path in (*environments, self.path):
            sync(path)
        os.rename(self.path, generation_path(self.root, self.manifest.generation))
        sync(self.root)
        record_complete(self.root, self.manifest.generation)
        return self.manifest

    def held_batches(self) -> Iterator[Batch]:
        """Keys and values that the file holds so far, ascending."""
        return walk(self._read, copied)

    def _read(self, function: Callable[[lmdb.Transaction[memoryview]], T]) -> T:
        with self.environment.begin(buffers=True) as transaction:
            return function(transaction)

    def _read_back(self) -> None:
        tally = tally_of(self._read, self.spec, num_users=self.tally.count)
        if tally != self.tally:
            raise StoreError(
                f"{self.folder} holds {tally.count} records, but {self.tally.count} were put; check the disk"
            )

    def close(self) -> None:
        """Close the files; closing twice is allowed."""
        for environment in (self._environment, self._states):
            if environment is not None:
                environment.close()
        self._environment = self._states = None

    def discard(self) -> None:
        """Remove what was built."""
        self.close()
        remove_renamed(self.path)


def restamp_records(keys: Sequence[bytes], records: Sequence[bytes], spec: RecordSpec) -> list[bytes]:
    """Move checked records to another generation: only its number, the checksum and the code change."""
    headers = np.frombuffer(b"".join([record[:HEADER_BYTES] for record in records]), HEADER).copy()
    headers["generation"] = spec.generation
    headers["checksum"] = 0
    packed = headers.tobytes()
    sealed = []
    for index, (key, record) in enumerate(zip(keys, records, strict=True)):
        payload = memoryview(record)[HEADER_BYTES : len(record) - spec.code_bytes]
        header = packed[HEADER_BYTES * index : HEADER_BYTES * (index + 1)]
        sealed.append(seal_record(header, [payload], key, spec.key))
    return sealed
