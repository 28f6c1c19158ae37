"""Tables of item features: every kind from every format, and what is refused, with file, row, column, and remedy."""

from __future__ import annotations

import datetime
import logging
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tests.log.feature_tables import add_items, features_of, table_of, text_file
from tests.log.log_oracle import contents
from vista.config import ItemTableConfig
from vista.errors import ConfigError, DataError
from vista.log.event_log import EventLog

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


@pytest.mark.parametrize("form", ["parquet", "csv", "two files"])
def test_a_file(tmp_path: Path, form: str) -> None:
    if form == "parquet":
        report = add_items(tmp_path, parquet(tmp_path))
    elif form == "two files":
        frame()[:2].write_parquet(tmp_path / "a.parquet")
        frame()[2:].write_parquet(tmp_path / "b.parquet")
        report = add_items(tmp_path, tmp_path / "a.parquet", tmp_path / "b.parquet")
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
def test_a_frame(tmp_path: Path, library: str) -> None:
    import pandas as pd

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


def test_text_that_is_not_only_numbers_is_a_category(tmp_path: Path) -> None:
    lines = ["item,size,zip,code,empty", "10,1.5,01234,1e,", "20,L,90210,.,", "30,,05,2,"]
    file = text_file(tmp_path, "\n".join(lines) + "\n")
    report = add_items(tmp_path, file)
    assert [line.partition(",")[0] for line in report.features] == [
        "size: category of 2 values",
        "zip: category of 3 values",
        "code: category of 3 values",
        "empty: category of 0 values",
    ]


INF, NAN = float("inf"), float("nan")

BAD_TABLES: dict[str, tuple[dict[str, list[Any]], dict[str, Any], str]] = {
    "infinite number": (
        {"item": [10, 20], "price": [1.0, INF]},
        {},
        r"row 2, column 'price': inf is not a finite number; correct it, or leave it empty",
    ),
    "text as a number": (
        {"item": [10, 20], "price": ["1", "cheap"]},
        {"numbers": ["price"]},
        r"row 2, column 'price': 'cheap' is not a number; correct it, or name the column under items.categories",
    ),
    "NaN in a vector": (
        {"item": [10, 20], "v": [[1.0, 2.0], [1.0, NAN]]},
        {},
        r": item 20 in row 2, column 'v': \[1\.0, nan\] has an entry that is not a finite number; correct it, or leave",
    ),
    "vectors of two lengths": (
        {"item": [10, 20, 30], "v": [None, [1.0, 2.0], [1.0]]},
        {},
        r"row 3, column 'v': \[1\.0\] is not a vector of 2 numbers like the first one; write vectors of one length",
    ),
    "no vector at all": ({"item": [10], "v": [""]}, {"vectors": ["v"]}, "column 'v' has no vectors; leave it out"),
    "two rows for an item": (
        {"item": [10, 20, 10], "brand": ["a", "b", "a"]},
        {},
        r"row 3, column 'item': item 10 is also in row 1 of .*items\.parquet; keep one row per item",
    ),
    "no item of the log": (
        {"item": [1, 2], "brand": ["a", "b"]},
        {},
        r"column 'item' contains none of the log's items, such as 10; use the log's ids",
    ),
    "integers that are not named": (
        {"item": [10], "year": [1999]},
        {},
        r"column 'year' has type Int64 and could be categories or numbers; list all columns to read, this one "
        r"under items\.categories or items\.numbers \(in a frame, convert it to text or to floats\)",
    ),
    "dates": (
        {"item": [10], "since": [datetime.date(2020, 1, 1)]},
        {},
        "column 'since' has type Date and cannot be a feature; convert it, or name the other columns under",
    ),
    "floats as a category": (
        {"item": [10], "price": [1.5]},
        {"categories": ["price"]},
        r"column 'price' has type Float64 and cannot be a category; convert it, or leave it out of items\.categories",
    ),
    "a list as an id": ({"item": [[10]], "p": [1.0]}, {}, "column 'item' has type List.* and cannot be an item"),
    "no ids": ({"id": [10], "p": [1.0]}, {}, "column 'item' is missing, the file has: id, p; .* with items.item="),
    "no features": ({"item": [10]}, {}, "names no column but 'item'; add columns of features"),
    "no rows": ({"item": [], "brand": []}, {"categories": ["brand"]}, "has no rows; leave it out, or write it again"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_bad_table_is_refused_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    columns, settings, message = BAD_TABLES[name]
    file = table_of(tmp_path, **columns)
    with pytest.raises(DataError, match=rf"items\.parquet.*{message}") as caught:
        add_items(tmp_path, file, **settings)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        ("item,brand\n10,a,b\n", {}, "row 1, beyond the last column: 'b' is one field too many; quote text"),
        ("item,v\n10,1 2\n20,1\n", {"vectors": ["v"]}, r"row 2, column 'v': \['1'\] is not a vector of 2 numbers"),
        (
            "item,kind,price\n10,a,0.25\n20,b,\n30,c,1e3\n",
            {},
            r"column 'price' has only numbers, such as '0\.25', and could be categories or numbers; list all "
            r"columns to read, this one under items\.categories or items\.numbers",
        ),
        ("item;a\n10;x\n", {}, "column 'item' is missing, the file has: item;a; .*, or set items.separator="),
    ],
)
def test_a_bad_text_file_is_refused(tmp_path: Path, content: str, settings: dict[str, Any], message: str) -> None:
    file = text_file(tmp_path, content)
    with pytest.raises(DataError, match=rf"items\.csv.*{message}"):
        add_items(tmp_path, file, **settings)
    assert not (tmp_path / "log").exists()


