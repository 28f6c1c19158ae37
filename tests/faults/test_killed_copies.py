"""Killed copies between a folder and a Valkey server resume, and give what copies without kills give."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.faults import server_kills as kills
from tests.faults.harness import Trial, promise
from tests.faults.losses import compare
from tests.faults.nursery import Nursery
from tests.faults.server_kills import STORE, USERS, Contents, Growth, contents
from tests.faults.test_killed_server_refresh import LOSES_NOTHING
from tests.store.remote.valkey_server import ValkeyServer
from vista.config.choices import Codec
from vista.log.event_log import EventLog
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, refresh
from vista.store import StoreReader

TO_SERVER, TO_FOLDER = "to a server", "from a server"


@dataclass(frozen=True)
class Copies:
    """Stores with one and with two generations, and what a copy of the second one to the store with one leaves."""

    folder: Path
    """one/ and two/."""
    on_server: dict[bytes, bytes]
    """A server with both generations, for `restore`."""
    after: dict[str, Contents]
    points: dict[str, list[int]]
    """Requests and system calls of the copies, by kind."""


@pytest.fixture(scope="module")
def copies(growth: Growth, valkey: ValkeyServer, traced: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Copies:
    folder, model = tmp_path_factory.mktemp("copies").resolve(), VistaModel.from_pretrained(growth.folder / "model")
    options = RefreshOptions(codec=Codec.float32, state="none")  # type: ignore[arg-type]
    for segment, name in ((1, "one"), (2, "two")):
        if segment == 2:
            shutil.copytree(folder / "one", folder / "two")
        log = EventLog.open(growth.folder / "log", last_segment=segment)
        refresh(model, log, folder / name, options=options, created_at=segment)
    traced.imports("tests.faults.server_kills")
    traced.imports("vista.store.remote.locked_server")
    shutil.copytree(folder / "one", folder / "target")
    kills.restore(valkey, growth.dump)
    points = {TO_SERVER: traced.call(kills.copy, folder / "two", valkey.url(STORE), 0)}
    on_server, after = kills.dumped(valkey), {TO_SERVER: contents(valkey)}
    points[TO_FOLDER] = traced.call(kills.copy, valkey.url(STORE), folder / "target", 0)
    after[TO_FOLDER] = kills.folder_contents(folder / "target")
    return Copies(folder, on_server, after, points)


@promise(
    LOSES_NOTHING,
    fault="beyond one machine, kill -9 of a copy {kind}: at any request, or system call that changes the folder",
    full=20,
    short=1,
    kinds=[TO_SERVER, TO_FOLDER],
    judged=True,
)
def test_killed_copy(trial: Trial, traced: Nursery, growth: Growth, copies: Copies, valkey: ValkeyServer) -> None:
    kind, url, folder = trial.promise.kind, valkey.url(STORE), trial.folder / "target"
    kills.restore(valkey, growth.dump if kind == TO_SERVER else copies.on_server)
    if kind == TO_SERVER:
        source, target, found = str(copies.folder / "two"), url, lambda: contents(valkey)
    else:
        shutil.copytree(copies.folder / "one", folder)
        source, target, found = url, str(folder), lambda: kills.folder_contents(folder)
    before, source_before = found(), contents(valkey) if kind == TO_FOLDER else {}
    num_requests, num_calls = copies.points[kind]
    num_kills, again = 0, True
    with StoreReader.open(target) as reader:
        expected = reader.get_many(USERS).summary
        while again:
            by_call = kind == TO_FOLDER and trial.random.random() < 0.6
            at = trial.random.randint(1, num_calls if by_call else num_requests)
            point = [at] if by_call else [0, at, trial.random.choice([0.0, trial.random.random(), 1.0])]
            child = traced.start(kills.copy, source, target, *point).end()
            assert child.exit_code == -9 or (num_kills and child.exit_code == 0), child.raised
            if child.exit_code:
                num_kills += 1
                trial.count("at a system call" if by_call else "at a request")
            kills.release_lock(valkey)
            assert np.array_equal(reader.get_many(USERS).summary, expected)
            with StoreReader.open(target) as opened:
                assert opened.get_many(USERS).found.all()
            again = trial.random.random() < 0.4
        traced.call(kills.copy, source, target, 0)
    compare(trial, found(), copies.after[kind])
    assert before != found()
    if kind == TO_FOLDER:
        compare(trial, contents(valkey), source_before)
    trial.count("kills", num_kills)
