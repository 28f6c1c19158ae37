"""Copies between folders and servers, verification, rollback, and statistics."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

import vista
from tests.conftest import Served
from tests.serve.conftest import models_file
from tests.store.conftest import found, write_generations
from tests.store.remote.valkey_server import ValkeyServer
from vista.cli.command_table import COMMANDS
from vista.cli.main import main
from vista.config import ExploreConfig
from vista.errors import StoreBusyError, StoreError
from vista.store import StoreReader
from vista.store.admin import copy_generation, roll_back, store_stats, verify_store
from vista.store.backend import open_backend
from vista.store.layout import StoreUrl, read_current
from vista.store.reader import published_manifest
from vista.store.server import Server
from vista.store.server_generation import ServerGeneration
from vista.store.writer import erase

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
