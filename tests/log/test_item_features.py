"""Item features of a log: merged over segments as a plain dictionary is, compacted, and refused if damaged."""

from __future__ import annotations

import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.log.feature_tables import add_items, features_of, table_of, user_features_of
from tests.log.log_oracle import contents, replace_array
from tests.log.test_event_log import flip
from vista.errors import LogFormatError
from vista.log.compaction import compact_log
from vista.log.deletions import erase_users
from vista.log.event_log import EventLog
from vista.log.inspection import LogStats

NUMBERS = st.floats(-9, 9, width=32)
VALUES = {
    "brand": st.none() | st.sampled_from("abcß"),
    "tags": st.none() | st.lists(st.sampled_from(["x", "y", "z z", ""]), max_size=4),
    "price": st.none() | NUMBERS,
    "vector": st.none() | st.lists(NUMBERS, min_size=2, max_size=2),
}
SCHEMA = {"item": pl.Int64, "brand": pl.String, "tags": pl.List(pl.String), "price": pl.Float32,
          "vector": pl.List(pl.Float32)}  # fmt: skip


@st.composite
def tables(draw: st.DrawFn) -> dict[str, list[Any]]:
    """A table of some items, of which 0 is always in the log, and 9 never."""
    items = [0, *draw(st.lists(st.sampled_from([1, 2, 3, 4, 9]), unique=True))]
    names = draw(st.lists(st.sampled_from(sorted(VALUES)), unique=True, min_size=1))
    table = {name: [draw(VALUES[name]) for _ in items] for name in names}
    if table.get("vector") == [None] * len(items):
        table["vector"][0] = [1.0, 2.0]
    return {"item": items} | table


STEPS = st.lists(st.tuples(st.none() | st.sets(st.sampled_from([1, 2, 3, 4]), min_size=1), tables()), max_size=4)
"""Per segment: items with new events, if it has events, and a table."""


