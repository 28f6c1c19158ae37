"""What a service relies on: counters, reloads, stores that change or are refused, and the cost of a call."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import platform
import resource
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import ITEMS, ROUNDING, USERS, Served, sign_model, untrained
from tests.forked_child import in_child
from vista.config.checks import Precision
from vista.errors import CheckpointError, ConfigError, RecordContentsError, StoreError, SummarizerMismatchError
from vista.log.event_log import EventLog
from vista.model.item_projections import CANDIDATE_FILE, RETRIEVAL_FILE, ItemProjections
from vista.model.saved_model import WEIGHTS_FILE
from vista.model.vista_model import VistaModel
from vista.refresh import erase, refresh
from vista.scorer import Scorer
from vista.scorer.request import MOST_IDLE_MS
from vista.scorer.scorer import LATENCY_BOUNDS_MS, ScorerStats
from vista.store.admin import compact_store
from vista.store.layout import Shard

Call = Callable[[Scorer], object]


def test_during_compactions(served: Served, tmp_path: Path) -> None:
    refresh(served.model, served.log, tmp_path / "store")
    stop, answers = threading.Event(), list[np.ndarray]()
    with Scorer.open(served.model, tmp_path / "store", on_missing="nan") as scorer:
        expected = scorer.score(USERS, ITEMS)

        def ask() -> None:
            while not stop.is_set():
                answers.append(scorer.score(USERS, ITEMS))

        asking = threading.Thread(target=ask)
        asking.start()
        for _ in range(3):
            compact_store(tmp_path / "store")
            assert scorer.reload() is True
        stop.set()
        asking.join()
        assert answers and all(np.array_equal(scores, expected) for scores in answers)
        assert scorer.store.generation == 4
        # An erased user is missing at once, or after a reload if a compaction has removed the open generation.
        erase(tmp_path / "store", [USERS[0]])
        rows = scorer.score(USERS, ITEMS)
        assert np.isnan(rows[0]).all() and np.array_equal(rows[1:], expected[1:])
        compact_store(tmp_path / "store")
        erase(tmp_path / "store", [USERS[1]])
        np.testing.assert_array_equal(scorer.score(USERS, ITEMS), rows)
        assert scorer.reload() is True
        rows[1] = np.nan
        np.testing.assert_array_equal(scorer.score(USERS, ITEMS), rows)


def test_a_store_that_moves_to_another_model(served: Served, tmp_path: Path) -> None:
    """Scorers of the old model use its generation until they are moved to the new model."""
    refresh(served.model, served.log, tmp_path / "store")
    other = untrained(served.log, 9)
    with Scorer.open(served.model, tmp_path / "store") as scorer:
        expected = scorer.score(USERS, ITEMS)
        refresh(other, served.log, tmp_path / "store")
        assert scorer.reload() is False
        np.testing.assert_array_equal(scorer.score(USERS, ITEMS), expected)
    with Scorer.open(served.model, tmp_path / "store") as again:
        assert again.store.generation == 1
        np.testing.assert_array_equal(again.score(USERS, ITEMS), expected)


def test_closed(served: Served) -> None:
    scorer = Scorer.open(served.model, served.store)
    scorer.close()
    calls: list[Call] = [
        lambda s: s.score([100], ITEMS),
        lambda s: s.predict([100], ITEMS),
        lambda s: s.rank(100),
        lambda s: s.user_vectors([100]),
        lambda s: s.explain(100, ITEMS),
        lambda s: s.score([], []),
        lambda s: s.reload(),
        lambda s: s.encode(ITEMS),
        lambda s: s.item_vectors(),
        lambda s: s.manifest,
    ]
    for call in calls:
        with pytest.raises(StoreError, match="is closed; open a new one"):
            call(scorer)


def test_folders_that_are_not_a_store_are_neither_opened_nor_written(served: Served, tmp_path: Path) -> None:
    shutil.copytree(served.store, tmp_path / "store")
    shutil.copytree(served.model_dir, tmp_path / "model")
    shutil.copytree(served.log.path, tmp_path / "log")
    for folder, message in {
        "store/gen-1": f"is a generation of the store {tmp_path / 'store'}; pass that folder instead",
        "store/gen-2": "is a generation of the store",
        "log": "is not a store, but a log, a model or a run",
        "model": "is not a store, but a log, a model or a run",
    }.items():
        before = sorted(str(path) for path in tmp_path.rglob("*"))
        with pytest.raises(StoreError, match=message):
            Scorer.open(served.model, tmp_path / folder)
        with pytest.raises(StoreError, match=message):
            refresh(served.model, served.log, tmp_path / folder)
        assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_a_store_of_another_model_is_refused_and_both_are_named(served: Served) -> None:
    other = untrained(served.log, model__num_seeds=0)
    ids = (served.model.summarizer_id().hex(), other.summarizer_id().hex())
    with pytest.raises(SummarizerMismatchError, match=f"summarizer {ids[0]}, but the model's is {ids[1]}"):
        Scorer.open(other, served.store)


def test_a_store_with_shorter_tails_is_refused(served: Served, tmp_path: Path) -> None:
    config = dataclasses.replace(served.model.config, tail_len=3)
    short = VistaModel(config, served.model.schema, served.model.items, served.model.data).eval()
    weights = {k: v for k, v in served.model.state_dict().items() if not k.startswith("target_attention")}
    short.load_state_dict(weights, strict=False)
    assert short.summarizer_id() == served.model.summarizer_id()
    refresh(short, served.log, tmp_path / "store")
    with pytest.raises(StoreError, match=r"store holds tails of 3 events, but the model reads 6; refresh the store"):
        Scorer.open(served.model, tmp_path / "store")
    # A model that reads fewer events of each tail can share the store of one that reads more.
    with Scorer.open(short, served.store) as scorer, Scorer.open(short, tmp_path / "store") as own:
        np.testing.assert_allclose(scorer.score(USERS, ITEMS), own.score(USERS, ITEMS), atol=ROUNDING)
    refresh(served.model, served.log, tmp_path / "store")
    with Scorer.open(served.model, tmp_path / "store") as scorer:
        expected = scorer.score(USERS, ITEMS)
        refresh(short, served.log, tmp_path / "store")
        for _ in range(2):
            with pytest.raises(StoreError, match="tails of 3 events"):
                scorer.reload()
            np.testing.assert_array_equal(scorer.score(USERS, ITEMS), expected)
            assert scorer.manifest.generation == 2 and scorer.stats().reloads == 0


def test_the_store_is_checked_before_the_weights_are_read(served: Served, tmp_path: Path) -> None:
    """A service that waits for a refresh tries again and again, and must not read large files each time."""
    shutil.copytree(served.model_dir, tmp_path / "model")
    (tmp_path / "model" / WEIGHTS_FILE).unlink()
    refresh(served.model.with_tail(3), served.log, tmp_path / "store")
    with pytest.raises(RecordContentsError, match="holds tails of 3 events, but the model reads 6"):
        Scorer.open(tmp_path / "model", tmp_path / "store")
    with pytest.raises(CheckpointError):
        Scorer.open(tmp_path / "model", served.store)


def test_folders_that_are_not_a_store_or_a_model(served: Served, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("hello")
    for place in ("absent", "empty", "file"):
        with pytest.raises(StoreError, match=place):
            Scorer.open(served.model, tmp_path / place)
        with pytest.raises(CheckpointError, match=rf"{place}: no readable model .*vista train"):
            Scorer.open(tmp_path / place, served.store)
    with pytest.raises(ConfigError, match="device=cuda:99: torch cannot use it here"):
        Scorer.open(served.model_dir, served.store, device="cuda:99")


def test_a_model_without_retrieval_head(impression_log: EventLog, tmp_path: Path) -> None:
    model = untrained(impression_log, 1, optim__next_weight=0.0)
    refresh(model, impression_log, tmp_path / "store")
    with Scorer.open(model, tmp_path / "store") as scorer:
        assert scorer.tasks == ["click", "like", "long_view"] and scorer.task == "click"
        user = next(scorer.store.keys())
        assert list(scorer.predict([user], scorer.model.items.ids([0]))) == scorer.tasks
        with pytest.raises(ValueError, match=r"no retrieval head; train it with optim\.next_weight above 0"):
            scorer.user_vectors([user])


def source_of(scorer: Scorer) -> tuple[int, str | None] | None:
    """Generation and model of this thread's last answer."""
    source = scorer.answered_from
    return None if source is None else (source.generation, source.model_checksum)


