"""The data sets of the experiments become logs with their order, times and categories."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from scripts.experiments import sets
from scripts.experiments.sets import SETS, set_folder, source_folder
from tests.conftest import real_set
from vista.config import TrainConfig
from vista.config.composition import compose_config
from vista.log.event_log import EventLog
from vista.log.item_categories import read_categories
from vista.log.until import parse_time

pytestmark = pytest.mark.research


def test_baskets_keep_their_order_and_products_their_categories(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "baskets", tmp_path / "logs" / "baskets"
    folder.mkdir()
    events = {
        "household_id": [7, 7, 7, 3],
        "product_id": [40, 10, 40, 99],
        "timestamp": [5, 5, 6, 1],
        "quantity": [1] * 4,
    }
    pl.DataFrame(events).write_parquet(folder / "events.parquet")
    products = {"product_id": [10, 40], "product_type": ["RYE", None], "product_category": ["BREAD", "MILK"]}
    products |= {name: ["x", "y"] for name in ("manufacturer_id", "department", "brand", "package_size")}
    pl.DataFrame(products).write_parquet(folder / "products.parquet")
    assert sets.main(["complete-journey", "--data", str(folder), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"vista train data.path={out} data=time") and "data.test_from=2017-11-01" in printed
    log = EventLog.open(out)
    (user,) = log.users.rows([7])
    history = log.gather(np.array([user]), np.array([3]))
    assert log.items.ids(history.item).tolist() == [40, 10, 40] and history.timestamp.tolist() == [5000, 5000, 6000]
    table = source_folder(out) / "items.parquet"
    types, categories = (read_categories(table, name, log.items) for name in SETS["complete-journey"].categories)
    ten, forty, unknown = 1 + log.items.rows([10, 40, 99])
    assert types[ten] and not types[forty] and categories[ten] != categories[forty] and not categories[unknown]
    assert sets.main(["complete-journey", "--data", str(tmp_path), "--out", str(tmp_path / "other")]) == 1
    assert "products.parquet: cannot be read" in capsys.readouterr().err and not (tmp_path / "other").exists()


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "sizes"), [("complete-journey", (1238, 53_185, 738_201)), ("dev-packages", (355, 42_655, 368_040))]
)
def test_long_histories_with_returns_are_read(name: str, sizes: tuple[int, int, int], tmp_path: Path) -> None:
    sets.prepare_set(name, real_set(name), tmp_path / "log")
    log = EventLog.open(tmp_path / "log")
    assert (log.num_users, log.num_items, int(log.lengths.sum())) == sizes and log.has_time
    for category in SETS[name].categories:
        codes = read_categories(source_folder(log.path) / "items.parquet", category, log.items)
        assert (codes[1:] > 0).mean() > 0.99 and codes.max() > 10


@pytest.mark.parametrize("name", SETS)
def test_every_split_can_be_composed(name: str) -> None:
    data = compose_config(TrainConfig, SETS[name].words).data
    if data.test_from is not None:
        assert parse_time(str(data.validation_from)) < parse_time(data.test_from)


@pytest.mark.parametrize("name", ["complete-journey", "dev-packages"])
def test_the_experiment_splits_where_the_tables_do(name: str) -> None:
    splits = []
    for words in (SETS[name].words, [f"experiment={name}"]):
        data = compose_config(TrainConfig, words).data
        splits.append((data.split, data.validation_from, data.test_from, data.validation_share, data.test_share))
    assert splits[0] == splits[1]


def test_the_folder_is_given_or_below_that_of_all_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ml-1m").mkdir()
    monkeypatch.setenv("VISTA_DATA_DIR", str(tmp_path))
    assert set_folder("ml-1m") == tmp_path / "ml-1m" and set_folder("ml-1m", tmp_path) == tmp_path
