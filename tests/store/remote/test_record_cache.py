"""The cache of a host in front of a server: it saves bytes, never serves what has changed, and never fails a read."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.forked_child import in_child
from tests.store.remote.valkey_server import ValkeyServer
from vista.errors import StoreUnavailableError
from vista.store import StoreReader
from vista.store.admin.verification import verify_store
from vista.store.erasure import erase
from vista.store.remote.record_cache import RecordCache

TOTAL = 40


def sent_bytes(server: ValkeyServer) -> int:
    stats: Any = server.command("INFO", "stats")
    return int(stats["total_net_output_bytes"])


@pytest.fixture
def cached(server: ValkeyServer, tmp_path: Path) -> str:
    """URL of a store with a cache."""
    return server.url(options=f"?cache={tmp_path / 'deep' / 'cache'}&cache_mb=10")


def test_cached_records_are_not_sent_again(server, build, cached, tmp_path):
    build.write_store(cached, codec="float32", num_tokens=2, dim=8)
    with StoreReader.open(cached) as store, StoreReader.open(server.url()) as plain:
        before = sent_bytes(server)
        first = store.get_many(range(-1, TOTAL))
        cold = sent_bytes(server) - before
        server.command("CONFIG", "RESETSTAT")
        again = store.get_many(range(-1, TOTAL))
        stats = server.command("INFO", "commandstats")
        assert stats["cmdstat_mget"]["calls"] == 1 == stats["cmdstat_getrange"]["calls"], "one round trip"
        assert sent_bytes(server) < cold / 3
        np.testing.assert_array_equal(first.summary, again.summary)
        np.testing.assert_array_equal(first.summary, plain.get_many(range(-1, TOTAL)).summary)
        assert again.found.tolist() == [False] + [True] * TOTAL
    (folder,) = (tmp_path / "deep" / "cache").iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_every_change_is_seen_at_once(server, build, cached):
    build.write_store(cached)
    with StoreReader.open(cached) as store:
        store.get_many(range(TOTAL))
        build.update(server.url(), range(10, 12), salt=1)
        assert store.get_many([10]).summary.max() > 900, "updated in place, without a reload"
        assert erase(server.url(), [5]) == 1
        assert store.get_many([4, 5]).found.tolist() == [True, False]
        for salt in (2, 3):
            build.write_store(server.url(), salt, run_digest=f"log-{salt}")
        assert store.get_many([4]).summary.max() > 2900, "its generation was removed"
    assert verify_store(cached).num_problems == 0


def test_threads_that_see_different_versions_do_not_mix_them(server, build, cached, monkeypatch):
    """One thread has read records; before it caches them, a user is erased, and another thread sees the new version."""
    build.write_store(cached)
    with StoreReader.open(cached) as store:
        records, erased = store._current().records, []

        def set_version(one: Any, version: bytes) -> None:
            one.version = version
            if one is records and not erased:
                erased.append(5)
                assert erase(server.url(), erased) == 1
                assert store.get_many([7]).found.all()

        records.version = b""
        versions = property(lambda one: one.version, set_version)
        monkeypatch.setattr(type(records), "_version", versions, raising=False)
        assert store.get_many(range(TOTAL)).found.all() and erased
        for _ in range(2):
            assert store.get_many([4, 5]).found.tolist() == [True, False]


def test_processes_share_it_and_forks_use_it(server, build, cached):
    build.write_store(cached)
    with StoreReader.open(cached) as store:
        store.get_many(range(20))
        for first in range(0, TOTAL, 10):
            users = range(first, first + 10)
            assert in_child(lambda users=users: store.get_many(users).found.tolist()) == [True] * 10
        server.command("CONFIG", "RESETSTAT")
        assert store.get_many(range(TOTAL)).found.all()
        assert server.command("INFO", "commandstats")["cmdstat_mget"]["calls"] == 1
        server.kill()
        with pytest.raises(StoreUnavailableError):  # Nobody could tell whether what is cached is still valid.
            store.get_many([1])


def test_a_damaged_entry_is_read_again(server, build, cached, monkeypatch):
    build.write_store(cached)
    get = RecordCache.get

    def get_damaged(cache: RecordCache, version: bytes, keys: list[bytes]) -> list[bytes | None]:
        return [None if value is None else value[:-1] + b"\xff" for value in get(cache, version, keys)]

    with StoreReader.open(cached) as store:
        expected = store.get_many(range(TOTAL))
        monkeypatch.setattr(RecordCache, "get", get_damaged)
        np.testing.assert_array_equal(store.get_many(range(TOTAL)).summary, expected.summary)


def test_its_size_is_bounded(tmp_path):
    cache, record = RecordCache(tmp_path / "cache", 1_000_000), bytes(4000)
    keys = [b"%d" % number for number in range(2000)]
    for first in range(0, 2000, 50):
        cache.put(b"v", dict.fromkeys(keys[first : first + 50], record))
    held = [value is not None for value in cache.get(b"v", keys)]
    assert 50 <= sum(held) <= 400 and all(held[-50:])
    assert cache._open().live_bytes() < 1_000_000 + 60 * 8192
    assert cache.get(b"w", keys[-50:]) == [None] * 50
    cache.close()


def test_a_cache_that_cannot_be_written_does_not_fail_reads(server, build, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    url = server.url(options=f"?cache={tmp_path / 'file' / 'cache'}")
    build.write_store(server.url())
    with StoreReader.open(url) as store:
        assert store.get_many(range(TOTAL)).found.all() and store.get_many(range(TOTAL)).found.all()
    assert caplog.text.count("records are no longer cached here") == 1
