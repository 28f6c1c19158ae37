"""`vista items add`: a model in service ranks new items, and nothing else changes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tests.conftest import small_config, small_frame
from vista import files
from vista.cli.items_command import _locked, run_items_add
from vista.config import ItemsAddConfig, ItemTableConfig
from vista.errors import CheckpointError, ConfigError, DataError
from vista.log.event_log import EventLog
from vista.model.item_projections import ItemProjections
from vista.model.shared_tables import SharedTables
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.scorer import Scorer, Tail
from vista.training.trainer import train

KNOWN = np.unique(small_frame()["item"])
NEW = [5000, 5010, 7000]


def table(items: Any, seed: int = 1) -> dict[str, Any]:
    rng, count = np.random.default_rng(seed), len(items)
    return {
        "item": list(items),
        "brand": [f"brand {value}" for value in rng.integers(0, 5, count)],
        "price": rng.lognormal(size=count),
        "text": rng.normal(size=(count, 3)).tolist(),
    }


def with_known(rows: dict[str, Any], count: int) -> dict[str, Any]:
    """The table with the first known items, as the model has them."""
    known = table(KNOWN)
    return {name: [*values, *list(known[name])[:count]] for name, values in rows.items()}


@pytest.fixture
def served(tmp_path: Path) -> tuple[Path, Path]:
    """A model with features, and its store."""
    log = EventLog.from_frame(small_frame(), tmp_path / "log", time_unit="ms", items=table(KNOWN))
    model = train(small_config(log, tmp_path / "run", optim__learning_rate=2e-2), log)
    refresh(model, log, tmp_path / "store")
    return tmp_path / "run" / "best", tmp_path / "store"


def add(model: Path, rows: dict[str, Any], **changes: Any) -> str:
    file = model.parent / "new.parquet"
    pl.DataFrame(rows).write_parquet(file)
    return str(run_items_add(ItemsAddConfig(model=str(model), items=ItemTableConfig(paths=[str(file)], **changes))))


def test_a_scorer_in_service_ranks_new_items(served: tuple[Path, Path]) -> None:
    model, store = served
    with Scorer.open(model, store) as scorer:
        before = scorer.score([100, 104], KNOWN)
        unknown = scorer.score([100, 104], NEW)
        encoded = scorer.encode(KNOWN)
        assert (unknown == unknown[:, :1]).all()  # all of them are the unknown item
        words = add(model, with_known(table(NEW), 4))
        assert words == f"{model}: 3 items added, {len(KNOWN) + 3} in all; 4 were known already"
        assert np.array_equal(scorer.score([100, 104], NEW), unknown)  # until it reloads
        assert scorer.reload()
        assert np.array_equal(scorer.score([100, 104], KNOWN), before)
        assert np.array_equal(scorer.score([100, 104], encoded), before)
        ranked = scorer.score([100, 104], NEW)
        assert len(np.unique(ranked)) == 6
        items, _ = scorer.item_vectors()
        assert set(NEW) <= set(items.tolist())
    assert (model / "README.md").is_file()


def test_a_scorer_opens_at_every_step_of_the_replacement(
    served: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, store = served
    kinds = []
    for name in ("_exchanged", "remove_renamed"):
        call = getattr(files, name)

        def watched(*paths: Path, call: Any = call) -> Any:
            done = call(*paths)
            with Scorer.open(model, store) as scorer:
                kinds.append(len(np.unique(scorer.score([100], NEW))))
            return done

        monkeypatch.setattr(files, name, watched)
    add(model, table(NEW))
    assert kinds == sorted(kinds) and set(kinds) == {1, 3}  # the old model, then the new one


def test_a_scorer_opens_again_if_the_model_is_replaced_meanwhile(
    served: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, store = served
    load, added = ItemProjections.load, []

    def load_late(folder: Path, its: VistaModel, tables: SharedTables, **options: bool) -> ItemProjections:
        if not added:
            added.append(add(model, table(NEW)))
        return load(folder, its, tables, **options)

    monkeypatch.setattr(ItemProjections, "load", load_late)
    with Scorer.open(model, store) as scorer:
        assert len(np.unique(scorer.score([100], NEW))) == 3


def test_an_addition_that_was_killed_between_two_renames_is_repeated(served: tuple[Path, Path]) -> None:
    model, store = served
    model.rename(model.with_name("best.old"))  # what a file system that cannot exchange names may leave
    with pytest.raises(CheckpointError, match="no readable model"):
        Scorer.open(model, store)
    assert "3 items added" in add(model, table(NEW))
    assert not model.with_name("best.old").exists()
    with Scorer.open(model, store) as scorer:
        assert len(np.unique(scorer.score([100], NEW))) == 3


def test_items_come_in_parts(served: tuple[Path, Path]) -> None:
    model, store = served
    for part in (slice(1, None), slice(1)):
        add(model, {name: values[part] for name, values in table(NEW).items()})
    assert add(model, table(NEW)).endswith(f"0 items added, {len(KNOWN) + 3} in all; 3 were known already")
    with Scorer.open(model, store) as scorer:
        assert np.isfinite(scorer.score([100], NEW)).all()


def test_a_value_that_training_did_not_see_is_missing(served: tuple[Path, Path]) -> None:
    model, store = served
    rows = table(NEW)
    for name in ("price", "text"):
        rows[name] = [rows[name][0]] * 3
    rows["brand"] = ["a new brand", None, "brand 1"]
    words = add(model, rows)
    assert words.endswith("brand: not seen in training, treated as missing: 1 of 2 values, such as 'a new brand'")
    with Scorer.open(model, store) as scorer:
        first, second, third = scorer.score([104], NEW)[0]
    assert first == second != third


@pytest.mark.parametrize("change", [("brand", "brand 9"), ("brand", None), ("price", 0.5), ("text", [0.0, 0.0, 1.0])])
def test_a_table_of_another_age_than_the_model_is_reported(served: tuple[Path, Path], change: tuple[str, Any]) -> None:
    model, store = served
    rows = with_known(table(NEW), 4)
    rows[change[0]][-1] = change[1]
    with Scorer.open(model, store) as scorer:
        before = scorer.score([100], KNOWN)
        words = add(model, rows)
        assert "\n1 of the known items have other features in the table than in the model, which keeps its own" in words
        scorer.reload()
        assert np.array_equal(scorer.score([100], KNOWN), before)
    assert "1 of the known items" in add(model, {name: values[-1:] for name, values in rows.items()})


def test_items_without_any_value(served: tuple[Path, Path]) -> None:
    model, store = served
    missing = {"item": NEW, "brand": [None] * 3, "price": [None] * 3, "text": [None] * 3}
    add(model, missing)
    with Scorer.open(model, store) as scorer:
        assert len(np.unique(scorer.score([104], NEW))) == 1


def test_histories_do_not_know_added_items(served: tuple[Path, Path], tmp_path: Path) -> None:
    """A store that the extended model refreshes serves the model without the added items, and the other way round."""
    model, _ = served
    shutil.copytree(model, tmp_path / "old")
    frame = small_frame()
    frame["item"][-3:] = NEW
    log = EventLog.from_frame(frame, tmp_path / "later", time_unit="ms")
    add(model, table(NEW))
    grown = VistaModel.from_pretrained(model)
    refresh(grown, log, tmp_path / "both")
    refresh(VistaModel.from_pretrained(tmp_path / "old"), log, tmp_path / "before")
    user = int(frame["user"][-1])
    fresh = Tail(items=NEW[:1], times=[int(frame["timestamp"][-1]) + 1], actions=[0], offsets=[0, 1])
    scores = []
    for folder in (model, tmp_path / "old"):
        for store in ("both", "before"):
            with Scorer.open(folder, tmp_path / store) as scorer:
                scores += [scorer.score([user], KNOWN), scorer.score([user], KNOWN, tail=fresh)]
    for one in range(2):
        assert all(np.array_equal(other, scores[one]) for other in scores[one::2])


def test_one_process_extends_a_model_at_a_time(served: tuple[Path, Path]) -> None:
    model, _ = served
    with _locked(model), pytest.raises(CheckpointError, match="another process is extending this model"):
        add(model, table(NEW))
    add(model, table(NEW))


def test_bad_tables_change_nothing(served: tuple[Path, Path]) -> None:
    model, _ = served
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    rows = table(NEW)
    with pytest.raises(DataError, match="column 'brand' is missing"):
        add(model, {name: rows[name] for name in ("item", "price", "text")})
    with pytest.raises(DataError, match="has vectors of 2 numbers, but the model expects 3"):
        add(model, rows | {"text": [[1.0, 2.0]] * 3})
    with pytest.raises(DataError, match="is also in row 1"):
        add(model, table([5000, 5000]))
    with pytest.raises(DataError, match="column 'price' has type List"):
        add(model, rows | {"price": rows["text"]})
    with pytest.raises(ConfigError, match="do not set categories"):
        add(model, rows, categories=["brand"])
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_a_model_without_features_is_refused(tmp_path: Path) -> None:
    log = EventLog.from_frame(small_frame(), tmp_path / "log", time_unit="ms")
    train(small_config(log, tmp_path / "run", optim__epochs=1), log)
    with pytest.raises(ConfigError, match="was trained without item features"):
        add(tmp_path / "run" / "best", table(NEW))
    with pytest.raises(CheckpointError, match="no readable model"):
        run_items_add(ItemsAddConfig(model=str(tmp_path / "nothing")))
