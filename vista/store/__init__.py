"""Summary store: records of fixed size a user in LMDB, published atomically (docs/reference/file-formats.md)."""

from vista.store.format.keys import user_keys
from vista.store.format.record import RecordSpec, encode_records
from vista.store.layout import Manifest
from vista.store.reader import StoreReader
from vista.store.stored_batch import NO_TIMESTAMP, StoredBatch, Tail
from vista.store.writer import StoreWriter

__all__ = [
    "NO_TIMESTAMP",
    "Manifest",
    "RecordSpec",
    "StoreReader",
    "StoreWriter",
    "StoredBatch",
    "Tail",
    "encode_records",
    "user_keys",
]
