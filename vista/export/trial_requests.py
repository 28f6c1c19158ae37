"""Random requests, for the users of a store, on which an export is compared with the scorer.

B users, C candidates, V items of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int, offsets_of
from vista.config.checks import Codec, OnMissing, StateDtype
from vista.counters.counters import MAX_CODE, CounterCodes, cells_of
from vista.counters.keys import MAX_KEY, newest_items
from vista.export.serving_graph import Arrays, request_arrays
from vista.log.histories import DAY_MS, YEAR_1971_MS, Histories
from vista.model import inference
from vista.model.features import HashedVocabulary, RowFeatureReader
from vista.model.inference import pooled_rows, pooled_sums
from vista.model.serving_model import ServingModel
from vista.model.vista_model import VistaModel
from vista.refresh.full import new_manifest
from vista.scorer.request import Request, with_fresh_events
from vista.scorer.serving_snapshot import ServingSnapshot
from vista.store.keys import user_keys
from vista.store.reader import StoredBatch
from vista.store.record import Tail
from vista.store.record_encoding import encode_records
from vista.store.state_record import UserSummaries
from vista.store.writer import StoreWriter

USERS_PER_BATCH = 1, 2, 7, 32
CANDIDATES = 1, 2, 17, 100
NEW_EVENTS = 4
MISSING = 0.1
"""Share of values, times, and users that requests do not have."""
NUM_USERS = 200
MOST_EVENTS = 60
"""Of the random users of an export without a store."""


@dataclass(frozen=True, slots=True)
class TrialRequests:
    """A batch of requests: for the graph, and for the scorer."""

    arrays: Arrays
    request: Request
    rows: Int
    """int64 [B, C] candidates."""


def trial_requests(snapshot: ServingSnapshot, num_requests: int, seed: int = 0) -> Iterator[TrialRequests]:
    """Batches of requests, `num_requests` in all, each read by the scorer's own path.

    Users have records or not; requests have a time, features, and new events or not. Candidates include unknown items
    and those of the user's own tail.
    """
    rng, left = np.random.default_rng(seed), num_requests
    known = list(islice(snapshot.store.keys(), num_requests))
    while left:
        size = min(int(rng.choice(USERS_PER_BATCH)), left)
        left -= size
        yield _batch(snapshot, [_user(known, rng) for _ in range(size)], int(rng.choice(CANDIDATES)), rng)


def _user(known: list[Any], rng: np.random.Generator) -> Any:
    if known and rng.random() > MISSING:
        return known[int(rng.integers(len(known)))]
    is_text = bool(known) and isinstance(known[0], str)
    return "nobody (a trial of an export)" if is_text else -(2**62)


def _batch(snapshot: ServingSnapshot, users: list[Any], num_candidates: int, rng: np.random.Generator) -> TrialRequests:
    model, num_users = snapshot.model, len(users)
    stored = snapshot.store.get_many(users)
    now = None
    if model.schema.has_time and rng.random() > MISSING:
        after = rng.exponential(10 * DAY_MS, num_users).astype(np.int64)
        now = np.maximum(stored.last_event_ts, 2 * YEAR_1971_MS) + after
    tail = _new_events(model, stored, now, rng) if rng.random() < 0.5 else None
    request = snapshot.read(users, tail, now, OnMissing.empty)
    merged, is_new = stored.tail, np.zeros(len(stored.tail.items), np.bool_)
    if tail is not None:
        merged, is_new, _ = with_fresh_events(model, stored, tail, refuse=True)
    rows = _candidates(model, merged, num_users, num_candidates, rng)
    request, codes = _with_features(request, snapshot.served, num_candidates, rng)
    arrays = request_arrays(model, stored, merged, is_new, now, rows, codes)
    return TrialRequests(arrays, request, rows)


def _candidates(model: VistaModel, tail: Tail, num_users: int, count: int, rng: np.random.Generator) -> Int:
    """Rows int64 [B, C], a part of them of the users' own tails."""
    rows = rng.integers(0, len(model.items) + 1, (num_users, count))
    for user, (start, stop) in enumerate(zip(tail.offsets[:-1], tail.offsets[1:], strict=True)):
        if stop > start:
            own = rng.choice(tail.items[start:stop], count)
            rows[user] = np.where(rng.random(count) < 0.3, own, rows[user])
    return rows


