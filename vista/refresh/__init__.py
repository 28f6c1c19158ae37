"""Batch refresh: users' summaries into a store, in full or for what is new.

    full          every user, into a new generation that is published at once
    incremental   users with new events, into the served generation: their states take the new events alone
    forget        events out of a log and of the states of their users, by subtraction
    erase         users out of a store at once, and for good
    merge         stores over disjoint events of the same users, made by several machines, into one

The data's way: EventLog -> rows of the model -> states [L, H, D, D] -> summaries [K, d] -> records -> one durable
transaction a batch.
"""

from vista.refresh.encode import check_log, refresh_from_config
from vista.refresh.erasing import forget
from vista.refresh.full import refresh
from vista.refresh.incremental import refresh_incremental
from vista.refresh.merging import merge
from vista.refresh.refresh_report import RefreshReport
from vista.store.updates import erase

__all__ = [
    "RefreshReport",
    "check_log",
    "erase",
    "forget",
    "merge",
    "refresh",
    "refresh_from_config",
    "refresh_incremental",
]
