"""`Scorer.retrieve`: what `rank` returns, from candidates that an index finds."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tests.conftest import DAY, LENGTHS, START, Served, draw_counter_weights, small_frame, tail_of, untrained
from vista.cli.item_commands import run_index, run_items_add
from vista.config import IndexConfig, ItemsAddConfig, ItemTableConfig
from vista.config.checks import IndexKind
from vista.errors import ItemIndexError, UnknownUserError
from vista.log.event_log import EventLog
from vista.model.features import FeatureSpec
from vista.model.item_feature_table import ItemFeatureTable
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.scorer import Scorer
from vista.scorer.ranking import Ranking

USERS = [100 + number for number in range(len(LENGTHS))]
ITEMS = np.unique(small_frame()["item"])
NOW = START + 400 * DAY
HAS_FAISS = find_spec("faiss") is not None


def item_table(items: Any, seed: int = 1) -> dict[str, Any]:
    rng, count = np.random.default_rng(seed), len(items)
    return {
        "item": list(items),
        "brand": [f"brand {value}" for value in rng.integers(0, 5, count)],
        "color": [["red", "blue"][: value + 1] for value in rng.integers(0, 2, count)],
        "price": rng.lognormal(size=count),
    }


def export(folder: Path, log: EventLog, seed: int = 5, **changes: Any) -> VistaModel:
    """An untrained model with counters, statistics, and weights of the heads as if it were trained; and its store."""
    model = untrained(log, seed, model__counter_keys=["item"], **changes)
    model.set_item_features(feature_table(log))
    draw_counter_weights(model)
    model.save_pretrained(folder / "model")
    refresh(model, log, folder / "store")
    return model


def feature_table(log: EventLog) -> ItemFeatureTable:
    features = log.item_features
    return ItemFeatureTable.of(features, [FeatureSpec.of(name, column) for name, column in features.items()])


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    folder = tmp_path_factory.mktemp("retrieval-log")
    return EventLog.from_frame(small_frame(), folder / "log", time_unit="ms", items=item_table(ITEMS))


@pytest.fixture(scope="module")
def exported(log: EventLog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/, store/ and model.index/."""
    folder = tmp_path_factory.mktemp("retrieval")
    export(folder, log)
    run_index(IndexConfig(model=str(folder / "model")))
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(exported, tmp_path / "served")


def open_scorer(folder: Path, **options: Any) -> Scorer:
    return Scorer.open(folder / "model", folder / "store", index=folder / "model.index", **options)


@pytest.fixture(scope="module")
def scorer(exported: Path) -> Iterator[Scorer]:
    with open_scorer(exported) as opened:
        yield opened


def same(actual: Ranking, expected: Ranking) -> None:
    assert actual.items.tolist() == expected.items.tolist()
    np.testing.assert_allclose(actual.scores, expected.scores, rtol=1e-4, atol=1e-5)


def test_the_flat_index_ranks_next_items_as_a_scan_does(scorer: Scorer) -> None:
    for options in ({}, {"exclude_tail": True}, {"exclude": [0, 10, 360]}):
        # Of more candidates than are asked for, because sums over transitions may be worth less than 0.
        retrieved = scorer.retrieve(USERS, top_k=7, num_candidates=20, now=NOW, **options)
        for user, ranking in zip(USERS, retrieved, strict=True):
            same(ranking, scorer.rank(user, top_k=7, now=NOW, **options))


def candidates_of(scorer: Scorer, user: int, count: int, **options: Any) -> set[int]:
    """The items of the user's tail and counters, followers of the tail's items, and the nearest `count` others."""
    items, vectors = scorer.item_vectors()
    distances = scorer.user_vectors([user], **options)[0] @ vectors.T
    with scorer._call([user], options.get("tail"), options.get("now")) as call:
        tail = call.request.tail
        own = set(items[tail.item[tail.valid] - 1].tolist())
        if call.request.counters is not None:
            own |= set(items[call.request.counters.codes.key - 1].tolist())
    others = [item for item in items[np.argsort(-distances)].tolist() if item not in own]
    return own | set(others[:count]) | set(scorer.counted_items([user], **options)[0].tolist())


@pytest.mark.parametrize("count", [1, 4])
def test_labeled_tasks_rank_the_candidates_with_stage_2(served_tasks: Served, tmp_path: Path, count: int) -> None:
    run_index(IndexConfig(model=str(served_tasks.model_dir), out=str(tmp_path / "index")))
    with Scorer.open(served_tasks.model_dir, served_tasks.store, index=tmp_path / "index") as scorer:
        assert scorer.task != "next"
        users = served_tasks.log.users.ids(np.arange(12)).tolist()
        for user, ranking in zip(users, scorer.retrieve(users, top_k=count, num_candidates=count), strict=True):
            candidates = sorted(candidates_of(scorer, user, count))
            assert count < len(candidates) < served_tasks.log.num_items
            same(ranking, scorer.rank(user, top_k=count, candidates=candidates))


