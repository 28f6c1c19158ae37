"""Several machines: shards of a store read as one, and stores over disjoint events merged into one."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import ROUNDING
from tests.refresh.conftest import contents, fail_at
from vista.cli.main import main
from vista.config.checks import Codec, Decay
from vista.errors import ConfigError, RecordError, StoreError
from vista.log.compaction import compact_log
from vista.log.deletions import forget_events
from vista.log.event_log import EventLog
from vista.refresh import RefreshOptions, forget, merge, merging, refresh, refresh_incremental
from vista.scorer import Scorer
from vista.store import StoreReader, user_keys
from vista.store.admin import copy_generation
from vista.store.folder_files import Tombstones
from vista.store.keys import user_key
from vista.store.layout import Shard, environment_path, stores_in, users_by_store
from vista.store.parquet import export_store, import_store
from vista.store.reader import ShardedReader, open_store
from vista.store.writer import StoreUpdate, erase

EXACT = RefreshOptions(codec=Codec.float32)


def test_shards_are_read_as_one_store(tmp_path, grow):
    model = grow.model(num_tail_features=2, counter_keys=["item", "genre"])
    log = grow.append(tmp_path / "log", grow.events({user: 1 + user % 9 for user in range(40)}))
    for index in range(3):
        refresh(model, log, tmp_path / "sharded", options=EXACT, shard=Shard(index, 3))
    log = grow.later(tmp_path / "log", {5: 2, 50: 3, 51: 1})
    for index in range(3):
        refresh_incremental(model, log, tmp_path / "sharded", shard=Shard(index, 3))
    grow.full(model, log, tmp_path / "whole")
    users = [51, 3, 3, 999, 5, *range(40)]
    with StoreReader.open(tmp_path / "whole") as whole, open_store(tmp_path / "sharded") as sharded:
        assert isinstance(sharded, ShardedReader) and len(sharded) == len(whole) == 42
        assert sorted(sharded.keys()) == sorted(whole.keys())
        batch, wanted = sharded.get_many(users), whole.get_many(users)
        for name in ("found", "event_count"):
            assert getattr(batch, name).tolist() == getattr(wanted, name).tolist(), name
        np.testing.assert_allclose(batch.summary, wanted.summary, atol=ROUNDING)
        for name in ("items", "times", "actions", "offsets"):
            assert getattr(batch.tail, name).tolist() == getattr(wanted.tail, name).tolist(), name
        assert list(batch.tail.features) == ["surface", "dwell"]
        for name, column in batch.tail.features.items():
            np.testing.assert_array_equal(column, wanted.tail.features[name])
        for counters, others in zip(batch.counters, wanted.counters, strict=True):
            for name in ("key", "codes", "offsets", "clock"):
                np.testing.assert_array_equal(getattr(counters, name), getattr(others, name), name)
        assert sharded.get_many([]).summary.shape == (0, 4, 16) and not sharded.reload()
    with Scorer.open(model, tmp_path / "whole") as one, Scorer.open(model, tmp_path / "sharded") as many:
        np.testing.assert_allclose(many.score(users, [0, 10, 20]), one.score(users, [0, 10, 20]), atol=1e-4)


def test_incomplete_and_inconsistent_shards_are_refused(tmp_path, grow):
    model = grow.model()
    log = grow.append(tmp_path / "log", grow.events(dict.fromkeys(range(9), 3)))
    refresh(model, log, tmp_path / "sharded", shard=Shard.parse("0/2"))
    with pytest.raises(StoreError, match=r"shards \[1\] of 2 are missing; refresh them with shard=i/2"):
        open_store(tmp_path / "sharded")
    refresh(model, log, tmp_path / "sharded", shard=Shard.parse("1/2"), until="leave-last-out")
    with pytest.raises(StoreError, match="until differs"):
        open_store(tmp_path / "sharded")
    with pytest.raises(ConfigError, match=r"with \[2\] shards, to which part-1-of-3 does not belong; name another"):
        refresh(model, log, tmp_path / "sharded", shard=Shard.parse("1/3"))
    (tmp_path / "sharded" / "part-1-of-3").mkdir()
    with pytest.raises(StoreError, match=r"holds shards of stores with \[2, 3\] shards"):
        open_store(tmp_path / "sharded")
    for text in ("3/3", "1", "-1/2", "a/b"):
        with pytest.raises(ConfigError, match="write i/n"):
            Shard.parse(text)


def test_a_sharded_and_an_unsharded_store_cannot_share_a_folder(tmp_path, grow):
    model = grow.model()
    log = grow.append(tmp_path / "log", grow.events(dict.fromkeys(range(9), 3)))
    whole, sharded, file = tmp_path / "whole", tmp_path / "sharded", tmp_path / "all.parquet"
    refresh(model, log, whole)
    for index in range(2):
        refresh(model, log, sharded, shard=Shard(index, 2))
    export_store(whole, file)
    for act in (
        lambda: import_store(file, sharded),
        lambda: copy_generation(whole, sharded),
        lambda: merge(model, [(whole, log)], sharded),
    ):
        with pytest.raises(ConfigError, match=r"is sharded; refresh its shards with shard=i/2, or name another folder"):
            act()
    for act in (
        lambda: refresh(model, log, whole, shard=Shard(0, 2)),
        lambda: refresh_incremental(model, log, whole, shard=Shard(0, 2)),
        lambda: import_store(file, whole / "part-0-of-2"),
        lambda: copy_generation(sharded / "part-0-of-2", whole / "part-0-of-2"),
    ):
        with pytest.raises(ConfigError, match=r"holds an unsharded store \(CURRENT\).*name another folder"):
            act()
    with pytest.raises(ConfigError, match=r"holds shards of a store with \[2\] shards"):
        copy_generation(whole, sharded / "part-0-of-3")
    assert sorted(path.name for path in sharded.iterdir()) == ["part-0-of-2", "part-1-of-2"]
    assert not list(whole.glob("part-*"))
    with open_store(whole) as one, open_store(sharded) as many:
        assert len(one) == len(many) == 9


features = st.sampled_from([None, 0, 1, 2])


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), decay=st.sampled_from([Decay.none, Decay.time]))
def test_merged_stores_equal_the_store_of_all_events(tmp_path_factory, grow, data, decay):
    folder, horizons = tmp_path_factory.mktemp("merge"), [20.0, 0.0] if decay is Decay.time else []
    options = {"decay": decay, "decay_horizons": horizons}
    counted = (
        {"counter_keys": ["item", "genre*month", "previous*item", "genre*action"]} if data.draw(st.booleans()) else {}
    )
    model = grow.model(num_tail_features=data.draw(features), **options, **counted)
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
        grow.full(model, log, folder / f"store-{part}")
        parts.append((folder / f"store-{part}", log))
    log = grow.append(folder / "log", frame)
    merge(model, parts, folder / "merged", options=RefreshOptions(users_per_batch=2))
    grow.full(model, log, folder / "expected")
    grow.assert_same(folder / "merged", folder / "expected", atol=5e-4)
    if len(parts) > 1:
        with pytest.raises(StoreError, match=r"merged from several logs, and no segment of .* ends exactly after"):
            refresh_incremental(model, log, folder / "merged")  # of a log with other sources


def test_merge_refuses_outdated_and_incomplete_parts(tmp_path, grow):
    model = grow.model()
    log = grow.append(tmp_path / "log", grow.events({1: 7}))
    refresh(model, log, tmp_path / "store")
    log = grow.later(tmp_path / "log", {2: 1})
    with pytest.raises(StoreError, match=r"covers segment 1, but .*log ends at segment 2.*; refresh that store first"):
        merge(model, [(tmp_path / "store", log)], tmp_path / "merged")
    other = grow.append(tmp_path / "other", grow.events({1: 6}))
    with pytest.raises(StoreError, match=r"is another log; refresh that store first"):
        merge(model, [(tmp_path / "store", other)], tmp_path / "merged")
    refresh_incremental(model, log, tmp_path / "store")
    with StoreUpdate.open(
        tmp_path / "store", summarizer_id=model.summarizer_id(), applied_segment=2, created_at=0
    ) as update:  # as an incremental refresh does if it cannot store the summary
        update.writer.remove_states(user_keys([1]))
    report = merge(model, [(tmp_path / "store", log)], tmp_path / "merged")
    assert list(report.failures) == ["1"] and "but no state in" in report.failures["1"]
    with StoreReader.open(tmp_path / "merged") as store:
        assert list(store.keys()) == [2]
    refresh(model, log, tmp_path / "past", until="leave-last-out")
    with pytest.raises(StoreError, match="has no states"):
        merge(model, [(tmp_path / "past", log)], tmp_path / "merged")
    with pytest.raises(ConfigError, match="has no states"):
        merge(grow.model(num_seeds=0), [(tmp_path / "past", log)], tmp_path / "merged")
    with pytest.raises(ConfigError, match=r"options\.codec: is taken from the stores that are merged"):
        merge(model, [(tmp_path / "store", log)], tmp_path / "merged", options=EXACT)


ONE_BY_ONE = RefreshOptions(codec=Codec.float32, tokens_per_batch=1, users_per_batch=1)
"""A sum may differ in its last bit with the users that are computed together."""
UPDATE = RefreshOptions(tokens_per_batch=1, users_per_batch=1)


def records_of(path: Path) -> dict[bytes, bytes]:
    return {key: value for key, value in contents(path).items() if not key.startswith(b"!")}


@pytest.mark.parametrize("decay", [Decay.none, Decay.position])
def test_merged_shards_equal_the_store_of_one_refresh(tmp_path, grow, monkeypatch, decay):
    """The records are bit-identical, before and after an incremental refresh; each shard is asked for its own users."""
    horizons, made = [20.0, 0.0] if decay is Decay.position else [], {"created_at": 7}
    model = grow.model(decay=decay, decay_horizons=horizons, counter_keys=["item", "genre"])
    log = grow.append(tmp_path / "log", grow.events({user: 1 + user % 9 for user in range(30)}))
    whole, merged = tmp_path / "whole", tmp_path / "merged"
    refresh(model, log, whole, options=ONE_BY_ONE, **made)
    for index in range(3):
        refresh(model, log, tmp_path / "sharded", options=ONE_BY_ONE, shard=Shard(index, 3), **made)
    asked, states = Counter[Any](), StoreReader.states
    monkeypatch.setattr(StoreReader, "states", lambda store, users: asked.update(users) or states(store, users))
    named = [tmp_path / "sharded"] if decay is Decay.none else stores_in(tmp_path / "sharded")
    merge(model, [(store, log) for store in named], merged, options=RefreshOptions(users_per_batch=1), **made)
    assert records_of(merged) == records_of(whole) and len(records_of(merged)) == 30
    assert asked == Counter(range(30))
    log = grow.later(tmp_path / "log", {5: 2, 50: 3})
    log = grow.append(tmp_path / "log", grow.events({7: 2}, seed=1))  # late
    for path in (merged, whole):
        report = refresh_incremental(model, log, path, options=UPDATE, created_at=8)
        assert report.num_users == 3
    assert records_of(merged) == records_of(whole) and len(records_of(merged)) == 31


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_store_of_several_logs_resumes_from_one_log(tmp_path, grow, monkeypatch, is_killed):
    model, log, parts = grow.model(counter_keys=["item", "genre", "previous*item"]), None, []
    lengths = [{1: 9, 2: 8, 3: 3, 4: 4}, {1: 7, 2: 200, 5: 6, 6: 5}, {2: 1, 7: 12}]
    for part, counts in enumerate(lengths):
        frame = grow.events(counts, seed=part, spread=10**7)
        frame["action"][:] = "click"
        own = grow.append(tmp_path / f"log-{part}", frame)
        refresh(model, own, tmp_path / f"store-{part}", options=ONE_BY_ONE, created_at=7)
        parts.append((tmp_path / f"store-{part}", own))
        log = grow.append(tmp_path / "log", frame)
    assert log is not None
    whole, merged = tmp_path / "whole", tmp_path / "merged"
    refresh(model, log, whole, options=ONE_BY_ONE, created_at=7)
    merge(model, parts, merged, options=RefreshOptions(users_per_batch=1), created_at=7)
    before = records_of(merged)
    merge(model, parts[::-1], tmp_path / "backward")
    log = grow.later(tmp_path / "log", {1: 2, 4: 3, 8: 3})
    log = grow.append(tmp_path / "log", grow.events({2: 1}, seed=9, spread=10**6))  # late
    with pytest.raises(StoreError, match=r"merged from several logs, and no segment of .* ends exactly after"):
        refresh_incremental(model, log, tmp_path / "backward")
    if is_killed:
        with monkeypatch.context() as patch:
            fail_at(patch, StoreUpdate, "put_batch", 3, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                refresh_incremental(model, log, merged, options=UPDATE, created_at=8)
        log = grow.later(tmp_path / "log", {1: 1, 3: 2}, hours=900)
    report = refresh_incremental(model, log, merged, options=UPDATE, created_at=8)
    counts = {name: number for name, number in report.counts.items() if number and name != "unchanged"}
    # The killed run had exchanged the late event; its state is read again.
    assert counts == {"recomputed": 1} | ({"appended": 4} if is_killed else {"appended": 2, "exchanged": 1}), report
    expected = refresh_incremental(model, log, whole, options=UPDATE, created_at=8)
    grow.assert_same(merged, whole, atol=5e-4)
    assert expected.num_users == report.num_users == 4 + is_killed
    after, wanted = records_of(merged), records_of(whole)
    for user in (5, 6, 7) if is_killed else (3, 5, 6, 7):  # without changes
        assert after[user_key(user)] == before[user_key(user)]
    for user in (4, 8):  # whose events were all in one log, and came in order
        assert after[user_key(user)] == wanted[user_key(user)]
    log = grow.later(tmp_path / "log", {3: 1}, hours=1000)
    assert refresh_incremental(model, log, merged).num_users == 1  # It is an ordinary store of this log now.


@pytest.mark.parametrize("place", ["a part", "the log, compacted"])
def test_forgotten_events_do_not_come_back_from_the_sources(tmp_path, grow, place):
    """Neither if they were deleted from a part, nor if the deletion cannot be told from the sources anymore."""
    model, parts = grow.model(), []
    for part in range(2):
        frame = grow.events({1: 9, part + 2: 4}, seed=part)
        log = grow.append(tmp_path / f"log-{part}", frame)
        refresh(model, log, tmp_path / f"store-{part}")
        parts.append((tmp_path / f"store-{part}", log.path))
        whole = grow.append(tmp_path / "log", frame)
    history = log[1].slice(0, 4, 6)
    gone: dict[str, Any] = {"user": [1, 1], "item": log.items.ids(history.item), "timestamp": history.timestamp}
    if is_part := "a part" in place:
        forget(model, log, tmp_path / "store-1", gone)
    else:
        forget_events(whole.path, gone)
    if "compacted" in place:
        compact_log(log.path if is_part else whole.path)
    merge(model, [(store, EventLog.open(path)) for store, path in parts], tmp_path / "merged")
    whole = grow.later(whole.path, {3: 2})
    with pytest.raises(StoreError, match="has deletions or events" if is_part else "ends exactly after their"):
        refresh_incremental(model, whole, tmp_path / "merged")


def test_a_merge_refuses_what_would_count_twice_or_be_missing(tmp_path, grow):
    model, log = grow.model(), grow.append(tmp_path / "log", grow.events(dict.fromkeys(range(40), 3)))
    shards, merged = tmp_path / "sharded", tmp_path / "merged"
    refresh(model, log, tmp_path / "whole")
    refresh(model, log, shards, shard=Shard(0, 2))
    with pytest.raises(StoreError, match=r"shards \[1\] of 2 are missing; refresh them with shard=i/2"):
        merge(model, [(shards, log)], merged)
    with pytest.raises(StoreError, match=r"shards \[1\] of 2 are missing; name all shards, or the folder above them"):
        merge(model, [(shards / "part-0-of-2", log)], merged)
    shutil.copytree(shards / "part-0-of-2", tmp_path / "half")
    with pytest.raises(RecordError, match=r"\d+ users failed; the first one is .*but no state in .*half; add the"):
        merge(model, [(tmp_path / "half", log)], merged)
    with pytest.raises(StoreError, match=r"user \d+ is in both .*half and .*whole, which were refreshed from"):
        merge(model, [(tmp_path / "half", log), (tmp_path / "whole", log)], merged)
    other = grow.append(tmp_path / "other", grow.events(dict.fromkeys(range(40), 3)))
    grown = grow.later(tmp_path / "other", {1: 2})
    assert grown.path == other.path
    refresh(model, grown, tmp_path / "grown")
    with pytest.raises(StoreError, match=r"log and .*other both contain events of source with SHA-256 [0-9a-f]{64}"):
        merge(model, [(tmp_path / "whole", log), (tmp_path / "grown", grown)], merged)
    with pytest.raises(StoreError, match="holds no published generation"):
        (shards / "part-1-of-2").mkdir()
        merge(model, [(shards, log)], merged)
    with pytest.raises(StoreError, match="was written by summarizer"):
        merge(grow.model(seed=1), [(tmp_path / "whole", log)], merged)
    with pytest.raises(ConfigError, match="whole: is one of the parts, which it would replace"):
        merge(model, [(tmp_path / "whole", log)], tmp_path / "other" / ".." / "whole")
    with pytest.raises(ConfigError, match="parts: name the stores to merge"):
        merge(model, [], merged)
    assert not (merged / "CURRENT").exists()


def test_the_command_merges_stores_and_shards(tmp_path, grow, capsys):
    model, log, parts = tmp_path / "model", tmp_path / "log", []
    grow.model().save_pretrained(model)
    for part in range(2):
        frame = grow.events({1: 5, 2 + part: 4}, seed=part)
        parts.append(str(grow.append(tmp_path / f"log-{part}", frame).path))
        grow.append(log, frame)
        assert main(["refresh", f"data={parts[-1]}", f"model={model}", f"store={tmp_path}/{part}"]) == 0
        assert main(["refresh", f"data={log}", f"model={model}", f"store={tmp_path}/shards", f"shard={part}/2"]) == 0
    assert main(["refresh", f"data={log}", f"model={model}", f"store={tmp_path}/shards", "shard=0/2"]) == 0
    for name, stores, data in (("of-logs", "0,1", ",".join(parts)), ("of-shards", "shards", str(log))):
        named = ",".join(str(tmp_path / store) for store in stores.split(","))
        words = [f"model={model}", f"store={tmp_path / name}"]
        assert main(["store", "merge", f"parts=[{named}]", f"data=[{data}]", *words]) == 0, capsys.readouterr().err
        assert "3 users" in capsys.readouterr().out
        assert main(["store", "get", "user=1", words[1]]) == 0
        segment = "none: merged from several logs" if name == "of-logs" else "2"
        assert re.search(rf"log segment: +{segment}\n", capsys.readouterr().out)
        assert main(["refresh", "incremental=true", f"data={log}", *words]) == 0, capsys.readouterr().err
        with StoreReader.open(tmp_path / name) as store:
            assert store.get_many([1, 2, 3]).event_count.tolist() == [10, 4, 4]
    for words in (["parts=[]"], [f"parts=[{tmp_path / '0'}]", f"data=[{','.join(parts)}]"]):
        assert main(["store", "merge", *words, f"model={model}", f"store={tmp_path / 'no'}"]) == 2
        assert re.search("parts: name the stores|data: names 2 logs for 1 parts", capsys.readouterr().err)


def test_users_who_were_erased_from_a_part_stay_erased(tmp_path, grow, monkeypatch):
    model, parts = grow.model(), []
    for part in range(2):
        log = grow.append(tmp_path / f"log-{part}", grow.events({1: 5, 2: 4, 3: 3, 4 + part: 2}, seed=part))
        refresh(model, log, tmp_path / f"store-{part}")
        parts.append((tmp_path / f"store-{part}", log))
    erase(tmp_path / "store-0", [1, 900])
    read = merging._MergeSource.read

    def read_and_erase(source: Any, *arguments: Any) -> Any:
        found = read(source, *arguments)
        erase(tmp_path / "store-1", [2])  # during the merge
        return found

    monkeypatch.setattr(merging._MergeSource, "read", read_and_erase)
    merge(model, parts, tmp_path / "merged")
    with StoreReader.open(tmp_path / "merged") as store:
        assert list(store.keys()) == [3, 4, 5]
    assert Tombstones(tmp_path / "merged").erased(user_keys([1, 2, 3, 900])) == [True, True, False, True]


def test_a_merge_that_fails_has_erased_users_from_the_store_in_service(tmp_path, grow, monkeypatch):
    model, log, _ = grow.stored(tmp_path, {1: 5, 2: 4, 3: 3})
    parts, merged = [(tmp_path / "store", log)], tmp_path / "merged"
    for _ in range(2):
        merge(model, parts, merged)
    erase(tmp_path / "store", [2])
    fail_at(monkeypatch, merging._MergeSource, "read", 1, StoreError("the disk"))
    with StoreReader.open(merged) as store:
        with pytest.raises(StoreError, match="the disk"):
            merge(model, parts, merged)
        assert store.get_many([1, 2, 3]).found.tolist() == [True, False, True]
    assert Tombstones(merged).count() == 1
    for generation in (1, 2):
        with StoreReader.open(merged, generation=generation) as store:
            assert list(store.keys()) == [1, 3]


def test_a_part_refreshed_during_a_merge_is_refused(tmp_path, grow, monkeypatch):
    model, check = grow.model(), merging._MergeSource.check
    logs = [grow.append(tmp_path / f"log-{part}", grow.events({1: 7 - part, part + 2: 4})) for part in range(2)]
    for part, log in enumerate(logs):
        refresh(model, log, tmp_path / f"store-{part}")

    def check_and_grow(part: Any, store: StoreReader) -> None:
        check(part, store)
        if part.log.path == logs[0].path:
            grown = grow.later(tmp_path / "log-0", {2: 5})
            refresh_incremental(model, grown, tmp_path / "store-0")

    monkeypatch.setattr(merging._MergeSource, "check", check_and_grow)
    with pytest.raises(StoreError, match=r"user 2 does not cover the events in .*do not refresh it during the merge"):
        merge(model, [(tmp_path / f"store-{part}", log) for part, log in enumerate(logs)], tmp_path / "merged")
    assert not (tmp_path / "merged" / "CURRENT").exists()


def test_merged_records_are_authenticated_like_their_parts(tmp_path, grow):
    model, key, parts = grow.model(), bytes(range(32)), []
    for part, lengths in enumerate(({1: 7, 2: 3}, {1: 4, 3: 2})):
        log = grow.append(tmp_path / f"log-{part}", grow.events(lengths))
        refresh(model, log, tmp_path / f"store-{part}", key=key)
        parts.append((tmp_path / f"store-{part}", log))
    with pytest.raises(StoreError, match="key"):
        merge(model, parts, tmp_path / "merged")
    merge(model, parts, tmp_path / "merged", key=key, options=RefreshOptions(shared_with_group=True))
    assert environment_path(tmp_path / "merged", 1).stat().st_mode & 0o7777 == 0o2750
    with StoreReader.open(tmp_path / "merged", key=key) as store:
        assert store.get_many([1, 2, 3]).event_count.tolist() == [11, 3, 2]


def test_a_store_refreshed_with_until_refuses_to_forget(tmp_path, grow):
    model, log = grow.model(), grow.append(tmp_path / "log", grow.events({1: 30, 2: 5}))
    refresh(model, log, tmp_path / "past", until="leave-last-out")
    history = log[1].slice(0, 4, 6)
    gone: dict[str, Any] = {"user": [1, 1], "item": log.items.ids(history.item), "timestamp": history.timestamp}
    with pytest.raises(ConfigError, match="was refreshed with until=leave-last-out and cannot be updated"):
        forget(model, log, tmp_path / "past", gone)
    assert EventLog.open(log.path).num_events == 35


def test_forgotten_events_leave_store_and_log(tmp_path, grow):
    model, log, _ = grow.stored(tmp_path, {1: 30, 2: 5})
    history = log[1].slice(0, 4, 6)
    gone: dict[str, Any] = {"user": [1, 1], "item": log.items.ids(history.item), "timestamp": history.timestamp}
    report = forget(model, log, tmp_path / "store", gone)
    assert report.counts["exchanged"] == 1 and report.num_events == 2
    refresh(model, EventLog.open(log.path), tmp_path / "expected", options=EXACT)
    grow.assert_same(tmp_path / "store", tmp_path / "expected", atol=1e-4)
    with StoreReader.open(tmp_path / "store") as store:
        assert store.get_many([1]).event_count.tolist() == [28]


def test_commands_handle_all_shards(tmp_path, grow, capsys):
    model, store, host = grow.model(), tmp_path / "sharded", tmp_path / "host"
    log = grow.append(tmp_path / "log", grow.events({user: 1 + user % 9 for user in range(40)}))
    for turn in range(2):
        for index in range(3):
            refresh(model, log, store, shard=Shard(index, 3), created_at=1_700_000_000_000 + turn)
    counts = [len(StoreReader.open(path)) for path in stores_in(store)]

    def said(*words: str, code: int = 0) -> list[str]:
        assert main(["store", *words, f"store={store}"]) == code, capsys.readouterr()
        out = capsys.readouterr()
        return (out.out or out.err).splitlines()

    assert sum("gen-2 is published" in line for line in said("stats")) == 3
    assert [f"{count:,} records" in line for count, line in zip(counts, said("verify"), strict=True)] == [True] * 3
    for user in (0, 17, 39):
        assert f"user {user}" in said("get", f"user={user}")[0]
    assert "user 40 has no record" in said("get", "user=40", code=1)[0]
    exported = said("export", f"out={tmp_path / 'all.parquet'}")
    assert [path.name for path in sorted(tmp_path.glob("*.parquet"))] == [
        f"all.part-{i}-of-3.parquet" for i in range(3)
    ]
    assert len(exported) == 3

    # Shards are copied first, and published once all of them are copied.
    assert sum("not published yet" in line for line in said("copy", f"to={host}", "publish=false")) == 3
    with pytest.raises(StoreError, match="no published generation"):
        open_store(host)
    assert sum("is published" in line for line in said("copy", f"to={host}")) == 3
    with open_store(host) as sharded:
        assert len(sharded) == 40 and sharded.generation == 2

    # Users are erased from their own shards.
    gone = [3, 17, 25]
    assert f"{store}: 3 of 3 users had a record" in said("erase", f"users={gone}")[0]
    for path in stores_in(store):
        assert len(Tombstones(path)) == len(dict(users_by_store(store, gone)).get(path, []))
    assert [report.count("is published") for report in said("compact")] == [1] * 3
    with open_store(store) as sharded:
        assert len(sharded) == 37 and not sharded.get_many(gone).found.any()
    with pytest.raises(StoreError, match=r"belongs to shard \d of 3, which is missing"):
        users_by_store(stores_in(store)[0], list(range(9)))

    # Either all shards are rolled back, or none of them.
    for index in range(3):
        refresh(model, log, store, shard=Shard(index, 3))
    with open_store(store) as sharded:
        assert sharded.generation == 4
    damaged = environment_path(stores_in(store)[2], 3) / "data.mdb"
    whole = damaged.read_bytes()
    damaged.write_bytes(b"PAR1" * 4000)
    assert "gen-3 cannot be published" in said("rollback", "to=3", code=1)[0]
    assert "part-2-of-3: 1 problem" in " ".join(said("verify", code=1))
    with open_store(store) as sharded:
        assert sharded.generation == 4
    damaged.write_bytes(whole)
    assert [report.count("is published") for report in said("rollback")] == [1] * 3
    with open_store(store) as sharded:
        assert sharded.generation == 3 and len(sharded) == 37


def test_a_shard_holds_only_its_own_users(tmp_path, grow):
    """Also if it is named by its own folder; and a sharded store can only be refreshed shard by shard."""
    model, store = grow.model(), tmp_path / "sharded"
    log = grow.append(tmp_path / "log", grow.events(dict.fromkeys(range(20), 3)))
    for index in range(2):
        refresh(model, log, store / f"part-{index}-of-2")
    log = grow.later(tmp_path / "log", dict.fromkeys(range(30), 1))
    for path in stores_in(store):
        refresh_incremental(model, log, path)
    with open_store(store) as sharded:
        assert len(sharded) == 30 and sorted(sharded.keys()) == list(range(30))
    for run in (refresh, refresh_incremental):
        with pytest.raises(ConfigError, match=r"is sharded; refresh its shards with shard=i/2"):
            run(model, log, store)
        with pytest.raises(ConfigError, match="is the folder of one shard"):
            run(model, log, store / "part-0-of-2", shard=Shard(1, 2))
    history = log[3]
    gone = {"item": log.items.ids(history.item[:1]), "timestamp": history.timestamp[:1]}
    with pytest.raises(ConfigError, match=r"is sharded; refresh its shards with shard=i/2"):
        forget(model, log, store, {"user": [3], **gone})
    ((own, _),) = users_by_store(store, [3])
    (other,) = (path for path in stores_in(store) if path != own)
    with pytest.raises(StoreError, match=r"user 3 belongs to shard [01] of 2"):
        forget(model, log, other, {"user": [3], **gone})
    assert EventLog.open(log.path).last_segment == log.last_segment