def test_the_source_of_an_answer(served: Served, tmp_path: Path) -> None:
    store, checksum = tmp_path / "store", json.loads((served.model_dir / "config.json").read_text())["checksum"]
    refresh(served.model, served.log, store)
    with Scorer.open(served.model_dir, store) as scorer:
        assert scorer.answered_from is None
        scorer.score([*USERS, 999], ITEMS)
        assert source_of(scorer) == (1, checksum)
        source, newest = scorer.answered_from, scorer.store.get_many(USERS).last_event_ts
        assert source is not None and source.known.tolist() == [True] * len(USERS) + [False]
        assert source.now is not None and source.now[:-1].tolist() == (newest + MOST_IDLE_MS).tolist()
        refresh(served.model, served.log, store)
        assert scorer.reload()
        assert source_of(scorer) == (1, checksum)  # No call since.
        seen = []

        def work() -> None:
            seen.append(source_of(scorer))
            scorer.rank(USERS[0])
            seen.append(source_of(scorer))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert seen == [None, (2, checksum)] and source_of(scorer) == (1, checksum)
        scorer.user_vectors([])
        assert source_of(scorer) == (2, checksum)


def test_a_model_in_memory_and_a_store_with_shards(served: Served, tmp_path: Path) -> None:
    """The model has no checksum. The number is that of the oldest generation."""
    for index in (0, 1, 1):
        refresh(served.model, served.log, tmp_path, shard=Shard(index, 2))
    with Scorer.open(served.model, tmp_path) as scorer:
        assert sorted(reader.generation for reader in scorer.store._readers) == [1, 2]  # type: ignore[union-attr]
        scorer.score(USERS, ITEMS)
        assert source_of(scorer) == (1, None)


