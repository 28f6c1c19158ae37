"""T-ECD: what users of a bank's services did in five domains, one file per domain and day.

Only the columns of the marketplace are known from its files, those of other domains from code that reads them. So types
may vary, and columns that only some domains have may be missing.
"""

from __future__ import annotations

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

DOMAINS_OF_ITEMS = ("marketplace", "retail", "offers")
ACTION_OF_BRANDS = {"payments": "payment", "reviews": "review"}
"""The domains whose events are about brands, with the action of these events. A brand's item id begins with BRAND."""
BRAND = "brand_"
OPTIONAL = ("subdomain", "os")
"""Features of events besides the domain."""
CATEGORIES, PRICE, VECTOR = ("brand_id", "category", "subcategory"), "price", "embedding"
"""Features of items. Only the vector is in every domain."""
OF_USERS = ("socdem_cluster", "region")
"""Features of users."""


def read_domain(file: Path) -> FileScan:
    """The events of a domain on a day.

    Raises:
        DataError: if the file is not in the folder of a domain, or lacks a column.
    """
    domain = (file.parent.parent if file.parent.name == "events" else file.parent).name
    if domain not in (*DOMAINS_OF_ITEMS, *ACTION_OF_BRANDS):
        known = ", ".join((*DOMAINS_OF_ITEMS, *ACTION_OF_BRANDS))
        raise DataError(f"{file}: is not in the folder of a domain, which is {known}; {T_ECD.remedy}")
    rows = pl.scan_parquet(file, glob=False)
    types = rows.collect_schema()
    columns = {"user": "user_id", "timestamp": "timestamp"}
    if domain in ACTION_OF_BRANDS:
        columns |= {"item": "brand_id"}
    else:
        columns |= {"item": "item_id", "action": "action_type"}
    check_columns(str(file), columns, types, "events", T_ECD.remedy)
    canonical = {name: pl.col(own) for name, own in columns.items()}
    canonical["timestamp"] = _milliseconds(file, types["timestamp"])
    if domain in ACTION_OF_BRANDS:
        canonical["item"] = pl.lit(BRAND) + _text("brand_id", types)
        canonical["action"] = pl.lit(ACTION_OF_BRANDS[domain])
        rows = rows.filter(pl.col("brand_id").is_not_null())
    else:
        canonical["item"] = _text("item_id", types)
    canonical["category:domain"] = pl.lit(domain)
    for name in OPTIONAL:
        canonical[f"category:{name}"] = (pl.col(name) if name in types else pl.lit(None)).cast(pl.String)
    frame = rows.select(value.alias(name) for name, value in canonical.items()).with_row_index(ROW, 1)
    own = {name: columns.get(name, name.removeprefix("category:")) for name in canonical}
    return FileScan(frame, own, is_text=False, time_form="ms")


def read_catalog(file: Path) -> FileScan:
    """The features of a domain's items.

    Raises:
        DataError: if the file lacks ids or vectors.
    """
    rows = pl.scan_parquet(file, glob=False)
    types = rows.collect_schema()
    check_columns(str(file), {"item": "item_id", f"vector:{VECTOR}": VECTOR}, types, "items", T_ECD.remedy)
    categories = [_text(name, types) if name in types else pl.lit(None, pl.String) for name in CATEGORIES]
    price = pl.col(PRICE) if PRICE in types else pl.lit(None, pl.Float64)
    values = [_text("item_id", types), *categories, price, pl.col(VECTOR)]
    names = ["item_id", *CATEGORIES, PRICE, VECTOR]
    frame = rows.select(value.alias(name) for value, name in zip(values, names, strict=True)).with_row_index(ROW, 1)
    return FileScan(frame, dict(zip(names, names, strict=True)), is_text=False)


def read_users(file: Path) -> FileScan:
    """The users and their categories.

    Raises:
        DataError: if the file lacks a column.
    """
    rows = pl.scan_parquet(file, glob=False)
    types = rows.collect_schema()
    names = {name: name for name in ("user_id", *OF_USERS)}
    check_columns(str(file), names, types, "users", T_ECD.remedy)
    frame = rows.select(pl.col("user_id"), *(_text(name, types).alias(name) for name in OF_USERS))
    return FileScan(frame.with_row_index(ROW, 1), names, is_text=False)


def _text(name: str, types: pl.Schema) -> pl.Expr:
    """A column of ids as text; whole numbers may be floats where some are missing."""
    ids = pl.col(name)
    return (ids.cast(pl.Int64) if types[name].is_float() else ids).cast(pl.String)


def _milliseconds(file: Path, dtype: pl.DataType) -> pl.Expr:
    """The times since day 0. Integers are microseconds."""
    if isinstance(dtype, pl.Duration):
        return pl.col("timestamp").dt.total_milliseconds()
    if dtype.is_integer():
        return pl.col("timestamp") // 1000
    raise DataError(
        f"{file}: column 'timestamp' has type {dtype}, but that of the set is the duration since day 0; {T_ECD.remedy}"
    )


_OF_DOMAIN, _DAYS = "events/[0-9]*.pq", "[0-9]*.pq"
T_ECD = PublicSet(
    # The folder of the set, of one domain, or of reviews.
    events=(
        FileForm(
            (*(f"{domain}/{_OF_DOMAIN}" for domain in (*DOMAINS_OF_ITEMS, "payments")), f"reviews/{_DAYS}"),
            read=read_domain,
        ),
        FileForm((_OF_DOMAIN,), read=read_domain),
        FileForm((_DAYS,), read=read_domain),
    ),
    items=tuple(
        FileForm(
            patterns,
            {"item": "item_id", "categories": list(CATEGORIES), "numbers": [PRICE], "vectors": [VECTOR]},
            read_catalog,
        )
        for patterns in (tuple(f"{domain}/items.pq" for domain in DOMAINS_OF_ITEMS), ("items.pq",))
    ),
    users=(FileForm(("users.pq",), {"user": "user_id", "categories": list(OF_USERS)}, read_users),),
    marker="users.pq",
    url="https://huggingface.co/datasets/t-tech/T-ECD",
)
