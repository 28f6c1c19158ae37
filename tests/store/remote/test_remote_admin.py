"""Copies between folders and servers, verification, rollback, and statistics. Refreshes into a server, scorers and
trainings that read from it, and commands: only `store=redis://…` differs."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vista
from tests.conftest import Served
from tests.refresh import conftest as growing
from tests.refresh.test_item_values import counting_model
from tests.serve.conftest import models_file
from tests.store.conftest import found, write_generations
from tests.store.remote.valkey_server import ValkeyServer
from vista.cli.command_table import COMMANDS
from vista.cli.main import main
from vista.config import ExploreConfig, RefreshOptions
from vista.config.checks import Codec, Mixing, StateDtype
from vista.errors import ConfigError, LeakageError, RecordError, StoreBusyError, StoreError, SummarizerMismatchError
from vista.log.deletions import forget_events
from vista.log.event_log import EventLog
from vista.log.splits import parse_until
from vista.refresh import merge, refresh, refresh_incremental
from vista.scorer import Scorer
from vista.store import StoreReader
from vista.store.admin import copy_generation, roll_back, store_stats, verify_store
from vista.store.backend import open_backend
from vista.store.keys import user_keys
from vista.store.layout import Shard, StoreUrl, read_current
from vista.store.reader import published_manifest
from vista.store.server import Server
from vista.store.server_generation import ServerGeneration
from vista.store.state_record import StateArrays, StateSpec, encode_states
from vista.store.writer import erase
from vista.training.trainer import train

TOTAL = 40


def contents(store: str | Path, number: int) -> tuple[dict[bytes, bytes], Any]:
    """Records and manifest of a generation."""
    with open_backend(store).open(number, None) as reader:
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


def test_verification(server, build):
    url = server.url()
    write_generations(url)
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
    users, get = iter(range(TOTAL)), ServerGeneration._get

    def erase_and_get(records: ServerGeneration, keys: list[bytes]) -> list[bytes | None]:
        erase(url, [next(users)])
        return get(records, keys)

    monkeypatch.setattr(ServerGeneration, "_get", erase_and_get)
    with pytest.raises(StoreBusyError, match="gen-1 is being written"):
        verify_store(url)


def test_rollback(server, build):
    url = server.url()
    write_generations(url)
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
    write_generations(url)
    store = Server(StoreUrl.parse(url))
    store.erased_users.add(list(contents(url, 1)[0])[:2])  # of an erasure that was killed
    roll_back(url)
    assert found(url, range(TOTAL)) == [False, False, *[True] * (TOTAL - 2)]
    assert published_manifest(url).count == TOTAL - 2


def test_a_killed_removal_is_completed(server, build):
    """A generation without a manifest, but with records, is what a kill leaves."""
    url = server.url()
    write_generations(url)
    server.command("DEL", "{mine}:gen-1:!manifest", "{mine}:gen-1:!complete", "{mine}:gen-1:!cursor")
    assert "gen-1: " in str(store_stats(url)) and verify_store(url).unfinished == [1]
    with build.open_writer(url, run_digest="log-3"):
        pass
    assert not server.command("KEYS", "{mine}:gen-1:*")


SECRET = "hunter-two-and-more"
SLOW = ("watch", "evaluate", "report", "doctor", "export")
COMMANDS_WITH_STORES = [
    pytest.param(name, marks=[pytest.mark.nightly] if name in SLOW else [])
    for name, command in COMMANDS.items()
    if hasattr(command.schema, "store") and name != "train"
]


@pytest.fixture(scope="module")
def secured(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The URL of a store, with a password that the server requires, and a log that commands may change."""
    folder = tmp_path_factory.mktemp("secured")
    shutil.copytree(served.log.path, folder / "log")
    server = ValkeyServer(folder / "server", "--requirepass", SECRET)
    url = server.url(user=f"default:{SECRET}@")
    try:
        assert main(["store", "copy", f"store={served.store}", f"to={url}"]) == 0
        yield url, folder / "log"
    finally:
        server.kill()


