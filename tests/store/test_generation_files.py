"""Generations that keep states: what is durable when, and what a missing folder of states leads to."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vista.errors import StoreError
from vista.store import StoreReader, StoreWriter, Tail, UserSummaries, encode_records, user_keys
from vista.store.admin.store_stats import store_stats
from vista.store.admin.verification import verify_store
from vista.store.erasure import erase
from vista.store.format.state_record import StateArrays, encode_states
from vista.store.layout import generation_path, list_generations, state_path
from vista.store.lmdb.environment import SharedEnvironment

WITH_STATES = {"state_dtype": "float32", "state_shape": (1, 2, 3)}


def put(build: Any, writer: StoreWriter, users: range, salt: int = 0) -> None:
    """One batch with states of zeros."""
    keys, records = build.records_of(users, writer.spec, salt)
    count, zeros = len(users), np.zeros(len(users), np.int64)
    weights = np.zeros((count, 2), np.float32)
    states = StateArrays(
        np.zeros((count, 1, 2, 3, 3), np.float32), weights, weights, zeros, zeros, zeros, zeros.astype(np.uint64)
    )
    assert writer.state_spec is not None
    writer.put_batch(keys, records, users.stop, encode_states(keys, states, writer.state_spec))


def write(build: Any, root: Path, salt: int = 0) -> None:
    with build.open_writer(root, run_digest=f"log-{salt}", **WITH_STATES) as writer:
        for start in range(writer.cursor, 40, 8):
            put(build, writer, range(start, start + 8), salt)
        writer.publish()


def test_all_folders_of_a_generation_are_durable_before_its_manifest_is_committed(tmp_path, build, monkeypatch):
    """Otherwise a power cut could keep the manifest and lose the folder of the states."""
    root, fsync, commit, steps = tmp_path / "store", os.fsync, SharedEnvironment.write, []

    def note_sync(descriptor: int) -> None:
        steps.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def note_commit(environment: SharedEnvironment, *arguments: Any) -> Any:
        steps.append("commit")
        return commit(environment, *arguments)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(SharedEnvironment, "write", note_commit)
    build.open_writer(root, **WITH_STATES).close()
    folders = (tmp_path, root, root / "gen-1", root / "gen-1" / "summary", root / "gen-1" / "state")
    assert set(map(str, folders)) <= set(steps[: steps.index("commit")])


@pytest.mark.parametrize("num_done", [0, 16])
def test_an_unfinished_generation_without_its_states_starts_over(tmp_path, build, caplog, num_done):
    write(build, tmp_path)
    with build.open_writer(tmp_path, run_digest="log-1", **WITH_STATES) as writer:
        for start in range(0, num_done, 8):
            put(build, writer, range(start, start + 8), 1)
    shutil.rmtree(state_path(tmp_path, 2))
    write(build, tmp_path, salt=1)
    assert "the states that its manifest names are missing" in caplog.text and "starts over" in caplog.text
    assert list_generations(tmp_path) == [1, 2] and verify_store(tmp_path).num_problems == 0
    with StoreReader.open(tmp_path) as store:
        assert store.generation == 2
        np.testing.assert_allclose(store.get_many(range(40)).summary, build.summaries(range(40), 1), atol=0.02)


def test_a_served_generation_that_lost_its_states_is_read_and_erased_from_but_not_updated(tmp_path, build):
    write(build, tmp_path)
    shutil.rmtree(generation_path(tmp_path, 1) / "state")
    with pytest.raises(StoreError, match=r"gen-1/state: the states .* are missing; run a full refresh"):
        build.update(tmp_path, range(4), 1)
    assert erase(tmp_path, [3]) == 1
    with StoreReader.open(tmp_path) as store:
        assert store.get_many([2, 3]).found.tolist() == [True, False]
    write(build, tmp_path, salt=1)
    assert verify_store(tmp_path).records == {1: 39, 2: 39}


def test_records_in_ascending_order_fill_their_pages(tmp_path: Path, build: Any) -> None:
    """Records of a bit less than half a page: two per page in ascending batches, and nothing lost in another order."""
    sizes = {}
    for name, order in (("ascending", range(0, 400, 20)), ("descending", range(380, -20, -20))):
        with build.open_writer(tmp_path / name, num_tokens=110, total_users=400) as writer:
            for done, first in enumerate(order, 1):
                users = range(first, first + 20)
                keys = user_keys(list(users))
                summaries = UserSummaries(
                    keys=keys, summary=np.ones((20, 110, 8), np.float32), tail=Tail.empty(20),
                    event_count=np.array(users), last_event_ts=np.array(users),
                    history_digest=np.zeros(20, np.uint64),
                )  # fmt: skip
                writer.put_batch(keys, encode_records(summaries, writer.spec), 20 * done)
            writer.publish()
        with StoreReader.open(tmp_path / name) as store:
            assert store.get_many(range(400)).event_count.tolist() == list(range(400))
        sizes[name] = store_stats(tmp_path / name).generations[0].live_bytes
    assert sizes["ascending"] < 1.1 * 400 * 2048 < sizes["descending"]
