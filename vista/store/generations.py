"""Write side of a store: one writer fills a generation in durable batches, resumes it after a kill, publishes it."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType

import lmdb
import numpy as np

from vista.choices import Codec
from vista.errors import StoreError
from vista.files import sync
from vista.store.authentication import key_id
from vista.store.environment import MAX_READERS, SharedEnvironment, check_structure, complete_size, open_environment
from vista.store.keys import COMPLETE_KEY, CURSOR_KEY, INT_PREFIX, MANIFEST_KEY, STR_PREFIX
from vista.store.layout import (
    CURRENT,
    Manifest,
    WriterLock,
    environment_path,
    last_complete,
    list_generations,
    missing_generation,
    note_complete,
    prepare_root,
    read_current,
    remove_generation,
    remove_leftovers,
    write_current,
)
from vista.store.permissions import GROUP, PRIVATE, Modes, make_folder
from vista.store.record import check_records

_SCAN_RECORDS = 1024

logger = logging.getLogger(__name__)


class StoreWriter:
    """The one writer of a store: fills a generation in durable batches, resumes it after a kill, publishes it.

    Open it with `StoreWriter.open`; as a context manager it lets go on the way out, and what it wrote stays for the
    next run of the same identity.
    """

    def __init__(
        self,
        root: Path,
        lock: WriterLock,
        served: int,
        environment: lmdb.Environment,
        manifest: Manifest,
        key: bytes | None,
    ) -> None:
        self.path = root
        self._served = served
        self.manifest = manifest
        self.spec = manifest.spec(key)
        self._pid = os.getpid()
        self._lock = lock
        self._environment: lmdb.Environment | None = environment
        with environment.begin() as transaction:
            self._cursor = int(transaction.get(CURSOR_KEY, b"0"))

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        summarizer_id: bytes,
        num_tokens: int,
        dim: int,
        codec: Codec,
        tail_len: int,
        total_users: int,
        run_digest: str,
        until: str | int | None = None,
        applied_segment: int = 0,
        created_at: int | None = None,
        max_readers: int = MAX_READERS,
        key: bytes | None = None,
        shared_with_group: bool = False,
    ) -> StoreWriter:
        """Resume the unfinished generation of the same identity, or start a new one.

        Args:
            path: the store's folder; made if it is not there.
            summarizer_id: SHA-256, 32 bytes.
            num_tokens: K.
            dim: d.
            codec: how rows are stored.
            tail_len: most events of a stored tail.
            total_users: users of the run.
            run_digest: digest of the log's content and of the fixed order in which the run visits its users: the
                cursor means nothing without both.
            until: which events the summaries may have seen, as given to the refresh.
            applied_segment: newest segment of the log that is read.
            created_at: ms; by default now. A resumed generation keeps its own.
            max_readers: slots of the generation's reader table.
            key: 32 bytes: records get codes that only holders of the key can make.
            shared_with_group: let the group of the store's folder read (folders 2750, files 0640, lock.mdb 0660).

        Raises:
            StoreLockedError: another writer holds the store; the message names its process if known.
            StoreError: the path cannot be written; the message has the remedy.
        """
        root = Path(path).absolute()
        try:
            modes = GROUP if shared_with_group else PRIVATE
            prepare_root(root, modes)
            lock = WriterLock(root)
        except OSError as error:
            raise StoreError(f"{root} cannot be written: {error}; choose another folder or its permissions") from error
        try:
            remove_leftovers(root)
            current = _served(root)
            wanted = Manifest(
                generation=current + 1,
                created_at=time.time_ns() // 1_000_000 if created_at is None else created_at,
                summarizer_id=summarizer_id.hex(),
                num_tokens=num_tokens,
                dim=dim,
                codec=codec.value,
                tail_len=tail_len,
                until=until,
                applied_segment=applied_segment,
                total_users=total_users,
                run_digest=run_digest,
                key_id=None if key is None else key_id(key),
            )
            resumed = _resume(root, wanted, current, max_readers)
            if isinstance(resumed, Manifest):
                resumed = _create(root, resumed, max_readers, modes), resumed
            return cls(root, lock, current, *resumed, key)
        except (OSError, lmdb.Error) as error:
            lock.release()
            raise _write_error(root, error) from error
        except BaseException:
            lock.release()
            raise

    @property
    def generation(self) -> int:
        """Number of the generation being written."""
        return self.manifest.generation

    @property
    def cursor(self) -> int:
        """Users done, in the run's fixed order; 0 in a new generation."""
        return self._cursor

    def put_batch(self, keys: Sequence[bytes], records: Sequence[bytes], cursor: int) -> None:
        """Write a batch and the cursor in one durable transaction: after it returns, a kill or power loss keeps both.

        Args:
            keys: from `vista.store.keys.user_keys`.
            records: from `vista.store.record.encode_records` with this writer's `spec`, one a key.
            cursor: users done after this batch; those without a record count too.

        Raises:
            StoreError: nothing of the batch was written (disk full, input/output error); the message has the remedy.
        """
        if len(keys) != len(records) or not self._cursor <= cursor <= self.manifest.total_users:
            raise ValueError(f"{len(keys)} keys, {len(records)} records, cursor {self._cursor} -> {cursor}")
        environment = self._open_environment()
        try:
            environment.reader_check()
            with environment.begin(write=True) as transaction:
                for key, record in zip(keys, records, strict=True):
                    transaction.put(key, record)
                transaction.put(CURSOR_KEY, b"%d" % cursor)
        except lmdb.Error as error:
            raise _write_error(self.path, error) from error
        self._cursor = cursor

    def publish(self, expected_count: int) -> Manifest:
        """Check every record, mark the generation complete, flip CURRENT, remove all but this and the one before.

        Args:
            expected_count: records that the generation must hold.

        Raises:
            StoreError: the run is not finished (it stays resumable); or the count, a record or the file's structure is
                wrong (the generation is removed, CURRENT stays).
        """
        if self._cursor != self.manifest.total_users:
            raise StoreError(
                f"{self.path}: {self._cursor} of {self.manifest.total_users} users are done; run the refresh again, it "
                "goes on from there"
            )
        environment = self._open_environment()
        folder = environment_path(self.path, self.generation)
        try:
            manifest = self._scan(environment)
            if manifest.count != expected_count:
                raise StoreError(f"{folder} holds {manifest.count} records instead of {expected_count}")
            with environment.begin(write=True) as transaction:
                transaction.put(MANIFEST_KEY, manifest.to_bytes())
                transaction.put(COMPLETE_KEY, b"1")
            self._close_environment()
            complete_size(folder)
            check_structure(folder)
            for path in (folder, folder.parent, self.path):
                sync(path)
            write_current(self.path, self.generation)
            for generation in list_generations(self.path):
                if generation not in (self._served, self.generation):
                    remove_generation(self.path, generation)
        except StoreError as error:
            self._close_environment()
            remove_generation(self.path, self.generation)
            raise StoreError(
                f"{error}. The generation was removed, CURRENT is as before; check the disk, then refresh again"
            ) from error
        except (OSError, lmdb.Error) as error:
            raise _write_error(self.path, error) from error
        self.manifest = manifest
        return manifest

    def close(self) -> None:
        """Let the store go; an unpublished generation stays for the next run of the same identity."""
        self._close_environment()
        self._lock.release()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _scan(self, environment: lmdb.Environment) -> Manifest:
        count, digest, kinds = 0, 0, set()
        with environment.begin(buffers=True) as transaction:
            cursor = transaction.cursor()
            items = cursor.iternext() if cursor.set_range(b"u") else iter(())
            while batch := list(islice(items, _SCAN_RECORDS)):
                keys = [bytes(key) for key, _ in batch]
                headers = check_records([value for _, value in batch], keys, self.spec)
                digest += int(headers["checksum"].sum(dtype=np.uint64))
                kinds |= {key[:2] for key in keys}
                count += len(batch)
        names = {INT_PREFIX: "int", STR_PREFIX: "str"}
        kind = names.get(next(iter(kinds)), "mixed") if len(kinds) == 1 else "mixed" if kinds else None
        return dataclasses.replace(
            self.manifest, count=count, user_kind=kind, records_digest=f"{digest % (1 << 64):016x}"
        )

    def _open_environment(self) -> lmdb.Environment:
        if self._environment is None or self._pid != os.getpid():
            raise StoreError(f"{self.path}: the writer is closed, or was opened before a fork; open another")
        return self._environment

    def _close_environment(self) -> None:
        if self._environment is not None:
            self._environment.close()
            self._environment = None


