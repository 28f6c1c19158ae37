"""Shards of a store: each machine refreshes one shard, and a reader opens all of them as one.

    stores/mine/part-0-of-4/    a complete store: CURRENT, generations, writer.lock
    stores/mine/part-1-of-4/

A user's shard depends only on the user's key (XXH3-64 modulo the number of shards), so every refresh with the same
number of shards assigns users alike. Shards are published one by one, but one user's data come from one generation.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from vista.errors import ConfigError, StoreError, shortened
from vista.store.keys import common_kind, user_keys
from vista.store.layout import CURRENT, StoreUrl, store_address, store_path
from vista.store.manifest import Manifest
from vista.store.reader import StoreReader, published_manifest
from vista.store.record import StoredBatch
from vista.store.record_spec import TailColumn, UserColumn

MAX_SHARDS = 65_536
_SHARED_FIELDS = ("summarizer_id", "num_tokens", "dim", "until", "counters", "user_columns", "tail_columns")
"""Fields of manifests that all shards have in common."""
_NUMBER = "(0|[1-9][0-9]{0,4})"


@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
    """Shard `index` of `count`."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Parse "2/8", the third of eight shards.

        Raises:
            ConfigError: the text has another form.
        """
        shard = cls._matching(f"{_NUMBER}/{_NUMBER}", text.strip())
        if shard is None:
            raise ConfigError(
                f"shard={shortened(text, 80)}: write i/n with i from 0 to n-1 and n at most {MAX_SHARDS}, such as 0/4"
            )
        return shard

    @classmethod
    def named(cls, name: str) -> Shard | None:
        """The shard whose folder has this name; None for any other name."""
        return cls._matching(f"part-{_NUMBER}-of-{_NUMBER}", name)

    @classmethod
    def _matching(cls, pattern: str, text: str) -> Shard | None:
        match = re.fullmatch(pattern, text)
        if match is None or not int(match[1]) < int(match[2]) <= MAX_SHARDS:
            return None
        return cls(int(match[1]), int(match[2]))

    def path(self, store: str | Path) -> Path:
        """Folder of this shard of a store."""
        return Path(store) / f"part-{self.index}-of-{self.count}"

    def holds(self, keys: Sequence[bytes]) -> NDArray[np.bool_]:
        """Whether each user belongs to this shard, [N]."""
        own: NDArray[np.bool_] = shards_of(keys, self.count) == self.index
        return own


def shards_in(store: str | Path | StoreUrl) -> list[Shard]:
    """The shards in a store's folder, ascending; none if the store is not sharded, as no store on a server is.

    Raises:
        StoreError: there are shards of different counts.
    """
    root = store_address(store)
    if isinstance(root, StoreUrl):
        return []
    if (root / CURRENT).exists() or not root.is_dir():
        return []
    shards = _shards_at(root)
    counts = sorted({shard.count for shard in shards})
    if len(counts) > 1:
        raise StoreError(
            f"{root}: holds shards of stores with {counts} shards; keep those of one store and remove the others"
        )
    return shards


def _shards_at(root: Path) -> list[Shard]:
    shards = [shard for entry in root.iterdir() if (shard := Shard.named(entry.name)) is not None and entry.is_dir()]
    return sorted(shards, key=lambda shard: shard.index)


def stores_in(store: str | Path) -> list[Path | StoreUrl]:
    """Folders of the shards in a store's folder, or the folder or URL itself if the store is not sharded."""
    if StoreUrl.matches(store):
        return [StoreUrl.parse(store)]
    return [*(shard.path(store) for shard in shards_in(store))] or [Path(store)]


def shard_to_write(store: str | Path | StoreUrl, shard: Shard | None) -> tuple[Path | StoreUrl, Shard | None]:
    """The folder or URL that a refresh of a store or shard writes to, and the shard that it holds.

    Raises:
        ConfigError: a shard of a store on a server is named; `store` is the folder of a shard, and `shard` is another
            one; or as of `check_place`.
    """
    root = store_address(store)
    if isinstance(root, StoreUrl):
        if shard is not None:
            raise ConfigError(f"shard: a store on a server has no shards; leave it out to refresh {root}")
        return root, None
    own = Shard.named(root.name)
    if own is not None:
        if shard not in (None, own):
            raise ConfigError(f"store={store}: is the folder of one shard; name the folder above it")
        path, shard = root, own
    else:
        path = Path(str(store)) if shard is None else shard.path(str(store))
    check_place(path)
    return path, shard