@pytest.mark.parametrize("count", [1, 6])
def test_items_of_the_counters_and_the_tail_are_candidates(scorer: Scorer, count: int) -> None:
    new = tail_of([(100, [(int(ITEMS[3]), START + 300 * DAY, 0)])])
    for user, options in [*((user, {}) for user in USERS), (100, {"tail": new, "now": NOW})]:
        ranking = scorer.retrieve([user], top_k=count, num_candidates=count, **options)[0]
        candidates = sorted(candidates_of(scorer, user, count, **options))
        assert user != 100 or not options or ITEMS[3] in candidates
        same(ranking, scorer.rank(user, top_k=count, candidates=candidates, **options))


@pytest.mark.parametrize("kind", ["hnsw", "ivfpq"])
def test_the_other_kinds_find_the_same_in_a_small_catalog(exported: Path, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("faiss")
    out = str(tmp_path / "index")
    report = run_index(IndexConfig(model=str(exported / "model"), kind=IndexKind(kind), out=out))
    assert report.recall >= 0.95 and str(report).startswith(f"{out}: {kind} index of 40 items, 0.0 MB, in ")
    with Scorer.open(exported / "model", exported / "store", index=out) as scorer:
        for user, ranking in zip(USERS, scorer.retrieve(USERS, top_k=5, num_candidates=20, now=NOW), strict=True):
            same(ranking, scorer.rank(user, top_k=5, now=NOW))


def test_only_available_items(scorer: Scorer) -> None:
    stock = ITEMS[::3]
    for within in (stock, stock.tolist(), scorer.encode(stock), [*stock.tolist(), 123_456]):
        ranking = scorer.retrieve([104], top_k=5, num_candidates=5, within=within)[0]
        same(ranking, scorer.rank(104, top_k=5, candidates=stock))


def test_only_values_of_a_category(scorer: Scorer) -> None:
    table = item_table(ITEMS)
    brand, color = np.array(table["brand"]), np.array([len(colors) for colors in table["color"]])
    cases: list[tuple[dict[str, Any], Any]] = [
        ({"brand": "brand 1"}, brand == "brand 1"),
        ({"brand": ["brand 1", "brand 4"]}, (brand == "brand 1") | (brand == "brand 4")),
        ({"brand": "brand 1", "color": "blue"}, (brand == "brand 1") & (color == 2)),
        ({"brand": []}, np.zeros(len(ITEMS), np.bool_)),
    ]
    for where, mask in cases:
        ranking = scorer.retrieve([104], top_k=50, where=where)[0]
        assert set(ranking.items.tolist()) == set(ITEMS[mask].tolist())
    both = scorer.retrieve([104], top_k=50, where={"brand": "brand 1"}, within=ITEMS[:20], exclude=[int(ITEMS[0])])
    assert set(both[0].items.tolist()) == set(ITEMS[1:20][brand[1:20] == "brand 1"].tolist())


def test_excluding_more_than_there_are_candidates(scorer: Scorer) -> None:
    left = scorer.retrieve([104, 108], top_k=50, num_candidates=2, exclude=ITEMS[:35])
    for ranking in left:
        assert set(ranking.items.tolist()) <= set(ITEMS[35:].tolist()) and len(ranking.items)
    same(left[0], scorer.rank(104, top_k=50, candidates=left[0].items))


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        ({"size": 1}, ValueError, "'size' is not a category of this model's items, which are: brand, color"),
        ({"price": 1.0}, ValueError, "'price' is not a category"),
        ({"brand": "brand 77"}, ValueError, "'brand 77' is not a value of 'brand'"),
        ({"brand": 5}, (TypeError, ValueError), "where: "),
        ({"brand": 0.5}, TypeError, "where: "),
        ("brand", TypeError, "must be a mapping"),
    ],
)
def test_bad_categories(scorer: Scorer, where: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        scorer.retrieve([100], where=where)


def test_bad_items(scorer: Scorer) -> None:
    with pytest.raises(TypeError, match=r"within|candidates"):
        scorer.retrieve([100], within=["a"])
    with pytest.raises(ValueError, match="within: must be of shape"):
        scorer.retrieve([100], within=[[0, 10], [20, 30]])
    with pytest.raises(TypeError, match="exclude"):
        scorer.retrieve([100], exclude="0")


def test_users_without_a_record(scorer: Scorer, exported: Path) -> None:
    """They have an empty history, or get nothing, or an error."""
    known, unknown = scorer.retrieve([100, 999], top_k=5)
    same(unknown, scorer.rank(999, top_k=5))
    same(known, scorer.rank(100, top_k=5))
    with open_scorer(exported, on_missing="nan") as other:
        known, unknown = other.retrieve([100, 999], top_k=5)
        assert len(known.items) == 5 and len(unknown.items) == 0
    with open_scorer(exported, on_missing="raise") as other, pytest.raises(UnknownUserError, match="999"):
        other.retrieve([100, 999])


@pytest.mark.parametrize(
    ("options", "error"), [({"top_k": 0}, ValueError), ({"top_k": 1.5}, TypeError), ({"num_candidates": 0}, ValueError)]
)
def test_bad_numbers(scorer: Scorer, options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(options))):
        scorer.retrieve([100], **options)


