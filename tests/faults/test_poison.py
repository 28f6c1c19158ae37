"""Poisoned input raises a typed error or gives the documented result, and does not affect others in its batch."""

from __future__ import annotations

import dataclasses
import resource
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.conftest import DAY, START
from tests.faults.harness import Trial, promise
from tests.faults.nursery import Nursery, Say
from tests.record_reference import decode_record_reference
from tests.store.conftest import users_of
from vista.config import SourceColumns
from vista.config.checks import Codec
from vista.errors import RecordError, VistaError
from vista.log.event_log import EventLog
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.scorer import Scorer, Tail
from vista.store import RecordSpec, encode_records, user_keys

EXAMPLES = 50
NUMBERS = [0, -1, 1, 2**31, 2**63 - 1, -(2**63), 2**63, 2**64, -(2**70), 1.5, 1e300, float("nan"), float("inf"), None]
WORDS = ["", "x", "é" * 300, "0", "nan", "\x00", "\ud800", b"bytes", True, (), [1]]
odd = st.one_of(st.sampled_from(NUMBERS), st.sampled_from(WORDS), st.integers(), st.floats(), st.text(max_size=4))


def mostly(usual: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """The usual strategy, and sometimes the odd one."""
    return st.integers(0, 7).flatmap(lambda dice: usual if dice else odd)


def examples(number: int, check: Callable[[Any], None], strategy: st.SearchStrategy[Any]) -> None:
    """Run a check on EXAMPLES examples, which depend only on the number."""
    test = given(strategy)(check)
    everything = list(HealthCheck)
    seed(number)(
        settings(max_examples=EXAMPLES, database=None, deadline=None, suppress_health_check=everything)(test)
    )()


@promise("Poison input", fault="NaN, infinities and extremes in summaries", full=2000, smoke=True, each=EXAMPLES)
def test_poisoned_summaries(trial: Trial) -> None:
    extremes = [np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-45, 0.0, -0.0, 1e30, 65504.0, 70000.0]
    value = st.one_of(st.sampled_from(extremes), st.floats(width=32))

    def check(example: tuple[list[float], int, Codec]) -> None:
        values, user, codec = example
        spec = RecordSpec(bytes(32), 1, 2, 4, codec)
        summary = np.ones((3, 2, 4), np.float32)
        summary[user].flat[: len(values)] = values
        users = users_of(user_keys([0, 1, 2]), summary=summary)
        try:
            records = encode_records(users, spec)
        except RecordError as error:
            assert f"user {user}" in str(error)
            # Narrower numbers, or the scales of quantized rows, may overflow.
            assert codec is not Codec.float32 or not np.isfinite(summary[user]).all()
            trial.count("refused")
            return
        assert np.isfinite(summary).all(), "a non-finite value was written"
        clean = encode_records(dataclasses.replace(users, summary=np.ones_like(summary)), spec)
        for other in {0, 1, 2} - {user}:
            assert records[other] == clean[other]
        decoded = decode_record_reference(records[user])["summary"]
        assert np.isfinite(decoded).all()
        if codec is Codec.float32:
            assert decoded.tobytes() == summary[user].tobytes()
        else:
            exact = summary[user].astype(np.float64)
            span, low = np.ptp(exact, axis=1, keepdims=True), np.abs(exact.min(axis=1, keepdims=True))
            bound = {
                Codec.float16: np.abs(exact) * 2.0**-11 + 2.0**-25,
                Codec.int8: 1.01 * span / 255 + 1e-6,
                # Half a step plus the rounding of scale and bias to float16.
                Codec.int4: 0.51 * span / 15 + 2.0**-10 * (low + span) + 15 * 2.0**-25,
            }[codec]
            assert (np.abs(decoded.astype(np.float64) - exact) <= bound).all(), (codec, exact, decoded)
        trial.count("written")

    examples(
        trial.number, check, st.tuples(st.lists(value, max_size=8), st.integers(0, 2), st.sampled_from(list(Codec)))
    )


@promise(
    "Poison input",
    fault="requests: odd users, candidates, tails, times and types",
    full=2000,
    smoke=True,
    each=EXAMPLES,
)
def test_poisoned_requests(trial: Trial, scorer: Scorer) -> None:
    healthy = scorer.predict([103, 100], [0, 390])[scorer.task]
    times = st.sampled_from([START, START + 900 * DAY, -1, 0, 1, 2**62, 5, START - DAY])
    event = st.tuples(st.sampled_from([0, 10, 390, -1, 7, 2**40]), times, st.sampled_from([0, 1, 2, 255]))
    tail = st.one_of(st.none(), st.lists(event, max_size=5))
    request = st.fixed_dictionaries(
        {
            "users": st.lists(mostly(st.sampled_from([103, 100, 99])), max_size=3),
            "candidates": mostly(st.lists(mostly(st.sampled_from([0, 390, 5])), max_size=4)),
            "now": mostly(st.one_of(st.none(), times)),
            "tail": tail,
            "cut": st.integers(-1, 6),
        }
    )

    def check(words: dict[str, Any]) -> None:
        given_tail = None
        if words["tail"] is not None:
            columns = np.array(words["tail"], np.int64).reshape(-1, 3).T
            ends = [len(words["tail"])] * len(words["users"])
            ends[:1] = [words["cut"]] if len(ends) > 1 else ends[:1]
            given_tail = Tail(columns[0], columns[1], columns[2].astype(np.uint8), np.array([0, *ends]))
        try:
            scores = scorer.predict(words["users"], words["candidates"], tail=given_tail, now=words["now"])
        except (VistaError, ValueError, TypeError) as error:
            assert str(error), type(error)
            trial.count("refused")
        else:
            assert all(np.isfinite(cells).all() for cells in scores.values())
            trial.count("scored")
        assert scorer.predict([103, 100], [0, 390])[scorer.task].tobytes() == healthy.tobytes()

    examples(trial.number, check, request)


@promise(
    "Poison input",
    fault="rows of a log: odd ids, times, actions, ratings; unsorted, twice, none",
    full=1000,
    smoke=True,
    each=EXAMPLES,
)
def test_poisoned_rows(trial: Trial) -> None:
    """Users 1 and 2 are healthy; the other rows are odd."""
    row = st.tuples(
        st.one_of(st.integers(3, 5), st.sampled_from([0, -1, 2**63 - 1, -(2**63)])),
        st.one_of(st.integers(0, 9), st.sampled_from([-1, 2**63 - 1])),
        st.sampled_from([START, START + 5, START, -1, 0, -(2**63), 2**63 - 1, 10**17, START + DAY]),
        st.sampled_from(["click", "like", "", "é" * 300, None, "\x00"]),
        st.sampled_from([1.0, 5.0, np.nan, np.inf, -np.inf, 1e308, -0.0, None]),
    )
    good = [(1 + n % 2, n % 7, START + 1000 * n, "click", 3.0) for n in range(12)]

    def check(rows: list[tuple[Any, ...]]) -> None:
        with tempfile.TemporaryDirectory(dir=trial.folder) as folder:
            columns = dict(
                zip(("user", "item", "timestamp", "action", "rating"), zip(*good, *rows, strict=True), strict=True)
            )
            frame = {name: list(values) for name, values in columns.items()}
            try:
                log = EventLog.from_frame(
                    frame,
                    f"{folder}/log",
                    time_unit="ms",
                    columns=SourceColumns(action="action", rating="rating"),
                    on_bad_rows="quarantine",
                )
            except VistaError as error:
                assert str(error)
                trial.count("refused")
                return
            users = log.users.ids(np.arange(log.num_users)).tolist()
            for user in (1, 2):
                seen = log.slice(users.index(user))
                mine = [event for event in good if event[0] == user]
                assert log.items.ids(seen.item).tolist() == [event[1] for event in mine]
                assert np.asarray(seen.timestamp).tolist() == [event[2] for event in mine]
            histories = log.gather(np.arange(log.num_users))
            for begin, end in zip(histories.offsets[:-1], histories.offsets[1:], strict=True):
                assert (np.diff(np.asarray(histories.timestamp[begin:end])) >= 0).all()
            assert histories.num_events <= len(good) + len(rows)
            trial.count("quarantined" if histories.num_events < len(good) + len(rows) else "taken")

    examples(trial.number, check, st.lists(row, max_size=5))


def giant(say: Say, model: str, folder: str, num_events: int, num_candidates: int) -> list[int]:
    """Prepare, refresh and score a user with very many events and a small one, then very many candidates.

    Returns:
        Growth of peak memory, bytes; size of the log, bytes.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rng = np.random.default_rng(0)
    frame = {
        "user": np.repeat([1, 2], [num_events, 3]),
        "item": 10 * rng.integers(0, 40, num_events + 3),
        "timestamp": START + np.arange(num_events + 3) * 1000,
        "action": np.full(num_events + 3, "click"),
    }
    log = EventLog.from_frame(frame, f"{folder}/log", time_unit="ms", columns=SourceColumns(action="action"))
    loaded = VistaModel.from_pretrained(model)
    refresh(loaded, log, f"{folder}/store")
    with Scorer.open(loaded, f"{folder}/store") as scorer:
        scores = scorer.score([1, 2], np.resize(np.arange(0, 400, 10), num_candidates))
    assert scores.shape == (2, num_candidates) and np.isfinite(scores).all()
    assert (scores[:, :40] == scores[:, 40:80]).all()
    shutil.rmtree(folder)
    return [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before, 40 * num_events]


@promise("Poison input", fault="a user of 1M events, 1M candidates", full=3)
def test_giants(trial: Trial, nursery: Nursery, model_dir: Path) -> None:
    events, candidates = (10**6, 10**6) if trial.number else (10**5, 10**5)
    peak, log = nursery.start(giant, model_dir, trial.folder / "work", events, candidates).result(timeout_s=600)
    assert peak <= 1 << 30, f"{peak >> 20} MiB for a log of {log >> 20} MiB"
    trial.count(f"at most {-(-peak // (64 << 20)) * 64} MiB")
