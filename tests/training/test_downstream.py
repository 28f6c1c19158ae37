"""Downstream training: what it keeps of the base, what it reads from the store, and what it refuses as leakage."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import Served, made_once, serve, served_in, tasks_config
from tests.training.test_trainer import assert_same_result
from vista.config import EvaluateConfig, OptimConfig, SasrecConfig, TrainConfig
from vista.config.checks import Codec, Decay, Mixing
from vista.errors import ConfigError, LeakageError, SummarizerMismatchError
from vista.evaluation.evaluate import evaluate_scorer
from vista.examples.batch_source import BatchSource, ModelReads
from vista.log.event_log import EventLog
from vista.log.histories import UNKNOWN_GAP
from vista.log.splits import visible_counts
from vista.model.vista_model import STAGE1_WEIGHTS, VistaModel
from vista.refresh import RefreshOptions, refresh
from vista.scorer import Scorer
from vista.store import StoreReader, Tail
from vista.training.downstream import Downstream
from vista.training.log_schema import schema_and_readers, schema_of
from vista.training.trainer import Trainer, train

PAST_SHARE = 0.4
"""Share of the impressions before the store's `until`; validation begins at 0.6."""


def past_of(served: Served) -> int:
    times = np.sort(np.asarray(served.log.impressions.timestamp))  # type: ignore[union-attr]
    return int(times[int(PAST_SHARE * len(times))])


