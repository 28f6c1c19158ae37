"""Whether a table has the columns that a configuration or a data set names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from vista.errors import DataError

_KEYS = {
    "label": "labels",
    "probability": "probabilities",
    "category": "categories",
    "number": "numbers",
    "vector": "vectors",
}
"""Keys of the configuration by the role of a column, where they differ."""


def check_columns(path: str, columns: Mapping[str, str], present: Iterable[str], table: str, remedy: str = "") -> None:
    """Refuse a table that does not have each of these columns once.

    Args:
        columns: canonical names to those of the table.
        present: the table's columns.
        remedy: what to do; by default, to set the key of the column.

    Raises:
        DataError: naming the column, with the remedy.
    """
    names = list(present)
    for canonical, own in columns.items():
        if names.count(own) != 1:
            raise DataError(
                f"{path}: column {own!r} {'is missing' if own not in names else 'occurs twice'}, the file has: "
                f"{', '.join(names)}; {remedy or _key_to_set(canonical, names, table)}"
            )


def _key_to_set(canonical: str, names: Sequence[str], table: str) -> str:
    key = _KEYS.get(canonical.split(":")[0], canonical)
    # Commands name columns of a table of items by different keys.
    is_feature_of_item = table == "items" and ":" in canonical
    return (
        ("name one of these" if is_feature_of_item else f"name the right one with {table}.{key}=...")
        + (f", or set {table}.separator=..." if len(names) == 1 else "")
        + (", or leave it out for a log without times" if canonical == "timestamp" and table == "events" else "")
    )
