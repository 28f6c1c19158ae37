"""Calls of the public API with one hostile argument each."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.conftest import small_config, small_frame
from tests.faults.operations import COLUMNS, first_event, index_items, log_of, model_of
from vista import EventLog, Scorer, StoreReader, VistaModel, train
from vista.config import SourceColumns
from vista.log.histories import RowFeatures
from vista.log.vocabulary import Vocabulary
from vista.model.features import RowFeatureReader
from vista.refresh import RefreshOptions, erase, forget, merge, refresh, refresh_incremental
from vista.scorer import ScorerStats, Tail
from vista.scorer.request_features import PairFeatures

LONG = "x" * 100_000
PATHS: list[Any] = [
    *("", "/", "/dev/null", "/nowhere/at/all", "/etc/passwd", "x" * 5000, "x" * 250, "a\0b", "\ud800"),
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
    *(-1, 0, 2**62, 2**63, 10**30, float("nan"), "now", "2024-01-01", [1], [[1]], [None]),
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


@dataclass(frozen=True)
class ApiCall:
    """A public function, hostile values of one argument, and a call with such a value in a copy of the world."""

    function: Callable[..., Any]
    values: Sequence[Any]
    call: Callable[[Path, Any], Any]


Opened = Callable[[Path], AbstractContextManager[Any]]
"""Opens, in a copy of the world, what has the method that is called."""


def a_scorer(folder: Path) -> Scorer:
    return Scorer.open(model_of(folder), folder / "store")


def a_scorer_with_index(folder: Path) -> Scorer:
    index_items(folder)
    return Scorer.open(folder / "model", folder / "store", index=folder / "model.index")


def a_store(folder: Path) -> StoreReader:
    return StoreReader.open(folder / "store")


def a_log(folder: Path) -> AbstractContextManager[EventLog]:
    return nullcontext(log_of(folder))


def a_model(folder: Path) -> AbstractContextManager[VistaModel]:
    return nullcontext(model_of(folder))


def methods(
    opened: Opened, function: Callable[..., Any], hostile: Mapping[str, Sequence[Any]], **usual: Any
) -> dict[str, ApiCall]:
    """Calls of a method with hostile values of one argument, and the usual ones of the others."""

    def call(folder: Path, value: Any, name: str) -> None:
        with opened(folder) as one:
            function(one, **usual | {name: value})

    return {
        f"{function.__qualname__}({name})": ApiCall(function, values, partial(call, name=name))
        for name, values in hostile.items()
    }


def functions(
    function: Callable[..., Any], usual: Callable[[Path], dict[str, Any]], hostile: Mapping[str, Sequence[Any]]
) -> dict[str, ApiCall]:
    """Calls of a function with hostile values of one argument and usual ones of the others; what it opens is closed."""

    def call(folder: Path, value: Any, name: str) -> None:
        opened = function(**usual(folder) | {name: value})
        if isinstance(opened, Scorer | StoreReader):
            opened.close()

    return {
        f"{function.__qualname__}({name})": ApiCall(function, values, partial(call, name=name))
        for name, values in hostile.items()
    }


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


def after(opened: Opened, *functions: Callable[..., Any]) -> dict[str, ApiCall]:
    """Calls of methods without arguments after one of EARLIER happened."""

    def call(folder: Path, value: Any, function: Callable[..., Any]) -> None:
        with opened(folder) as one:
            happen(value, folder / "store", one)
            function(one)

    return {f"{one.__qualname__} after": ApiCall(one, EARLIER, partial(call, function=one)) for one in functions}


def world_of(folder: Path) -> dict[str, Any]:
    """The model, log, and store of a copy of the world, by the names that refreshes give them."""
    return {"model": model_of(folder), "log": log_of(folder), "store": folder / "store"}


def frame_of(folder: Path) -> dict[str, Any]:
    return {"frame": small_frame(), "path": folder / "made", **COLUMNS}


REQUEST = {"users": IDS, "tail": TAILS, "now": TIMES}


def predict_and_reload(folder: Path, value: Any) -> None:
    with a_scorer(folder) as scorer:
        happen(value, folder / "store", scorer)
        scorer.predict([100], [0])
        scorer.reload()


def list_keys(folder: Path, value: Any) -> None:
    with a_store(folder) as store:
        happen(value, folder / "store", store)
        list(store.keys())


def latency(folder: Path, value: Any) -> None:
    with a_scorer(folder) as scorer:
        scorer.stats().latency_ms(value)


def from_columns(name: str) -> ApiCall:
    """Make a log with another name of a column."""
    return ApiCall(
        EventLog.from_frame,
        WORDS,
        lambda folder, value: EventLog.from_frame(
            small_frame(), folder / "made", time_unit="ms", columns=SourceColumns(**{name: value})
        ),
    )


RAW_IDS: list[Any] = [*INTS, *WORDS]
API_CALLS: dict[str, ApiCall] = {
    **functions(EventLog.open, lambda folder: {"path": folder / "log"}, {"path": PATHS, "last_segment": INTS}),
    **functions(
        EventLog.from_frame, frame_of, {"time_unit": WORDS, "on_bad_rows": WORDS, "items": ITEMS, "path": NEW_PATHS}
    ),
    **functions(EventLog.from_frame, lambda folder: {"path": folder / "made", "time_unit": "ms"}, {"frame": FRAMES}),
    **{f"columns.{name}": from_columns(name) for name in ("user", "timestamp", "action", "sequence")},
    **methods(a_log, EventLog.__getitem__, {"user_id": [1, -1, 10**18, 10**30, -(10**30), *WORDS]}),
    **methods(a_log, EventLog.__contains__, {"user_id": RAW_IDS}),
    **methods(a_log, EventLog.gather, {"user_rows": ROWS, "counts": ROWS}, user_rows=[0]),
    **methods(a_log, EventLog.gather_ranges, {"starts": ROWS, "stops": ROWS}, user_rows=[0], starts=[0], stops=[1]),
    **methods(a_log, EventLog.slice, {"user_row": INTS, "stop": INTS}, user_row=0),
    **methods(a_log, EventLog.changed_users, {"after": INTS}),
    **methods(a_log, EventLog.new_events, {"after": INTS}, user_rows=[0]),
    **methods(a_log, EventLog.counts_before, {"time": INTS}),
    **methods(a_log, EventLog.has_boundary, {"after": INTS}),
    **methods(a_log, EventLog.verify, {"newer_than": INTS}),
    **methods(a_log, EventLog.sources_digest, {"upto": INTS}),
    **functions(VistaModel.from_pretrained, lambda folder: {}, {"folder": PATHS}),
    **methods(a_model, VistaModel.with_tail, {"tail_len": INTS}),
    **methods(a_model, VistaModel.save_pretrained, {"folder": NEW_PATHS}),
    "train(config.run_dir)": ApiCall(
        train, NEW_PATHS, lambda folder, value: train(small_config(log_of(folder), value, optim__epochs=1))
    ),
    **functions(refresh, world_of, {"until": [*WORDS, *INTS], "created_at": INTS, "store": NEW_PATHS}),
    "RefreshOptions(users_per_batch)": ApiCall(
        RefreshOptions,
        INTS,
        lambda folder, value: refresh(**world_of(folder), options=RefreshOptions(users_per_batch=value)),
    ),
    **functions(refresh_incremental, world_of, {"created_at": INTS, "store": NEW_PATHS}),
    **functions(
        forget, lambda folder: world_of(folder) | {"events": first_event()}, {"events": FRAMES, "store": NEW_PATHS}
    ),
    **functions(
        erase, lambda folder: {"path": folder / "store", "user_ids": [101]}, {"user_ids": IDS, "path": NEW_PATHS}
    ),
    "merge(store of a part)": ApiCall(
        merge, PATHS, lambda folder, value: merge(model_of(folder), [(value, log_of(folder))], folder / "merged")
    ),
    **functions(
        merge,
        lambda folder: {"model": model_of(folder), "parts": [(folder / "store", log_of(folder))]},
        {"store": NEW_PATHS},
    ),
    **functions(
        Scorer.open,
        lambda folder: {"model": folder / "model", "store": folder / "store"},
        {"model": PATHS, "store": PATHS, "adapter": PATHS, "key": KEYS, "max_age_s": FLOATS}
        | dict.fromkeys(("on_missing", "task", "device", "precision"), WORDS),
    ),
    **methods(a_scorer, Scorer.score, REQUEST | {"candidates": IDS}, users=[100], candidates=[0]),
    **methods(
        a_scorer, Scorer.predict, REQUEST | {"candidates": IDS, "request": FEATURES}, users=[100], candidates=[0]
    ),
    "Scorer.predict(request) of a model with request features": ApiCall(
        Scorer.predict, FEATURES, lambda folder, value: PairFeatures.of(FEATURE_READER, value, 1, 1)
    ),
    **methods(
        a_scorer,
        Scorer.rank,
        {"user": RAW_IDS, "top_k": INTS, "candidates": IDS, "exclude": IDS, "diversity": FLOATS},
        user=100,
    ),
    **methods(
        a_scorer_with_index,
        Scorer.retrieve,
        {"users": IDS, "top_k": INTS, "num_candidates": INTS, "within": IDS, "where": [*FEATURES, *WORDS]},
        users=[100],
    ),
    **methods(a_scorer, Scorer.encode, {"candidates": IDS}),
    **methods(a_scorer, Scorer.user_vectors, REQUEST, users=[100]),
    **methods(a_scorer, Scorer.counted_items, REQUEST, users=[100]),
    **methods(a_scorer, Scorer.catalog_scores, REQUEST, users=[100]),
    **methods(
        a_scorer,
        Scorer.explain,
        {"user": RAW_IDS, "items": IDS, "candidates": IDS, "task": WORDS, "now": TIMES},
        user=100,
        items=[0],
    ),
    **methods(a_scorer, Scorer.follow, {"every_s": FLOATS}),
    **after(a_scorer, Scorer.close, Scorer.reload, Scorer.stats, Scorer.item_vectors),
    "Scorer.predict after": ApiCall(Scorer.predict, EARLIER, predict_and_reload),
    "ScorerStats.latency_ms(quantile)": ApiCall(ScorerStats.latency_ms, FLOATS, latency),
    **functions(StoreReader.open, lambda folder: {"path": folder / "store"}, {"path": PATHS, "summarizer_id": KEYS}),
    **methods(a_store, StoreReader.get_many, {"user_ids": IDS}),
    **methods(a_store, StoreReader.record, {"user_ids": IDS}, wanted=lambda spec: True),
    **methods(a_store, StoreReader.states, {"user_ids": IDS}),
    **after(a_store, StoreReader.reload, StoreReader.close),
    "StoreReader.keys after": ApiCall(StoreReader.keys, EARLIER, list_keys),
}
"""By what is called and which argument is hostile. Values have a type that the annotation of the argument allows."""