def requests_of(name: str, served: Served, log: Path, store: str, folder: Path) -> list[list[str]]:
    """Arguments with which a command uses a store: as `store`, and wherever else it accepts one."""
    given = {
        "model": served.model_dir, "data": log, "run": served.config.run_dir, "users": "[101]", "user": 101,
        "to": folder / "copy", "out": folder / "out", "file": folder / "store.parquet", "num_threads": 1,
        "device": "cpu", "once": "true", "folder": folder / "new", "store": store,
    }  # fmt: skip
    if name == "store rollback":
        given["to"] = 1
    if name == "store merge":
        given |= {"parts": f"[{served.store}]", "data": f"[{log}]"}
    known = {field.name for field in fields(COMMANDS[name].schema)}
    words = {key: f"{key}={value}" for key, value in given.items() if key in known}
    requests = [[*words.values()]]
    if name in ("doctor", "evaluate"):
        requests.append([*words.values(), f"out={folder}/out.json"])
    if name == "store copy":
        requests.append([f"store={served.store}", f"to={store.replace('/mine', '/copied')}"])
    if name == "store merge":
        requests.append([*(words | {"parts": f"parts=[{store}]", "store": f"store={folder}/merged"}).values()])
    if name == "serve":
        requests.append([f"models={models_file(folder, {'a': (served.model_dir, store)})}"])
    return requests


@pytest.mark.parametrize("name", COMMANDS_WITH_STORES)
def test_no_command_shows_or_writes_a_password(
    served: Served, secured: tuple[str, Path], monkeypatch, capfd, tmp_path, name: str
) -> None:
    """With the right server, one that does not answer, a word that is not a URL, and a missing quote."""
    url, log = secured
    monkeypatch.chdir(tmp_path)
    (tmp_path / "new").mkdir()
    assert main(["store", "export", f"store={served.store}", f"out={tmp_path}/store.parquet"]) == 0
    stores = urls(url)
    if name in ("serve", "explore", "export"):
        stores = stores[1:]  # With the first one, they would run for long; `test_no_page_shows_a_password` opens it.
    for store in stores:
        for words in requests_of(name, served, log, store, tmp_path):
            if name != "explore":
                main([*name.split(), *words])
            with contextlib.suppress(SystemExit):
                main([*name.split(), *words, "--cfg"])
    said = "".join(capfd.readouterr())
    assert said and SECRET not in said
    assert files_with_password(tmp_path) <= {"models.yaml"}


def urls(url: str) -> list[str]:
    """A URL of the right server, of one that does not answer, a word that is not a URL, and a missing quote."""
    return [url, re.sub(r"/(\w+)$", "/no name", url), re.sub(r":\d+/", ":1/", url), f"'{url}"]


def files_with_password(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()}


PAGE_TABS = ("User", "Ranking", "What if", "Compare", "Store", "Results")


@pytest.mark.parametrize(
    "tab", [pytest.param(tab, marks=[] if tab == "Compare" else [pytest.mark.nightly]) for tab in PAGE_TABS]
)
def test_no_page_shows_a_password(served: Served, secured: tuple[str, Path], monkeypatch, caplog, tab: str) -> None:
    testing = pytest.importorskip("streamlit.testing.v1", reason="the extra `explore` is not installed")
    from vista.explore.page_body import TABS
    from vista.explore.page_cache import SCORERS

    assert tuple(TABS) == PAGE_TABS
    url, _ = secured
    script = Path(vista.__file__).parent / "explore" / "page.py"
    for store, other in ((url, url), (re.sub(r":\d+/", ":1/", url), None)):
        config = ExploreConfig(model=str(served.model_dir), store=store, other_store=other, data=str(served.log.path))
        monkeypatch.setattr("sys.argv", [str(script), json.dumps(asdict(config))])
        page = testing.AppTest.from_file(str(script), default_timeout=200)
        page.query_params.update(tab=tab, user="104")
        page.run()
        for button in [each for each in page.button if each.label == "Measure"]:
            button.click().run(timeout=200)
        shown = "".join(str(element.proto) for element in [*page.main, *page.sidebar] if hasattr(element, "proto"))
        assert store != url or "redis://default@127" in shown
        assert SECRET not in shown + caplog.text
    for each in SCORERS._open.values():
        each.scorer.close()
    SCORERS._open.clear()