def _new_events(model: VistaModel, stored: StoredBatch, now: Int | None, rng: np.random.Generator) -> Tail:
    """Events since the records, up to the time of the request, as a caller passes them."""
    lengths = rng.integers(0, NEW_EVENTS, len(stored.found))
    total = int(lengths.sum())
    first = np.maximum(stored.last_event_ts, 2 * YEAR_1971_MS if model.schema.has_time else 0)
    last = first + DAY_MS if now is None else now
    times = rng.integers(np.repeat(first, lengths), np.repeat(last, lengths) + 1)
    named = np.flatnonzero(model.items.has_ids(np.arange(len(model.items))))
    items = model.items.ids(rng.choice(named, total))
    actions = rng.integers(0, len(model.schema.actions), total).astype(np.uint8)
    reader = model.tail_features
    features = {} if reader is None else _values(reader, total, rng)
    return Tail(items, times, actions, offsets_of(lengths), features)


def _with_features(
    request: Request, model: ServingModel, count: int, rng: np.random.Generator
) -> tuple[Request, dict[str, NDArray[Any]]]:
    """The request with features that differ between candidates, and their codes [B, C] by name."""
    reader, shape = model.request_features, (len(request), count)
    if reader is None:
        return request.with_features(model, {}, count), {}
    given = _values(reader, len(request) * count, rng)
    codes = reader.parse(given, len(request) * count).columns
    by_pair = {name: np.array(values, object).reshape(shape) for name, values in given.items()}
    return request.with_features(model, by_pair, count), {name: own.reshape(shape) for name, own in codes.items()}


def _values(reader: RowFeatureReader, count: int, rng: np.random.Generator) -> dict[str, list[Any]]:
    """Values of N rows by name, as a caller passes them."""
    values: dict[str, list[Any]] = {}
    for column in reader.columns:
        known = reader.values[column.name]
        if known is None:
            drawn: list[Any] = (column.mean + column.scale * rng.standard_normal(count)).tolist()
        elif isinstance(known, HashedVocabulary) or not len(known):
            drawn = [f"value {number}" for number in rng.integers(0, 1000, count).tolist()]
        else:
            drawn = known.ids(rng.integers(0, len(known), count)).tolist()
        values[column.name] = [None if rng.random() < MISSING else value for value in drawn]
    return values


def write_trial_store(model: VistaModel, path: Path, seed: int = 0) -> None:
    """Write a store of random histories, summarized by the model, with random counters and features of users, for an
    export without a store."""
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
        summary=np.concatenate([summary, pooled_rows(model, pooled_sums(model, items, actions, offsets), lengths)], 1),
        tail=Tail(items[index], times[index], actions[index], offsets_of(kept), features),
        event_count=lengths,
        last_event_ts=last,
        history_digest=np.zeros(NUM_USERS, np.uint64),
        counters=_counters(model, lengths, last, newest_items(items, offsets), rng),
        features=own,
    )
    manifest = new_manifest(
        model,
        codec=Codec.float32.value,
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
    model: VistaModel, lengths: Int, clock: Int, newest: Int, rng: np.random.Generator
) -> tuple[CounterCodes, ...]:
    """Random codes of random keys, which candidates have if no event is added: after the users' newest items."""
    keys = model.item_keys
    if keys is None:
        return ()
    user, spec, fields = np.repeat(np.arange(len(lengths)), np.minimum(lengths, min(keys.spec.keys))), keys.spec, []
    times = clock[user] - rng.integers(0, 60 * DAY_MS, len(user))
    for key in keys.of(rng.integers(1, len(model.items) + 1, len(user)), times, newest[user]):
        cells = np.unique(cells_of(user, key)[key > 0])
        codes = rng.integers(0, MAX_CODE + 1, (len(cells), spec.num_columns))
        codes[:, 0] = np.maximum(codes[:, 0] // 2, 7)  # a count is at least 1
        offsets = np.searchsorted(cells, cells_of(np.arange(len(lengths) + 1), 0))
        fields.append(CounterCodes(spec, (cells & MAX_KEY).astype(np.int32), codes.astype(np.uint8), offsets, clock))
    return tuple(fields)
