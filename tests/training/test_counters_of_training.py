"""Counters of items and of categories: runs with them, and that every part of vista counts the same keys."""

from __future__ import annotations

import calendar
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from tests.conftest import Served, draw_counter_weights, small_config, small_frame
from tests.counters.counter_histories import counters_of_request
from tests.training.conftest import assert_served_as_validated
from tests.training.worlds import begun
from vista.cli.item_commands import run_items_add
from vista.config import ExploreConfig, ItemsAddConfig, ItemTableConfig, ModelConfig, SourceColumns, TrainConfig
from vista.config.checks import Architecture, Codec, Split, StateDtype
from vista.counters.counters import CounterSpec
from vista.counters.keys import UserCounters
from vista.errors import CheckpointError, ConfigError
from vista.evaluation.cases import NextItemCases
from vista.examples.batch import Batch
from vista.examples.batch_source import MEASURED_BATCHES
from vista.examples.item_statistics import num_statistics
from vista.examples.transitions import TransitionCounts
from vista.explore.user_page import counter_rows
from vista.explore.workspace import Places, Workspace
from vista.log.event_log import EventLog
from vista.log.histories import Histories
from vista.log.splits import split_until, visible_counts
from vista.model import inference
from vista.model.baselines.sequence_models import SequenceModel
from vista.model.ranking_model import RankingModel
from vista.model.vista_model import VistaModel
from vista.planning.capacity_plan import StoreSizes
from vista.refresh import RefreshOptions, refresh
from vista.runs.tracking import MetricsWriter
from vista.scorer import Scorer
from vista.training.log_schema import schema_of
from vista.training.optimizers import HEAD_RATE
from vista.training.trainer import Trainer, train, train_model
from vista.training.validation import Validation


def counting_config(log: EventLog, run_dir: Path, **changes: Any) -> TrainConfig:
    options = {
        "model__counter_keys": ["item"],
        "model__num_counters": 5,
        "optim__window_weight": 1.0,
        "data__horizon_events": 5,
        "data__exclude_seen": False,
    }
    if changes.get("model__architecture", Architecture.vista) is Architecture.vista:
        options |= {"model__num_seeds": 0, "model__pooled_dim": 16}
    return small_config(log, run_dir, **{**options, **changes})


def test_the_heads_start_from_the_training_part_and_have_their_own_rate(event_log: EventLog, tmp_path: Path) -> None:
    config = counting_config(event_log, tmp_path, data__num_negatives=event_log.num_items)
    made = Trainer(config, event_log)
    made._start(MetricsWriter(tmp_path))

    labels, returns = 0, 0
    for index in range(min(made.source.num_batches(0), MEASURED_BATCHES)):
        batch = made.source.batch(0, index)
        assert batch.anchors is not None and batch.anchors.counters is not None
        for label, slots in zip(batch.anchors.item.tolist(), batch.anchors.counters.item.tolist(), strict=True):
            own, had = {item for item in label if item >= 0}, {item for item in slots if item >= 0}
            labels, returns = labels + len(own) * bool(had), returns + len(own & had)
    share = (returns + 1) / (labels + 2)
    assert 0.02 < share < 0.9
    assert counted_share(made.model, made.source.batch(0, 0)) == pytest.approx(share, rel=0.02)

    visible = visible_counts(event_log, split_until(made.config.data, "train"))
    seen = np.concatenate([np.asarray(event_log.slice(u, 0, int(n)).item) for u, n in enumerate(visible)])
    number = np.log1p(np.bincount(seen, minlength=event_log.num_items))
    expected = (number - number[number > 0].mean()) / number[number > 0].std()
    np.testing.assert_allclose(made.model.item_statistics[1:, 0], expected, rtol=1e-4, atol=1e-5)
    assert made.model.item_statistics.shape == (1 + event_log.num_items, num_statistics(has_time=True))
    assert made.model.transitions is not None
    counts = TransitionCounts(event_log, np.arange(1, 1 + event_log.num_items), visible, 50)
    table, found = counts.table(1 + event_log.num_items), made.model.transitions
    assert torch.equal(found.item, table.item) and torch.equal(found.weight, table.weight) and found.item.any()

    # Heads learn faster in epoch 0, and as fast as the rest afterwards.
    for optimizers, of_heads in ((made._new_optimizers(trains_tables=False), HEAD_RATE), (made.optimizers, 1.0)):
        rate = optimizers.schedule(10, 4)
        rates = {id(p): group["lr"] for group in optimizers.dense.param_groups for p in group["params"]}
        for name, parameter in made.model.named_parameters():
            if name != "item_table":
                factor = of_heads if name.startswith(("counted.", "statistics.")) else 1.0
                assert rates[id(parameter)] == pytest.approx(rate * factor), name


