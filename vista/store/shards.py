"""A store in parts: each machine refreshes one part, a reader opens all of them as one.

    stores/mine/part-0-of-4/    a store of its own: CURRENT, generations, writer.lock
    stores/mine/part-1-of-4/

A user's part follows from the key alone (XXH3-64 modulo the number of parts), so it is the same in every refresh of as
many parts. Parts flip one by one; all that a call returns of one user is of one generation.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from vista.errors import ConfigError, StoreError
from vista.log.histories import ranges
from vista.store.format.keys import common_kind, user_keys
from vista.store.layout import CURRENT, Manifest
from vista.store.reader import StoreReader
from vista.store.stored_batch import StoredBatch, Tail
from vista.store.updates import served_manifest

_NAME = re.compile(r"part-(\d+)-of-(\d+)")


@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
    """Part `index` of `count`."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read "2/8", the third of eight parts.

        Raises:
            ConfigError: if it is no such thing.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if match is None or int(match[1]) >= int(match[2]):
            raise ConfigError(f"shard={text}: write i/n with i from 0 to n-1, such as 0/4")
        return cls(int(match[1]), int(match[2]))

    def path(self, store: str | Path) -> Path:
        """Folder of this part of a store."""
        return Path(store) / f"part-{self.index}-of-{self.count}"

    def holds(self, keys: Sequence[bytes]) -> NDArray[np.bool_]:
        """[N] whether each user is of this part."""
        own: NDArray[np.bool_] = _parts_of(keys, self.count) == self.index
        return own


def shards_in(store: str | Path) -> list[Shard]:
    """The parts that lie in a store's folder, ascending; none in a store that is not divided.

    Raises:
        StoreError: there are parts of several numbers.
    """
    root = Path(store)
    if (root / CURRENT).exists() or not root.is_dir():
        return []
    shards = _parts_at(root)
    counts = sorted({shard.count for shard in shards})
    if len(counts) > 1:
        raise StoreError(f"{root}: holds parts of {counts}; keep those of one number, remove the others")
    return shards


def _parts_at(root: Path) -> list[Shard]:
    found = [match for match in map(_NAME.fullmatch, (entry.name for entry in root.iterdir())) if match]
    return sorted((Shard(int(match[1]), int(match[2])) for match in found), key=lambda shard: shard.index)


def stores_in(store: str | Path) -> list[Path]:
    """Folders of the parts that lie in a store's folder; that folder itself where a store is not divided."""
    return [shard.path(store) for shard in shards_in(store)] or [Path(store)]


def shard_to_write(store: str | Path, shard: Shard | None) -> tuple[Path, Shard | None]:
    """The folder that a refresh of a store, or of a shard of it, writes, and the shard that this is.

    Raises:
        ConfigError: a part is named as a store that is to be divided; or as of `check_place`.
    """
    root = Path(store).absolute()
    named = _NAME.fullmatch(root.name)
    if named is not None:
        own = Shard(int(named[1]), int(named[2]))
        if shard not in (None, own):
            raise ConfigError(f"store={store}: is a part itself; name the folder above it")
        path, shard = root, own
    else:
        path = Path(store) if shard is None else shard.path(store)
    check_place(path)
    return path, shard


def check_place(path: str | Path) -> None:
    """Refuse to write a store, or a part of one, where it would hide another or be hidden by it.

    Raises:
        ConfigError: an undivided store and parts would lie in one folder, or parts of several numbers.
    """
    path = Path(path).absolute()
    named = _NAME.fullmatch(path.name)
    root = path.parent if named else path
    counts = sorted({shard.count for shard in _parts_at(root)}) if root.is_dir() else []
    if (root / CURRENT).exists() and (named or counts):
        raise ConfigError(
            f"{root}: holds an undivided store ({CURRENT}), which hides all parts beside it; name another folder, or "
            "move one of the two out of it"
        )
    if counts and named is None:
        raise ConfigError(f"{root}: is divided; refresh its parts with shard=i/{counts[0]}, or name another folder")
    if named and counts not in ([], [int(named[2])]):
        raise ConfigError(f"{root}: holds parts of {counts}, {path.name} is none of them; name another folder")


def user_kind(store: str | Path) -> str | None:
    """int, str or mixed, of all users of a store, divided or not; None without users."""
    return common_kind(served_manifest(root).user_kind for root in stores_in(store))


def divide(store: str | Path, users: Sequence[int] | Sequence[str]) -> list[tuple[Path, list[Any]]]:
    """The folders of a store, divided or not, with those of the users who belong there.

    Raises:
        StoreError: a part to which one belongs is not there; the message names it.
    """
    root, shards = Path(store).absolute(), shards_in(store)
    named = _NAME.fullmatch(root.name)
    if named is not None:  # one part
        root, shards = root.parent, [Shard(int(named[1]), int(named[2]))]
    if not shards:
        return [(root, list(users))]
    owner = _parts_of(user_keys(users), shards[0].count)
    for user, index in zip(users, owner.tolist(), strict=True):
        if index not in {shard.index for shard in shards}:
            raise StoreError(
                f"{store}: user {user!r} belongs to part {index} of {shards[0].count}, which is not there; name the "
                "folder that holds it"
            )
    return [
        (shard.path(root), [users[row] for row in np.flatnonzero(owner == shard.index).tolist()])
        for shard in shards
        if (owner == shard.index).any()
    ]