def _served(root: Path) -> int:
    """Generation that CURRENT names, 0 for none; where CURRENT is damaged, the newest complete one."""
    if not (root / CURRENT).exists():
        return 0
    try:
        current = read_current(root)
        if environment_path(root, current).is_dir():
            return current
        raise missing_generation(root, current)
    except StoreError as error:
        logger.warning("%s; this refresh goes on from the newest complete generation", error)
    return next((generation for generation in reversed(list_generations(root)) if _is_complete(root, generation)), 0)


def _is_complete(root: Path, generation: int) -> bool:
    try:
        shared = SharedEnvironment.acquire(environment_path(root, generation))
    except StoreError:
        return False
    try:
        return shared.read(lambda transaction: transaction.get(COMPLETE_KEY) is not None)
    except StoreError:
        return False
    finally:
        shared.release()


def _resume(
    root: Path, wanted: Manifest, current: int, max_readers: int
) -> tuple[lmdb.Environment, Manifest] | Manifest:
    """The newest generation beyond CURRENT if its identity is the wanted one; else the manifest of one to create.

    All others beyond CURRENT are removed. A number that was ever complete is not used again.
    """
    for generation in reversed([number for number in list_generations(root) if number > current]):
        try:
            environment = open_environment(environment_path(root, generation), readonly=False, max_readers=max_readers)
        except StoreError as error:
            logger.warning("%s; it is unfinished and starts afresh", error)
            remove_generation(root, generation)
            continue
        with environment.begin() as transaction:
            value, complete = transaction.get(MANIFEST_KEY), transaction.get(COMPLETE_KEY)
        try:
            found = None if value is None else Manifest.from_bytes(value, root)
        except StoreError:
            found = None
        if found is not None and found.identity() == wanted.identity():
            return environment, found
        environment.close()
        if complete is not None:
            note_complete(root, generation)
        logger.warning("%s: unfinished gen-%d is of another run; it is removed, a new one starts", root, generation)
        remove_generation(root, generation)
    return dataclasses.replace(wanted, generation=max(current, last_complete(root)) + 1)


def _create(root: Path, manifest: Manifest, max_readers: int, modes: Modes) -> lmdb.Environment:
    folder = environment_path(root, manifest.generation)
    for path in (folder.parent, folder):
        make_folder(path, modes)
    environment = open_environment(folder, readonly=False, max_readers=max_readers)
    with environment.begin(write=True) as transaction:
        transaction.put(MANIFEST_KEY, manifest.to_bytes())
        transaction.put(CURSOR_KEY, b"0")
    for path in (folder, folder.parent, root, root.parent):
        sync(path)
    return environment


def _write_error(root: Path, error: Exception) -> StoreError:
    return StoreError(
        f"{root} cannot be written: {error}; check free space and permissions, then run the refresh again: it goes on "
        "after the last batch that was written"
    )
