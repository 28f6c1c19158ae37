"""Calls of the public API with one hostile argument each."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.conftest import small_config, small_frame
from tests.faults.operations import COLUMNS, first_event, index_items, log_of, model_of
from vista import EventLog, Scorer, StoreReader, VistaModel, train
from vista.config import SourceColumns
from vista.log.row_features import RowFeatures
from vista.log.vocabulary import Vocabulary
from vista.model.row_feature_reader import RowFeatureReader
from vista.refresh import RefreshOptions, erase, forget, merge, refresh, refresh_incremental
from vista.scorer import ScorerStats, Tail
from vista.scorer.pair_features import PairFeatures

LONG = "x" * 100_000
PATHS: list[Any] = [
    "",
    "/",
    "/dev/null",
    "/nowhere/at/all",
    "/etc/passwd",
    "x" * 5000,
    "x" * 250,
    "a\0b",
    "\ud800",
    Path(".."),
]
NEW_PATHS: list[Any] = ["", "x" * 5000, "x" * 250, "a\0b", "\ud800", "store", "store/CURRENT", "store/CURRENT/x"]
"""Paths in the working directory, a copy of the world, for calls that write."""
INTS: list[Any] = [-1, 0, 2**31, 2**63 - 1, 2**63, 10**18, 10**30, -(10**30)]
WORDS: list[Any] = ["", "x", "all", "-1", "1" * 5000, LONG, "\0", "\ud800", "leave-last-0-out", "2024-13-45", "١٢"]
FLOATS: list[Any] = [0.0, -1.0, float("nan"), float("inf"), 1e308]
KEYS: list[Any] = [b"", b"short", bytes(32), bytes(10**5)]
IDS: list[Any] = [
    *([], [0], [-1], [10**18], [10**30], ["x"], [""], [LONG], ["\0"], ["\ud800"], [1, "a"], [None], [1.5]),
    *([float("nan")], [True], [b"x"], [[1], [2, 3]], np.array([1.5]), np.array([[1, 2]]), np.array([], object), "abc"),
    *(range(3), np.array(["2020-01-01"], "datetime64[D]"), np.array([2**63], np.uint64)),
]
ROWS: list[Any] = [*([], [-1], [16], [2**31], [2**63 - 1], [10**30], [0.5], ["x"], [[0]]), np.array([True])]
FRAMES: list[Any] = [
    *({}, {"user": []}, {"user": [], "item": [], "timestamp": []}, {"user": [1], "item": [1, 2], "timestamp": [1]}),
    {"user": [None], "item": [1], "timestamp": [1]},
    {"user": [[1]], "item": [1], "timestamp": [1]},
    {"user": [10**30], "item": [1], "timestamp": [1]},
    {"user": [1.5], "item": [1], "timestamp": [1]},
    {"user": [LONG], "item": ["\0"], "timestamp": [1]},
    {"user": [1], "item": [1], "timestamp": ["2020-01-01"]},
    {"user": [1], "item": [1], "timestamp": [float("nan")]},
    {"user": [1], "item": [1], "timestamp": [2**63 - 1]},
    {"user": [1, "a"], "item": [1, 2], "timestamp": [1, 2]},
]
ITEMS: list[Any] = [
    *({}, {"item": []}, {"item": [0]}, {"item": [0], "a": []}, {"item": [0], "a": ["x", "y"]}, {"a": ["x"]}, 1),
    *({"item": [0, 0], "a": ["x", "y"]}, {"item": [None], "a": ["x"]}, {"item": [[1]], "a": ["x"]}),
    *({"item": [0], "a": [value]} for value in (1, 10**30, LONG, "\0", None, [], [[]], [[1.0]], b"x", {}, {"b": 1.0})),
    *({"item": [0], "a": [value]} for value in (float("inf"), 1e300, [], [None], [float("nan")], [1.0, "x"], object())),
    {"item": [0, 1], "a": [[1.0], [1.0, 2.0]]},
    {"item": [0], 5: [1.0]},
    {"item": [0], LONG: [1.0]},
    {"item": [0], "a": np.zeros((1, 2, 3))},
    {"item": [0], "a": np.zeros((1, 0))},
    {"item": [0]} | {f"c{number}": [1.0] for number in range(1_001)},
]
TAILS: list[Any] = [
    Tail(*(np.zeros(2, kind) for kind in (np.int64, np.int64, np.uint8)), np.array(offsets, np.int64))
    for offsets in ([0, 2], [0, 3], [2, 0], [0], [], [0, 1, 2], [-1, 2])
] + [
    Tail(np.array([0]), np.array([2**62]), np.array([0]), np.array([0, 1])),
    Tail(np.array([0]), np.array([0.5]), np.array([0]), np.array([0, 1])),
    Tail(np.array([0]), np.array([0]), np.array([300]), np.array([0, 1])),
    Tail(np.array([[0]]), np.array([0]), np.array([0]), np.array([0, 1])),
    Tail(np.array([0]), np.array([0]), np.array([0]), np.array([0, 1]), {"surface": [None]}),
    Tail(np.array([0]), np.array([0]), np.array([0]), np.array([0, 1]), [("surface", [None])]),  # type: ignore[arg-type]
    Tail(*(np.zeros(10**7, kind) for kind in (np.int64, np.int64, np.uint8)), np.array([0, 10**7])),
]
TIMES: list[Any] = [
    -1,
    0,
    2**62,
    2**63,
    10**30,
    float("nan"),
    "now",
    "2024-01-01",
    [1],
    [[1]],
    [None],
    np.array([1, 2]),
]

EARLIER = ["nothing", "closed", "no store", "empty CURRENT", "CURRENT without a generation"]
"""What happened since the store was opened, for calls without arguments."""
FEATURES: list[Any] = [
    *(5, "device", ["device"], {5: 1}, {"devise": "tv"}, {"device": "tv", LONG: 1}, [("device", "tv")]),
    *({"device": one} for one in (1.5, b"x", [], [[]], [["tv"]], LONG, "\0", "\ud800", object(), 10**30, {}, {"tv"})),
    *({"device": one} for one in (float("nan"), [None], [LONG], np.array(["tv"]), np.array([[1]]), ["tv", "tv"])),
    *({"hour": one} for one in ("noon", 1e300, 10**400, float("inf"), [[1.0]], b"x", object(), [], "", {}, [1, "x"])),
    {"hour": np.zeros((1, 1))},
    {"hour": np.array(["2024-01-01"], "datetime64[D]")},
]
FEATURE_READER = RowFeatureReader.of(
    RowFeatures({"device": np.zeros(1, np.int32), "hour": np.ones(1, np.float32)}),
    {"device": Vocabulary.from_ids(["phone", "tv"]), "hour": None},
)
REQUESTS: dict[str, list[Any]] = {"users": IDS, "tail": TAILS, "now": TIMES}


@dataclass(frozen=True)
class ApiCall:
    """A public function, hostile values of one argument, and a call with such a value in a copy of the world."""

    function: Callable[..., Any]
    values: Sequence[Any]
    call: Callable[[Path, Any], Any]


def scored(call: Callable[[Scorer, Any], Any]) -> Callable[[Path, Any], Any]:
    """A call of a scorer."""

    def run(folder: Path, value: Any) -> None:
        with Scorer.open(model_of(folder), folder / "store") as scorer:
            call(scorer, value)

    return run


def retrieving(call: Callable[[Scorer, Any], Any]) -> Callable[[Path, Any], Any]:
    """A call of a scorer with an index of items."""

    def run(folder: Path, value: Any) -> None:
        index_items(folder)
        with Scorer.open(folder / "model", folder / "store", index=folder / "model.index") as scorer:
            call(scorer, value)

    return run


def opened(call: Callable[[StoreReader, Any], Any]) -> Callable[[Path, Any], Any]:
    """A call of a store's reader."""

    def run(folder: Path, value: Any) -> None:
        with StoreReader.open(folder / "store") as store:
            call(store, value)

    return run