def open_store(
    path: str | Path, *, summarizer_id: bytes | None = None, key: bytes | None = None, tail_len: int = 0
) -> StoreReader | StoreParts:
    """Open a store, or all parts of one; arguments and errors as of `StoreReader.open`."""
    root = Path(path)
    if shards_in(root):
        return StoreParts.open(root, summarizer_id=summarizer_id, key=key, tail_len=tail_len)
    return StoreReader.open(root, summarizer_id=summarizer_id, key=key, tail_len=tail_len)


class StoreParts:
    """All parts of a store, read as one."""

    def __init__(self, path: Path, parts: Sequence[StoreReader]) -> None:
        self.path = path
        self._parts = list(parts)

    @classmethod
    def open(
        cls, path: str | Path, *, summarizer_id: bytes | None = None, key: bytes | None = None, tail_len: int = 0
    ) -> StoreParts:
        """Open every part.

        Raises:
            StoreError: a part is missing, or there are parts of several numbers; and as `StoreReader.open`.
        """
        root = Path(path).absolute()
        shards = shards_in(root)
        if not shards:
            raise StoreError(f"{root} holds no parts; check the path")
        count = shards[0].count
        missing = sorted(set(range(count)) - {shard.index for shard in shards})
        if missing:
            raise StoreError(f"{root}: parts {missing} of {count} are not there; refresh them with shard=i/{count}")
        opened: list[StoreReader] = []
        try:
            for index in range(count):
                part_root = Shard(index, count).path(root)
                opened.append(StoreReader.open(part_root, summarizer_id=summarizer_id, key=key, tail_len=tail_len))
            parts = cls(root, opened)
            first = opened[0].manifest
            for part in opened[1:]:
                for field in ("summarizer_id", "num_tokens", "dim", "until"):
                    if getattr(part.manifest, field) != getattr(first, field):
                        raise StoreError(f"{part.path}: {field} differs from that of part 0; refresh all parts alike")
            return parts
        except BaseException:
            for part in opened:
                part.close()
            raise

    @property
    def manifest(self) -> Manifest:
        """Of part 0, but what holds for all: the oldest generation and refresh, the shortest tail; counts add up."""
        all_of = [part.manifest for part in self._parts]
        return dataclasses.replace(
            all_of[0],
            generation=min(manifest.generation for manifest in all_of),
            created_at=min(manifest.created_at for manifest in all_of),
            refreshed_at=min(manifest.refreshed_at for manifest in all_of),
            applied_segment=min(manifest.applied_segment for manifest in all_of),
            tail_len=min(manifest.tail_len for manifest in all_of),
            total_users=sum(manifest.total_users for manifest in all_of),
            count=sum(manifest.count for manifest in all_of),
            user_kind=common_kind(manifest.user_kind for manifest in all_of),
        )

    @property
    def generation(self) -> int:
        """The oldest of the parts' generations."""
        return self.manifest.generation

    @property
    def summarizer_id(self) -> bytes:
        """SHA-256 of the summarizer that wrote all parts, 32 bytes."""
        return self._parts[0].summarizer_id

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def get_many(self, user_ids: Sequence[int] | Sequence[str] | NDArray[Any]) -> StoredBatch:
        """Records of a batch of users; as `StoreReader.get_many`."""
        ids = user_ids if isinstance(user_ids, np.ndarray) else np.array(list(user_ids), dtype=object)
        owner = _parts_of(user_keys(user_ids), len(self._parts))
        order = np.argsort(owner, kind="stable")
        bounds = np.searchsorted(owner[order], np.arange(len(self._parts) + 1))
        asked = [ids[order[bounds[index] : bounds[index + 1]]].tolist() for index in range(len(self._parts))]
        # A part without a user of the batch is asked too: its shapes and errors are those of all.
        batches = [part.get_many(users) for part, users in zip(self._parts, asked, strict=True)]
        return _in_order(batches, np.argsort(order, kind="stable"))

    def keys(self) -> Iterator[int | str]:
        """User ids of all records, part by part."""
        return chain.from_iterable(part.keys() for part in self._parts)

    def reload(self) -> bool:
        """Follow every part to its newest generation; whether one changed."""
        changed = [part.reload() for part in self._parts]  # all of them, whether or not the first changes
        return any(changed)

    def close(self) -> None:
        """Let all parts go."""
        for part in self._parts:
            part.close()

    def __enter__(self) -> StoreParts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _parts_of(keys: Sequence[bytes], count: int) -> NDArray[np.int64]:
    return np.array([xxhash.xxh3_64_intdigest(key) % count for key in keys], np.int64)


def _in_order(batches: Sequence[StoredBatch], place: NDArray[np.int64]) -> StoredBatch:
    """Batches end to end, rearranged so that row b is row place[b] of them."""

    def column(name: str) -> NDArray[Any]:
        joined: NDArray[Any] = np.concatenate([getattr(batch, name) for batch in batches])[place]
        return joined

    lengths = np.concatenate([np.diff(batch.tail.offsets) for batch in batches])
    starts, counts = (np.cumsum(lengths) - lengths)[place], lengths[place]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    index = ranges(starts, counts)
    items, times, actions = (
        np.concatenate([getattr(batch.tail, name) for batch in batches])[index]
        for name in ("items", "times", "actions")
    )
    return StoredBatch(
        found=column("found"),
        summary=column("summary"),
        tail=Tail(items, times, actions, offsets),
        event_count=column("event_count"),
        last_event_ts=column("last_event_ts"),
        created_at=column("created_at"),
        history_digest=column("history_digest"),
    )
