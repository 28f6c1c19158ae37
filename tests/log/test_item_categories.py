"""Categories of items are read from CSV and Parquet by id; an error names the row that is wrong."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tests.log.conftest import PARSER
from vista.errors import DataError
from vista.log.item_categories import read_categories
from vista.log.vocabulary import Vocabulary

NUMBERS = Vocabulary.from_ids(np.array([30, 10, 20, 40]))
WORDS = Vocabulary.from_ids(np.array(["c", "a", "b", "d"]))
KINDS = ["shelf", "books", None, "books"]
"""Categories of items 10, 20, 30, and 99, or a, b, c, and z. The third has none; the last is not in the model."""


@pytest.fixture(autouse=True)
def shared_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    """One child process for all tests; to start one takes half a second."""
    monkeypatch.setattr("vista.log.item_categories.SourceParser", lambda: nullcontext(PARSER))


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize(("items", "ids"), [(NUMBERS, [10, 20, 30, 99]), (WORDS, ["a", "b", "c", "z"])])
def test_codes_are_at_model_rows(tmp_path: Path, items: Vocabulary, ids: list[int | str], suffix: str) -> None:
    table = pl.DataFrame({"item": ids, "kind": KINDS, "price": [1.0, 2.0, 3.0, 4.0]})
    table = pl.concat([table, table])  # repeated rows are allowed
    file = tmp_path / f"items.{suffix}"
    table.write_csv(file) if suffix == "csv" else table.write_parquet(file)
    codes = read_categories(file, "kind", items)
    first, second, third = codes[1 + items.rows(ids[:3])].tolist()
    assert sorted([first, second]) == [1, 2]
    assert codes[0] == third == 0 and (codes == 0).sum() == 3  # 40 and d are not in the table


def test_categories_may_be_numbers(tmp_path: Path) -> None:
    pl.DataFrame({"item": [10, 20, 30], "topic": [7, 0, 7]}).write_parquet(tmp_path / "items.parquet")
    codes = read_categories(tmp_path / "items.parquet", "topic", NUMBERS)
    first, second, third = codes[1 + NUMBERS.rows([10, 20, 30])].tolist()
    assert third == first != second != 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("item,kind\n10,books\n20,shelf\n10,shelf\n", "items.csv: item 10 has the categories books, shelf; keep one"),
        ("item,kind\n10,books\nx7,shelf\n", "items.csv: row 2, column 'item': 'x7' is not an integer"),
        ("item,kind\n11,books\n", "items.csv: column 'item' contains none of the log's items; use the log's ids"),
        ("id,kind\n10,books\n", "items.csv: column 'item' is missing, the file has: id, kind; name"),
        ("item,category\n10,books\n", "items.csv: column 'kind' is missing, .*data.category_column="),
    ],
)
def test_a_wrong_table_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "items.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_categories(tmp_path / "items.csv", "kind", NUMBERS)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"item": [10, 20], "kind": [["a", "b"], ["c"]]}, "column 'kind' has type List.*one value per item"),
        ({"item": [10.0, 20.5], "kind": ["a", "b"]}, "column 'item' has type Float64"),
        ({"item": [10, 20], "kind": [1.0, float("nan")]}, "column 'kind' has type Float64"),
        ({"item": [10, 20], "kind": [b"a", b"\xff"]}, "column 'kind' has type Binary"),
        ({"item": [10, None], "kind": [None, "a"]}, "column 'kind' has no values"),
    ],
)
def test_columns_of_other_types_are_refused(tmp_path: Path, columns: dict[str, list[object]], message: str) -> None:
    pl.DataFrame(columns).write_parquet(tmp_path / "items.parquet")
    with pytest.raises(DataError, match=message):
        read_categories(tmp_path / "items.parquet", "kind", NUMBERS)


@pytest.mark.parametrize("name", ["items.csv", "items.parquet"])
def test_an_unreadable_table_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"data.item_categories=.*{name}: cannot be read"):
        read_categories(tmp_path / name, "kind", NUMBERS)
    (tmp_path / name).write_bytes(b"\x00\xff\xfe\x80" * 40)
    with pytest.raises(DataError, match=name):
        read_categories(tmp_path / name, "kind", NUMBERS)
