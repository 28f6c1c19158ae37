"""What a service relies on: counters, reloads of models and generations, the cost of a call."""

from __future__ import annotations

import dataclasses
import io
import logging
import platform
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import ITEMS, USERS, Served, run_python, sign_model, small_config
from tests.forked_child import in_child
from vista.config.choices import Precision
from vista.errors import CheckpointError, StoreError
from vista.log.event_log import EventLog
from vista.model.item_projections import CANDIDATE_FILE, RETRIEVAL_FILE, ItemProjections
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.scorer import Scorer
from vista.scorer.scorer_stats import LATENCY_BOUNDS_MS, ScorerStats
from vista.training.log_schema import schema_of


def untrained(log: EventLog, seed: int, **changes: Any) -> VistaModel:
    config = small_config(log, "unused", **changes)
    torch.manual_seed(seed)
    return VistaModel(config.model, schema_of(log, config), log.items, config.data).eval()


def wait_for_end(thread: threading.Thread) -> None:
    """Wait until the system's thread has ended too, which `join` does not.

    A thread that ends returns its memory to MKL under a lock. A child forked in the meantime deadlocks on that lock.
    """
    deadline = time.monotonic() + 60
    while Path(f"/proc/self/task/{thread.native_id}").exists():
        assert time.monotonic() < deadline, "the thread does not end"
        time.sleep(0.001)