def happen(what: str, store: Path, opened: Scorer | StoreReader) -> None:
    """Do one of EARLIER."""
    match what:
        case "closed":
            opened.close()
        case "no store":
            shutil.rmtree(store)
        case "empty CURRENT":
            (store / "CURRENT").write_bytes(b"")
        case "CURRENT without a generation":
            (store / "CURRENT").write_bytes((store / "CURRENT").read_bytes().replace(b"1", b"9"))


def scored_after(call: Callable[[Scorer], Any]) -> Callable[[Path, Any], Any]:
    """A call of a scorer after something happened."""

    def run(folder: Path, value: Any) -> None:
        with Scorer.open(model_of(folder), folder / "store") as scorer:
            happen(value, folder / "store", scorer)
            call(scorer)

    return run


def opened_after(call: Callable[[StoreReader], Any]) -> Callable[[Path, Any], Any]:
    """A call of a store's reader after something happened."""

    def run(folder: Path, value: Any) -> None:
        with StoreReader.open(folder / "store") as store:
            happen(value, folder / "store", store)
            call(store)

    return run


def request(function: Callable[..., Any], name: str) -> Callable[[Path, Any], Any]:
    """A request of a scorer for a user, with another value of an argument."""
    return scored(lambda scorer, value: function(scorer, **{"users": [100], name: value}))