def records(store: str | Path) -> dict[int | str, Any]:
    """The bytes of every user's record in the published generation, by user."""
    with StoreReader.open(store) as reader:
        users = list(reader.keys())
        batch = reader.get_many(users)
        columns = (batch.summary, batch.event_count, batch.history_digest, np.diff(batch.tail.offsets))
        return {user: tuple(column[row].tobytes() for column in columns) for row, user in enumerate(users)}


def test_a_refresh_into_a_server_writes_the_same_records(served, start_server, tmp_path):
    server = start_server("--requirepass", "secret")
    url = server.url(user=":secret@", options="?timeout_s=10")
    options = RefreshOptions(state=StateDtype.none)
    report = refresh(served.model, served.log, url, created_at=1)
    refresh(served.model, served.log, tmp_path / "local", options=options, created_at=1)
    assert report.store == server.url() and "secret" not in str(report)
    copy_generation(url, tmp_path / "copy")
    ours, theirs = published_manifest(tmp_path / "copy"), published_manifest(tmp_path / "local")
    assert ours == theirs and records(url) == records(tmp_path / "local")


def test_values_of_items_are_those_of_a_folder(server, tmp_path):
    log = growing.append(tmp_path / "log", growing.events({1: 30, 2: 25}))
    model, url = counting_model(log), server.url()
    refresh(model, log, url)
    growing.full(model, log, tmp_path / "store", codec=Codec.int8)
    with StoreReader.open(url) as remote, StoreReader.open(tmp_path / "store") as folder:
        assert remote.item_values().to_bytes() == folder.item_values().to_bytes()
        assert remote.item_values().to_bytes().startswith(remote.manifest.items_digest.encode() + b"\n")
    log = growing.later(tmp_path / "log", {2: 3})
    with Scorer.open(model, url) as scorer:
        old = scorer.catalog_scores([1])
        refresh_incremental(model, log, url)
        scorer.reload()
        assert not np.array_equal(scorer.catalog_scores([1]), old)
    copy_generation(url, tmp_path / "copy")
    growing.full(model, log, tmp_path / "store")
    with StoreReader.open(tmp_path / "copy") as copied, StoreReader.open(tmp_path / "store") as again:
        assert copied.item_values().to_bytes() == again.item_values().to_bytes()
    assert not verify_store(url).num_problems


def test_a_scorer_reads_from_a_server(served, server):
    url = server.url()
    copy_generation(served.store, url)
    users = served.log.users.ids(np.arange(served.log.num_users))[:50]
    with Scorer.open(served.model_dir, served.store) as local, Scorer.open(served.model_dir, url) as remote:
        items = local.model.items.ids(np.arange(20))
        np.testing.assert_array_equal(remote.score(users, items), local.score(users, items))
        assert remote.rank(users[0], top_k=5).items.tolist() == local.rank(users[0], top_k=5).items.tolist()
        assert not remote.reload()
        refresh(served.model, served.log, url)
        assert remote.reload() and remote.manifest.generation == 2
        np.testing.assert_array_equal(remote.score(users, items), local.score(users, items))
    other = growing.model(seed=5)
    with pytest.raises(SummarizerMismatchError):
        Scorer.open(other, url)


