"""Logs whose items have features made of their texts, and the rows that are trained on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from scripts.experiments.set_texts import prepare_with_texts
from scripts.experiments.sets import prepare_set
from scripts.experiments.table_run import recorded_config
from scripts.experiments.tables import TABLES
from tests.cli.test_items_commands import LettersEncoder
from tests.log.ingest.public.samples import complete_journey
from vista.cli import embed_command
from vista.log.event_log import EventLog

SET = "complete-journey"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / SET
    made.mkdir()
    complete_journey(made)
    return made


@pytest.mark.parametrize("texts", ["vectors", "codes"])
def test_a_log_gets_one_more_feature(folder: Path, tmp_path: Path, texts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed_command, "TextEncoder", lambda device: LettersEncoder())
    if texts == "codes":
        pytest.importorskip("faiss")
    prepare_set(SET, folder, tmp_path / "plain")
    (tmp_path / "log.partial").mkdir()  # of a run that was killed
    prepare_with_texts(SET, folder, tmp_path / "log", texts)
    plain, log = EventLog.open(tmp_path / "plain"), EventLog.open(tmp_path / "log")
    assert not (tmp_path / "log.partial").exists()
    assert log.num_events == plain.num_events and log.items.digest() == plain.items.digest()
    before, after = plain.item_features, log.item_features
    assert before is not None and after is not None
    name, kind = {"vectors": ("text", "vector"), "codes": ("codes", "category")}[texts]
    assert [*after.columns] == [*before.columns, name] and after.columns[name].kind == kind
    assert after.columns[name].is_known.all()
    assert (tmp_path / "log-source" / "items.parquet").exists() and pl.read_parquet(
        tmp_path / "log-source" / "vectors.parquet"
    ).columns == ["product_id", "text"]


def test_rows_with_texts_are_runs_of_their_own() -> None:
    """Otherwise, a row would load the model of another one."""
    table = TABLES["cold-cj"]
    rows = {row.texts: recorded_config(table, row) for row in table.rows.values() if not row.untrained}
    assert rows.keys() == {"", "vectors", "codes"}
    assert rows["vectors"] == rows["codes"] | {"texts": "vectors"}
    plain = recorded_config(table, table.rows["vista"])
    assert "texts" not in plain and rows["codes"] == plain | {"texts": "codes"}
    assert np.all([pair in table.pairs for pair in (("vista, text vectors", "vista"), ("vista, text codes", "vista"))])
