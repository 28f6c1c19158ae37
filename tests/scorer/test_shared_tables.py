"""Scorers of one process hold equal tables once, and requests can compute projections instead of reading them."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import DAY, ITEMS, START, USERS, Served, draw_counter_weights, small_frame, untrained
from vista.config import SourceColumns
from vista.config.checks import Split
from vista.log.event_log import EventLog
from vista.model.features import FeatureSpec
from vista.model.item_feature_table import ItemFeatureTable
from vista.model.item_projections import CANDIDATE_FILE, RETRIEVAL_FILE
from vista.model.saved_model import WEIGHTS_FILE, SharedTables, total_bytes
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.scorer import Scorer

TOLERANCE = 1e-5
"""Between projections that the export holds and those that a request computes (docs/guides/serve.md)."""


def other_stage_2(base: Path, folder: Path) -> Path:
    """A model with the stage 1 of `base` and another stage 2, as `init_freeze=summarizer` exports it."""
    model = VistaModel.from_pretrained(base)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.target_attention.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def other_head(served_tasks: Served, tmp_path: Path) -> Path:
    return other_stage_2(served_tasks.model_dir, tmp_path / "other")


@pytest.fixture
def opened(served_tasks: Served) -> Iterator[Scorer]:
    gc.collect()
    with Scorer.open(served_tasks.model_dir, served_tasks.store) as scorer:
        yield scorer


def mapped_files(folder: Path) -> set[str]:
    """Names of the files of a folder that this process maps."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {Path(line.split()[-1]).name for line in lines if str(folder) in line}


def test_models_with_the_same_table_hold_it_once(served_tasks: Served, opened: Scorer, other_head: Path) -> None:
    with Scorer.open(other_head, served_tasks.store) as other:
        first, second = opened.model, other.model
        assert second.item_table.data_ptr() == first.item_table.data_ptr()
        assert second.items is first.items
        files = mapped_files(other_head)
        assert CANDIDATE_FILE in files and RETRIEVAL_FILE not in files
        both, own = total_bytes([opened.served.tables, other.served.tables]), opened.served.tables.num_bytes
        shared = other.served.tables.bytes_of_others([opened.served.tables, other.served.tables])
        assert both == own + other.served.tables.num_bytes - shared and shared > 0
        assert shared >= first.item_table.nbytes + (served_tasks.model_dir / RETRIEVAL_FILE).stat().st_size


def test_scores_are_those_of_each_model_alone(served_tasks: Served, opened: Scorer, other_head: Path) -> None:
    users, items = list(opened.store.keys())[:4], opened.model.items.ids(np.arange(20))
    alone = VistaModel.from_pretrained(other_head)
    with Scorer.open(other_head, served_tasks.store) as other, Scorer.open(alone, served_tasks.store) as expected:
        for task, scores in other.predict(users, items).items():
            np.testing.assert_allclose(scores, expected.predict(users, items)[task], atol=TOLERANCE)
        assert not np.allclose(other.score(users, items), opened.score(users, items), atol=1e-3)


def test_equal_exports_share_all_tables(served_tasks: Served, opened: Scorer, tmp_path: Path) -> None:
    shutil.copytree(served_tasks.model_dir, tmp_path / "copy")
    with Scorer.open(tmp_path / "copy", served_tasks.store) as copy:
        assert not mapped_files(tmp_path / "copy") - {WEIGHTS_FILE}  # small weights stay where they are
        assert total_bytes([opened.served.tables, copy.served.tables]) == opened.served.tables.num_bytes


def test_a_table_is_freed_with_its_last_model(served_tasks: Served, tmp_path: Path) -> None:
    """The second model keeps what it shares with the first one, and all is unmapped in the end."""
    model = VistaModel.from_pretrained(served_tasks.model_dir)
    with torch.no_grad():
        model.item_table.mul_(1.25)  # a table that no model of another test has
    model.save_pretrained(tmp_path / "first")
    refresh(model, served_tasks.log, tmp_path / "store")
    del model
    first = Scorer.open(tmp_path / "first", tmp_path / "store")
    second = Scorer.open(other_stage_2(tmp_path / "first", tmp_path / "second"), tmp_path / "store")
    users, items = list(first.store.keys())[:4], first.model.items.ids(np.arange(20))
    before = second.score(users, items)
    assert RETRIEVAL_FILE in mapped_files(tmp_path / "first")
    first.close()
    del first
    gc.collect()
    assert CANDIDATE_FILE not in mapped_files(tmp_path / "first")
    np.testing.assert_array_equal(second.score(users, items), before)
    second.close()
    del second
    gc.collect()
    assert not mapped_files(tmp_path)


