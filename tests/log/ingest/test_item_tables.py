"""Tables of item features: every kind from every format, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest

from tests.log.feature_tables import add_items, features_of, table_of, text_file
from vista.config import SourceColumns
from vista.log.event_log import EventLog
from vista.log.ingest import new_features

TABLE: dict[str, list[Any]] = {
    "item": [40, 10, 99, 20],
    "brand": ["Ω", None, "x", "a b"],
    "new": [True, False, True, None],
    "genres": [["Drama", "Comedy", "Drama"], [], ["War"], ["Comedy", "", None]],
    "price": [1.5, float("nan"), 7.0, None],
    "text": [[1.0, -2.5], [float("nan")] * 2, [0.0, 0.0], [3.0, 4.0]],
}
FEATURES = {
    "brand": {40: ["Ω"], 20: ["a b"]},
    "new": {40: ["true"], 10: ["false"]},
    "genres": {40: ["Comedy", "Drama"], 20: ["Comedy"]},
    "price": {40: 1.5},
    "text": {40: [1.0, -2.5], 20: [3.0, 4.0]},
}
AS_TEXT = "item,brand,new,genres,price,text\n" + (
    '40,Ω,true,Drama|Comedy|Drama,1.5,"[1.0, -2.5]"\n10,,false,,NaN,NaN NaN\n99,x,true,War,7,0 0\n'
    "20,a b,,Comedy|,,3 4.0\n"
)
NAMED: dict[str, Any] = {
    "categories": ["brand", "new", "genres"], "numbers": ["price"], "vectors": ["text"], "value_separator": "|"
}  # fmt: skip
FORM = {"brand": "category", "new": "category", "genres": "category", "price": "number", "text": "vector"}


def frame(**columns: Any) -> pl.DataFrame:
    return pl.DataFrame(TABLE | columns)


def parquet(folder: Path, name: str = "items.parquet", **columns: Any) -> Path:
    frame(**columns).write_parquet(folder / name)
    return folder / name


class TestRoundTrip:
    @pytest.mark.parametrize("form", ["parquet", "named", "csv", "tsv", "gz", "two files"])
    def test_a_file(self, tmp_path: Path, form: str) -> None:
        if form in ("parquet", "named"):
            report = add_items(tmp_path, parquet(tmp_path), **(NAMED if form == "named" else {}))
        elif form == "two files":
            frame()[:2].write_parquet(tmp_path / "a.parquet")
            frame()[2:].write_parquet(tmp_path / "b.parquet")
            report = add_items(tmp_path, tmp_path / "a.parquet", tmp_path / "b.parquet")
        elif form == "tsv":
            report = add_items(
                tmp_path,
                text_file(tmp_path, AS_TEXT.replace('"[1.0, -2.5]"', "1.0 -2.5").replace(",", "\t"), "i.tsv"),
                **NAMED,
            )
        elif form == "gz":
            pl.read_csv(AS_TEXT.encode(), infer_schema=False).write_csv(tmp_path / "i.csv.gz", compression="gzip")
            report = add_items(tmp_path, tmp_path / "i.csv.gz", **NAMED)
        else:
            report = add_items(tmp_path, text_file(tmp_path, AS_TEXT + "\n"), **NAMED)
        log = EventLog.open(tmp_path / "log")
        assert features_of(log) == FEATURES
        assert {column["name"]: column["kind"] for column in log.manifests[0]["features"]} == FORM
        assert [source["rows"] for source in log.manifests[0]["sources"] if source["table"] == "items"] in ([4], [2, 2])
        assert report.features == [
            "brand: category of 2 values, 50% of items",
            "new: category of 2 values, 50% of items",
            "genres: category of 2 values, 50% of items",
            "price: number, 25% of items",
            "text: vector of 2 dimensions, 50% of items",
        ]
        assert "feature price: number, 25% of items" in str(report)
        log.verify()

    @pytest.mark.parametrize("library", ["polars", "lazy", "pandas", "mapping", "arrays"])
    def test_a_frame(self, tmp_path: Path, library: str) -> None:
        events = {"user": [1, 1, 2, 2], "item": [10, 20, 30, 40], "timestamp": [1, 2, 3, 4]}
        vectors = [None if vector is None else np.array(vector) for vector in TABLE["text"]]
        items: Any = {
            "polars": frame(),
            "lazy": frame().lazy(),
            "pandas": pd.DataFrame(TABLE | {"text": vectors, "brand": pd.Categorical(TABLE["brand"])}),
            "mapping": TABLE,
            "arrays": pl.DataFrame(TABLE, schema_overrides={"text": pl.Array(pl.Float32, 2), "brand": pl.Categorical}),
        }[library]
        log = EventLog.from_frame(events, tmp_path / "log", time_unit="s", items=items)
        assert features_of(log) == FEATURES
        again = EventLog.from_frame(None, tmp_path / "log", append=True, items={"item": [30], "price": [2.0]})
        assert features_of(again) == FEATURES | {"price": {40: 1.5, 30: 2.0}}

    def test_whole_numbers_are_what_they_are_named(self, tmp_path: Path) -> None:
        file = table_of(
            tmp_path, item=[10, 20], year=[1999, 2004], shop=[3, 4], pair=[[1, 2], [3, 4]], tags=[[5], [6, 5]]
        )
        add_items(tmp_path, file, numbers=["year"], categories=["shop", "tags"], vectors=["pair"])
        assert features_of(EventLog.open(tmp_path / "log")) == {
            "shop": {10: ["3"], 20: ["4"]},
            "tags": {10: ["5"], 20: ["5", "6"]},
            "year": {10: 1999, 20: 2004},
            "pair": {10: [1, 2], 20: [3, 4]},
        }

    def test_files_may_write_the_same_kind_differently(self, tmp_path: Path) -> None:
        pl.DataFrame({"item": [10], "tag": ["x"], "v": [[1.0, 2.0]]}).write_parquet(tmp_path / "a.parquet")
        other = pl.DataFrame({"item": ["20"], "tag": [["y", "x"]], "v": np.array([[3.0, 4.0]], np.float32)})
        other.write_parquet(tmp_path / "b.parquet")
        add_items(tmp_path, tmp_path / "a.parquet", tmp_path / "b.parquet")
        expected = {"tag": {10: ["x"], 20: ["x", "y"]}, "v": {10: [1.0, 2.0], 20: [3.0, 4.0]}}
        assert features_of(EventLog.open(tmp_path / "log")) == expected

    def test_text_ids(self, tmp_path: Path) -> None:
        file = text_file(tmp_path, "sku,kind\nb,x\n7,y\n")
        add_items(tmp_path, file, events=[("u", "a", 1), ("u", "b", 2), ("v", "7", 3)], item="sku")
        assert features_of(EventLog.open(tmp_path / "log")) == {"kind": {"b": ["x"], "7": ["y"]}}

    def test_text_that_is_not_only_numbers_is_a_category(self, tmp_path: Path) -> None:
        lines = ["item,size,zip,code,empty", "10,1.5,01234,1e,", "20,L,90210,.,", "30,,05,2,"]
        file = text_file(tmp_path, "\n".join(lines) + "\n")
        report = add_items(tmp_path, file)
        assert [line.partition(",")[0] for line in report.features] == [
            "size: category of 2 values",
            "zip: category of 3 values",
            "code: category of 3 values",
            "empty: category of 0 values",
        ]

    def test_a_frame_names_its_ids_as_the_events_do(self, tmp_path: Path) -> None:
        events = {"user": [1], "movie": ["a"], "timestamp": [1]}
        items = {"movie": ["a", "b"], "kind": ["x", "y"]}
        columns = SourceColumns(item="movie")
        log = EventLog.from_frame(events, tmp_path / "log", time_unit="s", columns=columns, items=items)
        assert features_of(log) == {"kind": {"a": ["x"]}}

    def test_vectors_in_blocks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(new_features, "BLOCK_NUMBERS", 6)
        rng = np.random.default_rng(0)
        ids, vectors = rng.permutation(50), rng.standard_normal((50, 4)).astype(np.float32)
        file = table_of(tmp_path, item=ids.tolist(), v=vectors.tolist())
        add_items(tmp_path, file, events=[(1, item, item) for item in range(0, 50, 2)])
        kept = {item: vector.tolist() for item, vector in zip(ids.tolist(), vectors, strict=True) if item % 2 == 0}
        assert features_of(EventLog.open(tmp_path / "log")) == {"v": kept}


def test_a_log_without_features_has_none(tmp_path: Path) -> None:
    log = EventLog.from_frame({"user": [1], "item": [1], "timestamp": [1]}, tmp_path / "log", time_unit="s")
    assert log.item_features is None and log.manifests[0]["features"] == []