@pytest.mark.parametrize("asked", [True, False])
def test_the_gate_starts_by_the_first_batch_with_a_question(
    event_log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    made = Trainer(counting_config(event_log, tmp_path), event_log)
    whole = made.source.batch

    def without_questions(epoch: int, index: int) -> Batch:
        batch = whole(epoch, index)
        assert batch.anchors is not None
        return batch if asked and index else replace(batch, anchors=replace(batch.anchors, window=torch.zeros(0)))

    monkeypatch.setattr(made.source, "batch", without_questions)
    made._start(MetricsWriter(tmp_path))
    assert made.model.counted is not None and bool(made.model.counted.gate.bias) == asked


@torch.no_grad()
def counted_share(model: RankingModel, batch: Batch) -> float:
    """Mean probability that the items of users who have counters are counted items, in a softmax of the catalog."""
    assert model.counted is not None and batch.anchors is not None and batch.anchors.counters is not None
    assert batch.statistics is not None and (batch.rows > 0).sum() == len(model.items)
    vectors = model.item_vectors(batch.rows)
    users, items = model.anchor_users(batch, vectors), model.training_items(batch, vectors)
    dim = items.shape[1]
    shares = []
    assert batch.anchors.transitions is not None
    anchors = batch.anchors.time, batch.anchors.counters.item, batch.anchors.transitions
    for user, time, slots, sums in zip(users, *anchors, strict=True):
        own = slots[slots >= 0]
        if len(own):
            statistics = batch.statistics.values[int((batch.statistics.time <= time).sum()) - 1]
            last = dim + statistics.shape[1]
            logit = items @ user[:dim] / model.temperature + statistics @ user[dim:last] + user[last:] @ sums
            logit[batch.rows == 0] = -torch.inf
            logit[own] = model.counted.gate.bias
            shares.append(float(logit.softmax(0)[own].sum()))
    return float(np.mean(shares))


@dataclass(frozen=True)
class Asked:
    """A request to a baseline after the first `seen` events of a user."""

    model: SequenceModel
    log: EventLog
    user: int
    seen: int
    now: np.ndarray

    def counters(self) -> UserCounters:
        keys, history = self.model.item_keys, self.newest(self.seen, self.seen)
        assert keys is not None
        start = max(self.seen - self.model.config.tail_len, 0)
        return counters_of_request(keys, history, covered=self.seen, tail_start=start, seen=self.seen, now=self.now)

    def newest(self, limit: int, stop: int) -> Histories:
        """Up to `limit` events before the position `stop`, with rows of the model."""
        events = self.log.slice(self.user, max(stop - limit, 0), stop)
        return replace(events, item=self.model.rows_of(self.log.items)[events.item].astype(np.int32))

    def scores(self) -> np.ndarray:
        """[V]."""
        model = self.model
        users = model.user_vectors(self.newest(model.config.history_limit, self.seen), self.now)
        newest = self.newest(model.config.tail_len, self.seen).item
        tail = np.concatenate([np.zeros(model.config.tail_len, np.int64), newest])[None, -model.config.tail_len :]
        items = inference.item_vectors(model)
        return inference.catalog_scores(model, users, items, self.counters(), tail, None)[0].numpy()

    def probabilities(self, item: int) -> np.ndarray:
        """[num_tasks] of an item, a row of the log."""
        row = self.model.rows_of(self.log.items)[[item]]
        codes = torch.from_numpy(self.counters().of_pairs(np.zeros(1, np.int64), row))[None]
        history = self.newest(self.model.config.history_limit, self.seen)
        logits = self.model.candidate_logits(history, torch.from_numpy(row[None]), self.now, codes)
        return logits[0, 0].sigmoid().numpy()


HSTU = {"model__architecture": Architecture.hstu, "model__history_limit": 8}
"""A baseline, whose raw history covers all events. Validation of vista is compared with a store (test_validation.py),
and that with raw histories (test_scorer_counters.py)."""


def test_validation_scores_counted_items(event_log: EventLog, tmp_path: Path) -> None:
    config = counting_config(event_log, tmp_path, **HSTU)
    model = Trainer(config, event_log).model.eval()
    assert isinstance(model, SequenceModel)
    draw_counter_weights(model)
    validation = Validation(event_log, model.rows_of(event_log.items), config)
    measured = validation(model)

    rows, cases = model.rows_of(event_log.items), validation._ranked
    assert isinstance(cases, NextItemCases)
    gains = []
    for user, seen, item in zip(cases.user.tolist(), cases.seen.tolist(), cases.item.tolist(), strict=True):
        now = np.asarray(event_log.slice(user, seen, seen + 1).timestamp)
        scores = Asked(model, event_log, user, seen, now).scores()
        rank = int((scores > scores[rows[item] - 1]).sum())
        gains.append(1 / math.log2(rank + 2) if rank < 10 else 0.0)
    assert measured["ndcg@10"] == pytest.approx(np.mean(gains), rel=1e-4)


def test_tasks_read_the_counters_of_candidates(served_tasks: Served, tmp_path: Path) -> None:
    log, data = served_tasks.log, served_tasks.config.data
    config = counting_config(log, tmp_path, **HSTU, data=data)
    model = Trainer(config, log).model.eval()
    assert isinstance(model, SequenceModel) and model.candidate_head is not None
    assert not model.candidate_head.added.weight.any()
    assert not model.candidate_head.network[-1].weight.any()
    draw_counter_weights(model)
    validation = Validation(log, model.rows_of(log.items), config)
    cases = validation._impressions
    assert cases is not None
    predicted = validation._answers(model, np.arange(log.num_users)).probabilities(cases)
    counted = 0
    for n in range(0, len(cases.user), 3):
        user, seen = int(cases.user[n]), int(cases.seen[n])
        asked = Asked(model, log, user, seen, cases.timestamp[[n]])
        np.testing.assert_allclose(predicted[n], asked.probabilities(int(cases.item[n])), rtol=1e-4, atol=1e-6)
        counted += int(model.rows_of(log.items)[cases.item[n]] in asked.counters().codes.key)
    assert counted > 3


def test_a_log_with_returns_trains_counters_without_being_asked(event_log: EventLog, tmp_path: Path) -> None:
    """From the settings that are null to scores from a store, and resumed without a change."""
    null = {f"model__{key}": None for key in ("counter_keys", "temperature")}
    config = small_config(event_log, tmp_path / "run", data__exclude_seen=None, optim__window_weight=None, **null)
    model = train(config, event_log, metrics_every=1)
    found = model.config
    assert (found.counter_keys, found.temperature) == (["item"], 0.3)
    assert '"window"' in (tmp_path / "run" / "metrics.jsonl").read_text()
    weights = (tmp_path / "run" / "best" / "model.safetensors").read_bytes()
    train(config, event_log)
    assert (tmp_path / "run" / "best" / "model.safetensors").read_bytes() == weights
    refresh(model, event_log, tmp_path / "store")
    with Scorer.open(model, tmp_path / "store") as scorer:
        users = event_log.users.ids(np.arange(3))
        _, scores, offsets = scorer.counted_items(users)
        assert np.isfinite(scores).all() and (np.diff(offsets) > 0).all()


COLUMNS = SourceColumns(action="action", rating="rating", labels=["click"])
ITEMS = np.unique(small_frame()["item"])
BRANDS = np.where(np.arange(len(ITEMS)) % 7 > 0, np.arange(len(ITEMS)) % 7, 0)
"""Brand of each item, from 1 on; 0 is none."""
KEYS = ["item", "brand", "brand*weekday", "previous*item", "brand*action:like", "action:click"]
COUNTED = {"model__counter_keys": KEYS, "data__exclude_seen": False}


def brand_table(items: Any, brands: Any) -> dict[str, Any]:
    return {"item": list(items), "brand": [f"brand {value}" if value else None for value in brands]}


@pytest.fixture(scope="module")
def brand_log(tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    """The small log with shown items, some of which were clicked, and the brands of its items."""
    frame, rng = small_frame(), np.random.default_rng(2)
    shown = rng.integers(0, len(frame["user"]), 200)
    return EventLog.from_frame(
        frame,
        tmp_path_factory.mktemp("brands") / "log",
        time_unit="ms",
        items=brand_table(ITEMS, BRANDS),
        impressions={
            "user": frame["user"][shown],
            "item": rng.choice(ITEMS, 200),
            "timestamp": frame["timestamp"][shown] + 1,
            "click": rng.integers(0, 2, 200),
        },
        columns=COLUMNS,
    )


def config_of(brand_log: EventLog, run_dir: Path, **changes: Any) -> Any:
    times = np.sort(np.asarray(brand_log.impressions.timestamp))  # type: ignore[union-attr]
    split = {"data__split": Split.time, "data__validation_from": str(times[120]), "data__test_from": str(times[160])}
    return small_config(brand_log, run_dir, **{"optim__learning_rate": 2e-2, **split, **COUNTED, **changes})


@pytest.fixture(scope="module")
def trained(brand_log: EventLog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, with a store of what its validation may see."""
    folder = tmp_path_factory.mktemp("trained")
    config = config_of(brand_log, folder / "run")
    model = train(config, brand_log)
    assert isinstance(model, VistaModel)
    until, options = split_until(config.data, "validation"), RefreshOptions(codec=Codec.float32)
    refresh(model, brand_log, folder / "store", until=until, options=options)
    return folder


def test_keys_are_the_values_of_the_items(trained: Path, brand_log: EventLog) -> None:
    model = VistaModel.from_pretrained(trained / "run" / "best")
    assert model.item_keys is not None and model.feature_table is not None
    assert model.item_keys.spec.fields == tuple(KEYS) and model.item_keys.spec.keys == (64,) * len(KEYS)
    keys = model.item_keys.categories["brand"]
    assert keys[0] == 0
    keys = keys[model.item_rows(ITEMS)]
    names = model.feature_table.values["brand"].ids(np.maximum(keys - 1, 0)).tolist()
    assert [name if key else None for name, key in zip(names, keys, strict=True)] == brand_table(ITEMS, BRANDS)["brand"]


def test_validation_is_what_the_scorer_reaches(trained: Path, brand_log: EventLog, tmp_path: Path) -> None:
    """Summaries and counters of raw histories, as training validates, and those of the store, as users get them."""
    model = VistaModel.from_pretrained(trained / "run" / "best")
    assert_served_as_validated(config_of(brand_log, trained / "run"), model, brand_log, tmp_path / "store")


def test_scores_read_the_counters_of_a_category(trained: Path, brand_log: EventLog) -> None:
    """Also for items that the user never had; pairs get the same scores alone and together."""
    user = brand_log.users.ids(np.arange(1)).tolist()[0]
    with Scorer.open(trained / "run" / "best", trained / "store") as scorer:
        stored = scorer.store.get_many([user])
        items, brands, *_ = stored.counters
        explanation = scorer.explain(user, ITEMS, task="click")
        num_values = items.spec.num_columns
        assert explanation.counts.shape == (len(ITEMS), len(KEYS) * num_values)
        held = np.isin(scorer.model.item_rows(ITEMS), items.key)
        keys = scorer.model.item_keys.categories["brand"][scorer.model.item_rows(ITEMS)]  # type: ignore[union-attr]
        same_brand = np.isin(keys, brands.key)
        assert (np.isfinite(explanation.counts[:, 0]) == held).all()
        assert (np.isfinite(explanation.counts[:, num_values]) == same_brand).all()
        new = ~held & same_brand
        assert new.any() and explanation.shares["counters"][new].all()
        # A brand was had as often as its items.
        for key in brands.key.tolist():
            of_brand = explanation.counts[keys == key]
            assert of_brand[0, num_values] == pytest.approx(np.nansum(of_brand[:, 0]), rel=0.1)
        users = brand_log.users.ids(np.arange(5)).tolist()
        together = scorer.predict(users, ITEMS)
        for name, scores in together.items():
            alone = [scorer.predict([one], ITEMS[[place]])[name][0, 0] for place, one in enumerate(users)]
            # Products of another shape sum in another order, which costs each of the layers some float32 roundings.
            # Scores of `next` are sums of terms that can be larger than the sum.
            rounding = 32 * np.finfo(np.float32).eps
            terms = {"atol": rounding if name == "next" else 0, "rtol": rounding}
            np.testing.assert_allclose(scores[np.arange(5), np.arange(5)], alone, err_msg=name, **terms)


def test_baselines_count_categories_too(brand_log: EventLog, tmp_path: Path) -> None:
    model = train_model(config_of(brand_log, tmp_path / "run", **HSTU, optim__epochs=1), brand_log)
    assert model.item_keys is not None and list(model.item_keys.categories) == ["brand"]
    assert model.candidate_head.added.weight.any()  # type: ignore[union-attr]


def test_added_items_have_the_counters_of_their_category(trained: Path, brand_log: EventLog, tmp_path: Path) -> None:
    model = VistaModel.from_pretrained(trained / "run" / "best")
    model.save_pretrained(tmp_path / "model")
    added = tmp_path / "new.parquet"
    pl.DataFrame(brand_table([5000, 5001, 5002], [2, 0, 99])).write_parquet(added)
    run_items_add(ItemsAddConfig(model=str(tmp_path / "model"), items=ItemTableConfig(paths=[str(added)])))
    grown = VistaModel.from_pretrained(tmp_path / "model")
    assert grown.summarizer_id() == model.summarizer_id() and grown.item_keys is not None
    brand = grown.item_keys.categories["brand"]
    of_brand_2 = int(brand[grown.item_rows(ITEMS[BRANDS == 2][:1])][0])
    assert brand[grown.item_rows([5000, 5001, 5002])].tolist() == [of_brand_2, 0, 0]
    pl.DataFrame({"item": [6000], "brand": ["brand 1|brand 2"]}).write_parquet(added)
    several = ItemTableConfig(paths=[str(added)], value_separator="|")
    with pytest.raises(
        ConfigError, match=r"1 items of .*new\.parquet have several values of 'brand', such as \[6000\]"
    ):
        run_items_add(ItemsAddConfig(model=str(tmp_path / "model"), items=several))
    assert len(VistaModel.from_pretrained(tmp_path / "model").items) == len(grown.items)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counter_keys": ["item", "item"]}, "must be distinct and begin with item, got"),
        ({"counter_keys": ["a"]}, "must be distinct and begin with item, got"),
        ({"counter_keys": ["item", "a*"]}, r"'a\*' must have distinct parts, such as a\*b"),
        ({"counter_keys": ["item", "a*month*a"]}, r"'a\*month\*a' must have distinct parts"),
        ({"counter_keys": ["item", "previous*month"]}, r"'previous\*month' is the same for all candidates; add"),
        ({"counter_keys": ["item", "item*month"], "ignore": ["times"]}, r"'item\*month' needs times, which"),
        ({"counter_keys": ["item", "a"], "ignore": ["item_features"]}, "'a' needs item_features, which model.ignore"),
    ],
)
def test_settings_that_no_log_fits_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"model.counter_keys: .*{message}"):
        ModelConfig(**changes)


def test_a_category_must_be_one_of_the_log_with_one_value_per_item(brand_log: EventLog, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'color' is not a category of the items of .*; those are: brand"):
        train(config_of(brand_log, tmp_path / "run", model__counter_keys=["item", "color"]), brand_log)
    items = {"item": ITEMS.tolist(), "tags": [["a", "b"][: 1 + (item == ITEMS[3])] for item in ITEMS]}
    other = EventLog.from_frame(small_frame(), tmp_path / "log", time_unit="ms", items=items)
    changes = {**COUNTED, "model__counter_keys": ["item", "tags"]}
    with pytest.raises(ConfigError, match=rf"1 items of .* have several values of 'tags', such as \[{ITEMS[3]}\]"):
        train(small_config(other, tmp_path / "run", **changes), other)
    assert not (tmp_path / "run" / "best").exists()


def test_the_calendar_needs_times_and_actions_need_several(tmp_path: Path) -> None:
    frame = {name: small_frame()[name] for name in ("user", "item")}
    log = EventLog.from_frame(frame, tmp_path / "log", columns=SourceColumns(timestamp=None))
    config = small_config(log, tmp_path / "run", model__counter_keys=["item", "previous*item", "weekday*item"])
    with pytest.raises(ConfigError, match=r"weekday\*item needs times, which .*log does not have"):
        schema_of(log, config)
    config.model.counter_keys = ["item", "action"]
    with pytest.raises(ConfigError, match=r"'action' needs a log with 2 to 16 actions, but .*log has"):
        schema_of(log, config)


def test_a_counted_action_must_be_one_of_the_log(brand_log: EventLog, tmp_path: Path) -> None:
    config = config_of(brand_log, tmp_path / "run", model__counter_keys=["item", "action", "item*action:buy"])
    with pytest.raises(ConfigError, match=r"'item\*action:buy' counts an action that the log does not have; .*'click'"):
        schema_of(brand_log, config)
    config.model.counter_keys = ["item", "action"]
    spec = CounterSpec.of(config.model, has_time=True, actions=schema_of(brand_log, config).actions)
    assert spec is not None and spec.fields == ("item", "action:click", "action:like")


def test_a_model_without_its_category_is_refused(trained: Path, tmp_path: Path) -> None:
    model = VistaModel.from_pretrained(trained / "run" / "best")
    model.config.counter_keys = [*KEYS[:1], "color", *KEYS[2:]]
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="'color', which the model counts, is not a category of its items"):
        VistaModel.from_pretrained(tmp_path / "model")


def test_a_warm_start_keeps_the_values_of_earlier_items(trained: Path, brand_log: EventLog, tmp_path: Path) -> None:
    """A later log has more brands, some of which sort before the known ones."""
    frame = small_frame()
    brands = [f"a new brand {value}" if value == 3 else f"brand {value}" if value else None for value in BRANDS]
    later = EventLog.from_frame(
        frame, tmp_path / "log", time_unit="ms", items={"item": ITEMS.tolist(), "brand": brands}, columns=COLUMNS
    )
    options = {"init_from": str(trained / "run" / "best"), "optim__task_weight": 0.0}
    _, made = begun(config_of(brand_log, tmp_path / "run", **options, data__path=str(later.path)), later)
    model = made.model
    assert model.item_keys is not None and model.feature_table is not None
    keys = model.item_keys.categories["brand"][model.item_rows(ITEMS)]
    names = model.feature_table.values["brand"].ids(np.maximum(keys - 1, 0)).tolist()
    assert [name if key else None for name, key in zip(names, keys, strict=True)] == brands


def test_the_page_names_the_values_of_a_category(trained: Path) -> None:
    config = ExploreConfig(model=str(trained / "run" / "best"), store=str(trained / "store"))
    opened = Workspace.open(Places.of(config))
    assert opened.scorer is not None
    with opened.scorer as scorer:
        rows = counter_rows(opened, scorer, scorer.store.get_many([next(iter(scorer.store.keys()))]))
    assert list(rows) == KEYS
    assert all(row["value"].startswith("pair ") for row in rows["previous*item"])
    parts = [row["value"].split(", ") for row in rows["brand*weekday"]]
    assert parts and all(brand in {row["value"] for row in rows["brand"]} for brand, _ in parts)
    assert {day for _, day in parts} <= {*calendar.day_name}
    assert {row["value"] for row in rows["action:click"]} <= {"all items"}
    assert {row["value"] for row in rows["brand*action:like"]} <= {row["value"] for row in rows["brand"]}
    assert rows["brand"] and all(row["value"].startswith("brand ") and row["count"] > 0 for row in rows["brand"])


def test_a_record_grows_by_the_counters_of_each_category() -> None:
    sizes = [
        StoreSizes.of(
            ModelConfig(counter_keys=["item", *names]),
            Codec.int8,
            StateDtype.float32,
            num_items=1000,
            history_events=10,
        )
        for names in ([], ["brand"], ["brand", "topic"], ["brand", "previous*item"])
    ]
    assert sizes[0].record < sizes[1].record < sizes[2].record and sizes[0].state < sizes[1].state
    assert sizes[2].record - sizes[1].record == sizes[1].record - sizes[0].record
    assert sizes[3].record - sizes[2].record == 64 * 2  # a pair of items takes 4 bytes
    per_action = ModelConfig(counter_keys=["item", "brand*action"])
    with pytest.raises(
        ConfigError, match=r"'brand\*action' is a key per action; list them, such as item\*action:click"
    ):
        StoreSizes.of(per_action, Codec.int8, StateDtype.float32, num_items=1000, history_events=10)
