"""Summary store: one record per user in LMDB, published atomically (docs/reference/file-formats.md)."""

from vista.log.histories import NO_TIMESTAMP
from vista.store.keys import user_keys
from vista.store.manifest import Manifest
from vista.store.reader import StoredBatch, StoreReader
from vista.store.record import RecordSpec, Tail
from vista.store.record_encoding import encode_records
from vista.store.state_record import UserSummaries
from vista.store.writer import StoreWriter

__all__ = [
    "NO_TIMESTAMP",
    "Manifest",
    "RecordSpec",
    "StoreReader",
    "StoreWriter",
    "StoredBatch",
    "Tail",
    "UserSummaries",
    "encode_records",
    "user_keys",
]
