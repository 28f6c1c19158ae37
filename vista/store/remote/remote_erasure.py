"""Erasure of users from a store on a server."""

from __future__ import annotations

from collections.abc import Sequence

from vista.errors import StoreError, StoreWriteError
from vista.store.remote.generation_on_server import GenerationOnServer
from vista.store.remote.remote_store import RemoteStore
from vista.store.remote.store_url import StoreUrl


def erase_on_server(url: StoreUrl, keys: Sequence[bytes]) -> int:
    """Erase users as `vista.store.erasure.erase` does; returns how many had a record in the published generation.

    The tombstones come first, so that no later write brings the users back. Writers are not stopped: whoever of the two
    is late repeats its own atomic change.

    Raises:
        StoreError: there is no store, or the server cannot be used, or did not bring it to its disk. Call it again, as
            after a kill.
    """
    store = RemoteStore.connect(url)
    numbers = store.numbers()
    if not numbers:
        raise StoreError(f"{url} holds no store; check the store's name")
    if not keys:
        return 0
    store.tombstones.add(keys)
    published, count = store.published_or_none(), 0
    for number in sorted(numbers, key=lambda number: number != published):  # the one that readers see comes first
        try:
            removed = GenerationOnServer(store, number, None).remove(keys)
        except StoreWriteError:
            if number in store.numbers():
                raise
            continue  # It was removed by a publication meanwhile.
        count = removed if number == published else count
    store.make_durable()
    return count