@pytest.mark.parametrize("state", [StateDtype.none, StateDtype.float32])
def test_incremental_refreshes(server, tmp_path, state):
    """As in a folder, with states or without them."""
    url, model, options = server.url(), growing.model(), RefreshOptions(state=state, codec=Codec.float32)
    log = growing.append(tmp_path / "log", growing.events(dict.fromkeys(range(1, 40), 6)))
    refresh(model, log, url, options=options)
    log = growing.append(
        tmp_path / "log",
        growing.events({3: 4, 41: 5, **dict.fromkeys(range(10, 40), 2)}, start=growing.START + 500 * growing.HOUR),
    )
    with StoreReader.open(url) as reader:
        counts = refresh_incremental(model, log, url).counts
        assert counts["recomputed"] == (32 if state is StateDtype.none else 1)
        assert reader.get_many([41]).found.all()
    refresh(model, log, tmp_path / "full", options=options)
    growing.assert_same(url, tmp_path / "full", 1e-6 if state is StateDtype.none else 2e-5)
    manifest = published_manifest(url)
    assert (manifest.applied_segment, manifest.going_to, manifest.generation) == (2, 0, 1)
    assert refresh_incremental(model, log, url).num_users == 0


def test_states_on_a_server_are_those_of_a_folder(server, tmp_path):
    """Byte for byte, after new, late, and forgotten events, and an erasure."""
    url, folder, model = server.url(), tmp_path / "store", growing.model()
    log = growing.append(tmp_path / "log", growing.events({1: 12, 2: 3, 3: 30, 4: 1, 5: 9}))
    options = RefreshOptions(state=StateDtype.float32, users_per_batch=2)
    for store in (url, folder):
        refresh(model, log, store, options=options, created_at=1)
    growing.append(tmp_path / "log", growing.events({1: 5, 3: 1, 6: 4}, growing.START + 500 * growing.HOUR))
    growing.append(tmp_path / "log", growing.events({2: 2, 5: 1}, growing.START - 100 * growing.HOUR))
    newest = log[3].slice(0, log[3].num_events - 1)
    columns = {"item": log.items.ids(newest.item), "timestamp": newest.timestamp}
    forget_events(log.path, {"user": np.array([3]), **columns})
    log = EventLog.open(tmp_path / "log")
    reports = [refresh_incremental(model, log, store, created_at=2) for store in (url, folder)]
    assert reports[0].counts == reports[1].counts and reports[0].counts["exchanged"] == 2
    assert [erase(store, [2]) for store in (url, folder)] == [1, 1]
    ours, theirs = (list(all_values(store)) for store in (url, folder))
    assert ours == theirs and [len(values) for values in ours] == [5, 5]
    assert b"!state:" + b"ui" + (2 + 2**63).to_bytes(8, "big") not in b"".join(server.command("KEYS", "*"))  # type: ignore[arg-type]
    assert "no problem found" in str(verify_store(url))


def all_values(store: str | Path) -> Iterator[dict[bytes, bytes]]:
    """Records and states of the published generation."""
    managed = open_backend(store)
    with managed.open(managed.current(), None) as held:
        for batches in (held.batches(), held.state_batches()):
            yield dict(pair for batch in batches for pair in zip(*batch, strict=True))


def test_parts_on_a_server_are_merged_into_a_folder(server, tmp_path):
    """Without the users who were erased from them, who stay erased."""
    model, log = growing.model(), growing.append(tmp_path / "log", growing.events(dict.fromkeys(range(300), 2)))
    refresh(model, log, server.url(), options=RefreshOptions(codec=Codec.float32, state=StateDtype.float32))
    growing.full(model, log, tmp_path / "full")
    gone = list(range(0, 300, 2))
    for store in (server.url(), tmp_path / "full"):
        assert erase(store, [*gone, 900]) == len(gone)
    merge(model, [(server.url(), log)], tmp_path / "merged")
    growing.assert_same(tmp_path / "merged", tmp_path / "full", 2e-5)
    assert all(open_backend(tmp_path / "merged").erased_users.erased(user_keys([*gone, 900])))


def test_states_that_cannot_be_kept_are_refused(served, server, tmp_path):
    options, model = RefreshOptions(state=StateDtype.float16), growing.model(mixing=Mixing.bidirectional)
    log = growing.append(tmp_path / "log", growing.events({1: 3}))
    for store in (server.url(), tmp_path / "store"):
        with pytest.raises(ConfigError, match=r"state=float16: no incremental refresh can add events.*leave it out"):
            refresh(model, log, store, options=options)
        with pytest.raises(ConfigError, match=r"state=float16: .*`until` hides events"):
            refresh(served.model, served.log, store, options=options, until="leave-last-out")
    refresh(model, log, server.url())
    assert published_manifest(server.url()).state_dtype == "none"


