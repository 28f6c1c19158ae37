"""Write side of a store: one writer fills a generation in durable batches, resumes it after a kill, publishes it."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import lmdb

from vista.config.choices import Codec, StateDtype
from vista.errors import StoreBusyError, StoreError, StoreLockedError, StoreWriteError
from vista.files import sync
from vista.store.admin.whole_generations import Tally, tally_of
from vista.store.format.authentication import key_id
from vista.store.format.keys import COMPLETE_KEY, CURSOR_KEY
from vista.store.generation_files import TURNS, GenerationFiles, flip
from vista.store.layout import (
    CURRENT,
    Manifest,
    environment_path,
    environments_of,
    generation_path,
    last_complete,
    list_generations,
    missing_generation,
    note_complete,
    read_current,
    remove_generation,
    remove_leftovers,
)
from vista.store.lmdb.data_file import MAX_READERS, check_structure
from vista.store.lmdb.environment import SharedEnvironment
from vista.store.lmdb.locks import WriterLock, cannot_write, erasing, lock_store
from vista.store.lmdb.permissions import GROUP, PRIVATE, Modes
from vista.store.tombstones import Tombstones

logger = logging.getLogger(__name__)


class StoreWriter:
    """The one writer of a store: fills a generation in durable batches, resumes it after a kill, publishes it.

    Open it with `StoreWriter.open`; as a context manager it lets go on the way out, and what it wrote stays for the
    next run of the same identity.
    """

    def __init__(self, root: Path, lock: WriterLock, served: int, files: GenerationFiles, key: bytes | None) -> None:
        self.path = root
        self._served = served
        self._lock = lock
        self._files = files
        self.manifest = files.manifest
        self.spec = self.manifest.spec(key)
        self.state_spec = self.manifest.state_spec()
        self._tombstones = Tombstones(root)
        self._cursor = files.summary.read(lambda transaction: int(bytes(transaction.get(CURSOR_KEY, b"0"))))

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
        log_digest: str = "",
        state_dtype: StateDtype = StateDtype.none,
        state_shape: tuple[int, int, int] = (0, 0, 0),
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
            log_digest: which log that is (`EventLog.sources_digest`).
            state_dtype: how states are kept beside the summaries, if they are.
            state_shape: layers, heads and head dim of a state.
            created_at: ms; by default now. A resumed generation keeps its own.
            max_readers: slots of the generation's reader table.
            key: 32 bytes: records get codes that only holders of the key can make.
            shared_with_group: let the group of the store's folder read (folders 2750, files 0640, lock.mdb 0660).

        Raises:
            StoreLockedError: another writer holds the store; the message names its process if known.
            StoreError: the path cannot be written; the message has the remedy.
        """
        root = Path(path).absolute()
        modes = GROUP if shared_with_group else PRIVATE
        lock = lock_store(root, modes)
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
                log_digest=log_digest,
                total_users=total_users,
                run_digest=run_digest,
                state_dtype=state_dtype.value,
                state_shape=state_shape,
                key_id=None if key is None else key_id(key),
            )
            files = _resume(root, wanted, current, max_readers, modes)
            return cls(root, lock, current, files, key)
        except (OSError, lmdb.Error) as error:
            lock.release()
            raise cannot_write(root, error) from error
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

    def put_batch(
        self, keys: Sequence[bytes], records: Sequence[bytes], cursor: int, states: Sequence[bytes] = ()
    ) -> int:
        """Write a batch and the cursor, durably: after it returns, a kill or power loss keeps both.

        Args:
            keys: from `vista.store.format.keys.user_keys`.
            records: from `vista.store.format.record.encode_records` with this writer's `spec`, one a key.
            cursor: users done after this batch; those without a record count too.
            states: from `encode_states` with `state_spec`, one a key, where states are kept.

        Returns:
            How many were written: erased users are left out.

        Raises:
            StoreError: the cursor has not moved, and the batch has to be written again (disk full, input/output
                error); the message has the remedy.
        """
        if len(keys) != len(records) or not self._cursor <= cursor <= self.manifest.total_users:
            raise ValueError(f"{len(keys)} keys, {len(records)} records, cursor {self._cursor} -> {cursor}")
        written = self._files.put(self._tombstones, keys, records, states, {CURSOR_KEY: b"%d" % cursor})
        self._cursor, self.manifest = cursor, self._files.manifest
        return written

    def publish(self) -> Manifest:
        """Check every record, mark the generation complete, flip CURRENT, remove all but this and the one before.

        Raises:
            StoreWriteError: the disk is full or fails; the generation stays, and the same run goes on.
            StoreLockedError, StoreBusyError: an erasure does not end, or erasures without a pause; likewise.
            StoreError: the run is not finished (it stays resumable); or the count, a record or the file's structure is
                wrong (the generation is removed, CURRENT stays).
        """
        if self._cursor != self.manifest.total_users:
            raise StoreError(
                f"{self.path}: {self._cursor} of {self.manifest.total_users} users are done; run the refresh again, it "
                "goes on from there"
            )
        try:
            self._check_records()
            self._files.mark_complete(self.manifest.created_at)
            self.manifest = self._files.manifest
            self._files.close()
            folder = generation_path(self.path, self.generation)
            environments = environments_of(self.path, self.generation)
            for path in environments:
                check_structure(path)
            for path in (*environments, folder, self.path):
                sync(path)
            flip(self.path, self.generation, (self._served,))
            return self.manifest
        except (StoreWriteError, StoreLockedError, StoreBusyError):
            raise
        except StoreError as error:
            self._files.close()
            with suppress(OSError):  # Else the next writer removes it.
                remove_generation(self.path, self.generation)
            raise StoreError(
                f"{error}. The generation was removed, CURRENT is as before; check the disk, then refresh again"
            ) from error
        except (OSError, lmdb.Error) as error:
            raise cannot_write(self.path, error) from error

    def close(self) -> None:
        """Let the store go; an unpublished generation stays for the next run of the same identity."""
        self._files.close()
        self._lock.release()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_records(self) -> None:
        """Check every record, and their number.

        An erasure meanwhile, which is not made to wait, changes what was counted: then it is counted again.
        """
        for _ in range(TURNS):
            num_erased = self._tombstones.count()
            self._files.remove_erased(self._tombstones)
            found = self._count_records()
            with erasing(self.path):
                if len(self._tombstones) == num_erased:
                    return self._compare(found)
        with erasing(self.path):  # Users are erased one by one without a pause.
            self._files.remove_erased(self._tombstones)
            self._compare(self._count_records())

    def _count_records(self) -> Tally:
        return tally_of(self._files.summary.read, self.spec)

    def _compare(self, found: Tally) -> None:
        manifest, folder = self._files.read_manifest(), generation_path(self.path, self.generation)
        if (manifest.count, manifest.records_digest) != (found.count, found.records_digest):
            raise StoreError(
                f"{folder} holds {found.count} records, but {manifest.count} were written, or others than these"
            )
        if self._files.state is not None and self._files.state.read(_num_entries) != manifest.count:
            raise StoreError(f"{folder} holds another number of states than its {manifest.count} records")


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


def _resume(root: Path, wanted: Manifest, current: int, max_readers: int, modes: Modes) -> GenerationFiles:
    """The newest generation beyond CURRENT if its identity is the wanted one; else a new one.

    All others beyond CURRENT are removed. A number that was ever complete is not used again.
    """
    for generation in reversed([number for number in list_generations(root) if number > current]):
        try:
            files = GenerationFiles.open(root, generation, max_readers=max_readers)
        except StoreError as error:
            logger.warning("%s; it is unfinished and starts afresh", error)
            remove_generation(root, generation)
            continue
        if files.manifest.identity() == wanted.identity():
            return files
        if files.complete:
            note_complete(root, generation)
        files.close()
        logger.warning("%s: unfinished gen-%d is of another run; it is removed, a new one starts", root, generation)
        remove_generation(root, generation)
    number = max(current, last_complete(root)) + 1
    return GenerationFiles.create(root, dataclasses.replace(wanted, generation=number), max_readers, modes)


def _num_entries(transaction: lmdb.Transaction[memoryview]) -> int:
    return int(transaction.stat()["entries"])