def wait_for_end(thread: threading.Thread) -> None:
    """Wait until the system's thread has ended too, which `join` does not.

    A thread that ends returns its memory to MKL under a lock. A child forked in the meantime deadlocks on that lock.
    """
    deadline = time.monotonic() + 60
    while Path(f"/proc/self/task/{thread.native_id}").exists():
        assert time.monotonic() < deadline, "the thread does not end"
        time.sleep(0.001)


def test_users_candidates_and_calls_are_counted(served: Served) -> None:
    with Scorer.open(served.model_dir, served.store) as scorer:
        assert scorer.stats() == ScorerStats()
        scorer.score([100, 999, 100], [0, 7])  # 999 has no record, and 7 is not an item
        scorer.rank(103, top_k=3, candidates=[0, 10, 7])
        scorer.user_vectors([101, 998])
        with pytest.raises(TypeError):
            scorer.score([100], [0.5])
        stats = scorer.stats()
        assert (stats.calls, stats.failed_calls, stats.hits, stats.misses, stats.stale) == (4, 1, 5, 2, 0)
        assert (stats.candidates, stats.unknown_candidates, stats.dropped) == (6 + 3, 3 + 1, 1)
        assert sum(stats.latency_counts) == 4 and 0 < stats.latency_ms(0.5) <= stats.latency_ms(1)
        scorer.score([100], ([0, 7, 390], [0, 3]))
        assert scorer.stats().unknown_candidates == 5 and scorer.stats().candidates == 12  # Padding is not counted.
    with Scorer.open(served.model_dir, served.store, max_age_s=1e-3) as scorer:
        scorer.score([100, 999], ITEMS)
        stats = scorer.stats()
        assert (stats.hits, stats.misses, stats.stale) == (0, 1, 1)