def check_place(path: str | Path) -> None:
    """Refuse to write a store or shard where it would hide another one, or be hidden by it.

    Raises:
        ConfigError: an unsharded store and shards, or shards of different counts, would share a folder.
    """
    path = store_path(path)
    named = Shard.named(path.name)
    root = path.parent if named else path
    counts = sorted({shard.count for shard in _shards_at(root)}) if root.is_dir() else []
    if (root / CURRENT).exists() and (named or counts):
        raise ConfigError(
            f"{root}: holds an unsharded store ({CURRENT}), which hides all shards in the same folder; name another "
            "folder, or move one of the two"
        )
    if counts and named is None:
        raise ConfigError(f"{root}: is sharded; refresh its shards with shard=i/{counts[0]}, or name another folder")
    if named and counts not in ([], [named.count]):
        raise ConfigError(
            f"{root}: holds shards of a store with {counts} shards, to which {path.name} does not belong; name another "
            "folder"
        )


def user_kind(store: str | Path) -> str | None:
    """Type of the user ids of a store, sharded or not: int, str or mixed; None without users."""
    return common_kind(published_manifest(root).user_kind for root in stores_in(store))


def users_by_store(store: str | Path, users: Sequence[int] | Sequence[str]) -> list[tuple[Path | StoreUrl, list[Any]]]:
    """Group users by the shard of a store that they belong to, or by the store itself if it is not sharded.

    Raises:
        StoreError: the shard of a user is missing; the message names it.
    """
    root, shards = store_address(store), shards_in(store)
    if isinstance(root, StoreUrl):
        return [(root, list(users))]
    named = Shard.named(root.name)
    if named is not None:
        root, shards = root.parent, [named]
    if not shards:
        return [(root, list(users))]
    owner = shards_of(user_keys(users), shards[0].count)
    for user, index in zip(users, owner.tolist(), strict=True):
        if index not in {shard.index for shard in shards}:
            raise StoreError(
                f"{store}: user {user!r} belongs to shard {index} of {shards[0].count}, which is missing; name the "
                "folder that holds it"
            )
    return [
        (shard.path(root), [users[row] for row in np.flatnonzero(owner == shard.index).tolist()])
        for shard in shards
        if (owner == shard.index).any()
    ]


def shards_of(keys: Sequence[bytes], count: int) -> NDArray[np.int64]:
    """Index of each user's shard, [N]."""
    return np.array([xxhash.xxh3_64_intdigest(key) % count for key in keys], np.int64)


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
    wanted: dict[str, Any] = {"summarizer_id": summarizer_id, "key": key, "tail_len": tail_len}
    wanted |= {"tail_columns": tail_columns, "user_columns": user_columns}
    if isinstance(address, StoreUrl) or not shards_in(address):
        return StoreReader.open(address, generation=generation, **wanted)
    if generation is not None:
        raise StoreError(f"{address} is sharded, and each shard counts its own generations; open one shard's folder")
    return ShardedReader(address, **wanted)


class ShardedReader:
    """All shards of a store, read as one; it has the methods of `StoreReader` except `states`.

    Args:
        path: the store's folder.
        wanted: as of `StoreReader.open`.

    Raises:
        StoreError: a shard is missing, or the shards are of different counts or hold different things; and as
            `StoreReader.open`.
    """

    def __init__(self, path: Path, **wanted: Any) -> None:
        self.path = path
        shards = shards_in(path)
        if not shards:
            raise StoreError(f"{path} holds no shards; check the path")
        count = shards[0].count
        missing = sorted(set(range(count)) - {shard.index for shard in shards})
        if missing:
            raise StoreError(f"{path}: shards {missing} of {count} are missing; refresh them with shard=i/{count}")
        self._readers: list[StoreReader] = []
        try:
            for shard in shards:
                self._readers.append(StoreReader.open(shard.path(path), **wanted))
            first = self._readers[0].manifest
            for reader in self._readers[1:]:
                for field in _SHARED_FIELDS:
                    if getattr(reader.manifest, field) != getattr(first, field):
                        raise StoreError(
                            f"{reader.path}: {field} differs from that of shard 0; refresh all shards alike"
                        )
        except BaseException:
            self.close()
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
        return StoredBatch.concatenated(batches).take(np.argsort(order, kind="stable"))

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

    def __exit__(self, *_: object) -> None:
        self.close()