def test_no_users_and_many(scorer: Scorer) -> None:
    assert scorer.retrieve([]) == []
    many = scorer.retrieve(USERS * 20, top_k=3)
    assert len(many) == 20 * len(USERS)
    same(many[-1], many[len(USERS) - 1])


def test_without_an_index(exported: Path) -> None:
    with Scorer.open(exported / "model", exported / "store") as scorer:
        with pytest.raises(ItemIndexError, match=r"has no index of items; run `vista index model=…`"):
            scorer.retrieve([100])
        assert len(scorer.rank(100).items) == 10


def test_a_missing_or_damaged_index(folder: Path) -> None:
    with pytest.raises(ItemIndexError, match="no readable index"):
        Scorer.open(folder / "model", folder / "store", index=folder / "elsewhere")
    (folder / "model.index" / "index.json").write_text("{}")
    with pytest.raises(ItemIndexError, match="index"):
        open_scorer(folder)


def test_the_index_of_another_model(folder: Path, log: EventLog, tmp_path: Path) -> None:
    export(tmp_path / "other", log, seed=6)
    run_index(IndexConfig(model=str(tmp_path / "other" / "model"), out=str(folder / "model.index")))
    with pytest.raises(ItemIndexError, match=r"model\.index: belongs to another model, whose vectors differ in"):
        open_scorer(folder)


def test_a_new_model_waits_for_its_index(
    folder: Path, log: EventLog, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_scorer(folder) as scorer:
        before = scorer.retrieve([104], top_k=5)[0]
        old = scorer.model
        new = export(tmp_path / "new", log, seed=6)
        new.save_pretrained(folder / "model")
        refresh(new, log, folder / "store")
        with caplog.at_level(logging.WARNING):
            assert not scorer.reload()
        assert "belongs to another model" in caplog.text and scorer.model is old
        same(scorer.retrieve([104], top_k=5)[0], before)
        run_index(IndexConfig(model=str(folder / "model")))
        assert scorer.reload() and not scorer.reload()
        after = scorer.retrieve([104], top_k=5)[0]
        same(after, scorer.rank(104, top_k=5))
        assert after.scores.tolist() != before.scores.tolist()


def test_a_damaged_index_leaves_the_old_one_in_service(folder: Path) -> None:
    with open_scorer(folder) as scorer:
        file = folder / "model.index" / "index.json"
        text = file.read_text()
        file.write_text(text[:-5])
        with pytest.raises(ItemIndexError, match="no readable index"):
            scorer.reload()
        assert len(scorer.retrieve([104])[0].items) == 10
        file.write_text(text)
        assert scorer.reload()


def test_added_items_are_found_before_and_after_a_new_index(folder: Path) -> None:
    table, kind = folder / "new.parquet", IndexKind.hnsw if HAS_FAISS else IndexKind.flat
    pl.DataFrame(item_table([5000, 5010])).write_parquet(table)
    run_index(IndexConfig(model=str(folder / "model"), kind=kind))
    with open_scorer(folder) as scorer:
        assert len(scorer.retrieve([104], top_k=99)[0].items) == 40
        run_items_add(ItemsAddConfig(model=str(folder / "model"), items=ItemTableConfig(paths=[str(table)])))
        assert scorer.reload()
        for _ in range(2):
            ranking = scorer.retrieve([104], top_k=99)[0]
            assert len(ranking.items) == 42 and {5000, 5010} <= set(ranking.items.tolist())
            same(ranking, scorer.rank(104, top_k=99))
            run_index(IndexConfig(model=str(folder / "model"), kind=kind))
            assert scorer.reload()