def logged(call: Callable[[EventLog, Any], Any]) -> Callable[[Path, Any], Any]:
    """A call of a log."""
    return lambda folder, value: call(log_of(folder), value)


def from_frame(name: str) -> Callable[[Path, Any], Any]:
    """Make a log with another value of an argument."""
    return lambda folder, value: EventLog.from_frame(small_frame(), folder / "made", **COLUMNS | {name: value})


def from_columns(name: str) -> Callable[[Path, Any], Any]:
    """Make a log with another name of a column."""
    return lambda folder, value: EventLog.from_frame(
        small_frame(), folder / "made", time_unit="ms", columns=SourceColumns(**{name: value})
    )


def refreshed(**names: str) -> Callable[[Path, Any], Any]:
    """A full refresh with another value of an argument or of an option."""
    return lambda folder, value: refresh(
        model_of(folder),
        log_of(folder),
        folder / "store",
        **{name: value if not option else RefreshOptions(**{option: value}) for name, option in names.items()},
    )


def open_scorer(name: str) -> Callable[[Path, Any], Any]:
    """Open a scorer with another value of an argument."""

    def run(folder: Path, value: Any) -> None:
        arguments = {"model": folder / "model", "store": folder / "store", name: value}
        Scorer.open(**arguments).close()

    return run