def test_quantiles_of_a_histogram() -> None:
    counts = [0] * (len(LATENCY_BOUNDS_MS) + 1)
    assert np.isnan(ScorerStats(latency_counts=tuple(counts)).latency_ms(0.5))
    counts[3], counts[10], counts[-1] = 98, 1, 1
    stats = ScorerStats(latency_counts=tuple(counts))
    assert stats.latency_ms(0.5) == stats.latency_ms(0.98) == LATENCY_BOUNDS_MS[3]
    assert stats.latency_ms(0.99) == LATENCY_BOUNDS_MS[10] and stats.latency_ms(1) == float("inf")
    for quantile in (0, 1.1):
        with pytest.raises(ValueError, match=r"quantile: must lie in \(0, 1\]"):
            stats.latency_ms(quantile)


def test_threads_lose_no_count_and_a_forked_child_starts_at_zero(served: Served) -> None:
    with Scorer.open(served.model_dir, served.store) as scorer:
        threads = [threading.Thread(target=lambda: [scorer.score([100], [0, 10]) for _ in range(25)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
            wait_for_end(thread)
        assert (scorer.stats().calls, scorer.stats().hits, scorer.stats().candidates) == (100, 100, 200)
        expected = scorer.score(USERS, ITEMS)
        scores, calls = in_child(lambda: (scorer.score(USERS, ITEMS), scorer.stats().calls))
        assert np.array_equal(scores, expected) and calls == 1


def test_a_new_model_enters_service_once_its_summaries_are_published(
    event_log: EventLog, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = untrained(event_log, 1), untrained(event_log, 2)
    first.save_pretrained(tmp_path / "model")
    refresh(first, event_log, tmp_path / "store")
    refresh(second, event_log, tmp_path / "other")
    with (
        Scorer.open(second, tmp_path / "other") as other,
        Scorer.open(tmp_path / "model", tmp_path / "store") as scorer,
    ):
        old, pool = scorer.score(USERS, ITEMS), scorer.encode(ITEMS)
        assert not scorer.reload()
        second.save_pretrained(tmp_path / "model")
        with caplog.at_level(logging.WARNING):
            assert not scorer.reload()
        assert "holds a new model, but the old one stays in service" in caplog.text
        np.testing.assert_array_equal(scorer.score(USERS, ITEMS), old)
        refresh(second, event_log, tmp_path / "store")
        assert scorer.reload() and not scorer.reload()
        np.testing.assert_array_equal(scorer.score(USERS, ITEMS), other.score(USERS, ITEMS))
        np.testing.assert_array_equal(scorer.score(USERS, pool), other.score(USERS, ITEMS))  # the same items
        assert scorer.stats().reloads == 1


def test_a_new_stage_two_for_the_same_summaries(event_log: EventLog, tmp_path: Path) -> None:
    model = untrained(event_log, 1)
    model.save_pretrained(tmp_path / "model")
    refresh(model, event_log, tmp_path / "store")
    with Scorer.open(tmp_path / "model", tmp_path / "store") as scorer:
        old = scorer.score(USERS, ITEMS)
        with torch.no_grad():
            model.request.neg_()
        model.save_pretrained(tmp_path / "model")
        assert scorer.reload()
        assert np.abs(scorer.score(USERS, ITEMS) - old).max() > 1e-3


def test_candidates_encoded_for_another_model_are_refused(
    event_log: EventLog, order_log: EventLog, tmp_path: Path
) -> None:
    models = [untrained(log, 1) for log in (event_log, order_log)]
    for index, (model, log) in enumerate(zip(models, (event_log, order_log), strict=True)):
        refresh(model, log, tmp_path / str(index))
    with (
        Scorer.open(models[0], tmp_path / "0") as one,
        Scorer.open(models[1], tmp_path / "1") as two,
        pytest.raises(ValueError, match="were encoded for another model; call encode again"),
    ):
        two.score(["u100"], one.encode([0, 10]))


def test_a_model_that_cannot_be_served_changes_nothing(event_log: EventLog, tmp_path: Path) -> None:
    model = untrained(event_log, 1)
    model.save_pretrained(tmp_path / "model")
    refresh(model, event_log, tmp_path / "store")
    scorer = Scorer.open(tmp_path / "model", tmp_path / "store")
    expected = scorer.score(USERS, ITEMS)
    shutil.rmtree(tmp_path / "model")  # between the two renames of an export
    assert not scorer.reload()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="format None"):
        scorer.reload()
    np.testing.assert_array_equal(scorer.score(USERS, ITEMS), expected)
    scorer.close()
    for call in (scorer.reload, lambda: scorer.score(USERS, ITEMS)):
        with pytest.raises(StoreError, match="is closed"):
            call()


def test_calls_continue_while_models_change(event_log: EventLog, tmp_path: Path) -> None:
    models = [untrained(event_log, seed) for seed in (1, 2)]
    for model in models:
        refresh(model, event_log, tmp_path / "store")
    models[0].save_pretrained(tmp_path / "model")
    expected = []
    for model in models:
        with Scorer.open(model, tmp_path / "store") as alone:
            expected.append(alone.score(USERS, ITEMS))
    with Scorer.open(tmp_path / "model", tmp_path / "store") as scorer:
        wrong: list[Any] = []
        done = threading.Event()

        def ask() -> None:
            while not done.is_set():
                answer = scorer.score(USERS, ITEMS)
                if not any(np.array_equal(answer, scores) for scores in expected):
                    wrong.append(answer)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            for turn in range(4):
                models[(turn + 1) % 2].save_pretrained(tmp_path / "model")
                assert scorer.reload()
        finally:
            done.set()
            for thread in threads:
                thread.join()
        assert not wrong and scorer.stats().failed_calls == 0 and scorer.stats().calls > 4


def test_a_running_call_keeps_its_store_open(event_log: EventLog, tmp_path: Path) -> None:
    models = [untrained(event_log, seed) for seed in (1, 2)]
    for model in models:
        refresh(model, event_log, tmp_path / "store")
    models[0].save_pretrained(tmp_path / "model")
    with Scorer.open(tmp_path / "model", tmp_path / "store") as scorer:
        old = scorer.store
        with scorer.in_service() as snapshot:
            models[1].save_pretrained(tmp_path / "model")
            assert scorer.reload() and scorer.store is not old
            assert snapshot.store is old and len(old.get_many(USERS).found) == 5
        with pytest.raises(StoreError, match="is closed"):
            old.get_many(USERS)


def test_a_scorer_closed_during_a_reload_stays_closed(
    event_log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [untrained(event_log, seed) for seed in (1, 2)]
    for model in models:
        refresh(model, event_log, tmp_path / "store")
    models[0].save_pretrained(tmp_path / "model")
    scorer = Scorer.open(tmp_path / "model", tmp_path / "store")
    models[1].save_pretrained(tmp_path / "model")
    begun, load = threading.Event(), ItemProjections.load

    def slow(*arguments: Any, **options: Any) -> ItemProjections:
        begun.set()
        time.sleep(0.2)
        return load(*arguments, **options)

    monkeypatch.setattr(ItemProjections, "load", slow)
    thread = threading.Thread(target=scorer.reload)
    thread.start()
    begun.wait()
    scorer.close()
    thread.join()
    for call in (scorer.reload, lambda: scorer.score(USERS, ITEMS)):
        with pytest.raises(StoreError, match="is closed"):
            call()


def test_a_model_without_the_task_does_not_block_new_generations(served_tasks: Served, tmp_path: Path) -> None:
    model, log = served_tasks.model, served_tasks.log
    shutil.copytree(served_tasks.model_dir, tmp_path / "model")
    refresh(model, log, tmp_path / "store")
    with Scorer.open(tmp_path / "model", tmp_path / "store", task="like") as scorer:
        schema = dataclasses.replace(model.schema, tasks=["click"])
        other = VistaModel(model.config, schema, model.items, model.data)
        weights = {
            k: v
            for k, v in model.state_dict().items()
            if not k.startswith(("task_head", "candidate_head", "item_rates"))
        }
        other.load_state_dict(weights, strict=False)
        other.save_pretrained(tmp_path / "model")
        refresh(model, log, tmp_path / "store")
        with pytest.raises(CheckpointError, match="holds a new model without the task 'like'"):
            scorer.reload()
        assert scorer.manifest.generation == 2 and "like" in scorer.tasks


def test_projections_of_other_weights_and_damaged_ones_are_refused(served_tasks: Served, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(served_tasks.model_dir, folder)
    candidate = np.load(folder / CANDIDATE_FILE)
    for changed in (candidate + 0.1, candidate[:-1]):
        np.save(folder / CANDIDATE_FILE, changed)
        with pytest.raises(CheckpointError, match=r"item_projections\.npy: (its content|holds \d+ bytes)"):
            Scorer.open(folder, served_tasks.store)
        sign_model(folder)
        with pytest.raises(CheckpointError, match="do not belong to its weights; export"):
            Scorer.open(folder, served_tasks.store)
    with io.BytesIO() as archive:
        np.savez(archive, np.zeros(3))
        zipped = archive.getvalue()
    for content in (b"", b"no array", zipped, (folder / RETRIEVAL_FILE).read_bytes()[:-8]):
        (folder / RETRIEVAL_FILE).write_bytes(content)
        sign_model(folder)
        with pytest.raises(
            CheckpointError, match=r"item_retrieval_vectors\.npy: cannot be mapped .*export the model again"
        ):
            Scorer.open(folder, served_tasks.store)


@pytest.mark.processor
def test_bfloat16_is_close_and_invalid_precisions_are_refused(served_tasks: Served, task_scorer: Scorer) -> None:
    users, items = list(task_scorer.store.keys())[:4], task_scorer.model.items.ids(np.arange(30))
    with Scorer.open(served_tasks.model_dir, served_tasks.store, precision="bfloat16") as scorer:
        for task, scores in scorer.predict(users, items).items():
            expected = task_scorer.predict(users, items)[task]
            assert scores.dtype == np.float32
            np.testing.assert_allclose(scores, expected, atol=0.5 if task == "next" else 0.02)
    with Scorer.open(served_tasks.model_dir, served_tasks.store, precision=Precision.auto) as scorer:
        assert scorer.score(users, items).shape == (4, 30)
    with pytest.raises(ValueError, match=r"precision: 'int8' is not one of \['auto', 'bfloat16', 'float32'\]"):
        Scorer.open(served_tasks.model_dir, served_tasks.store, precision="int8")


def test_the_cost_of_a_call_does_not_depend_on_the_history(event_log: EventLog, tmp_path: Path) -> None:
    """Operators and bytes of one call are equal for histories of 10^3, 10^4 and 10^5 events."""
    lengths = {1: 1_000, 2: 10_000, 3: 100_000}
    rng = np.random.default_rng(0)
    frame = {
        "user": np.repeat(list(lengths), list(lengths.values())),
        "item": np.concatenate([rng.integers(0, 40, count) for count in lengths.values()]),
        "timestamp": np.concatenate([1_600_000_000 + np.arange(count) for count in lengths.values()]),
    }
    log = EventLog.from_frame(frame, tmp_path / "log", time_unit="s")
    model = untrained(log, 1)
    refresh(model, log, tmp_path / "store")
    with Scorer.open(model, tmp_path / "store", backend="torch") as scorer:
        costs = []
        for user in lengths:
            scorer.score([user], [1, 2, 3])
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            ) as profile:
                scorer.score([user], [1, 2, 3])
            events = profile.key_averages()
            costs.append({event.key: (event.count, event.cpu_memory_usage) for event in events if "::" in event.key})
        assert costs[0] == costs[1] == costs[2] and len(costs[0]) > 10


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library has another allocator")
def test_buffers_are_reused_between_calls(impression_log: EventLog, tmp_path: Path) -> None:
    """Counted by page faults: memory that is returned to the system must be mapped again."""
    model = untrained(impression_log, 1, model__dim=128)
    model.save_pretrained(tmp_path / "model")
    refresh(model, impression_log, tmp_path / "store")

    def faults_per_call() -> float:
        with Scorer.open(tmp_path / "model", tmp_path / "store") as scorer:
            items = np.resize(scorer.model.items.ids(np.arange(40)), 2_000)
            for _ in range(3):
                scorer.predict([1, 2], items)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(10):
                scorer.predict([1, 2], items)
            return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10

    assert in_child(faults_per_call) < 100  # pages of 4 KB; many more without `reuse_freed_memory`
