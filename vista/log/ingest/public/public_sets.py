"""The kinds of source files that `vista prepare` knows by name: public data sets, and formats."""

from __future__ import annotations

from vista.log.ingest.public.amazon_reviews import AMAZON_REVIEWS
from vista.log.ingest.public.complete_journey import COMPLETE_JOURNEY
from vista.log.ingest.public.file_form import FileForm
from vista.log.ingest.public.kuairand import KUAIRAND
from vista.log.ingest.public.longctr import LONGCTR
from vista.log.ingest.public.movielens import ML_1M, ML_100K, ML_LATEST_SMALL
from vista.log.ingest.public.public_set import PublicSet
from vista.log.ingest.public.recbole import RECBOLE
from vista.log.ingest.public.t_ecd import T_ECD
from vista.log.ingest.public.yambda import YAMBDA

PUBLIC_SETS = {
    "ml-1m": ML_1M,
    "ml-latest-small": ML_LATEST_SMALL,
    "ml-100k": ML_100K,
    "recbole": RECBOLE,
    "npz": PublicSet(events=(FileForm(("events.npz",)),)),
    "simulated": PublicSet(
        events=(FileForm(("events.parquet",)),),
        impressions=(FileForm(("impressions.parquet",)),),
        marker="simulation.json",
    ),
    "complete-journey": COMPLETE_JOURNEY,
    "amazon-reviews-2023": AMAZON_REVIEWS,
    "kuairand": KUAIRAND,
    "yambda": YAMBDA,
    "longctr": LONGCTR,
    "t-ecd": T_ECD,
}
"""By the value of `kind`. `auto` takes the first that is recognized."""


def remedy_of_kind(kind: str) -> str:
    """`PublicSet.remedy`; "" for a table."""
    return PUBLIC_SETS[kind].remedy if kind in PUBLIC_SETS else ""
