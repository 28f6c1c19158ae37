"""The oracle of updates in place: the record and state of each user after every transaction of every turn.

Turn t of an update removes some users, gives others a new record and state, and keeps the rest, depending only on user
and turn. Turn 0 is the generation as published. Functions that take `say` are jobs of a nursery.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults.nursery import Say
from tests.faults.oracle import CREATED_AT, SUMMARIZER, Run
from vista.counters.counters import CounterTable
from vista.store import StoreReader, user_keys
from vista.store.admin import verify_store
from vista.store.folder_files import open_environment
from vista.store.layout import environment_path, state_path
from vista.store.record import RecordSpec
from vista.store.state_record import StateArrays, StateSpec, encode_states
from vista.store.writer import StoreUpdate

TOTAL, BATCH = 32, 8
REMOVED, PUT, KEPT = range(3)
STEPS = 5
"""Steps of a batch: nothing done; records removed; states removed; states put; records put."""


def role(user: int, turn: int) -> int:
    """The change of a user in a turn."""
    return REMOVED if (user + turn) % 5 == 0 else PUT if (7 * user + turn) % 3 else KEPT


def version(user: int, turn: int) -> int | None:
    """The turn of a user's record and state after a turn; None if the user has none."""
    if turn == 0:
        return 0
    what = role(user, turn)
    return turn if what == PUT else None if what == REMOVED else version(user, turn - 1)


def batches() -> Iterator[range]:
    """Batches of users 0 … TOTAL - 1, as in each turn."""
    for first in range(0, TOTAL, BATCH):
        yield range(first, first + BATCH)


def records(users: list[int], spec: RecordSpec, turn: int) -> list[bytes]:
    """The users' records of a turn."""
    run = Run(salt=turn, num_tokens=spec.num_tokens, dim=spec.dim)
    at_turn = dataclasses.replace(spec, created_at=CREATED_AT + turn, applied_segment=turn)
    return run.records(users, at_turn)[1]  # type: ignore[arg-type]


def states(users: list[int], spec: StateSpec, turn: int) -> list[bytes]:
    """The users' states of a turn."""
    count, L, H, D = len(users), spec.num_layers, spec.num_heads, spec.head_dim
    place = np.arange(L * H * D * D, dtype=np.float64).reshape(L, H, D, D)
    z = np.cos(place * 0.3 + np.array(users, np.float64)[:, None, None, None, None] + 10.0 * turn).astype(np.float32)
    own = np.array(users, np.int64)
    n = np.full((count, H), 1.0 + turn, np.float32)
    assert spec.counters is not None
    offsets = np.concatenate([[0], np.cumsum(own % 4 + turn)])  # each user has other keys, and some have none
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], np.diff(offsets))
    key = np.repeat(own, np.diff(offsets)) + place % 3
    counters = CounterTable.of(spec.counters, key, np.full(len(key), CREATED_AT), offsets)
    pooled = np.sin(own[:, None] + np.arange(spec.pooled_dim) + 10.0 * turn)
    digest = own.astype(np.uint64)
    arrays = StateArrays(z, n, n * 0, own + turn, own, np.full(count, turn), digest, pooled, (counters,))
    return encode_states(user_keys(users), arrays, dataclasses.replace(spec, created_at=CREATED_AT + turn))


def publish(say: Say, store: str, head_dim: int) -> None:
    """Publish turn 0."""
    run = Run(total=TOTAL, batch=BATCH)
    with run.open_writer(store, state_dtype="float32", state_shape=(1, 2, head_dim), pooled_dim=4) as writer:
        assert writer.state_spec is not None
        for users in run.batches(writer.cursor):
            own = states(list(users), writer.state_spec, 0)
            writer.put_batch(*run.records(users, writer.spec), users.stop, own)
        writer.publish()


def update(say: Say, store: str, turn: int) -> None:
    """Run or resume one turn; says ["ack", turn, n] after a batch and ["ack", turn + 1, 0] at the end."""
    with StoreUpdate.open(
        store, summarizer_id=SUMMARIZER, applied_segment=turn, created_at=CREATED_AT + turn
    ) as writer:
        assert writer.state_spec is not None
        writer.begin("")
        for users in batches():
            keys = user_keys(list(users))
            done = (writer.applied_segments(keys) >= turn).tolist()
            writer.writer.remove([key for key, user in zip(keys, users, strict=True) if role(user, turn) == REMOVED])
            put = [user for user, own in zip(users, done, strict=True) if role(user, turn) == PUT and not own]
            if put:
                writer.put_batch(user_keys(put), records(put, writer.spec, turn), states(put, writer.state_spec, turn))
            say(["ack", turn, users.stop])
        writer.finish()
    say(["ack", turn + 1, 0])


def check(say: Say, store: str, turn: int, least: int) -> str:
    """Check every byte of the records and states of a store after `turn` has acknowledged `least` users.

    Returns:
        How far the next batch, which was not acknowledged, had got.
    """
    report = verify_store(store)
    assert not report.num_problems, report
    held = _held(environment_path(Path(store), 1)), _held(state_path(Path(store), 1))
    with StoreReader.open(store) as opened:
        manifest = opened.manifest
        read = opened.get_many(range(TOTAL)).found.tolist()
        assert read == [key in held[0] for key in user_keys(range(TOTAL))] and sum(read) == len(opened)
    assert manifest.applied_segment in (turn - 1, turn), manifest
    spec, state_spec = manifest.spec(), manifest.state_spec()
    assert state_spec is not None
    for step in range(STEPS):
        if held == _expected(turn, least, step, spec, state_spec):
            if step == 0:
                return "as acknowledged"
            return "one step further" if step < STEPS - 1 else "one batch further"
    raise AssertionError(f"turn {turn}, {least} users acknowledged: no step of the next batch leaves such a store")


def check_and_continue(say: Say, store: str, turn: int, least: int) -> str:
    """Run `check`, then finish the turn and run one more."""
    outcome = check(say, store, turn, least)
    for number in (turn, turn + 1):
        update(lambda _: None, store, number)
        assert check(say, store, number + 1, 0) == "as acknowledged"
    return outcome


def acknowledged(messages: list[Any]) -> tuple[int, int]:
    """(Current turn, users that it acknowledged), from the messages of `update`; (1, 0) at first."""
    turns = [(turn, users) for what, turn, users in messages if what == "ack"]
    return max(turns, default=(1, 0))


def _held(folder: Path) -> dict[bytes, bytes]:
    with closing(open_environment(folder, readonly=True)) as environment, environment.begin() as transaction:
        return {key: value for key, value in transaction.cursor() if key.startswith(b"u")}


@cache
def _one(made: Any, user: int, spec: RecordSpec | StateSpec, turn: int) -> bytes:
    """One user's record or state."""
    (value,) = made([user], spec, turn)
    return bytes(value)


def _expected(
    turn: int, least: int, step: int, spec: RecordSpec, state_spec: StateSpec
) -> tuple[dict[bytes, bytes], dict[bytes, bytes]]:
    """Records and states after a step of the batch that follows the first `least` users."""
    held: tuple[dict[bytes, bytes], dict[bytes, bytes]] = {}, {}
    for user in range(TOTAL):
        before, after, what = version(user, turn - 1), version(user, turn), role(user, turn)
        in_flight = least <= user < least + BATCH
        for place, (made, done) in enumerate(((records, (1, 4)), (states, (2, 3)))):
            is_done = user < least or (in_flight and step >= done[what == PUT])
            own = after if is_done else before
            if own is not None:
                held[place][user_keys([user])[0]] = _one(made, user, (spec, state_spec)[place], own)
    return held
