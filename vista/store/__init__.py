"""Summary store: records of fixed size a user in LMDB, in generations that flip at once (docs/summary-format.md)."""

from vista.store.batches import NO_TIMESTAMP, StoredBatch, Tail
from vista.store.generations import StoreWriter
from vista.store.keys import user_keys
from vista.store.layout import Manifest
from vista.store.lmdb_store import SummaryStore
from vista.store.record import RecordSpec, encode_records

__all__ = [
    "NO_TIMESTAMP",
    "Manifest",
    "RecordSpec",
    "StoreWriter",
    "StoredBatch",
    "SummaryStore",
    "Tail",
    "encode_records",
    "user_keys",
]
