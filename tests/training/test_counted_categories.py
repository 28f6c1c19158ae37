"""Counters of categories, from the table of items to scores: every part of vista counts the same keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tests.conftest import small_config, small_frame
from vista.cli.items_command import run_items_add
from vista.config import EvaluateConfig, ExploreConfig, ItemsAddConfig, ItemTableConfig, ModelConfig, SourceColumns
from vista.config.choices import Architecture, Codec, Split, StateDtype
from vista.errors import CheckpointError, ConfigError
from vista.evaluation.evaluate import evaluate_scorer
from vista.explore.explore_workspace import Workspace
from vista.explore.places import Places
from vista.explore.user_page import counter_rows
from vista.log.event_log import EventLog
from vista.log.splits import split_until
from vista.model.vista_model import VistaModel
from vista.planning.store_sizes import StoreSizes
from vista.refresh import RefreshOptions, refresh
from vista.scorer import Scorer
from vista.training.trainer import train, train_model
from vista.training.validation import Validation

COLUMNS = SourceColumns(action="action", rating="rating", labels=["click"])
ITEMS = np.unique(small_frame()["item"])
BRANDS = np.where(np.arange(len(ITEMS)) % 7 > 0, np.arange(len(ITEMS)) % 7, 0)
"""Brand of each item, from 1 on; 0 is none."""
COUNTED = {"model__counters": True, "model__counter_categories": ["brand"], "data__exclude_seen": False}


def table(items: Any, brands: Any) -> dict[str, Any]:
    return {"item": list(items), "brand": [f"brand {value}" if value else None for value in brands]}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    """The small log with shown items, some of which were clicked, and the brands of its items."""
    frame, rng = small_frame(), np.random.default_rng(2)
    shown = rng.integers(0, len(frame["user"]), 200)
    return EventLog.from_frame(
        frame,
        tmp_path_factory.mktemp("brands") / "log",
        time_unit="ms",
        items=table(ITEMS, BRANDS),
        impressions={
            "user": frame["user"][shown],
            "item": rng.choice(ITEMS, 200),
            "timestamp": frame["timestamp"][shown] + 1,
            "click": rng.integers(0, 2, 200),
        },
        columns=COLUMNS,
    )


def config_of(log: EventLog, run_dir: Path, **changes: Any) -> Any:
    times = np.sort(np.asarray(log.impressions.timestamp))  # type: ignore[union-attr]
    split = {"data__split": Split.time, "data__validation_from": str(times[120]), "data__test_from": str(times[160])}
    return small_config(log, run_dir, **{"optim__learning_rate": 2e-2, **split, **COUNTED, **changes})


@pytest.fixture(scope="module")
def trained(log: EventLog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, with a store of what its validation may see."""
    folder = tmp_path_factory.mktemp("trained")
    config = config_of(log, folder / "run")
    model = train(config, log)
    assert isinstance(model, VistaModel)
    until, options = split_until(config.data, "validation"), RefreshOptions(codec=Codec.float32)
    refresh(model, log, folder / "store", until=until, options=options)
    return folder


def test_keys_are_the_values_of_the_items(trained: Path, log: EventLog) -> None:
    model = VistaModel.from_pretrained(trained / "run" / "best")
    assert model.item_keys is not None and model.feature_table is not None
    assert model.item_keys.spec.fields == ("item", "brand") and model.item_keys.spec.keys == (64, 64)
    _, keys = model.item_keys.of(model.item_rows(ITEMS))
    names = model.feature_table.values["brand"].ids(np.maximum(keys - 1, 0)).tolist()
    assert [name if key else None for name, key in zip(names, keys, strict=True)] == table(ITEMS, BRANDS)["brand"]
    assert model.item_keys.of(np.zeros(1, np.int64))[1].tolist() == [0]


def test_validation_is_what_the_scorer_reaches(trained: Path, log: EventLog) -> None:
    """Summaries and counters of raw histories, as training validates, and those of the store, as users get them."""
    config = config_of(log, trained / "run")
    asked = EvaluateConfig(split="validation", top_k=[10], progress=False)
    with Scorer.open(trained / "run" / "best", trained / "store") as scorer:
        served = evaluate_scorer(scorer, log, asked).metrics
        model = scorer.model
    measured = Validation(log, model.rows_of(log.items), config)(model)
    shared = served.keys() & measured.keys()
    assert {"hr@10", "auc/click"} <= shared
    for name in shared:
        assert served[name] == pytest.approx(measured[name], abs=2e-5), name


