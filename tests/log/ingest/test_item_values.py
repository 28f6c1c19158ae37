"""Texts and vectors of items as commands read them, and the column that they write."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tests.log.conftest import PARSER
from tests.log.feature_tables import table_of, text_file
from tests.log.ingest.public.test_public_sets import MOVIES, write_movielens
from vista.config import ItemsEmbedConfig, ItemTableConfig
from vista.errors import ConfigError, DataError
from vista.log.ingest.feature_sources import check_not_a_source, read_texts, read_vectors, write_values

NAN, INF = float("nan"), float("inf")


def texts_of(*paths: Path, kind: str = "table", columns: Any = (), **items: Any) -> dict[Any, str | None]:
    table = ItemTableConfig(paths=[str(path) for path in paths], **items)
    ids, texts = read_texts(ItemsEmbedConfig(kind=kind, items=table, columns=list(columns)), PARSER)
    return dict(zip(ids.to_list(), texts.to_list(), strict=True))


class TestTexts:
    def test_columns_are_joined_and_missing_parts_are_skipped(self, tmp_path: Path) -> None:
        file = table_of(
            tmp_path,
            item=[3, 1, 2, 5],
            title=["Jam", None, "  ", " Oat milk "],
            kinds=[["sweet", "", None, "red "], [], None, ["drink"]],
            shelf=[7, 8, None, None],
        )
        assert texts_of(file, columns=["title", "kinds", "shelf"]) == {
            3: "Jam. sweet, red. 7",
            1: "8",
            2: None,
            5: "Oat milk. drink",
        }
        assert texts_of(file, columns=["shelf", "title"])[3] == "7. Jam"

    def test_ids_of_text_files_stay_text(self, tmp_path: Path) -> None:
        file = text_file(tmp_path, "sku;words\n007;a|b\n8;c\n")
        assert texts_of(file, columns=["words"], item="sku", separator=";", value_separator="|") == {
            "007": "a, b",
            "8": "c",
        }

    def test_files_are_one_table(self, tmp_path: Path) -> None:
        for name, item in (("b", 1), ("a", 2)):
            pl.DataFrame({"item": [item], "title": [name]}).write_parquet(tmp_path / f"{name}.parquet")
        assert list(texts_of(tmp_path, columns=["title"]).items()) == [(2, "a"), (1, "b")]
        pl.DataFrame({"item": [2], "title": ["c"]}).write_parquet(tmp_path / "c.parquet")
        with pytest.raises(DataError, match=r"c\.parquet: row 1, column 'item': item 2 is also in row 1 of .*a\.parq"):
            texts_of(tmp_path, columns=["title"])

    @pytest.mark.parametrize("kind", MOVIES)
    def test_movielens(self, tmp_path: Path, kind: str) -> None:
        folder = write_movielens(tmp_path / "set", kind)
        texts = texts_of(folder, kind=kind)
        assert texts["1"] == "Toy Story (1995). Animation, Children's"
        accented = {
            "ml-1m": "Star Wars: Épisode IV (1977). Sci-Fi",
            "ml-100k": "Épisode IV (1977). Sci-Fi",
            "ml-latest-small": "Épisode, IV (1977). Sci-Fi",
        }
        assert texts["260"] == accented[kind] and len(texts) == 3
        assert texts_of(folder / MOVIES[kind][0], kind=kind, columns=["genres"])["260"] == "Sci-Fi"
        if kind != "ml-1m":  # without genres
            assert texts["9"] in ("unknown", "Café (2000)")
        assert texts_of(folder, kind="auto") == texts

    def test_complete_journey(self, tmp_path: Path) -> None:
        columns = {"department": ["DAIRY"], "product_category": ["MILK"], "product_type": [None], "brand": ["Private"]}
        pl.DataFrame({"product_id": [26093], **columns}, schema_overrides={"product_type": pl.String}).write_parquet(
            tmp_path / "products.parquet"
        )
        assert texts_of(tmp_path, kind="complete-journey") == {26093: "DAIRY. MILK"}
        (tmp_path / "events.parquet").touch()
        items = ItemTableConfig(paths=[str(tmp_path / "events.parquet")])
        config = ItemsEmbedConfig(kind="complete-journey", items=items, out=str(tmp_path / "products.parquet"))
        with pytest.raises(ConfigError, match=r"out=.*products\.parquet: is one of the files that are read"):
            read_texts(config, PARSER)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({}, ConfigError, r"columns: name the columns of text, such as columns=\[title,brand\]"),
            ({"kind": "tables"}, ConfigError, "kind: unknown kind 'tables'; use one of auto, table, ml-1m"),
            ({"columns": ["title", "title"]}, ConfigError, "names the column 'title' twice"),
            (
                {"columns": ["title"], "categories": ["title"]},
                ConfigError,
                r"do not set categories, .* columns=\[\.\.\.\]",
            ),
            ({"kind": "ml-1m"}, ConfigError, r"kind=ml-1m: finds no table of items at items\.paths=.*kind=table"),
        ],
    )
    def test_settings_that_are_refused(
        self, tmp_path: Path, arguments: Any, error: type[Exception], message: str
    ) -> None:
        file = table_of(tmp_path, item=[1], title=["Jam"])
        with pytest.raises(error, match=message):
            texts_of(file, **arguments)

    def test_a_table_without_any_text(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no item has a text in the columns a, b; name other columns"):
            texts_of(table_of(tmp_path, item=[1], a=[" "], b=[[""]]), columns=["a", "b"])


class TestVectors:
    def test_missing_vectors_are_nan(self, tmp_path: Path) -> None:
        file = table_of(tmp_path, sku=["b", "a", "c", "d"], v=[[1.0, 2.0], None, [NAN, NAN], [3.0, 4.5]], w=[[1]] * 4)
        ids, vectors = read_vectors(file, "sku", "v", PARSER)
        assert ids.to_list() == ["b", "a", "c", "d"] and vectors.dtype == np.float32
        assert np.array_equal(vectors, [[1, 2], [NAN, NAN], [NAN, NAN], [3, 4.5]], equal_nan=True)
        assert read_vectors(file, "sku", "w", PARSER)[1].tolist() == [[1.0]] * 4

    @pytest.mark.parametrize(
        ("vectors", "message"),
        [
            ([[1.0, 2.0], [1.0]], r"item 8 in row 2, column 'v': \[1\.0\] is not a vector of 2 numbers like the first"),
            ([[1.0, 2.0], [1.0, INF]], r"item 8 in row 2, column 'v': \[1\.0, inf\] has an entry that is not a finite"),
            ([None, [NAN]], "column 'v' has no vectors; name another column"),
        ],
    )
    def test_bad_vectors(self, tmp_path: Path, vectors: Any, message: str) -> None:
        with pytest.raises(DataError, match=rf"items\.parquet: {message}"):
            read_vectors(table_of(tmp_path, item=[7, 8], v=vectors), "item", "v", PARSER)

    def test_columns_and_files_that_are_not_there(self, tmp_path: Path) -> None:
        file = table_of(tmp_path, sku=[7], v=[[1.0]])
        with pytest.raises(DataError, match=r"column 'item' is missing, the file has: sku, v; .* one with item=\.\."):
            read_vectors(file, "item", "v", PARSER)
        with pytest.raises(DataError, match=r"column 'text' is missing, the file has: sku, v; .* one with column=\.\."):
            read_vectors(file, "sku", "text", PARSER)
        with pytest.raises(DataError, match=r"nothing\.parquet: cannot be read"):
            read_vectors(tmp_path / "nothing.parquet", "sku", "v", PARSER)
        with pytest.raises(ConfigError, match=r"vectors=.*items\.csv: name a Parquet file"):
            read_vectors(text_file(tmp_path, "sku,v\n7,1 2\n"), "sku", "v", PARSER)


class TestWriting:
    def test_a_file_is_replaced(self, tmp_path: Path) -> None:
        out = tmp_path / "out.parquet"
        for number in (1, 2):
            write_values(pl.DataFrame({"item": [number]}), out)
            assert pl.read_parquet(out)["item"].to_list() == [number]
        assert os.listdir(tmp_path) == ["out.parquet"]

    def test_what_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        for name, reason in (("folder", "is not a regular file"), ("no/file.parquet", "No such file")):
            with pytest.raises(ConfigError, match=rf"out=.*{name}: cannot be written \(.*{reason}"):
                write_values(pl.DataFrame({"item": [1]}), tmp_path / name)
        assert os.listdir(tmp_path) == ["folder"]

    @pytest.mark.parametrize("name", ["a.parquet", "link.parquet", "new.parquet"])
    def test_a_source_is_never_replaced(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "a.parquet").touch()
        (tmp_path / "link.parquet").symlink_to("a.parquet")
        source = tmp_path if name == "new.parquet" else tmp_path / "a.parquet"
        with pytest.raises(ConfigError, match="is one of the files that are read, or in their folder; name another"):
            check_not_a_source(tmp_path / name, [str(source)])
        check_not_a_source(tmp_path / "other.parquet", [str(tmp_path / "a.parquet")])