def test_files_must_fit_each_other(tmp_path: Path) -> None:
    for name, columns in {
        "a": {"item": [10], "v": [[1.0, 2.0]]},
        "b": {"item": [20], "v": [[1.0]]},
        "c": {"item": [20], "v": [["x"]]},
        "d": {"item": [10], "v": [[3.0, 4.0]]},
    }.items():
        pl.DataFrame(columns).write_parquet(tmp_path / f"{name}.parquet")
    for other, message in (
        ("b", r"b\.parquet: column 'v' has vectors of 1 numbers, but .*a\.parquet has 2; write vectors of one length"),
        ("c", r"c\.parquet: has the columns item, category:v, but .*a\.parquet has item, vector:v; prepare"),
        ("d", r"d\.parquet: row 1, column 'item': item 10 is also in row 1 of .*a\.parquet; keep one row per item"),
        ("a", r"a\.parquet: has the same content as .*a\.parquet"),
    ):
        with pytest.raises(DataError, match=message):
            add_items(tmp_path, tmp_path / "a.parquet", tmp_path / f"{other}.parquet")


def test_a_category_has_a_limited_number_of_values(tmp_path: Path) -> None:
    """If there are far too many, their number is estimated, so that they need no memory."""
    message = (
        r"column 'brand' the log would have {}3 distinct values, but a category may have at most 2; .*, raise items"
    )
    with pytest.raises(DataError, match=message.format("about ")):
        add_items(tmp_path, table_of(tmp_path, item=[10, 20, 30], brand=["a", "b", "c"]), max_values=2)
    table = table_of(tmp_path, item=[10, 20, 99], brand=["a", "b", "c"])
    add_items(tmp_path, table, max_values=2)  # 99 is not in the log
    with pytest.raises(DataError, match=message.format("")):
        add_items(tmp_path, table_of(tmp_path, item=[30], brand=["d"]), append=True, max_values=2)
    add_items(tmp_path, table_of(tmp_path, item=[30], brand=["d"]), append=True, max_values=3)
    with pytest.raises(ConfigError, match=r"items\.max_values: must lie in 1 … 2,147,483,646"):
        add_items(tmp_path, table, max_values=0)


