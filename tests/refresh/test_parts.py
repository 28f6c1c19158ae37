"""Several machines: parts of one store read as one, and stores over parts of the events merged into one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vista.choices import Codec, Decay
from vista.data.event_log import EventLog
from vista.errors import ConfigError, StoreError
from vista.refresh import forget, merge, refresh, refresh_incremental
from vista.scorer import Scorer
from vista.store import SummaryStore
from vista.store.parts import Shard, StoreParts, open_store


def test_parts_are_one_store(tmp_path: Path, grow: SimpleNamespace) -> None:
    model = grow.model()
    log = grow.append(tmp_path / "log", grow.events({user: 1 + user % 9 for user in range(40)}))
    for index in range(3):
        refresh(model, log, tmp_path / "parts", codec=Codec.float32, shard=Shard(index, 3))
    log = grow.append(tmp_path / "log", grow.events({5: 2, 50: 3, 51: 1}, grow.start + 500 * grow.hour))
    for index in range(3):
        refresh_incremental(model, log, tmp_path / "parts", shard=Shard(index, 3))
    refresh(model, log, tmp_path / "whole", codec=Codec.float32)
    users = [51, 3, 3, 999, 5, *range(40)]
    with SummaryStore.open(tmp_path / "whole") as whole, open_store(tmp_path / "parts") as parts:
        assert isinstance(parts, StoreParts) and len(parts) == len(whole) == 42
        assert sorted(parts.keys()) == sorted(whole.keys())
        found, wanted = parts.get_many(users), whole.get_many(users)
        assert (
            found.found.tolist() == wanted.found.tolist() and found.event_count.tolist() == wanted.event_count.tolist()
        )
        np.testing.assert_allclose(found.summary, wanted.summary, atol=2e-5)
        for name in ("items", "times", "actions", "offsets"):
            assert getattr(found.tail, name).tolist() == getattr(wanted.tail, name).tolist(), name
        assert parts.get_many([]).summary.shape == (0, 3, 16) and not parts.reload()
    with Scorer.open(model, tmp_path / "whole") as one, Scorer.open(model, tmp_path / "parts") as many:
        np.testing.assert_allclose(many.score(users, [0, 10, 20]), one.score(users, [0, 10, 20]), atol=1e-4)


def test_what_is_no_whole_set_of_parts_is_refused(tmp_path: Path, grow: SimpleNamespace) -> None:
    model = grow.model()
    log = grow.append(tmp_path / "log", grow.events(dict.fromkeys(range(9), 3)))
    refresh(model, log, tmp_path / "parts", shard=Shard.parse("0/2"))
    with pytest.raises(StoreError, match=r"parts \[1\] of 2 are not there; refresh them with shard=i/2"):
        open_store(tmp_path / "parts")
    refresh(model, log, tmp_path / "parts", shard=Shard.parse("1/2"), until="leave-last-out")
    with pytest.raises(StoreError, match="until differs"):
        open_store(tmp_path / "parts")
    refresh(model, log, tmp_path / "parts", shard=Shard.parse("1/3"))
    with pytest.raises(StoreError, match=r"holds parts of \[2, 3\]"):
        open_store(tmp_path / "parts")
    for text in ("3/3", "1", "-1/2", "a/b"):
        with pytest.raises(ConfigError, match="write i/n"):
            Shard.parse(text)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), decay=st.sampled_from([Decay.none, Decay.time]))
def test_merged_stores_equal_the_store_of_all_events(
    tmp_path_factory: pytest.TempPathFactory, grow: SimpleNamespace, data: st.DataObject, decay: Decay
) -> None:
    folder = tmp_path_factory.mktemp("merge")
    model = grow.model(decay=decay, decay_horizons=[20.0, 0.0] if decay is Decay.time else [])
    frame = grow.events(data.draw(st.dictionaries(st.integers(1, 6), st.integers(1, 20), min_size=1)), spread=10**7)
    owner = np.array(data.draw(st.lists(st.integers(0, 2), min_size=len(frame["user"]), max_size=len(frame["user"]))))
    if data.draw(st.booleans()):
        owner = np.sort(owner)  # few seams
    parts: list[tuple[Path, EventLog]] = []
    for part in range(3):
        rows = {name: values[owner == part] for name, values in frame.items()}
        if len(rows["user"]) and rows["action"][0] == "click" and "like" in rows["action"]:
            log = grow.append(folder / f"log-{part}", rows)
        elif len(rows["user"]):
            rows["action"] = np.where(np.arange(len(rows["user"])) == 0, "click", rows["action"])
            log = grow.append(folder / f"log-{part}", rows)
        else:
            continue
        frame["action"][owner == part] = rows["action"]
        refresh(model, log, folder / f"store-{part}", codec=Codec.float32)
        parts.append((folder / f"store-{part}", log))
    log = grow.append(folder / "log", frame)
    merge(model, parts, folder / "merged", users_per_batch=2)
    refresh(model, log, folder / "expected", codec=Codec.float32)
    grow.assert_same(folder / "merged", folder / "expected", atol=5e-4)
    with pytest.raises(ConfigError, match="until=merged"):
        refresh_incremental(model, log, folder / "merged")


def test_merge_refuses_what_does_not_add_up(tmp_path: Path, grow: SimpleNamespace) -> None:
    model = grow.model()
    log = grow.append(tmp_path / "log", grow.events({1: 7}))
    refresh(model, log, tmp_path / "store")
    log = grow.append(tmp_path / "log", grow.events({1: 1}, grow.start + 500 * grow.hour))
    with pytest.raises(StoreError, match=r"state of user 1 is of 7 events, but .* has 8; refresh that store first"):
        merge(model, [(tmp_path / "store", log)], tmp_path / "merged")
    refresh(model, log, tmp_path / "past", until="leave-last-out")
    with pytest.raises(StoreError, match="keeps no states"):
        merge(model, [(tmp_path / "past", log)], tmp_path / "merged")
    with pytest.raises(ConfigError, match="has no states"):
        merge(grow.model(num_seeds=0), [(tmp_path / "past", log)], tmp_path / "merged")


def test_forgotten_events_leave_store_and_log(tmp_path: Path, grow: SimpleNamespace) -> None:
    model = grow.model()
    log = grow.append(tmp_path / "log", grow.events({1: 30, 2: 5}))
    refresh(model, log, tmp_path / "store", codec=Codec.float32)
    history = log[1].slice(0, 4, 6)
    gone: dict[str, Any] = {"user": [1, 1], "item": log.items.ids(history.item), "timestamp": history.timestamp}
    report = forget(model, log, tmp_path / "store", gone)
    assert report.counts["exchanged"] == 1 and report.num_events == 2
    refresh(model, EventLog.open(log.path), tmp_path / "expected", codec=Codec.float32)
    grow.assert_same(tmp_path / "store", tmp_path / "expected", atol=1e-4)
    with SummaryStore.open(tmp_path / "store") as store:
        assert store.get_many([1]).event_count.tolist() == [28]
