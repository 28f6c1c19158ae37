"""Refresh: write users' summaries into a store, in full or for what is new.

    refresh              every user, into a new generation that is then published
    refresh_incremental  users with new events, in the published generation: their states receive the new events
    forget               delete events from a log and subtract their terms from their users' states
    erase                remove users from a store for good
    merge                combine stores of different events or users, made on several machines

Data flow: EventLog -> rows of the model -> states [L, H, D, D] -> summaries [K, d] -> records -> one durable
transaction per batch.
"""

from vista.config.store_config import RefreshOptions
from vista.refresh.full import RefreshReport, refresh
from vista.refresh.incremental import forget, refresh_incremental
from vista.refresh.log_reading import check_log
from vista.refresh.merging import merge
from vista.store.writer import erase

__all__ = ["RefreshOptions", "RefreshReport", "check_log", "erase", "forget", "merge", "refresh", "refresh_incremental"]
