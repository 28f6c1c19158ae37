"""Bytes per user in a store, from the code of the formats."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from vista.config.choices import Codec, Mixing, StateDtype
from vista.config.model_config import ModelConfig
from vista.counters.counter_codes import CounterSpec
from vista.errors import ConfigError
from vista.store.format.counter_layout import CounterLayout
from vista.store.format.counters_section import most_bytes
from vista.store.format.record_spec import HEADER_BYTES, RecordSpec
from vista.store.format.state_counters import tables_bytes
from vista.store.format.state_record import StateSpec
from vista.store.format.tail_section import event_bytes

KEY_BYTES = 10
"""Key of a user with an integer id."""
_PAGE_BYTES, _PAGE_HEADER_BYTES, _NODE_HEADER_BYTES, _POINTER_BYTES, _PAGE_NUMBER_BYTES = 4096, 16, 8, 2, 8
"""Of LMDB 0.9 (`lmdb.h`, `mdb.c`)."""
_MOST_NODE_BYTES = (_PAGE_BYTES - _PAGE_HEADER_BYTES) // 2 // 2 * 2 - _POINTER_BYTES
"""A value that does not fit a node of this size has pages of its own."""
_SERVER_HEADER_BYTES = 20
"""Of a string in Valkey or Redis, allocated together with it."""
_SERVER_BYTES_PER_USER = 180
"""Of everything else that a server holds per user: the key, its hash entry, and its entry in the set of users. Measured
with Valkey 8.1 (tests/planning/test_store_sizes.py)."""


@dataclass(frozen=True, slots=True)
class StoreSizes:
    """Bytes per user of a store whose users have integer ids and full tails."""

    record: int
    """Of the record."""
    record_on_disk: float
    """Of the record's share of LMDB pages."""
    state: int
    """Of the state; 0 if none are kept."""
    state_on_disk: float
    """Of the state's share of LMDB pages."""
    on_server: float
    """Of the record in the memory of a Valkey or Redis server."""

    @classmethod
    def of(
        cls, model: ModelConfig, codec: Codec, state: StateDtype, *, num_items: int, history_events: int
    ) -> StoreSizes:
        """The sizes of a model's records and states, without features of users or events.

        Args:
            model: its shape, with `counters` null meaning false.
            codec: how summaries are stored.
            state: how states are stored; bidirectional mixing has none.
            num_items: of the catalog, which decides how many bytes a counted key has.
            history_events: events per user, which are as many counted keys per field in a state at most.

        Raises:
            ConfigError: a record would exceed the format's limit.
        """
        spec = CounterSpec.of(model, has_time=True)
        # Most categories have fewer values than there are items.
        layout = None if spec is None else CounterLayout.of(spec, [num_items] * spec.num_fields)
        try:
            record_spec = RecordSpec(
                summarizer_id=bytes(32),
                generation=1,
                num_tokens=model.num_seeds + model.num_state_rows,
                dim=model.dim,
                codec=codec,
                counters=layout,
            )
        except ValueError as error:
            raise ConfigError(f"model.num_seeds: {error}") from error
        tail = model.tail_len * int(event_bytes(np.array([layout is not None]), ())[0])
        record = HEADER_BYTES + record_spec.rows_bytes + tail + (0 if layout is None else most_bytes(layout))
        state_bytes = 0
        if state is not StateDtype.none and model.mixing is Mixing.separable:
            state_spec = StateSpec(
                summarizer_id=bytes(32),
                generation=1,
                num_layers=model.num_state_layers,
                num_heads=model.num_heads,
                head_dim=model.dim // model.num_heads,
                dtype=state,
            )
            state_bytes = state_spec.least_bytes + (
                0 if spec is None else tables_bytes(spec, [history_events] * spec.num_fields)
            )
        on_disk = [lmdb_bytes(size) if size else 0.0 for size in (record, state_bytes)]
        return cls(record, on_disk[0], state_bytes, on_disk[1], server_bytes(record))


def lmdb_bytes(value_bytes: int, key_bytes: int = KEY_BYTES) -> float:
    """Bytes of LMDB pages per value, for many values of one size that are written in the order of their keys."""
    inline = _NODE_HEADER_BYTES + key_bytes + value_bytes
    own_pages = 0
    if inline > _MOST_NODE_BYTES:
        inline = _NODE_HEADER_BYTES + key_bytes + _PAGE_NUMBER_BYTES
        own_pages = math.ceil((_PAGE_HEADER_BYTES + value_bytes) / _PAGE_BYTES)
    leaves = 1 / _per_page(inline)
    branches = leaves / _per_page(_NODE_HEADER_BYTES + key_bytes)
    return _PAGE_BYTES * (own_pages + leaves + branches)


def server_bytes(value_bytes: int) -> int:
    """Memory of a Valkey or Redis server per value of a user: its allocator (jemalloc) has four sizes per doubling."""
    needed = value_bytes + _SERVER_HEADER_BYTES
    step = 1 << max(0, (needed - 1).bit_length() - 3)
    return math.ceil(needed / step) * step + _SERVER_BYTES_PER_USER


def _per_page(node_bytes: int) -> int:
    """Nodes per page."""
    return (_PAGE_BYTES - _PAGE_HEADER_BYTES) // (node_bytes + node_bytes % 2 + _POINTER_BYTES)
