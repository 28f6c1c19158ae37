"""Erasure alongside writers: no generation keeps an erased user, whatever is created or removed meanwhile."""

from __future__ import annotations

import pytest

from vista.store import StoreReader
from vista.store.erasure import erase
from vista.store.remote.remote_tombstones import RemoteTombstones

TOTAL = 40


def keys_of(server, user):
    key = b"ui" + (user + 2**63).to_bytes(8, "big")
    return [name for name in server.command("KEYS", "*") if name.endswith(key)]


def test_a_generation_that_is_published_while_an_erasure_begins(server, build, monkeypatch: pytest.MonkeyPatch):
    url = server.url()
    build.write_store(url)
    add = RemoteTombstones.add

    def publish_and_add(tombstones, keys):
        with monkeypatch.context() as patch:
            patch.setattr(RemoteTombstones, "add", add)
            build.write_store(url, 1, run_digest="log-2")
        add(tombstones, keys)

    monkeypatch.setattr(RemoteTombstones, "add", publish_and_add)
    assert erase(url, [3, 30]) == 2
    with StoreReader.open(url) as store:
        assert store.generation == 2 and not store.get_many([3, 30]).found.any() and len(store) == TOTAL - 2
    assert keys_of(server, 3) == keys_of(server, 30) == [] and len(keys_of(server, 4)) == 2


def test_a_generation_that_is_being_removed_loses_the_users_too(server, build):
    """As between the steps of a removal, or after a kill, when the next writer removes the rest."""
    url = server.url()
    build.write_store(url)
    build.write_store(url, 1, run_digest="log-2")
    for name in (b"!manifest", b"!complete", b"!cursor"):
        assert server.command("DEL", b"{mine}:gen-1:" + name) == 1
    assert len(keys_of(server, 3)) == 2
    assert erase(url, [3, 30]) == 2
    assert keys_of(server, 3) == keys_of(server, 30) == [] and len(keys_of(server, 4)) == 2