@pytest.mark.parametrize(
    ("columns", "form", "before"),
    [
        ({"brand": [1.0, 2.0]}, "number", "category"),
        ({"v": [[1.0], [2.0]]}, "vector of 1 numbers", "vector of 2 numbers"),
    ],
)
def test_a_column_keeps_its_kind_and_length(tmp_path: Path, columns: dict[str, Any], form: str, before: str) -> None:
    first = table_of(tmp_path, item=[10, 20], brand=["a", "b"], price=[1.0, 2.0], v=[[1.0, 2.0], [3.0, 4.0]])
    add_items(tmp_path, first)
    was = contents(tmp_path / "log")
    (name,) = columns
    message = (
        rf"items\.parquet: column '{name}' is a {form}, but in the log it is a {before}; give the column another name, "
        "or prepare the log again"
    )
    with pytest.raises(DataError, match=message):
        add_items(tmp_path, table_of(tmp_path, item=[10, 20], **columns), append=True)
    assert contents(tmp_path / "log") == was


def test_bad_rows_can_be_set_aside(tmp_path: Path) -> None:
    file = table_of(tmp_path, item=[10, 20, 30], price=[1.0, INF, 3.0], v=[[1.0, 2.0], [1.0, 2.0], [NAN, 2.0]])
    report = add_items(tmp_path, file, on_bad_rows="quarantine")
    assert features_of(EventLog.open(tmp_path / "log")) == {"price": {10: 1.0}, "v": {10: [1.0, 2.0]}}
    assert report.num_quarantined == 2 and report.quarantine is not None
    aside = pl.read_csv(report.quarantine, infer_schema=False)
    assert aside.select("table", "row", "column", "value").rows() == [
        ("items", "2", "price", "inf"),
        ("items", "3", "v", "NaN 2.0"),
    ]


def test_settings_that_contradict_each_other(tmp_path: Path) -> None:
    for settings, message in (
        ({"categories": ["a"], "numbers": ["a"]}, "items: names the column 'a' twice; name each column once"),
        ({"categories": ["item"]}, "items: names the column 'item' twice"),
        ({"value_separator": ""}, r"items\.value_separator: must not be empty; use null"),
        ({"separator": ";;"}, r"items\.separator: must be one character"),
    ):
        with pytest.raises(ConfigError, match=message):
            add_items(tmp_path, text_file(tmp_path, "item,a\n10,x\n"), **settings)
    with pytest.raises(ConfigError, match=r"items\.paths: name at least one file, such as items\.paths=\["):
        add_items(tmp_path)
    with pytest.raises(TypeError, match="frame must be a pandas or Polars DataFrame"):
        EventLog.from_frame(None, tmp_path / "log", items={"item": [1], "price": [1.0]})
    with pytest.raises(DataError, match=r"<items frame>: column 'year' has type Int64 .*convert it to text or to"):
        EventLog.from_frame({}, tmp_path / "log", items={"item": [1], "year": [1]})
    with pytest.raises(DataError, match=r"column 'item' is missing, the frame has: id, p; .*SourceColumns\(item="):
        EventLog.from_frame({}, tmp_path / "log", items={"id": [1], "p": [1.0]})
    assert ItemTableConfig().is_inferred and not ItemTableConfig(numbers=[]).is_inferred
    assert not (tmp_path / "log").exists()


def test_a_table_of_few_items_is_a_warning_and_others_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vista.prepare")
    few = table_of(tmp_path, item=[10, 98, 99], brand=["a", "b", "c"], price=[1.0, 2.0, 3.0])
    assert add_items(tmp_path, few).warnings[1:] == [
        "only 1 of the log's 4 items have features; check the ids in column 'item', or add the other items to the table"
    ]
    assert f"{few}: left out 2 items that the log does not contain" in caplog.messages
    assert f"{few}: features by the types of the columns: brand (category), price (number)" in caplog.messages
    for item, count in ((20, 2), (30, 3)):
        warnings = add_items(tmp_path, table_of(tmp_path, item=[item], brand=["a"]), append=True).warnings
        assert [text[:37] for text in warnings] == ["only 2 of the log's 4 items have feat"] * (count == 2)