class TestStats:
    def test_users_candidates_and_calls_are_counted(self, served: Served) -> None:
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

    def test_quantiles_of_a_histogram(self) -> None:
        counts = [0] * (len(LATENCY_BOUNDS_MS) + 1)
        assert np.isnan(ScorerStats(latency_counts=tuple(counts)).latency_ms(0.5))
        counts[3], counts[10], counts[-1] = 98, 1, 1
        stats = ScorerStats(latency_counts=tuple(counts))
        assert stats.latency_ms(0.5) == stats.latency_ms(0.98) == LATENCY_BOUNDS_MS[3]
        assert stats.latency_ms(0.99) == LATENCY_BOUNDS_MS[10] and stats.latency_ms(1) == float("inf")
        for quantile in (0, 1.1):
            with pytest.raises(ValueError, match=r"quantile: must lie in \(0, 1\]"):
                stats.latency_ms(quantile)

    def test_threads_lose_no_count_and_a_forked_child_starts_at_zero(self, served: Served) -> None:
        with Scorer.open(served.model_dir, served.store) as scorer:
            threads = [
                threading.Thread(target=lambda: [scorer.score([100], [0, 10]) for _ in range(25)]) for _ in range(4)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
                wait_for_end(thread)
            assert (scorer.stats().calls, scorer.stats().hits, scorer.stats().candidates) == (100, 100, 200)
            expected = scorer.score(USERS, ITEMS)
            scores, calls = in_child(lambda: (scorer.score(USERS, ITEMS), scorer.stats().calls))
            assert np.array_equal(scores, expected) and calls == 1


class TestReload:
    def test_a_new_model_enters_service_once_its_summaries_are_published(
        self, event_log: EventLog, tmp_path: Path, caplog: pytest.LogCaptureFixture
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

    def test_a_new_stage_two_for_the_same_summaries(self, event_log: EventLog, tmp_path: Path) -> None:
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
        self, event_log: EventLog, order_log: EventLog, tmp_path: Path
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

    def test_a_model_that_cannot_be_served_changes_nothing(self, event_log: EventLog, tmp_path: Path) -> None:
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

    def test_calls_continue_while_models_change(self, event_log: EventLog, tmp_path: Path) -> None:
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
                for turn in range(12):
                    models[(turn + 1) % 2].save_pretrained(tmp_path / "model")
                    assert scorer.reload()
            finally:
                done.set()
                for thread in threads:
                    thread.join()
            assert not wrong and scorer.stats().failed_calls == 0 and scorer.stats().calls > 12

    def test_a_running_call_keeps_its_store_open(self, event_log: EventLog, tmp_path: Path) -> None:
        models = [untrained(event_log, seed) for seed in (1, 2)]
        for model in models:
            refresh(model, event_log, tmp_path / "store")
        models[0].save_pretrained(tmp_path / "model")
        with Scorer.open(tmp_path / "model", tmp_path / "store") as scorer:
            old = scorer.store
            with scorer._snapshots.use() as snapshot:
                models[1].save_pretrained(tmp_path / "model")
                assert scorer.reload() and scorer.store is not old
                assert snapshot.store is old and len(old.get_many(USERS).found) == 5
            with pytest.raises(StoreError, match="is closed"):
                old.get_many(USERS)

    def test_a_scorer_closed_during_a_reload_stays_closed(
        self, event_log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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

    def test_a_model_without_the_task_does_not_block_new_generations(
        self, served_tasks: Served, tmp_path: Path
    ) -> None:
        model, log = served_tasks.model, served_tasks.log
        shutil.copytree(served_tasks.model_dir, tmp_path / "model")
        refresh(model, log, tmp_path / "store")
        with Scorer.open(tmp_path / "model", tmp_path / "store", task="like") as scorer:
            schema = dataclasses.replace(model.schema, tasks=["click"])
            other = VistaModel(model.config, schema, model.items, model.data)
            weights = {k: v for k, v in model.state_dict().items() if not k.startswith("task_head")}
            other.load_state_dict(weights, strict=False)
            other.save_pretrained(tmp_path / "model")
            refresh(model, log, tmp_path / "store")
            with pytest.raises(CheckpointError, match="holds a new model without the task 'like'"):
                scorer.reload()
            assert scorer.manifest.generation == 2 and "like" in scorer.tasks


class TestItemProjections:
    def test_projections_of_other_weights_and_damaged_ones_are_refused(
        self, served_tasks: Served, tmp_path: Path
    ) -> None:
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

    def test_missing_projections_are_named(self, served_tasks: Served, tmp_path: Path) -> None:
        shutil.copytree(served_tasks.model_dir, tmp_path / "model")
        (tmp_path / "model" / CANDIDATE_FILE).unlink()
        with pytest.raises(CheckpointError, match=r"no readable model .*item_projections\.npy"):
            Scorer.open(tmp_path / "model", served_tasks.store)


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
    """Operators and bytes of one call are equal for histories of 10^3, 10^5 and 10^6 events."""
    lengths = {1: 1_000, 2: 100_000, 3: 1_000_000}
    rng = np.random.default_rng(0)
    frame = {
        "user": np.repeat(list(lengths), list(lengths.values())),
        "item": np.concatenate([rng.integers(0, 40, count) for count in lengths.values()]),
        "timestamp": np.concatenate([1_600_000_000 + np.arange(count) for count in lengths.values()]),
    }
    log = EventLog.from_frame(frame, tmp_path / "log", time_unit="s")
    model = untrained(log, 1)
    refresh(model, log, tmp_path / "store")
    with Scorer.open(model, tmp_path / "store") as scorer:
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


BUFFERS = """
import resource, sys
import numpy as np, torch
from vista.scorer import Scorer
torch.set_num_threads(1)
with Scorer.open(sys.argv[1], sys.argv[2]) as scorer:
    items = np.resize(scorer.model.items.ids(np.arange(40)), 2_000)
    for _ in range(3):
        scorer.predict([1, 2], items)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        scorer.predict([1, 2], items)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library has another allocator")
def test_buffers_are_reused_between_calls(impression_log: EventLog, tmp_path: Path) -> None:
    """Counted by page faults: memory that is returned to the system must be mapped again."""
    model = untrained(impression_log, 1, model__dim=128)
    model.save_pretrained(tmp_path / "model")
    refresh(model, impression_log, tmp_path / "store")
    done = run_python(BUFFERS, str(tmp_path / "model"), str(tmp_path / "store"))
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 100  # pages of 4 KB; many more without `reuse_freed_memory`
