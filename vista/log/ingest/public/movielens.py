"""The MovieLens sets: ratings, and the titles and genres of movies. Files of movies may be in Latin-1."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vista.errors import DataError
from vista.installation import require_module
from vista.log.ingest.public.public_set import FileForm, PublicSet
from vista.log.ingest.source_files import (
    EXTRA,
    ROW,
    FileScan,
    as_utf8,
    check_columns,
    first_line,
    read_header,
    scan_text,
)

if TYPE_CHECKING:
    import polars as pl
else:
    pl = require_module("polars", "data")

RATING_FIELDS = ("user", "item", "rating", "timestamp")
"""The fields of ratings.dat and u.data, which have no header."""
GENRES = (
    "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy", "Film-Noir",
    "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
"""The flags of u.item, in the order of its last columns."""
MOVIE_COLUMNS = ("movieId", "title", "genres")
NO_GENRES = "(no genres listed)"
_MOVIES = {"item": "movieId", "categories": ["genres"]}
_TEXTS = ("title", "genres")
_URL = "https://grouplens.org/datasets/movielens"


def read_ratings_dat(file: Path) -> FileScan:
    """The ratings of ml-1m and ml-10m, `user::item::rating::timestamp`."""
    # The reader takes `::` for two separators, so every second field must be empty.
    layout = [name for field in RATING_FIELDS for name in (field, None)][:-1]
    return _ratings(file, layout, ":")


def read_u_data(file: Path) -> FileScan:
    """The ratings of ml-100k: user, item, rating, and timestamp, separated by tabs."""
    return _ratings(file, list(RATING_FIELDS), "\t")


def _ratings(file: Path, layout: list[str | None] | list[str], separator: str) -> FileScan:
    columns = {name: name for name in RATING_FIELDS}
    return FileScan(scan_text(file, layout, separator, None, 0), columns, is_text=True, time_form="s")


def read_movies_dat(file: Path) -> FileScan:
    """The movies of ml-1m and ml-10m, `movie::title::genres`. Raises DataError if the first line has another number of
    fields."""
    _check_fields(file, "::", 3, ML_1M.remedy)
    # Titles contain colons, so `:` cannot separate the columns.
    rows, line = scan_text(as_utf8(file), ["line"], "\x1f", None, 0), pl.col("line")
    movie, title = line.str.split("::").list.first().alias("movieId"), line.str.extract("::(.*)::").alias("title")
    return _movies(rows.select(ROW, movie, title, _genres(line.str.extract("::.*::(.*)$").alias("genres")), EXTRA))


def read_movies_csv(file: Path) -> FileScan:
    """The movies of ml-latest-small, ml-20m, ml-25m, and ml-32m, with a header `movieId,title,genres`. Raises DataError
    if the file lacks a column."""
    header = read_header(file, ",")
    check_columns(str(file), {name: name for name in MOVIE_COLUMNS}, header, "items", ML_LATEST_SMALL.remedy)
    layout = [name if name in MOVIE_COLUMNS else "" for name in header]
    return _movies(scan_text(file, layout, ",", '"', 1).with_columns(_genres(pl.col("genres"))))


def read_u_item(file: Path) -> FileScan:
    """The movies of ml-100k: 24 columns that are separated by `|`, of which the last 18 are genres. Raises DataError if
    the first line has another number of fields."""
    _check_fields(file, "|", 6 + len(GENRES), ML_100K.remedy)
    rows = scan_text(as_utf8(file), ["movieId", "title", *[""] * 4, *GENRES], "|", None, 0)
    genres = pl.concat_list(pl.when(pl.col(genre) == "1").then(pl.lit(genre)) for genre in GENRES)
    # A blank line has no movie either, and nothing else, so that it is skipped.
    genres = pl.when(pl.col("movieId").is_not_null()).then(genres).alias("genres")
    return _movies(rows.select(ROW, "movieId", "title", genres, EXTRA))


def read_users_dat(file: Path) -> FileScan:
    """The users of ml-1m, `user::gender::age::occupation::zip`. Age and occupation are codes. Raises DataError if the
    first line has another number of fields."""
    _check_fields(file, "::", 5, ML_1M.remedy)
    return _users(file, ["user", None, "gender", None, "age", None, "occupation", None, ""], ":")


def read_u_user(file: Path) -> FileScan:
    """The users of ml-100k, `user|age|gender|occupation|zip`. Raises DataError if the first line has another number of
    fields."""
    _check_fields(file, "|", 5, ML_100K.remedy)
    return _users(file, ["user", "age", "gender", "occupation", ""], "|")


def _users(file: Path, layout: list[str | None] | list[str], separator: str) -> FileScan:
    names = {name: name for name in layout if name}
    return FileScan(scan_text(as_utf8(file), layout, separator, None, 0), names, is_text=True)


def _movies(frame: pl.LazyFrame) -> FileScan:
    return FileScan(frame, {name: name for name in MOVIE_COLUMNS}, is_text=True)


def _genres(text: pl.Expr) -> pl.Expr:
    return text.str.replace(NO_GENRES, "", literal=True).str.split("|")


def _check_fields(file: Path, separator: str, count: int, remedy: str) -> None:
    """Refuse a file whose first line does not have as many fields as those of the set."""
    given = first_line(file, encoding="latin-1").count(separator) + 1
    if given != count:
        raise DataError(
            f"{file}: line 1 has {given} columns separated by {separator!r}, but {file.name} of the set has {count}; "
            f"{remedy}"
        )


ML_1M = PublicSet(
    events=(FileForm(("ratings.dat",), read=read_ratings_dat),),
    items=(FileForm(("movies.dat",), _MOVIES, read_movies_dat),),
    users=(FileForm(("users.dat",), {"categories": ["gender", "age", "occupation"]}, read_users_dat),),
    texts=_TEXTS,
    url=_URL,
)
ML_100K = PublicSet(
    events=(FileForm(("u.data",), read=read_u_data),),
    items=(FileForm(("u.item",), _MOVIES, read_u_item),),
    users=(FileForm(("u.user",), {"categories": ["gender", "occupation"], "numbers": ["age"]}, read_u_user),),
    texts=_TEXTS,
    url=_URL,
)
ML_LATEST_SMALL = PublicSet(
    events=(
        FileForm(
            ("ratings.csv",),
            {"user": "userId", "item": "movieId", "rating": "rating", "timestamp": "timestamp", "time_unit": "s"},
        ),
    ),
    items=(FileForm(("movies.csv",), _MOVIES, read_movies_csv),),
    texts=_TEXTS,
    url=_URL,
)