API_CALLS: dict[str, ApiCall] = {
    "EventLog.open(path)": ApiCall(EventLog.open, PATHS, lambda folder, value: EventLog.open(value)),
    "EventLog.open(last_segment)": ApiCall(
        EventLog.open, INTS, lambda folder, value: EventLog.open(folder / "log", last_segment=value)
    ),
    "EventLog.from_frame(frame)": ApiCall(
        EventLog.from_frame, FRAMES, lambda folder, value: EventLog.from_frame(value, folder / "made", time_unit="ms")
    ),
    **{
        f"EventLog.from_frame({name})": ApiCall(EventLog.from_frame, WORDS, from_frame(name))
        for name in ("time_unit", "on_bad_rows")
    },
    **{
        f"EventLog.from_frame(columns.{name})": ApiCall(EventLog.from_frame, WORDS, from_columns(name))
        for name in ("user", "timestamp", "action", "sequence")
    },
    "EventLog.from_frame(items)": ApiCall(EventLog.from_frame, ITEMS, from_frame("items")),
    "EventLog[user]": ApiCall(
        EventLog.__getitem__, [1, -1, 10**18, 10**30, -(10**30), *WORDS], logged(lambda log, value: log[value])
    ),
    "EventLog.gather(user_rows)": ApiCall(EventLog.gather, ROWS, logged(lambda log, value: log.gather(value))),
    "EventLog.gather(counts)": ApiCall(EventLog.gather, ROWS, logged(lambda log, value: log.gather([0], value))),
    "EventLog.slice(user_row)": ApiCall(EventLog.slice, INTS, logged(lambda log, value: log.slice(value))),
    "EventLog.slice(stop)": ApiCall(EventLog.slice, INTS, logged(lambda log, value: log.slice(0, 0, value))),
    "EventLog.changed_users(after)": ApiCall(
        EventLog.changed_users, INTS, logged(lambda log, value: log.changed_users(value))
    ),
    "EventLog.new_events(after)": ApiCall(
        EventLog.new_events, INTS, logged(lambda log, value: log.new_events([0], value))
    ),
    "VistaModel.from_pretrained(path)": ApiCall(
        VistaModel.from_pretrained, PATHS, lambda folder, value: VistaModel.from_pretrained(value)
    ),
    "VistaModel.with_tail(tail_len)": ApiCall(
        VistaModel.with_tail, INTS, lambda folder, value: model_of(folder).with_tail(value)
    ),
    "refresh(until)": ApiCall(refresh, [*WORDS, *INTS], refreshed(until="")),
    "refresh(created_at)": ApiCall(refresh, INTS, refreshed(created_at="")),
    "refresh(options.users_per_batch)": ApiCall(RefreshOptions, INTS, refreshed(options="users_per_batch")),
    "refresh_incremental(created_at)": ApiCall(
        refresh_incremental,
        INTS,
        lambda folder, value: refresh_incremental(model_of(folder), log_of(folder), folder / "store", created_at=value),
    ),
    "forget(events)": ApiCall(
        forget,
        FRAMES,
        lambda folder, value: forget(model_of(folder), log_of(folder), folder / "store", value),
    ),
    "erase(user_ids)": ApiCall(erase, IDS, lambda folder, value: erase(folder / "store", value)),
    "merge(store of a part)": ApiCall(
        merge, PATHS, lambda folder, value: merge(model_of(folder), [(value, log_of(folder))], folder / "merged")
    ),
    "Scorer.open(model)": ApiCall(Scorer.open, PATHS, open_scorer("model")),
    "Scorer.open(store)": ApiCall(Scorer.open, PATHS, open_scorer("store")),
    "Scorer.open(on_missing)": ApiCall(Scorer.open, WORDS, open_scorer("on_missing")),
    "Scorer.open(task)": ApiCall(Scorer.open, WORDS, open_scorer("task")),
    "Scorer.open(device)": ApiCall(Scorer.open, WORDS, open_scorer("device")),
    "Scorer.open(key)": ApiCall(Scorer.open, KEYS, open_scorer("key")),
    "Scorer.open(max_age_s)": ApiCall(Scorer.open, FLOATS, open_scorer("max_age_s")),
    "Scorer.open(precision)": ApiCall(Scorer.open, WORDS, open_scorer("precision")),
    "Scorer.predict(users)": ApiCall(Scorer.predict, IDS, scored(lambda scorer, value: scorer.predict(value, [0]))),
    "Scorer.predict(candidates)": ApiCall(
        Scorer.predict, IDS, scored(lambda scorer, value: scorer.predict([100], value))
    ),
    "Scorer.predict(tail)": ApiCall(
        Scorer.predict, TAILS, scored(lambda scorer, value: scorer.predict([100], [0], tail=value))
    ),
    "Scorer.predict(now)": ApiCall(
        Scorer.predict, TIMES, scored(lambda scorer, value: scorer.predict([100], [0], now=value))
    ),
    "Scorer.predict(request)": ApiCall(
        Scorer.predict, FEATURES, scored(lambda scorer, value: scorer.predict([100], [0], request=value))
    ),
    "Scorer.predict(request) of a model with request features": ApiCall(
        Scorer.predict, FEATURES, lambda folder, value: PairFeatures.of(FEATURE_READER, value, 1, 1)
    ),
    "Scorer.rank(top_k)": ApiCall(Scorer.rank, INTS, scored(lambda scorer, value: scorer.rank(100, top_k=value))),
    "Scorer.retrieve(users)": ApiCall(Scorer.retrieve, IDS, retrieving(lambda scorer, value: scorer.retrieve(value))),
    "Scorer.retrieve(top_k)": ApiCall(
        Scorer.retrieve, INTS, retrieving(lambda scorer, value: scorer.retrieve([100], top_k=value))
    ),
    "Scorer.retrieve(num_candidates)": ApiCall(
        Scorer.retrieve, INTS, retrieving(lambda scorer, value: scorer.retrieve([100], num_candidates=value))
    ),
    "Scorer.retrieve(within)": ApiCall(
        Scorer.retrieve, IDS, retrieving(lambda scorer, value: scorer.retrieve([100], within=value))
    ),
    "Scorer.retrieve(where)": ApiCall(
        Scorer.retrieve, [*FEATURES, *WORDS], retrieving(lambda scorer, value: scorer.retrieve([100], where=value))
    ),
    "Scorer.encode(candidates)": ApiCall(Scorer.encode, IDS, scored(lambda scorer, value: scorer.encode(value))),
    "Scorer.user_vectors(users)": ApiCall(
        Scorer.user_vectors, IDS, scored(lambda scorer, value: scorer.user_vectors(value))
    ),
    "Scorer.explain(user)": ApiCall(
        Scorer.explain, [*INTS, *WORDS], scored(lambda scorer, value: scorer.explain(value, [0]))
    ),
    "Scorer.explain(candidates)": ApiCall(
        Scorer.explain, IDS, scored(lambda scorer, value: scorer.explain(100, value))
    ),
    "Scorer.explain(task)": ApiCall(
        Scorer.explain, WORDS, scored(lambda scorer, value: scorer.explain(100, [0], task=value))
    ),
    "Scorer.explain(now)": ApiCall(
        Scorer.explain, TIMES, scored(lambda scorer, value: scorer.explain(100, [0], now=value))
    ),
    "Scorer.rank(user)": ApiCall(Scorer.rank, [*INTS, *WORDS], scored(lambda scorer, value: scorer.rank(value))),
    "Scorer.follow(every_s)": ApiCall(Scorer.follow, FLOATS, scored(lambda scorer, value: scorer.follow(value))),
    "EventLog.__contains__": ApiCall(EventLog.__contains__, [*INTS, *WORDS], logged(lambda log, value: value in log)),
    "EventLog.gather_ranges(starts)": ApiCall(
        EventLog.gather_ranges, ROWS, logged(lambda log, value: log.gather_ranges([0], value, [1]))
    ),
    "EventLog.gather_ranges(stops)": ApiCall(
        EventLog.gather_ranges, ROWS, logged(lambda log, value: log.gather_ranges([0], [0], value))
    ),
    "EventLog.counts_before(time)": ApiCall(
        EventLog.counts_before, INTS, logged(lambda log, value: log.counts_before(value))
    ),
    "EventLog.has_boundary(after)": ApiCall(
        EventLog.has_boundary, INTS, logged(lambda log, value: log.has_boundary(value))
    ),
    "EventLog.from_frame(path)": ApiCall(
        EventLog.from_frame,
        NEW_PATHS,
        lambda folder, value: EventLog.from_frame(small_frame(), value, **COLUMNS),
    ),
    "VistaModel.save_pretrained(folder)": ApiCall(
        VistaModel.save_pretrained, NEW_PATHS, lambda folder, value: model_of(folder).save_pretrained(value)
    ),
    "refresh(store)": ApiCall(
        refresh, NEW_PATHS, lambda folder, value: refresh(model_of(folder), log_of(folder), value)
    ),
    "refresh_incremental(store)": ApiCall(
        refresh_incremental,
        NEW_PATHS,
        lambda folder, value: refresh_incremental(model_of(folder), log_of(folder), value),
    ),
    "forget(store)": ApiCall(
        forget, NEW_PATHS, lambda folder, value: forget(model_of(folder), log_of(folder), value, first_event())
    ),
    "erase(path)": ApiCall(erase, NEW_PATHS, lambda folder, value: erase(value, [101])),
    "merge(store)": ApiCall(
        merge,
        NEW_PATHS,
        lambda folder, value: merge(model_of(folder), [(folder / "store", log_of(folder))], value),
    ),
    "train(config.run_dir)": ApiCall(
        train,
        NEW_PATHS,
        lambda folder, value: train(small_config(log_of(folder), value, optim__epochs=1)),
    ),
    "StoreReader.open(path)": ApiCall(StoreReader.open, PATHS, lambda folder, value: StoreReader.open(value).close()),
    "StoreReader.open(summarizer_id)": ApiCall(
        StoreReader.open, KEYS, lambda folder, value: StoreReader.open(folder / "store", summarizer_id=value).close()
    ),
    "StoreReader.get_many(user_ids)": ApiCall(
        StoreReader.get_many, IDS, opened(lambda store, value: store.get_many(value))
    ),
    "StoreReader.states(user_ids)": ApiCall(StoreReader.states, IDS, opened(lambda store, value: store.states(value))),
    **{
        f"Scorer.{function.__name__}({name})": ApiCall(function, values, request(function, name))
        for function in (Scorer.user_vectors, Scorer.counted_items, Scorer.catalog_scores)
        for name, values in REQUESTS.items()
    },
    **{
        f"Scorer.score({name})": ApiCall(Scorer.score, values, request(partial(Scorer.score, candidates=[0]), name))
        for name, values in REQUESTS.items()
    },
    "Scorer.score(candidates)": ApiCall(Scorer.score, IDS, scored(lambda scorer, value: scorer.score([100], value))),
    "Scorer.rank(candidates)": ApiCall(
        Scorer.rank, IDS, scored(lambda scorer, value: scorer.rank(100, candidates=value))
    ),
    "Scorer.rank(exclude)": ApiCall(Scorer.rank, IDS, scored(lambda scorer, value: scorer.rank(100, exclude=value))),
    **{
        f"Scorer.{function.__name__} after": ApiCall(function, EARLIER, scored_after(function))
        for function in (Scorer.close, Scorer.reload, Scorer.stats, Scorer.item_vectors)
    },
    "Scorer.predict after": ApiCall(
        Scorer.predict, EARLIER, scored_after(lambda scorer: scorer.predict([100], [0]) and scorer.reload())
    ),
    "ScorerStats.latency_ms(quantile)": ApiCall(
        ScorerStats.latency_ms, FLOATS, scored(lambda scorer, value: scorer.stats().latency_ms(value))
    ),
    "StoreReader.keys after": ApiCall(StoreReader.keys, EARLIER, opened_after(lambda store: list(store.keys()))),
    "StoreReader.reload after": ApiCall(StoreReader.reload, EARLIER, opened_after(StoreReader.reload)),
    "StoreReader.close after": ApiCall(StoreReader.close, EARLIER, opened_after(StoreReader.close)),
    "EventLog.verify(newer_than)": ApiCall(
        EventLog.verify, INTS, logged(lambda log, value: log.verify(newer_than=value))
    ),
    "EventLog.sources_digest(upto)": ApiCall(
        EventLog.sources_digest, INTS, logged(lambda log, value: log.sources_digest(value))
    ),
}
"""By what is called and which argument is hostile. Values have a type that the annotation of the argument allows."""
