"""The movies of the MovieLens sets: their genres."""

from __future__ import annotations

from pathlib import Path

from vista.errors import DataError
from vista.log.ingest.column_names import check_columns
from vista.log.ingest.public_sets import remedy_of_kind
from vista.log.ingest.scanned_source import EXTRA, ROW
from vista.log.ingest.text_files import first_line, read_header, scan_text
from vista.log.polars_extra import pl

MOVIELENS = ("ml-1m", "ml-latest-small", "ml-100k")
"""The kinds that are read here."""
GENRES = (
    "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy", "Film-Noir",
    "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
"""The flags of u.item, in the order of its last columns."""
NO_GENRES = "(no genres listed)"


def movielens_items(file: Path, kind: str) -> pl.LazyFrame:
    """The movies of a set.

    Args:
        kind: ml-1m for movies.dat, `movie::title::genres`; ml-latest-small for movies.csv, with a header
            `movieId,title,genres`; ml-100k for u.item, 24 columns that are separated by `|`, of which the last 18 are
            genres. Titles are not read, because they may be in Latin-1.

    Returns:
        Columns ROW, `movieId`, `genres` as lists of text, and EXTRA.

    Raises:
        DataError: if the file does not have these columns.
    """
    if kind == "ml-latest-small":
        header = read_header(file, ",", '"')
        check_columns(str(file), {"item": "movieId", "genres": "genres"}, header, "items", remedy_of_kind(kind))
        layout = [name if name in ("movieId", "genres") else "" for name in header]
        return scan_text(file, layout, ",", '"', 1).with_columns(_genres(pl.col("genres")))
    if kind == "ml-100k":
        _check_fields(file, "|", 6 + len(GENRES), kind)
        rows = scan_text(file, ["movieId", *[""] * 5, *GENRES], "|", None, 0, encoding="utf8-lossy")
        genres = pl.concat_list(pl.when(pl.col(genre) == "1").then(pl.lit(genre)) for genre in GENRES)
        # A blank line has no movie either, and nothing else, so that it is skipped.
        return rows.select(ROW, "movieId", pl.when(pl.col("movieId").is_not_null()).then(genres).alias("genres"), EXTRA)
    _check_fields(file, "::", 3, kind)
    # Titles contain colons, so `:` cannot separate the columns.
    rows = scan_text(file, ["line"], "\x1f", None, 0, encoding="utf8-lossy")
    movie = pl.col("line").str.split("::").list.first().alias("movieId")
    return rows.select(ROW, movie, _genres(pl.col("line").str.extract("::.*::(.*)$").alias("genres")), EXTRA)


def _genres(text: pl.Expr) -> pl.Expr:
    return text.str.replace(NO_GENRES, "", literal=True).str.split("|")


def _check_fields(file: Path, separator: str, count: int, kind: str) -> None:
    """Refuse a file whose first line does not have as many fields as those of the set."""
    given = first_line(file, encoding="latin-1").count(separator) + 1
    if given != count:
        raise DataError(
            f"{file}: line 1 has {given} columns separated by {separator!r}, but {file.name} of the set has {count}; "
            f"{remedy_of_kind(kind)}"
        )
