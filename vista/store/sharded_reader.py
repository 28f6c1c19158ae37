"""All shards of a store, read as one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import offsets_of
from vista.counters.counter_codes import CounterCodes
from vista.errors import StoreError
from vista.log.histories import ranges
from vista.store.format.keys import common_kind, user_keys
from vista.store.format.tail_column import TailColumn
from vista.store.format.user_column import UserColumn
from vista.store.layout import store_address, store_path
from vista.store.manifest import Manifest
from vista.store.reader import StoreReader
from vista.store.remote.store_url import StoreUrl
from vista.store.shards import Shard, shards_in, shards_of
from vista.store.stored_batch import StoredBatch
from vista.store.tail import Tail


def open_store(
    path: str | Path | StoreUrl,
    *,
    summarizer_id: bytes | None = None,
    key: bytes | None = None,
    tail_len: int = 0,
    tail_columns: Sequence[TailColumn] = (),
    user_columns: Sequence[UserColumn] = (),
    generation: int | None = None,
) -> StoreReader | ShardedReader:
    """Open a store, sharded or not, or on a server; arguments and errors as of `StoreReader.open`.

    Raises:
        StoreError: a generation of a sharded store is asked for, whose shards count theirs separately.
    """
    address = store_address(path)
    reads: dict[str, Any] = {"tail_len": tail_len, "tail_columns": tail_columns, "user_columns": user_columns}
    if isinstance(address, Path) and shards_in(address):
        if generation is not None:
            raise StoreError(
                f"{address} is sharded, and each shard counts its own generations; open one shard's folder"
            )
        return ShardedReader.open(address, summarizer_id=summarizer_id, key=key, **reads)
    return StoreReader.open(address, summarizer_id=summarizer_id, key=key, generation=generation, **reads)


class ShardedReader:
    """All shards of a store, read as one; it has the methods of `StoreReader` except `states`."""

    def __init__(self, path: Path, readers: Sequence[StoreReader]) -> None:
        self.path = path
        self._readers = list(readers)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        summarizer_id: bytes | None = None,
        key: bytes | None = None,
        tail_len: int = 0,
        tail_columns: Sequence[TailColumn] = (),
        user_columns: Sequence[UserColumn] = (),
    ) -> ShardedReader:
        """Open every shard.

        Raises:
            StoreError: a shard is missing, or the shards are of different counts; and as `StoreReader.open`.
        """
        root = store_path(path)
        shards = shards_in(root)
        if not shards:
            raise StoreError(f"{root} holds no shards; check the path")
        count = shards[0].count
        missing = sorted(set(range(count)) - {shard.index for shard in shards})
        if missing:
            raise StoreError(f"{root}: shards {missing} of {count} are missing; refresh them with shard=i/{count}")
        readers: list[StoreReader] = []
        try:
            for index in range(count):
                path = Shard(index, count).path(root)
                reader = StoreReader.open(
                    path,
                    summarizer_id=summarizer_id,
                    key=key,
                    tail_len=tail_len,
                    tail_columns=tail_columns,
                    user_columns=user_columns,
                )
                readers.append(reader)
            first = readers[0].manifest
            for reader in readers[1:]:
                shared = ("summarizer_id", "num_tokens", "dim", "until", "counters", "user_columns", "tail_columns")
                for field in shared:
                    if getattr(reader.manifest, field) != getattr(first, field):
                        raise StoreError(
                            f"{reader.path}: {field} differs from that of shard 0; refresh all shards alike"
                        )
            return cls(root, readers)
        except BaseException:
            for reader in readers:
                reader.close()
            raise

    @property
    def manifest(self) -> Manifest:
        """Manifest for all shards together: the oldest generation and refresh, the shortest tail, the sum of counts."""
        manifests = [reader.manifest for reader in self._readers]
        return dataclasses.replace(
            manifests[0],
            generation=min(manifest.generation for manifest in manifests),
            created_at=min(manifest.created_at for manifest in manifests),
            refreshed_at=min(manifest.refreshed_at for manifest in manifests),
            applied_segment=min(manifest.applied_segment for manifest in manifests),
            tail_len=min(manifest.tail_len for manifest in manifests),
            total_users=sum(manifest.total_users for manifest in manifests),
            count=sum(manifest.count for manifest in manifests),
            user_kind=common_kind(manifest.user_kind for manifest in manifests),
        )

    @property
    def generation(self) -> int:
        """The oldest of the shards' generations."""
        return self.manifest.generation

    @property
    def summarizer_id(self) -> bytes:
        """SHA-256 of the summarizer that wrote all shards, 32 bytes."""
        return self._readers[0].summarizer_id

    def __len__(self) -> int:
        return sum(map(len, self._readers))

    def get_many(self, user_ids: Sequence[int] | Sequence[str] | NDArray[Any]) -> StoredBatch:
        """Records of a batch of users; as `StoreReader.get_many`."""
        ids = user_ids if isinstance(user_ids, np.ndarray) else np.array(list(user_ids), dtype=object)
        count = len(self._readers)
        owner = shards_of(user_keys(user_ids), count)
        order = np.argsort(owner, kind="stable")
        bounds = np.searchsorted(owner[order], np.arange(count + 1))
        users_of = [ids[order[bounds[index] : bounds[index + 1]]].tolist() for index in range(count)]
        # Shards without a user of the batch are read too, for the shapes and errors of an empty batch.
        batches = [reader.get_many(users) for reader, users in zip(self._readers, users_of, strict=True)]
        return _in_order(batches, np.argsort(order, kind="stable"))

    def keys(self) -> Iterator[int | str]:
        """User ids of all records, shard by shard."""
        return chain.from_iterable(reader.keys() for reader in self._readers)

    def reload(self) -> bool:
        """Follow every shard to its newest generation; whether at least one changed."""
        changed = [reader.reload() for reader in self._readers]  # all of them, whether or not the first changes
        return any(changed)

    def close(self) -> None:
        """Close all shards."""
        for reader in self._readers:
            reader.close()

    def __enter__(self) -> ShardedReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _in_order(batches: Sequence[StoredBatch], place: NDArray[np.int64]) -> StoredBatch:
    """The batches end to end, rearranged so that row b is their row place[b]."""

    def column(name: str) -> NDArray[Any]:
        joined: NDArray[Any] = np.concatenate([getattr(batch, name) for batch in batches])[place]
        return joined

    tail = Tail.concatenated([batch.tail for batch in batches])
    counts = np.diff(tail.offsets)[place]
    return StoredBatch(
        found=column("found"),
        summary=column("summary"),
        tail=tail.select(ranges(tail.offsets[:-1][place], counts), offsets_of(counts)),
        event_count=column("event_count"),
        last_event_ts=column("last_event_ts"),
        created_at=column("created_at"),
        history_digest=column("history_digest"),
        generation=min(batch.generation for batch in batches),
        features={
            name: np.concatenate([batch.features[name] for batch in batches])[place] for name in batches[0].features
        },
        counters=tuple(
            CounterCodes.concatenated(fields).select(place)
            for fields in zip(*(batch.counters for batch in batches), strict=True)
        ),
    )