class Model:
    """The expected features, as dictionaries."""

    def __init__(self) -> None:
        self.items: set[int] = set()
        self.columns: dict[str, dict[int, Any]] = {}

    def append(self, new_items: set[int], table: dict[str, list[Any]]) -> None:
        self.items |= new_items
        for name, values in table.items():
            if name == "item":
                continue
            column = self.columns.setdefault(name, {})
            for item, value in zip(table["item"], values, strict=True):
                if item not in self.items:
                    continue
                if name in ("brand", "tags"):
                    value = sorted({value} if isinstance(value, str) else set(value or ())) if value else []
                    value = [text for text in value if text]
                column.pop(item, None)
                if value not in (None, []):
                    column[item] = value


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, compacted=st.integers(0, 4))
def test_segments_are_merged_like_dictionaries(
    steps: list[tuple[set[int] | None, dict[str, list[Any]]]], compacted: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """With a compaction after one of the segments: it changes nothing, and later segments build on it."""
    path, model = tmp_path_factory.mktemp("merge") / "log", Model()
    known: dict[str, list[str]] = {}
    steps = [({0}, {"item": [0], "brand": ["a"]}), *steps]
    for number, (new, table) in enumerate(steps):
        users = None
        if new is not None:
            users = {"user": [number] * len(new), "item": sorted(new), "timestamp": [number] * len(new)}
        frame = pl.DataFrame(table, schema_overrides={name: SCHEMA[name] for name in table})
        log = EventLog.from_frame(users, path, time_unit="s", append=number > 0, items=frame)
        model.append(new or set(), table)
        if number == compacted:
            compact_log(path)
            log = EventLog.open(path)
        assert features_of(log) == model.columns
        features = log.item_features
        assert list(features) == list(model.columns)
        for name, column in features.items():
            if column.values is not None:
                values = column.values.ids(np.arange(len(column.values))).tolist()
                assert values[: len(known.get(name, []))] == known.get(name, [])  # codes never change
                known[name] = values
    uncompacted = features_of(log)
    compact_log(path)
    log = EventLog.open(path)
    log.verify()
    assert features_of(log) == uncompacted
    for name, values in known.items():
        known_values = log.item_features[name].values
        assert known_values is not None and known_values.ids(np.arange(len(known_values))).tolist() == values


def test_features_survive_deletions_and_are_read_as_of_a_segment(tmp_path: Path) -> None:
    add_items(tmp_path, table_of(tmp_path, item=[10, 20], brand=["a", "b"]))
    path = tmp_path / "log"
    add_items(tmp_path, table_of(tmp_path, item=[20, 50], brand=["c", "a"]), append=True, events=[(3, 50, 9)])
    erase_users(path, [1])
    digest = EventLog.open(path).sources_digest(1)
    add_items(tmp_path, table_of(tmp_path, item=[20], brand=["b"]), append=True)
    log = EventLog.open(path)
    assert features_of(log) == {"brand": {10: ["a"], 20: ["b"], 50: ["a"]}}
    assert features_of(EventLog.open(path, last_segment=3)) == {"brand": {10: ["a"], 20: ["c"], 50: ["a"]}}
    assert features_of(EventLog.open(path, last_segment=1)) == {"brand": {10: ["a"], 20: ["b"]}}
    assert log.sources_digest(1) == digest != log.sources_digest(4)
    assert log.changed_users(3).tolist() == []
    assert LogStats.of(log).features == ["brand: category of 3 values, 60% of items"]
    assert "feature brand: category of 3 values, 60% of items" in str(LogStats.of(log))
    before = log.sources_digest(4)
    compact_log(path)
    assert EventLog.open(path).sources_digest(4) == before


def test_features_of_one_complete_table_are_not_copied(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((4, 30_000)).astype(np.float32)
    add_items(tmp_path, table_of(tmp_path, item=[40, 10, 20, 30], v=vectors.tolist()))
    log = EventLog.open(tmp_path / "log")
    tracemalloc.start()
    features = log.item_features
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert log.item_features is features
    column = features["v"]
    assert column.kind == "vector" and not column.data.flags.writeable
    np.testing.assert_array_equal(column.data, vectors[[1, 2, 3, 0]])
    assert peak < vectors.nbytes


@pytest.fixture(scope="module")
def full_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two segments with a column of each kind, and two with features of users."""
    folder = tmp_path_factory.mktemp("features")
    columns = {"brand": ["a", "b"], "tags": [["x"], ["x", "y"]], "price": [1.0, 2.0], "v": [[1.0, 2.0], [3.0, 4.0]]}
    add_items(folder, table_of(folder, item=[10, 20], **columns))
    add_items(folder, table_of(folder, item=[20, 40], **columns | {"brand": ["c", "a"]}), append=True)
    for users in ([1, 2], [2]):
        regions = {"user": users, "region": ["n", "s"][: len(users)], "age": [1.0, 2.0][: len(users)]}
        EventLog.from_frame(None, folder / "log", append=True, users=regions)
    return folder / "log"


@pytest.fixture
def log_folder(full_log: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(full_log, tmp_path / "log"))


@pytest.mark.parametrize("compacted", [False, True])
@pytest.mark.parametrize(
    ("folder", "num_files", "read"),
    [("features", 11, lambda log: log.item_features), ("user_features", 6, lambda log: log.user_features)],
    ids=["items", "users"],
)
def test_a_changed_byte_in_any_file_of_features_is_found_when_they_are_read(
    log_folder: Path, folder: str, num_files: int, read: Callable[[EventLog], object], compacted: bool
) -> None:
    if compacted:
        compact_log(log_folder)
    good = features_of(EventLog.open(log_folder)), user_features_of(EventLog.open(log_folder))
    files = sorted(log_folder.glob(f"*/{folder}/*"))
    assert len(files) == (num_files if compacted else 2 * num_files)
    for number, file in enumerate(files):
        content = file.read_bytes()
        place = (0, 70, len(content) - 1)[number % 3]
        flip(file, place, place % 8)
        with pytest.raises(LogFormatError, match=file.name):
            read(EventLog.open(log_folder))
        file.write_bytes(content)
        file.unlink()
        with pytest.raises(LogFormatError, match=f"{file.name}: missing"):
            EventLog.open(log_folder)
        file.write_bytes(content)
    assert (features_of(EventLog.open(log_folder)), user_features_of(EventLog.open(log_folder))) == good


def test_an_append_finds_damaged_values(log_folder: Path) -> None:
    """The codes of the new segment would depend on them."""
    flip(log_folder / "segment-000001" / "features" / "0.values.ids.npy", -1)
    before = contents(log_folder)
    with pytest.raises(LogFormatError, match=r"0\.values\.ids\.npy: its content has changed"):
        EventLog.from_frame(None, log_folder, append=True, items={"item": [10], "brand": ["b"]})
    assert contents(log_folder) == before


ARRAYS: list[tuple[str, Callable[[np.ndarray], np.ndarray], str]] = [
    ("items", lambda items: items[::-1].copy(), "are not ascending"),
    ("items", lambda items: items[:1], r"column 0 \('brand'\) do not match the 1 rows of items\.npy"),
    ("items", lambda items: np.array([0, 4]), "features of item row 4, but the manifest says 4 items"),
    ("items", lambda items: items.astype(np.int32), "has type int32"),
    ("0.codes", lambda codes: codes + 7, "codes 0 to 7 for 3 values"),
    ("0.values.offsets", lambda offsets: offsets[:1], "does not match"),
    (
        "3.vectors",
        lambda vectors: vectors[:, :1],
        "is a vector of 2 numbers, but in an earlier segment .* of 1 numbers",
    ),
]


@pytest.mark.parametrize(("name", "change", "message"), ARRAYS)
def test_arrays_that_contradict_each_other_are_refused(
    log_folder: Path, name: str, change: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    """Although their checksums are right."""
    segment = log_folder / "segment-000001"
    old = np.load(segment / "features" / f"{name}.npy")
    replace_array(segment, f"features/{name}.npy", np.ascontiguousarray(change(old)))
    with pytest.raises(LogFormatError, match=message):
        _ = EventLog.open(log_folder).item_features
