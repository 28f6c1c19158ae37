"""The sets of LongCTR, such as MicroVideo and KuaiVideo: shown items with labels, and a sequence of items per user.

The sets have no times, only the number of a user's items that come before each impression. So the n-th item of a user
gets the time n seconds after the start of its part: that of training starts in 1970, validation in 1980, and the test
in 1990. An impression then comes after the items that it may see, and the parts are those of the files.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from vista.errors import DataError
from vista.installation import require_module
from vista.log.ingest.public.public_set import FileForm, PublicSet
from vista.log.ingest.source_files import ROW, FileScan, check_columns

if TYPE_CHECKING:
    import polars as pl
else:
    pl = require_module("polars", "data")

PART_START_S = {"train": 0, "valid": 315_532_800, "test": 631_152_000}
"""Start of each part, in seconds since 1970: the first days of 1970, 1980, and 1990."""
LABELS = ("is_click", "click")
"""The column of labels has one of these names."""
OWN_IDS = ("item_id", "article_id")
"""Columns of item_info.parquet that repeat the item, with rare items merged."""
PADDING = 0
"""Item index that stands for no item."""
_SHOWN = {"user": "user_index", "item": "item_index", "timestamp": "seq_len"}


def read_sequences(file: Path) -> FileScan:
    """The items of user_info.parquet. Its n-th row belongs to the user with the index n.

    Raises:
        DataError: if a file lacks a column, or the parts are not in the order of time.
    """
    rows = pl.scan_parquet(file, glob=False)
    column = {"item": "full_item_seq"}
    check_columns(str(file), column, rows.collect_schema(), "events", LONGCTR.remedy)
    place = pl.int_ranges(0, pl.col("item").list.len(), dtype=pl.Int64).alias("place")
    items = (
        rows.select(pl.col("full_item_seq").alias("item"))
        .with_row_index("user")
        .with_columns(pl.col("user").cast(pl.Int64), place)
        .filter(pl.col("item").list.len() > 0)
        .explode("item", "place")
        .filter(pl.col("item").ne_missing(PADDING))
        .join(_first_places(file.parent).lazy(), on="user", how="left", maintain_order="left")
    )
    start = pl.lit(PART_START_S["train"])
    for part in ("valid", "test"):
        start = pl.when(pl.col("place") >= pl.col(part)).then(PART_START_S[part]).otherwise(start)
    frame = items.select("user", "item", (start + pl.col("place")).alias("timestamp")).with_row_index(ROW, 1)
    columns = {"user": "user_index", **column, "timestamp": "full_item_seq"}
    return FileScan(frame, columns, is_text=False, time_form="s")


def read_shown(file: Path) -> FileScan:
    """The impressions of train.parquet, valid.parquet, or test.parquet.

    Raises:
        DataError: if the file has another name, or lacks a column.
    """
    if file.stem not in PART_START_S:
        raise DataError(f"{file}: is not named after a part, {', '.join(PART_START_S)}; name the folder of the set")
    rows, label = _scan_part(file)
    columns = _SHOWN | {f"label:{LABELS[0]}": label}
    frame = rows.select(pl.col(own).alias(name) for name, own in columns.items())
    frame = frame.with_columns(pl.col("timestamp").cast(pl.Int64) + PART_START_S[file.stem]).with_row_index(ROW, 1)
    return FileScan(frame, columns, is_text=False, time_form="s")


def read_item_info(file: Path) -> FileScan:
    """The features of item_info.parquet: integers, or lists of them, are categories, and lists of floats are vectors.

    Raises:
        DataError: if the file lacks a column.
    """
    rows = pl.scan_parquet(file, glob=False).with_row_index(ROW, 1)
    types = rows.collect_schema()
    check_columns(str(file), {"item": "item_index"}, types, "items", LONGCTR.remedy)
    features = []
    for name, dtype in types.items():
        inner = dtype.inner if isinstance(dtype, pl.List | pl.Array) else dtype
        assert isinstance(inner, pl.DataType)
        if name in (ROW, "item_index", *OWN_IDS):
            continue
        text = pl.List(pl.String) if dtype.is_nested() else pl.String()
        features.append(pl.col(name).cast(text) if inner.is_integer() else pl.col(name))
    frame = rows.filter(pl.col("item_index") != PADDING).select(ROW, "item_index", *features)
    names = [name for name in frame.collect_schema() if name != ROW]
    return FileScan(frame, dict(zip(names, names, strict=True)), is_text=False)


def _scan_part(file: Path) -> tuple[pl.LazyFrame, str]:
    """The rows of a part, and the name of its label."""
    rows = pl.scan_parquet(file, glob=False)
    names = rows.collect_schema().names()
    label = next((name for name in LABELS if name in names), LABELS[0])
    check_columns(str(file), _SHOWN | {f"label:{LABELS[0]}": label}, names, "impressions", LONGCTR.remedy)
    return rows, label


def _first_places(folder: Path) -> pl.DataFrame:
    """Per user, how many items come before the first impression of "valid" and of "test"; null without impressions."""
    files = {part: file for part in PART_START_S if (file := folder / f"{part}.parquet").is_file()}
    user, place = pl.col("user_index").cast(pl.Int64).alias("user"), pl.col("seq_len").cast(pl.Int64)
    empty = {"user": pl.Int64, **{f"{end}:{part}": pl.Int64 for part in PART_START_S for end in ("first", "last")}}
    places = pl.DataFrame(schema={"user": pl.Int64})
    for part, file in files.items():
        ends = [place.min().alias(f"first:{part}"), place.max().alias(f"last:{part}")]
        of_part = _scan_part(file)[0].group_by(user).agg(ends).collect(engine="streaming")
        places = places.join(of_part, on="user", how="full", coalesce=True)
    places = pl.concat([pl.DataFrame(schema=empty), places], how="diagonal")
    for earlier, later in combinations(files, 2):
        wrong = places.filter(pl.col(f"last:{earlier}") > pl.col(f"first:{later}")).sort("user")
        if len(wrong):
            row = wrong.row(0, named=True)
            raise DataError(
                f"{files[later]}: user_index {row['user']} has an impression after {row[f'first:{later}']} items, but "
                f"one in {files[earlier].name} after {row[f'last:{earlier}']}: the parts are not in the order of time; "
                f"{LONGCTR.remedy}"
            )
    # Without an impression of the validation part, the test part begins right after that of training.
    return places.select("user", pl.col("first:valid").alias("valid"), pl.col("first:test").alias("test"))


LONGCTR = PublicSet(
    events=(FileForm(("user_info.parquet",), read=read_sequences),),
    impressions=(FileForm(tuple(f"{part}.parquet" for part in PART_START_S), read=read_shown),),
    items=(FileForm(("item_info.parquet",), {"item": "item_index"}, read_item_info),),
    marker="item_info.parquet",
    url="https://huggingface.co/reczoo",
)