def test_scores_read_the_counters_of_a_category(trained: Path, log: EventLog) -> None:
    """Also for items that the user never had; pairs get the same scores alone and together."""
    user = log.users.ids(np.arange(1)).tolist()[0]
    with Scorer.open(trained / "run" / "best", trained / "store") as scorer:
        stored = scorer.store.get_many([user])
        items, brands = stored.counters
        explanation = scorer.explain(user, ITEMS, task="click")
        num_values = items.spec.num_columns
        assert explanation.counts.shape == (len(ITEMS), 2 * num_values)
        held = np.isin(scorer.model.item_rows(ITEMS), items.key)
        keys = scorer.model.item_keys.of(scorer.model.item_rows(ITEMS))[1]  # type: ignore[union-attr]
        same_brand = np.isin(keys, brands.key)
        assert (np.isfinite(explanation.counts[:, 0]) == held).all()
        assert (np.isfinite(explanation.counts[:, num_values]) == same_brand).all()
        new = ~held & same_brand
        assert new.any() and explanation.counted[new].all()
        # A brand was had as often as its items.
        for key in brands.key.tolist():
            of_brand = explanation.counts[keys == key]
            assert of_brand[0, num_values] == pytest.approx(np.nansum(of_brand[:, 0]), rel=0.1)
        users = log.users.ids(np.arange(5)).tolist()
        together = scorer.predict(users, ITEMS)
        for name, scores in together.items():
            alone = [scorer.predict([one], ITEMS[[place]])[name][0, 0] for place, one in enumerate(users)]
            np.testing.assert_allclose(scores[np.arange(5), np.arange(5)], alone, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("architecture", [Architecture.sasrec, Architecture.hstu])
def test_baselines_count_categories_too(log: EventLog, tmp_path: Path, architecture: Architecture) -> None:
    options = {"model__architecture": architecture, "model__history_limit": 8, "optim__epochs": 1}
    model = train_model(config_of(log, tmp_path / "run", **options), log)
    assert model.item_keys is not None and len(model.item_keys.category) == 1
    assert model.candidate_counters.added.weight.any()  # type: ignore[union-attr]


def test_added_items_have_the_counters_of_their_category(trained: Path, log: EventLog, tmp_path: Path) -> None:
    model = VistaModel.from_pretrained(trained / "run" / "best")
    model.save_pretrained(tmp_path / "model")
    added = tmp_path / "new.parquet"
    pl.DataFrame(table([5000, 5001, 5002], [2, 0, 99])).write_parquet(added)
    run_items_add(ItemsAddConfig(model=str(tmp_path / "model"), items=ItemTableConfig(paths=[str(added)])))
    grown = VistaModel.from_pretrained(tmp_path / "model")
    assert grown.summarizer_id() == model.summarizer_id() and grown.item_keys is not None
    of_brand_2 = int(grown.item_keys.of(grown.item_rows(ITEMS[BRANDS == 2][:1]))[1][0])
    assert grown.item_keys.of(grown.item_rows([5000, 5001, 5002]))[1].tolist() == [of_brand_2, 0, 0]
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
        ({"counter_categories": ["item"]}, "must be distinct names of features other than 'item', got"),
        ({"counter_categories": ["a", "a"]}, "must be distinct names of features"),
        ({"counter_categories": ["a"], "use_item_features": False}, "needs model.use_item_features=true"),
        ({"counter_categories": ["a"], "counters": None}, "needs model.counters=true, got .* and counters=None"),
        ({"counter_categories": ["a"], "counters": False}, "needs model.counters=true"),
    ],
)
def test_settings_that_no_log_fits_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"model.counter_categories: .*{message}"):
        ModelConfig(**{"counters": True, **changes})


def test_a_category_must_be_one_of_the_log_with_one_value_per_item(log: EventLog, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'color' is not a category of the items of .*; those are: brand"):
        train(config_of(log, tmp_path / "run", model__counter_categories=["color"]), log)
    items = {"item": ITEMS.tolist(), "tags": [["a", "b"][: 1 + (item == ITEMS[3])] for item in ITEMS]}
    other = EventLog.from_frame(small_frame(), tmp_path / "log", time_unit="ms", items=items)
    changes = {**COUNTED, "model__counter_categories": ["tags"]}
    with pytest.raises(ConfigError, match=rf"1 items of .* have several values of 'tags', such as \[{ITEMS[3]}\]"):
        train(small_config(other, tmp_path / "run", **changes), other)
    assert not (tmp_path / "run" / "best").exists()


def test_a_model_without_its_category_is_refused(trained: Path, tmp_path: Path) -> None:
    model = VistaModel.from_pretrained(trained / "run" / "best")
    model.config.counter_categories = ["color"]
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="'color', which the model counts, is not a category of its items"):
        VistaModel.from_pretrained(tmp_path / "model")


def test_a_warm_start_keeps_the_values_of_earlier_items(trained: Path, log: EventLog, tmp_path: Path) -> None:
    """A later log has more brands, some of which sort before the known ones."""
    frame = small_frame()
    brands = [f"a new brand {value}" if value == 3 else f"brand {value}" if value else None for value in BRANDS]
    later = EventLog.from_frame(
        frame, tmp_path / "log", time_unit="ms", items={"item": ITEMS.tolist(), "brand": brands}, columns=COLUMNS
    )
    options = {"init_from": str(trained / "run" / "best"), "optim__task_weight": 0.0}
    model = train_model(config_of(log, tmp_path / "run", **options, data__path=str(later.path)), later)
    assert model.item_keys is not None and model.feature_table is not None
    _, keys = model.item_keys.of(model.item_rows(ITEMS))
    names = model.feature_table.values["brand"].ids(np.maximum(keys - 1, 0)).tolist()
    assert [name if key else None for name, key in zip(names, keys, strict=True)] == brands


def test_the_page_names_the_values_of_a_category(trained: Path) -> None:
    config = ExploreConfig(model=str(trained / "run" / "best"), store=str(trained / "store"))
    opened = Workspace.open(Places.of(config))
    assert opened.scorer is not None
    with opened.scorer as scorer:
        rows = counter_rows(opened, scorer, scorer.store.get_many([next(iter(scorer.store.keys()))]))
    assert list(rows) == ["item", "brand"]
    assert rows["brand"] and all(row["value"].startswith("brand ") and row["count"] > 0 for row in rows["brand"])


def test_a_record_grows_by_the_counters_of_each_category() -> None:
    sizes = [
        StoreSizes.of(
            ModelConfig(counters=True, counter_categories=names),
            Codec.int8,
            StateDtype.float32,
            num_items=1000,
            history_events=10,
        )
        for names in ([], ["brand"], ["brand", "topic"])
    ]
    assert sizes[0].record < sizes[1].record < sizes[2].record and sizes[0].state < sizes[1].state
    assert sizes[2].record - sizes[1].record == sizes[1].record - sizes[0].record
