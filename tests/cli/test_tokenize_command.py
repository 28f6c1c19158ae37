"""`vista items tokenize`: vectors become codes, which a log takes as a category of several values per item."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tests.conftest import small_config, small_frame
from tests.log.feature_tables import features_of
from vista.cli.main import main
from vista.cli.tokenize_command import run_items_tokenize
from vista.config import ItemsTokenizeConfig
from vista.errors import CheckpointError, ConfigError, DataError
from vista.log.event_log import EventLog
from vista.log.ingest import item_values
from vista.model.codebooks import Codebooks
from vista.training.trainer import train

ITEMS = np.unique(small_frame()["item"])
NAN = float("nan")


def vectors_file(folder: Path, vectors: list[Any] | None = None) -> Path:
    """Vectors of all items of `small_frame`: three pairs of clusters, a missing one, and NaN."""
    if vectors is None:
        rng = np.random.default_rng(0)
        rows = np.arange(len(ITEMS))[:, None]
        vectors = (100.0 * (rows % 3) + 10.0 * (rows % 2) + rng.normal(size=(len(ITEMS), 2))).tolist()
        vectors[:2] = [None, [NAN, NAN]]
    file = folder / "vectors.parquet"
    pl.DataFrame({"sku": ITEMS[: len(vectors)], "v": vectors}).write_parquet(file)
    return file


def tokenize(folder: Path, **changes: Any) -> str:
    given = {"vectors": str(folder / "vectors.parquet"), "column": "v", "item": "sku", "levels": 2, "codes": 3}
    return str(run_items_tokenize(ItemsTokenizeConfig(**(given | {"out": str(folder / "codes.parquet")} | changes))))


@pytest.mark.parametrize("name", ["codes", "semantic id"])
def test_the_new_table_and_the_report(tmp_path: Path, name: str) -> None:
    pytest.importorskip("faiss")
    vectors_file(tmp_path)
    words = tokenize(tmp_path, name=name, codes=6, levels=1).splitlines()
    table = pl.read_parquet(tmp_path / "codes.parquet")
    assert table.schema == {"sku": pl.Int64, name: pl.List(pl.String)}
    assert table["sku"].to_list() == ITEMS.tolist()
    codes = table[name].to_list()
    assert codes[:2] == [None, None] and all(len(one) == 1 and 0 <= int(one[0]) < 6 for one in codes[2:])
    assert words[0].startswith(
        f"{tmp_path}/codes.parquet: column {name} with 1 levels of 6 codes for {len(ITEMS)} items, 2 of them without a "
    )
    assert words[1].startswith("level 1: 6 codes used, perplexity ") and words[1].endswith("% of variance")
    counts = np.unique([one[0] for one in codes[2:]], return_counts=True)[1]
    count = len(ITEMS) - 2
    assert words[2] == (
        f"6 distinct full codes of {count} distinct vectors; {count} items share theirs with others, at most "
        f"{counts.max()} have the same"
    )
    assert words[3] == f"codebooks: {tmp_path}/codes.codebooks.safetensors"
    before = (tmp_path / "codes.parquet").read_bytes()
    tokenize(tmp_path, name=name, codes=6, levels=1)
    assert (tmp_path / "codes.parquet").read_bytes() == before


def test_values_are_prefixes(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    vectors_file(tmp_path)
    words = tokenize(tmp_path, levels=3)
    codes = pl.read_parquet(tmp_path / "codes.parquet")["codes"].to_list()
    for first, second, third in codes[2:]:
        assert second.rpartition("-")[0] == first and third.rpartition("-")[0] == second
    # Vectors of a cluster share the first code, those of different ones do not.
    assert len({(row % 3, values[0]) for row, values in enumerate(codes) if values}) == 3
    assert "level 3: " in words


def test_a_log_takes_the_codes_as_one_more_feature(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    vectors_file(tmp_path)
    tokenize(tmp_path)
    brands = {"item": ITEMS, "brand": [f"brand {item % 3}" for item in ITEMS]}
    EventLog.from_frame(small_frame(), tmp_path / "log", time_unit="ms", items=brands)
    words = ["append=true", f"items.paths=[{tmp_path}/codes.parquet]", "items.item=sku", "progress=false"]
    assert main(["prepare", f"out={tmp_path}/log", *words]) == 0
    features = features_of(EventLog.open(tmp_path / "log"))
    table = pl.read_parquet(tmp_path / "codes.parquet").drop_nulls()
    assert features["codes"] == {item: sorted(values) for item, values in table.rows()}
    assert len(features["brand"]) == len(ITEMS) == len(features["codes"]) + 2


def test_codes_of_a_model(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    log = EventLog.from_frame(small_frame(), tmp_path / "log", time_unit="ms")
    train(small_config(log, tmp_path / "run", optim__epochs=1), log)
    words = tokenize(tmp_path, vectors=None, model=str(tmp_path / "run" / "best"), codes=len(ITEMS), levels=1)
    table = pl.read_parquet(tmp_path / "codes.parquet")
    assert sorted(table["sku"].to_list()) == ITEMS.tolist()
    assert len(table["codes"].list.first().unique()) == len(ITEMS)
    assert f"{len(ITEMS)} distinct full codes of {len(ITEMS)} distinct vectors; 0 items share theirs" in words
    with pytest.raises(CheckpointError):
        tokenize(tmp_path, vectors=None, model=str(tmp_path / "nothing"))


def test_kept_codebooks_give_old_items_their_codes(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    vectors_file(tmp_path)
    first = tokenize(tmp_path, codes=4)
    old = dict(pl.read_parquet(tmp_path / "codes.parquet").rows())
    known = pl.read_parquet(tmp_path / "vectors.parquet")
    new = pl.DataFrame({"sku": [9001, 9002, 9003], "v": [[0.5, 0.1], [1e9, -1e9], None]})
    pl.concat([new, known.reverse()]).write_parquet(tmp_path / "more.parquet")
    codebooks = tmp_path / "codes.codebooks.safetensors"
    before = codebooks.read_bytes()
    changes = {
        "vectors": str(tmp_path / "more.parquet"),
        "codebooks": str(codebooks),
        "out": str(tmp_path / "all.parquet"),
    }
    words = tokenize(tmp_path, **changes, levels=9, codes=9)
    found = dict(pl.read_parquet(tmp_path / "all.parquet").rows())
    assert {item: found[item] for item in old} == old and found[9003] is None
    assert all(len(found[item]) == 2 for item in (9001, 9002))
    assert f"column codes with 2 levels of 4 codes for {len(ITEMS) + 3} items" in words
    assert words.splitlines()[-1] == first.splitlines()[-1] == f"codebooks: {codebooks}"
    assert codebooks.read_bytes() == before and not (tmp_path / "all.codebooks.safetensors").exists()


def test_codes_never_lie_beside_codebooks_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    vectors_file(tmp_path)
    tokenize(tmp_path)
    files = [tmp_path / name for name in ("codes.parquet", "codes.codebooks.safetensors")]
    before = [file.read_bytes() for file in files]

    def fail(*_: Any) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="the disk is full"):
        patch.setattr(item_values, "sync", fail)
        tokenize(tmp_path, codes=4)
    assert [file.read_bytes() for file in files] == before
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match=r"codebooks.* cannot be written"):
        patch.setattr(Codebooks, "save", fail)
        tokenize(tmp_path, codes=4)
    assert files[0].read_bytes() != before[0] and not files[1].exists()
    tokenize(tmp_path)
    assert [file.read_bytes() for file in files] == before


def test_codebooks_of_other_vectors_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    vectors_file(tmp_path)
    tokenize(tmp_path)
    (tmp_path / "codes.parquet").unlink()
    vectors_file(tmp_path, [[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]])
    codebooks = str(tmp_path / "codes.codebooks.safetensors")
    with pytest.raises(
        DataError, match="has codebooks for vectors of 2 numbers, but those of the items have 3; use the encoder"
    ):
        tokenize(tmp_path, codebooks=codebooks)
    with pytest.raises(DataError, match="no readable codebooks"):
        tokenize(tmp_path, codebooks=str(tmp_path / "vectors.parquet"))
    assert not (tmp_path / "codes.parquet").exists()


def test_bad_input_writes_nothing(tmp_path: Path) -> None:
    file = vectors_file(tmp_path, [[1.0, 2.0], [3.0, float("inf")]])
    with pytest.raises(
        DataError, match=rf"vectors\.parquet: item {ITEMS[1]} in row 2, column 'v': .*not a finite number"
    ):
        tokenize(tmp_path)
    with pytest.raises(ConfigError, match="is one of the files that are read"):
        tokenize(tmp_path, out=str(file))
    assert [path.name for path in tmp_path.iterdir()] == ["vectors.parquet"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vectors": None}, "vectors: set either vectors or model"),
        ({"model": "runs/x/best"}, "vectors: set either vectors or model"),
        ({"name": "sku"}, "name: must be a name other than that of the column of ids"),
        ({"levels": 0}, "levels: must be at least 1"),
        ({"codes": 1}, "codes: must be at least 2"),
        ({"seed": -1}, "seed: must be at least 0"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tokenize(tmp_path, **changes)
