"""Copies between folders and servers, verification, rollback, statistics, and the commands for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vista.errors import StoreBusyError, StoreError, StoreUnavailableError
from vista.store import StoreReader
from vista.store.admin.copying import copy_generation
from vista.store.admin.generation_reader import open_generation
from vista.store.admin.rollback import roll_back
from vista.store.admin.store_stats import store_stats
from vista.store.admin.verification import verify_store
from vista.store.erasure import erase
from vista.store.layout import read_current
from vista.store.remote.generation_on_server import GenerationOnServer
from vista.store.remote.remote_records import RemoteRecords
from vista.store.remote.remote_store import RemoteStore
from vista.store.remote.store_url import StoreUrl

TOTAL = 40


def contents(store: str | Path, number: int) -> tuple[dict[bytes, bytes], Any]:
    """Records and manifest of a generation."""
    if StoreUrl.matches(store):
        held = RemoteStore.connect(StoreUrl.parse(store)).open(number, None)
        return dict(pair for batch in held.raw_batches() for pair in zip(*batch, strict=True)), held.manifest
    with open_generation(Path(store), number) as reader:
        return dict(pair for batch in reader.raw_batches() for pair in zip(*batch, strict=True)), reader.manifest


def test_copies_are_equal_byte_for_byte(server, build, tmp_path):
    source, url, back = tmp_path / "source", server.url(), tmp_path / "back"
    build.write_store(source, tail_columns=build.tail_columns, counters=build.layout.to_dict())
    build.write_store(source, 1, run_digest="log-2", tail_columns=build.tail_columns, counters=build.layout.to_dict())
    report = copy_generation(source, url)
    assert str(report).startswith(f"generation 2 of {url} is published: 40 records, ")
    copy_generation(url, back)
    assert contents(source, 2) == contents(url, 2) == contents(back, 2) and read_current(back) == 2
    copy_generation(url, server.url("1/other"))
    assert contents(server.url("1/other"), 2) == contents(source, 2)
    assert copy_generation(source, url).num_resumed == TOTAL, "nothing to do"
    with StoreReader.open(url) as store:
        assert store.get_many([5]).summary.max() > 900
    with pytest.raises(StoreError, match="is the source store itself"):
        copy_generation(url, StoreUrl.parse(url))


def test_a_copy_is_published_later(server, build, tmp_path):
    url = server.url()
    build.write_store(tmp_path)
    with pytest.raises(StoreError, match="does not exist"):
        copy_generation(tmp_path / "none", url)
    assert not copy_generation(tmp_path, url, publish=False).published
    with pytest.raises(StoreError, match="holds no published generation"):
        StoreReader.open(url)
    report = copy_generation(tmp_path, url)
    assert report.published and report.num_resumed == TOTAL and report.generation == 1
    build.update(tmp_path, range(10), salt=1)  # in place
    assert copy_generation(tmp_path, url).generation == 2
    ours, theirs = contents(tmp_path, 1)[0], contents(url, 2)[0]
    assert ours.keys() == theirs.keys() and all(ours[key][128:] == theirs[key][128:] for key in ours)


def test_an_interrupted_copy_resumes(server, build, tmp_path, monkeypatch):
    build.write_store(tmp_path, total_users=1500)
    put, batches = GenerationOnServer.put, []

    def put_once(*arguments: Any) -> int:
        if batches:
            raise StoreUnavailableError("cut")
        batches.append(arguments)
        return put(*arguments)

    with monkeypatch.context() as patch, pytest.raises(StoreUnavailableError, match="cut"):
        patch.setattr(GenerationOnServer, "put", put_once)
        copy_generation(tmp_path, server.url())
    with pytest.raises(StoreError, match="holds no published"):
        StoreReader.open(server.url())
    report = copy_generation(tmp_path, server.url())
    assert 0 < report.num_resumed < 1500 and report.num_records == 1500
    assert contents(tmp_path, 1) == contents(server.url(), 1)


def test_an_interrupted_copy_of_other_records_starts_over(server, build, tmp_path, caplog):
    build.write_store(tmp_path)
    copy_generation(tmp_path, server.url(), publish=False)
    server.command("DEL", "{mine}:gen-1:!complete")
    name = b"{mine}:gen-1:ui" + (5 + 2**63).to_bytes(8, "big")
    server.command("SETRANGE", name, 140, b"\xff\xfe")
    assert copy_generation(tmp_path, server.url()).num_resumed == 0
    assert "the copy starts over" in caplog.text and contents(tmp_path, 1) == contents(server.url(), 1)


def test_users_who_were_erased_at_the_target_are_refused(server, build, tmp_path):
    url = server.url()
    build.write_store(tmp_path)
    copy_generation(tmp_path, url)
    assert erase(url, [3]) == 1
    build.update(tmp_path, range(10), salt=1)
    with pytest.raises(StoreError, match=r"some users were erased here, but are still in .*erase them there too"):
        copy_generation(tmp_path, url)
    erase(tmp_path, [3])
    assert copy_generation(tmp_path, url).num_records == TOTAL - 1


def test_verification(server, build):
    url = server.url()
    build.write_store(url)
    build.write_store(url, 1, run_digest="log-2")
    with build.open_writer(url, run_digest="log-3") as writer:
        build.put_users(writer, range(16))
    report = verify_store(url)
    assert (report.records, report.unfinished, report.problems) == ({1: 40, 2: 40}, [3], [])
    server.command("SETRANGE", b"{mine}:gen-1:ui" + (5 + 2**63).to_bytes(8, "big"), 140, b"\xff\xfe")
    server.command("DEL", b"{mine}:gen-2:ui" + (7 + 2**63).to_bytes(8, "big"))
    server.command("SET", "{mine}:LAST", "gen-x")
    problems = verify_store(url).problems
    assert [name for name in ("user 5", "user 7", "LAST holds") if any(name in line for line in problems)] == [
        "user 5", "user 7", "LAST holds",
    ]  # fmt: skip
    assert len(problems) == 3
    with pytest.raises(StoreError, match="holds no published generation"):
        verify_store(server.url("other"))


def test_verification_waits_for_a_quiet_moment(server, build, monkeypatch):
    url = server.url()
    build.write_store(url)
    users, get = iter(range(TOTAL)), RemoteRecords.get

    def erase_and_get(records: RemoteRecords, keys: list[bytes]) -> list[bytes | None]:
        erase(url, [next(users)])
        return get(records, keys)

    monkeypatch.setattr(RemoteRecords, "get", erase_and_get)
    with pytest.raises(StoreBusyError, match="gen-1 is being written"):
        verify_store(url)


def test_rollback(server, build):
    url = server.url()
    for salt in range(2):
        build.write_store(url, salt, run_digest=f"log-{salt}")
    with StoreReader.open(url) as store:
        (report,) = roll_back(url)
        assert report.generation == 1 and store.reload() and store.get_many([5]).summary.max() < 100
        with pytest.raises(StoreError, match="no complete generation before gen-1"):
            roll_back(url)
        server.command("SET", "{mine}:CURRENT", "gen-7")
        with pytest.raises(StoreError, match=r"CURRENT holds 'gen-7'.*vista store rollback"):
            store.reload()
        assert store.get_many([5]).found.all()
        assert roll_back(url, to=2)[0].generation == 2 and store.reload()
        with pytest.raises(StoreError, match=r"gen-9 cannot be published: .*has no gen-9"):
            roll_back(url, to=9)
    with pytest.raises(StoreError, match="holds no published generation"):
        roll_back(server.url("other"))
    assert server.command("EXISTS", "{other}:writer") == 0


def test_a_rollback_does_not_bring_erased_users_back(server, build):
    url = server.url()
    for salt in range(2):
        build.write_store(url, salt, run_digest=f"log-{salt}")
    store = RemoteStore.connect(StoreUrl.parse(url))
    store.tombstones.add(list(contents(url, 1)[0])[:2])  # of an erasure that was killed
    roll_back(url)
    with StoreReader.open(url) as reader:
        assert reader.get_many([0, 1, 2]).found.tolist() == [False, False, True] and len(reader) == TOTAL - 2


def test_statistics(server, build):
    url = server.url()
    build.write_store(url)
    with build.open_writer(url, run_digest="log-2") as writer:
        build.put_users(writer, range(16))
    stats = store_stats(url)
    assert stats.published == 1 and [each.num_records for each in stats.generations] == [40, 16]
    size = sum(map(len, contents(url, 1)[0].values()))
    assert abs(stats.generations[0].live_bytes - size) <= TOTAL and f"about {size:,} bytes" in str(stats)
    assert "gen-1 (published): 40 records" in str(stats) and "gen-2 (unfinished): 16 users done" in str(stats)


def test_a_killed_removal_is_completed(server, build):
    """A generation without a manifest, but with records, is what a kill leaves."""
    url = server.url()
    build.write_store(url)
    build.write_store(url, 1, run_digest="log-2")
    server.command("DEL", "{mine}:gen-1:!manifest", "{mine}:gen-1:!complete", "{mine}:gen-1:!cursor")
    assert "gen-1: " in str(store_stats(url)) and verify_store(url).unfinished == [1]
    with build.open_writer(url, run_digest="log-3"):
        pass
    assert not server.command("KEYS", "{mine}:gen-1:*")