@pytest.mark.parametrize(("lose", "message"), [("DEL", r"39 states, but 40 records"), ("SET", None)])
def test_lost_and_damaged_states(server, build, lose, message):
    """A publication notices that a state was lost. A damaged one is named when an incremental refresh reads it."""
    options = {"state_dtype": "float32", "state_shape": (1, 2, 3)}
    with build.open_writer(server.url(), **options) as writer:
        keys, records = build.records_of(range(40), writer.spec)
        writer.put_batch(keys, records, 40, states_of(keys, writer.state_spec))
        with pytest.raises(ValueError, match="states: got 0 for 40 records"):
            writer.put_batch(keys, records, 40)
        name = b"{mine}:gen-1:!state:" + keys[5]
        server.command(*[lose, name, b"x"][: 3 if lose == "SET" else 2])
        if message is not None:
            with pytest.raises(StoreError, match=message):
                writer.publish()
            assert server.command("KEYS", "*gen-1*") == []
            return
        writer.publish()
    with StoreReader.open(server.url()) as store:
        assert store.states([4, 99]) is not None
        with pytest.raises(RecordError, match="the state of user 5 is corrupt"):
            store.states([4, 5])
    assert "the state of user 5 is corrupt" in str(verify_store(server.url()))


def states_of(keys: list[bytes], spec: StateSpec) -> list[bytes]:
    """States whose numbers depend only on the user's place."""
    count = len(keys)
    z = np.arange(count * 18, dtype=np.float32).reshape(count, 1, 2, 3, 3)
    weights, whole = z[:, 0, :, 0, 0], np.arange(count)
    arrays = StateArrays(z, weights, weights, whole, whole, whole, whole.astype(np.uint64), np.zeros((count, 0)))
    return encode_states(keys, arrays, spec)


def test_what_a_server_does_not_have(served, server):
    with pytest.raises(ConfigError, match="a store on a server has no shards"):
        refresh(served.model, served.log, server.url(), shard=Shard(0, 2))
    report = refresh(served.model, served.log, server.url(), until=parse_until("leave-last-out"))
    with pytest.raises(ConfigError, match="until=leave-last-out"):
        refresh_incremental(served.model, served.log, server.url())
    assert report.generation == 1 and published_manifest(server.url()).state_dtype == "none"


def test_nothing_holds_the_password(served_tasks, start_server, tmp_path, caplog):
    store = start_server("--requirepass", "hunter2").url(user=":hunter2@")
    assert served_tasks.log.impressions is not None
    times = np.sort(np.asarray(served_tasks.log.impressions.timestamp))
    refresh(served_tasks.model, served_tasks.log, store)
    run_dir = tmp_path / "run"
    given = served_tasks.config
    config = replace(
        given,
        model=replace(given.model),
        optim=replace(given.optim, tasks=["like"], next_weight=0.0, epochs=1),
        base=str(served_tasks.model_dir),
        store=store,
        run_dir=str(run_dir),
    )
    with pytest.raises(LeakageError, match=r"store=redis://127.*was refreshed with until=all") as caught:
        train(config, served_tasks.log)
    refresh(served_tasks.model, served_tasks.log, store, until=int(times[len(times) * 2 // 5]))
    with caplog.at_level(logging.INFO):
        train(config, served_tasks.log)
    assert re.search("summaries of generation 2 of redis://127", caplog.text)
    written = [path.read_bytes() for path in run_dir.rglob("*") if path.is_file()]
    assert b"store: redis://@127.0.0.1:" in (run_dir / "config.yaml").read_bytes()
    assert not [text for text in (f"{caught.value}".encode(), caplog.text.encode(), *written) if b"hunter2" in text]
