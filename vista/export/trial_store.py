"""A store of random users, for exports without a store."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vista.arrays import offsets_of
from vista.config.choices import Codec, StateDtype
from vista.counters.counter_codes import MAX_CODE, CounterCodes
from vista.log.gaps import DAY_MS, YEAR_1971_MS
from vista.log.histories import Histories
from vista.model import inference
from vista.model.counted_fields import largest_keys
from vista.model.vista_model import VistaModel
from vista.refresh.new_generation import new_manifest
from vista.store.format.keys import user_keys
from vista.store.format.record import encode_records
from vista.store.tail import Tail
from vista.store.user_summaries import UserSummaries
from vista.store.writer import StoreWriter

NUM_USERS = 200
MOST_EVENTS = 60


def write_trial_store(model: VistaModel, path: Path, seed: int = 0) -> None:
    """Write a store of random histories, summarized by the model, with random counters and features of users."""
    rng, schema = np.random.default_rng(seed), model.schema
    lengths = rng.integers(0, MOST_EVENTS, NUM_USERS)
    lengths[0] = 0
    offsets, total = offsets_of(lengths), int(lengths.sum())
    gaps = rng.exponential(DAY_MS, total).astype(np.int64)
    since = np.cumsum(gaps) - np.repeat(np.concatenate([[0], np.cumsum(gaps)])[offsets[:-1]], lengths)
    times = 30 * YEAR_1971_MS + since
    items = rng.integers(0, model.num_trained_items + 1, total).astype(np.int32)
    actions = rng.integers(0, len(schema.actions), total).astype(np.uint8)
    summary = inference.summarize(model, Histories(items, times, actions, None, offsets)).cpu().numpy()
    kept = np.minimum(lengths, model.config.tail_len)
    index = np.concatenate([np.arange(stop - size, stop) for stop, size in zip(offsets[1:], kept, strict=True)])
    index = index.astype(np.int64)
    features = {name: _drawn(size, len(index), rng) for name, size in schema.tail_sizes.items()}
    own = {
        column.name: _drawn(column.size if column.kind == "category" else None, NUM_USERS, rng)
        for column in schema.user_features
    }
    last = np.where(lengths > 0, times[np.maximum(offsets[1:] - 1, 0)] if total else 0, np.int64(-(2**63)))
    users = UserSummaries(
        keys=user_keys(list(range(NUM_USERS))),
        summary=np.ascontiguousarray(summary),
        tail=Tail(items[index], times[index], actions[index], offsets_of(kept), features),
        event_count=lengths,
        last_event_ts=last,
        history_digest=np.zeros(NUM_USERS, np.uint64),
        counters=_counters(model, lengths, last, rng),
        features=own,
    )
    manifest = new_manifest(
        model,
        codec=Codec.float32,
        state=StateDtype.none,
        until=None,
        applied_segment=0,
        log_digest="",
        total_users=NUM_USERS,
        run_digest="",
        created_at=None,
    )
    with StoreWriter.open(path, manifest) as writer:
        writer.put_batch(users.keys, encode_records(users, writer.spec), NUM_USERS)
        writer.publish()


def _drawn(size: int | None, count: int, rng: np.random.Generator) -> np.ndarray:
    """Codes from -1, or numbers of which some are missing."""
    if size is not None:
        return rng.integers(-1, size, count).astype(np.int32)
    return np.where(rng.random(count) < 0.1, np.nan, rng.standard_normal(count)).astype(np.float32)


def _counters(
    model: VistaModel, lengths: np.ndarray, clock: np.ndarray, rng: np.random.Generator
) -> tuple[CounterCodes, ...]:
    spec = model.counter_spec
    if spec is None:
        return ()
    fields = []
    for most, largest in zip(spec.keys, largest_keys(spec, model.schema, len(model.items)), strict=True):
        sizes = np.minimum(np.minimum(lengths, most), largest)
        keys = [np.sort(rng.choice(largest, size, replace=False)) + 1 for size in sizes.tolist()]
        codes = rng.integers(0, MAX_CODE + 1, (int(sizes.sum()), spec.num_columns))
        codes[:, 0] = np.maximum(codes[:, 0] // 2, 7)  # a count is at least 1
        key = np.concatenate(keys).astype(np.int32)
        fields.append(CounterCodes(spec, key, codes.astype(np.uint8), offsets_of(sizes), clock))
    return tuple(fields)
