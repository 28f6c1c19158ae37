"""Erasure of users from a store on a server."""

from __future__ import annotations

from collections.abc import Sequence

from vista.errors import StoreError, StoreWriteError
from vista.store.remote.generation_on_server import GenerationOnServer
from vista.store.remote.remote_store import RemoteStore
from vista.store.remote.store_url import StoreUrl

_REMOVED_AT_ONCE = 1000


def erase_on_server(url: StoreUrl, keys: Sequence[bytes]) -> int:
    """Erase users as `vista.store.erasure.erase` does; returns how many had a record in the published generation.

    The tombstones come first, so that no later write brings the users back. Writers are not stopped: if a
    writer and an erasure collide, the later one repeats its own atomic change.

    Raises:
        StoreError: there is no store, or the server cannot be used, or did not sync to disk in time. Call this again,
            as after a kill.
    """
    store = RemoteStore.connect(url)
    if not store.numbers():
        raise StoreError(f"{url} holds no store; check the store's name")
    if not keys:
        return 0
    store.tombstones.add(keys)
    # Generations that are created from now on leave the users out; those that were created before are listed now.
    numbers, published, count = store.numbers(), store.published_or_none(), 0
    for number in sorted(numbers, key=lambda number: number != published):  # the one that readers see comes first
        try:
            removed = GenerationOnServer(store, number, None).remove(keys)
        except StoreWriteError:
            if store.server.command("EXISTS", store.names.generation(number).manifest):
                raise
            _remove_remains(store, number, keys)  # of a generation that is being removed, or whose removal was killed
            continue
        count = removed if number == published else count
    store.make_durable()
    return count


def _remove_remains(store: RemoteStore, number: int, keys: Sequence[bytes]) -> None:
    """Remove users from a generation that has no manifest, so that nothing counts them."""
    names = store.names.generation(number)
    for first in range(0, len(keys), _REMOVED_AT_ONCE):
        part = keys[first : first + _REMOVED_AT_ONCE]
        store.server.pipeline([("UNLINK", *names.values(part)), ("ZREM", names.users, *part)])