@pytest.fixture(scope="module")
def served_tasks(impression_log: EventLog, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """The base. It has pooled vectors, and is the model of the last epoch: the best may be epoch 0."""

    def config(folder: Path) -> TrainConfig:
        return tasks_config(impression_log, folder, model__pooled_dim=16, optim__validate_every=0)

    folder = made_once(
        tmp_path_factory, "downstream-base", lambda folder: serve(impression_log, config(folder), folder)
    )
    return served_in(impression_log, config(folder), folder)


@pytest.fixture(scope="module")
def past_store(served_tasks: Served, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the base `served_tasks`, int8, from before all downstream labels."""
    store = tmp_path_factory.mktemp("downstream") / "past"
    refresh(served_tasks.model, served_tasks.log, store, until=past_of(served_tasks))
    return store


def downstream_config(served: Served, store: Path, run_dir: Path, **changes: Any) -> TrainConfig:
    """A run of one task; `changes` are keys with two underscores for a dot."""
    config = replace(
        served.config,
        model=replace(served.config.model),
        data=replace(served.config.data),
        optim=replace(served.config.optim, tasks=["like"], next_weight=0.0, validate_every=1),
        base=str(served.model_dir),
        store=str(store),
        run_dir=str(run_dir),
    )
    for key, value in changes.items():
        group, _, name = key.rpartition("__")
        setattr(getattr(config, group) if group else config, name, value)
    return config


@pytest.fixture(scope="module")
def liked(
    served_tasks: Served, past_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainConfig, VistaModel]:
    """A downstream model of `like`, the next item, and windows, with a third layer of stage 2."""
    changes = {
        "optim__next_weight": 1.0,
        "optim__window_weight": 0.5,
        "model__num_target_layers": 3,
        "optim__epochs": 3,
    }
    config = downstream_config(served_tasks, past_store, tmp_path_factory.mktemp("liked") / "run", **changes)
    return config, train(config, served_tasks.log)


def test_the_base_stays_as_it_is(served_tasks: Served, liked: tuple[TrainConfig, VistaModel]) -> None:
    config, model = liked
    base, weights = served_tasks.model.state_dict(), model.state_dict()
    kept = [name for name in base if name.startswith(STAGE1_WEIGHTS)]
    assert {name.split(".")[0] for name in kept} == {"item_table", "item_space", "encoder", "summarizer"}
    assert all(torch.equal(weights[name], base[name]) for name in kept)
    assert model.summarizer_id() == served_tasks.model.summarizer_id()
    learned = [name for name in weights if not name.startswith(STAGE1_WEIGHTS)]
    torch.manual_seed(config.seed)
    with Downstream.open(config, served_tasks.log) as downstream:
        fresh = downstream.model(*schema_and_readers(served_tasks.log, config)).state_dict()
    moved = [name for name in learned if not torch.equal(weights[name], fresh[name])]
    assert moved == learned, "all other weights were trained"
    assert model.schema.tasks == ["like"] and model.task_head is not None and model.task_head.out_features == 1


def test_null_settings_are_those_of_the_base(served_tasks: Served, past_store: Path, tmp_path: Path) -> None:
    null = {f"model__{key}": None for key in ("counter_keys", "temperature")}
    unread = {"model__counter_days": [3.0], "model__num_counters": 7}  # without counters
    config = downstream_config(served_tasks, past_store, tmp_path, **null, **unread, optim__window_weight=None)
    base = served_tasks.model.config
    with Downstream.open(config, served_tasks.log) as downstream:
        found = downstream.config.model
        assert found.counter_keys == []
        assert found.temperature == base.temperature
        downstream.config.data.exclude_seen = None
        made = Trainer(downstream.config, served_tasks.log, downstream)
        assert made.config.optim.window_weight == 0
        assert made.model.data == made.config.data and made.model.data.exclude_seen is not None


def test_a_table_that_all_features_share_stays_too(served_tasks: Served, tmp_path: Path) -> None:
    log, given = served_tasks.log, served_tasks.config
    base = VistaModel(replace(given.model, embedding_rows=15), served_tasks.model.schema, log.items, given.data).eval()
    base.save_pretrained(tmp_path / "base")
    refresh(base, log, tmp_path / "store", until=past_of(served_tasks))
    changes = {"base": str(tmp_path / "base"), "optim__epochs": 1}
    config = downstream_config(served_tasks, tmp_path / "store", tmp_path / "run", **changes)
    with pytest.raises(ConfigError, match=r"changes model\.embedding_rows \(15 -> 0\)"):
        train(config, log)
    model = train(replace(config, model=base.config), log)
    assert torch.equal(model.item_table, base.item_table) and model.summarizer_id() == base.summarizer_id()
    assert not torch.equal(
        model.target_attention.request_projection.weight, base.target_attention.request_projection.weight
    )


def test_the_bases_store_serves_it(served_tasks: Served, liked: tuple[TrainConfig, VistaModel]) -> None:
    """One refresh serves the base and the downstream model, which is evaluated like any other."""
    export = Path(liked[0].run_dir) / "best"
    with Scorer.open(export, served_tasks.test_store) as scorer:
        assert scorer.tasks == ["like", "next"]
        evaluation = evaluate_scorer(scorer, served_tasks.log, EvaluateConfig())
    assert {name for name in evaluation.metrics if name.startswith("auc")} == {"auc/like"}
    assert "ndcg@10" in evaluation.metrics


def read_impressions(source: BatchSource, config: TrainConfig) -> Iterator[tuple[Any, int, int, int]]:
    """(batch, window, place, tail columns that are seen) of every impression of a pass."""
    offset = config.model.tail_len - config.data.label_spacing + 1
    for index in range(source.num_batches(0)):
        batch = source.batch(0, index)
        for window, place in batch.impressions.mask.any(-1).nonzero().tolist():
            yield batch, window, place, offset + int(batch.impressions.position[window, place])


def liked_impressions(log: EventLog, since: int, end: int) -> dict[tuple[int, int], list[int]]:
    """{(user row, item row): times of its impressions in [since, end) whose label of `like` is known}."""
    table = log.impressions
    assert table is not None
    user = np.repeat(np.arange(log.num_users), np.diff(table.offsets))
    shown_at = defaultdict(list)
    for index in np.flatnonzero((table.mask[:, 1] == 1) & (table.timestamp >= since) & (table.timestamp < end)):
        shown_at[int(user[index]), int(table.item[index])].append(int(table.timestamp[index]))
    return shown_at


def read_as_served(source: BatchSource, model: VistaModel) -> None:
    """Let questions read the item space, the statistics, and the label rates that serving reads."""
    assert source.spaces is not None and source.rates is not None
    source.spaces.of_each[:] = model.item_space.numpy()
    source.rates.of_each[:] = model.item_rates.numpy()
    statistics = model.item_statistics.numpy()
    source.statistics = SimpleNamespace(of_items=lambda times, rows: statistics[rows])  # type: ignore[assignment]


def test_training_at_a_position_is_serving_from_the_store(
    served_tasks: Served, liked: tuple[TrainConfig, VistaModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For impressions with a full tail: the scorer gives the same probability from the record and the events since.

    Records are float32, because training does not quantize pooled vectors. The store has no statistics of items,
    because training reads those as of each question.
    """
    monkeypatch.setattr("vista.refresh.full.item_values", lambda *_: None)
    config, model = liked
    log, since, end = served_tasks.log, past_of(served_tasks), int(str(served_tasks.config.data.validation_from))
    past_store = tmp_path / "past"
    refresh(served_tasks.model, log, past_store, until=since, options=RefreshOptions(codec=Codec.float32))
    config = replace(config, store=str(past_store), data=replace(config.data, label_spacing=2))
    shown = liked_impressions(log, since, end)
    checked = 0
    with Downstream.open(config, log) as downstream, Scorer.open(model, past_store) as scorer:
        source = BatchSource(log, ModelReads(np.arange(log.num_items) + 1), config, downstream.summaries)
        read_as_served(source, model)
        for batch, window, place, seen in read_impressions(source, config):
            if seen < config.model.tail_len or batch.impressions.gap[window, place] == UNKNOWN_GAP:
                continue
            with torch.no_grad():
                vectors = model.item_vectors(batch.rows)
                events = model.shown_vectors(batch.events, vectors)
                context = model.window_context(batch, events, model.cut_summaries(batch, events))
                trained = model.window_logits(batch, vectors, context)[0][window, place, 0].sigmoid()
            row = int(batch.user[batch.windows.cut[window]])
            item = int(batch.rows[batch.impressions.item[window, place]]) - 1
            if len(shown[row, item]) > 1:
                continue  # ambiguous: the item was shown several times
            (now,) = shown[row, item]
            history = log.slice(row)
            times = np.asarray(history.timestamp)
            fresh = (times >= since) & (times < now)
            tail = Tail(
                log.items.ids(history.item[fresh]), times[fresh], history.action[fresh], np.array([0, fresh.sum()])
            )
            user, candidate = log.users.ids([row]), log.items.ids([item])
            served = scorer.predict(user, candidate, tail=tail, now=now)["like"][0, 0]
            assert float(trained) == pytest.approx(float(served), abs=1e-5)
            checked += 1
    assert checked > 10


def test_a_user_without_a_record_has_the_empty_historys_summary(
    served_tasks: Served, past_store: Path, tmp_path: Path
) -> None:
    log = served_tasks.log
    early = int(np.sort([int(log.slice(row, 0, 1).timestamp[0]) for row in range(log.num_users)])[5]) + 1
    refresh(served_tasks.model, log, tmp_path / "early", until=early)
    users = np.arange(log.num_users)
    without = visible_counts(log, early) == 0
    assert 0 < without.sum() < log.num_users
    with (
        Downstream.open(downstream_config(served_tasks, tmp_path / "early", tmp_path / "run"), log) as downstream,
        StoreReader.open(tmp_path / "early") as store,
    ):
        summaries = downstream.summaries.read(users)
        records = store.get_many(log.users.ids(users))
    np.testing.assert_array_equal(records.found, ~without)
    np.testing.assert_array_equal(summaries[~without], records.summary[~without, :3])  # without pooled vectors
    np.testing.assert_array_equal(summaries[without], np.repeat(served_tasks.model.empty_summary().numpy(), 6, 0))


class TestLeakage:
    def test_a_store_that_covers_labels_is_refused(self, served_tasks: Served, tmp_path: Path) -> None:
        log = served_tasks.log
        for store, until in (
            (served_tasks.store, "all"),
            (served_tasks.test_store, served_tasks.config.data.test_from),
        ):
            with pytest.raises(LeakageError, match=rf"was refreshed with until={until}, but labels must lie"):
                train(downstream_config(served_tasks, store, tmp_path / "run"), log)

    def test_a_record_that_covers_more_than_its_store_says_is_refused(
        self, served_tasks: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("vista.refresh.full.visible_counts", lambda log, limit: log.lengths)
            refresh(served_tasks.model, served_tasks.log, tmp_path / "store", until=past_of(served_tasks))
        with pytest.raises(LeakageError, match=r"user \d+: the record in .* covers \d+ events, .* refresh the store"):
            train(downstream_config(served_tasks, tmp_path / "store", tmp_path / "run"), served_tasks.log)

    def test_a_base_that_was_trained_on_the_labels_is_refused(
        self, served_tasks: Served, past_store: Path, tmp_path: Path
    ) -> None:
        earlier = str(past_of(served_tasks) + 1)
        config = downstream_config(served_tasks, past_store, tmp_path, data__validation_from=earlier)
        with pytest.raises(LeakageError, match=rf"base=.*: was trained on events until .*validation_from={earlier}"):
            train(config, served_tasks.log)


def test_a_run_that_is_stopped_resumes_bitwise_equal(
    served_tasks: Served, past_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, make = served_tasks.log, BatchSource.batch
    whole, stopped = (
        downstream_config(served_tasks, past_store, tmp_path / name, data__tokens_per_batch=100)
        for name in ("whole", "stopped")
    )
    train(whole, log, metrics_every=1)

    def batch(source: BatchSource, epoch: int, index: int) -> Any:
        if (epoch, index) == (1, 1):
            raise KeyboardInterrupt
        return make(source, epoch, index)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(BatchSource, "batch", batch)
        train(replace(stopped, checkpoint_every=1), log, metrics_every=1)
    train(stopped, log, metrics_every=1)
    assert "resuming at step" in (tmp_path / "stopped" / "train.log").read_text()
    assert_same_result(Path(stopped.run_dir), Path(whole.run_dir))


def test_another_generation_of_the_store_is_another_run(served_tasks: Served, tmp_path: Path) -> None:
    store, until = tmp_path / "store", past_of(served_tasks)
    refresh(served_tasks.model, served_tasks.log, store, until=until)
    config = downstream_config(served_tasks, store, tmp_path / "run", optim__epochs=1)
    train(config, served_tasks.log)
    refresh(served_tasks.model, served_tasks.log, store, until=until, options=RefreshOptions(codec=Codec.float32))
    with pytest.raises(ConfigError, match=r"another store's generation \(1 \(\w+\) -> 2 \(\w+\)\)"):
        train(config, served_tasks.log)


class TestRefusals:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"base": "runs/mine/best"}, "store: is required with base"),
            ({"store": "stores/mine"}, "store: only applies with base; set that, or leave this out"),
            ({"base": "b", "store": "s"}, r"data\.split: training over a base needs time"),
        ],
    )
    def test_contradictory_keys(self, values: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            TrainConfig(**values)

    def test_baselines(self, served_tasks: Served, past_store: Path, tmp_path: Path) -> None:
        config = downstream_config(served_tasks, past_store, tmp_path)
        baseline = SasrecConfig(history_limit=200)
        with pytest.raises(ConfigError, match=r"model\.architecture: training over a base needs vista"):
            replace(config, model=baseline)

    def test_a_stage_1_that_differs_from_the_base(self, served_tasks: Served, past_store: Path, tmp_path: Path) -> None:
        changes = {"model__conv_width": 1, "model__num_seeds": 4}
        changes |= {"model__decay": Decay.time, "model__decay_horizons": [1.0, 2.0]}
        config = downstream_config(served_tasks, past_store, tmp_path, **changes, model__num_target_layers=1)
        expected = (
            "changes model.num_seeds (3 -> 4), model.conv_width (3 -> 1), model.decay (none -> time), "
            "model.decay_horizons ([] -> [1.0, 2.0]); set model.num_seeds=3 "
            "model.conv_width=3 model.decay=none model.decay_horizons=[]"
        )
        with pytest.raises(ConfigError, match=re.escape(expected)):
            train(config, served_tasks.log)
        config = downstream_config(served_tasks, past_store, tmp_path, model__mixing=Mixing.bidirectional)
        with pytest.raises(ConfigError, match=r"model\.mixing \(separable -> bidirectional\)"):
            train(config, served_tasks.log)

    def test_the_store_of_another_model(self, served_tasks: Served, served: Served, tmp_path: Path) -> None:
        with pytest.raises(SummarizerMismatchError):
            train(downstream_config(served_tasks, served.store, tmp_path), served_tasks.log)

    def test_no_label_after_the_store(self, served_tasks: Served, tmp_path: Path) -> None:
        end = served_tasks.config.data.validation_from
        refresh(served_tasks.model, served_tasks.log, tmp_path / "store", until=end)
        with pytest.raises(ConfigError, match=rf"until={end}, and no label of .* lies between .* an earlier until"):
            train(downstream_config(served_tasks, tmp_path / "store", tmp_path / "run"), served_tasks.log)

    def test_tasks(self, served_tasks: Served, event_log: EventLog, tmp_path: Path) -> None:
        for log, has in ((served_tasks.log, "click, like, long_view"), (event_log, "none")):
            with pytest.raises(ConfigError, match=rf"optim\.tasks: .* has no task 'share'; its tasks are: {has}"):
                schema_of(log, TrainConfig(optim=OptimConfig(tasks=["share"])))
        with pytest.raises(ConfigError, match=r"optim\.tasks: needs optim\.task_weight above 0"):
            OptimConfig(tasks=["like"], task_weight=0)
        chosen = schema_of(served_tasks.log, TrainConfig(optim=OptimConfig(tasks=["long_view", "click"])))
        assert chosen.tasks == ["click", "long_view"]
