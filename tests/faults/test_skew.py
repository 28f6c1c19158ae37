"""No skew: readers refuse records and stores of another summarizer, schema, codec or format, by any of their fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from tests.faults import oracle
from tests.faults.harness import Trial, promise
from tests.faults.nursery import Nursery, Say
from tests.faults.oracle import COUNTERS, Run
from vista.errors import RecordError, StoreError
from vista.store import StoreReader, user_keys
from vista.store.format.keys import MANIFEST_KEY
from vista.store.format.record_spec import CHECKSUM_OFFSET, HEADER, HEADER_BYTES
from vista.store.layout import environment_path
from vista.store.lmdb.data_file import open_environment
from vista.store.manifest import Manifest

RUN = Run(total=8)
VALUES = 10
CHECKED = (
    *("magic", "format_version", "header_length", "flags", "codec", "tokens", "dim", "scale_dtype", "payload_length"),
    *("generation", "summarizer_id", "key_hash", "tail_length", "counters_length"),
)
"""Header fields that a reader checks against its own; the others describe the refreshed history and may differ."""
NAMED = {"flags": "flags|tail_length"}
"""What the error names if it is not the field: a tail with the other kind of times has another length."""
DATA = ("created_at", "last_event_ts", "event_count", "applied_segment", "history_digest")


def with_flipped(record: bytes, field: str, bit: int) -> bytes:
    """The record with one flipped bit and a valid checksum: a foreign record, not a damaged one."""
    assert HEADER.fields is not None
    offset = HEADER.fields[field][1]
    changed = bytearray(record)
    changed[offset + bit // 8] ^= 1 << bit % 8
    changed[CHECKSUM_OFFSET:HEADER_BYTES] = bytes(8)
    changed[CHECKSUM_OFFSET:HEADER_BYTES] = xxhash.xxh3_64_intdigest(changed).to_bytes(8, "little")
    return bytes(changed)


def replace(store: str, key: bytes, value: bytes) -> None:
    """Put a value without the writer."""
    environment = open_environment(environment_path(Path(store), 1), readonly=False)
    with environment.begin(write=True) as transaction:
        transaction.put(key, value)
    environment.close()


def foreign_records(say: Say, store: str, field: str, bits: list[int]) -> int:
    """Flip each bit of a field in user 3's record and read it, alone and with others; returns the refusals."""
    (key,), refused = user_keys([3]), 0
    environment = open_environment(environment_path(Path(store), 1), readonly=True)
    with environment.begin() as transaction:
        whole = bytes(transaction.get(key, b""))
    environment.close()
    for bit in bits:
        replace(store, key, with_flipped(whole, field, bit))
        with StoreReader.open(store) as opened:
            assert opened.get_many([2, 4]).found.all()
            for users in ([3], range(RUN.total)):
                with pytest.raises(RecordError, match=f"user 3 .*{NAMED.get(field, field)}"):
                    opened.get_many(users)
        refused += 1
    replace(store, key, whole)
    oracle.published(say, store, RUN.words, 1)
    return refused


@promise(
    "No skew",
    fault="a flipped bit in each header field of a record, under a checksum that fits",
    full=1400,
    short=140,
    each=140,
)
def test_foreign_records(trial: Trial, nursery: Nursery) -> None:
    assert {*CHECKED, *DATA, "checksum"} == set(HEADER.names or ())
    store = trial.folder / "store"
    nursery.call(oracle.write, store, RUN.words)
    for field in CHECKED:
        bits = [trial.random.randrange(8 * HEADER[field].itemsize) for _ in range(VALUES)]
        assert nursery.call(foreign_records, store, field, bits) == VALUES
        trial.count(field, VALUES)


MANIFEST_FIELDS: dict[str, Callable[[Trial], Any]] = {
    "summarizer_id": lambda trial: trial.random.randbytes(32).hex(),
    "num_tokens": lambda trial: trial.random.choice([0, 1, 3, 17]),
    "dim": lambda trial: trial.random.choice([8, 15, 17, 32]),
    "codec": lambda trial: "float32",
    "counters": lambda trial: trial.random.choice([None, COUNTERS.to_dict() | {"key_bytes": [3]}]),
    "generation": lambda trial: trial.random.randrange(2, 9),
    "format_version": lambda trial: trial.random.choice([0, 1, 9]),
    "tail_columns": lambda trial: trial.random.choice([[], [{"name": "surface", "size": 3}]]),
}


def foreign_manifest(say: Say, store: str, changes: dict[str, Any]) -> str:
    """Open and read a store with another value in its manifest; returns the refusal."""
    environment = open_environment(environment_path(Path(store), 1), readonly=True)
    with environment.begin() as transaction:
        whole = bytes(transaction.get(MANIFEST_KEY, b""))
    environment.close()
    manifest = dataclasses.replace(Manifest.from_bytes(whole, Path(store)), **changes)
    replace(store, MANIFEST_KEY, manifest.to_bytes())
    with pytest.raises(StoreError) as refused, StoreReader.open(store, summarizer_id=oracle.SUMMARIZER) as opened:
        opened.get_many([3])
    replace(store, MANIFEST_KEY, whole)
    return type(refused.value).__name__


@promise("No skew", fault="another value in a manifest field of a store", full=600, short=12, each=6)
def test_foreign_manifests(trial: Trial, nursery: Nursery) -> None:
    store = trial.folder / "store"
    nursery.call(oracle.write, store, RUN.words)
    for field, value in MANIFEST_FIELDS.items():
        trial.count(f"{field}: {nursery.call(foreign_manifest, store, {field: value(trial)})}")