def test_models_for_training_share_nothing(served_tasks: Served, opened: Scorer) -> None:
    """Training changes weights, which would change the scores of others."""
    model = VistaModel.from_pretrained(served_tasks.model_dir)
    assert model.item_table.data_ptr() != opened.model.item_table.data_ptr()


def test_requests_compute_projections(served_tasks: Served, opened: Scorer, tmp_path: Path) -> None:
    """The table of projections is then neither read nor needed."""
    shutil.copytree(served_tasks.model_dir, tmp_path / "model")
    (tmp_path / "model" / CANDIDATE_FILE).unlink()
    users, items = list(opened.store.keys())[:4], opened.model.items.ids(np.arange(20))
    with Scorer.open(tmp_path / "model", served_tasks.store, project_per_request=True) as scorer:
        for task, scores in scorer.predict(users, [*items, 10**9]).items():
            np.testing.assert_allclose(scores, opened.predict(users, [*items, 10**9])[task], atol=TOLERANCE)
        lists = (items[:7], [0, 2, 2, 7, 7])
        np.testing.assert_allclose(scorer.score(users, lists), opened.score(users, lists), atol=TOLERANCE)
        np.testing.assert_array_equal(scorer.rank(users[0]).items, opened.rank(users[0]).items)
        assert scorer.served.tables.num_bytes < opened.served.tables.num_bytes
    with Scorer.open(opened.model, served_tasks.store, project_per_request=True) as scorer:
        np.testing.assert_allclose(scorer.score(users, items), opened.score(users, items), atol=TOLERANCE)


def test_tables_on_other_devices_are_counted_but_not_shared() -> None:
    first, second = SharedTables(is_shared=False), SharedTables(is_shared=False)
    made = [tables.take("key", 100, lambda: object()) for tables in (first, second)]
    assert made[0] is not made[1] and total_bytes([first, second]) == 200


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with counters, features of items, and a labeled task; and its store."""
    folder, frame = tmp_path_factory.mktemp("rich"), small_frame()
    shown = {**frame, "click": np.arange(len(frame["user"])) % 2}
    items = {"item": np.unique(frame["item"]), "brand": [f"brand {number % 5}" for number in range(40)]}
    log = EventLog.from_frame(
        frame,
        folder / "log",
        time_unit="ms",
        columns=SourceColumns(action="action", labels=["click"]),
        items=items,
        impressions={name: shown[name] for name in ("user", "item", "timestamp", "click")},
    )
    times = {"data__validation_from": str(START + 20 * DAY), "data__test_from": str(START + 30 * DAY)}
    model = untrained(log, 5, model__counter_keys=["item"], data__split=Split.time, **times)
    features = log.item_features
    assert model.features is not None
    columns = [FeatureSpec.of(name, column) for name, column in features.items()]
    model.set_item_features(ItemFeatureTable.of(features, columns))
    draw_counter_weights(model)
    with torch.no_grad():
        model.features.values.normal_(std=0.1)
    model.save_pretrained(folder / "model")
    refresh(model, log, folder / "store")
    return folder / "model", folder / "store"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_requests_compute_projections_of_features_and_counters(rich: tuple[Path, Path], precision: str) -> None:
    now, tolerance = START + 400 * DAY, TOLERANCE if precision == "float32" else 0.02
    with (
        Scorer.open(*rich, precision=precision) as stored,
        Scorer.open(*rich, precision=precision, project_per_request=True) as computed,
    ):
        assert stored.task == "click" and stored.store.get_many(USERS).counters
        expected = stored.score(USERS, ITEMS, now=now)
        assert np.ptp(expected) > 0.01
        np.testing.assert_allclose(computed.score(USERS, ITEMS, now=now), expected, atol=tolerance)


def test_vectors_of_features_are_held_once(rich: tuple[Path, Path]) -> None:
    with Scorer.open(*rich) as first, Scorer.open(*rich) as second:
        tables = [scorer.model.features for scorer in (first, second)]
        assert tables[0] is not None and tables[1] is not None
        assert tables[0].table is tables[1].table
        assert tables[0]._all_rows().data_ptr() == tables[1]._all_rows().data_ptr()
        assert total_bytes([first.served.tables, second.served.tables]) == first.served.tables.num_bytes
