"""User features of a log: prepared, merged over segments, erased, compacted, and refused if invalid or damaged."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tests.log.conftest import PARSER, write_csv
from tests.log.feature_tables import user_features_of
from tests.log.log_oracle import replace_array
from vista.config import PrepareConfig, SourceConfig, UserTableConfig
from vista.errors import DataError, LogFormatError
from vista.log.compaction import compact_log
from vista.log.deletions import erase_users
from vista.log.event_log import EventLog
from vista.log.features import merged_features, verified_columns
from vista.log.ingest.prepare import PrepareReport, prepare
from vista.log.inspection import LogStats
from vista.log.segment import features_of
from vista.log.segment_files import USERS

EVENTS = [(1, 10, 1), (1, 20, 2), (2, 30, 3), (3, 40, 4)]


def add_users(folder: Path, *, append: bool = False, events: Any = None, named: Any = None, **columns: Any) -> Any:
    """Prepare a table of users, with the events of EVENTS unless it is appended; returns the report."""
    pl.DataFrame(columns).write_parquet(folder / "users.parquet")
    return add_file(folder, folder / "users.parquet", append=append, events=events, **(named or {}))


def add_file(folder: Path, file: Path, *, append: bool = False, events: Any = None, **named: Any) -> PrepareReport:
    source = SourceConfig(timestamp="timestamp", time_unit="s")
    if not append or events:
        source.paths = [str(write_csv(folder / f"events-{append}.csv", events or EVENTS))]
    users = UserTableConfig(paths=[str(file)], **named)
    out = str(folder / "log")
    return prepare(PrepareConfig(out=out, events=source, users=users, append=append), parser=PARSER)


def test_a_table_of_users_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vista.prepare")
    report = add_users(tmp_path, user=[3, 1, 9], region=["north", None, "south"], paying=[True, False, None],
                       age=[30.0, None, 50.0])  # fmt: skip
    log = EventLog.open(tmp_path / "log")
    assert user_features_of(log) == {"region": {3: "north"}, "paying": {3: "true", 1: "false"}, "age": {3: 30.0}}
    assert log.item_features == {}
    file = tmp_path / "users.parquet"
    assert f"{file}: left out 1 users that the log does not contain" in caplog.messages
    assert f"{file}: features by the types of the columns: region (category), paying (category), age (number)" in (
        caplog.messages
    )
    assert report.features == [
        "region: category of 1 value, 33% of users",
        "paying: category of 2 values, 67% of users",
        "age: number, 33% of users",
    ]
    assert LogStats.of(log).features == report.features
    assert "feature age: number, 33% of users" in str(LogStats.of(log))
    assert log.manifests[0]["sources"][0]["table"] == "users"
    log.verify()


def test_integers_and_text_files_are_read_as_named(tmp_path: Path) -> None:
    add_users(tmp_path, user=[1, 2], plan=[1, 2], band=[20, 30], other=[5, 6],
              named={"categories": ["plan"], "numbers": ["band"]})  # fmt: skip
    assert user_features_of(EventLog.open(tmp_path / "log")) == {"plan": {1: "1", 2: "2"}, "band": {1: 20.0, 2: 30.0}}
    file = tmp_path / "users.tsv"
    file.write_text("id\tplan\tband\n3\t\t40\n1\t3\t\n")
    add_file(tmp_path, file, append=True, user="id", categories=["plan"], numbers=["band"], separator="\t")
    assert user_features_of(EventLog.open(tmp_path / "log")) == {"plan": {1: "3", 2: "2"}, "band": {2: 30.0, 3: 40.0}}


def test_the_newest_row_of_a_user_counts_in_each_column(tmp_path: Path) -> None:
    add_users(tmp_path, user=[1, 2], region=["n", "s"], age=[1.0, 2.0])
    report = add_users(tmp_path, append=True, user=[2, 3], region=["w", None], plan=["a", "b"])
    assert report.num_events == 0 and "segment 2 with features only" in str(report)
    add_users(tmp_path, append=True, events=[(4, 10, 9)], user=[4], age=[4.0])
    log = EventLog.open(tmp_path / "log")
    changed = [[1, 2, 3, 4], [2, 3, 4], [4], []]  # by the newest segment that is known
    expected = {"region": {1: "n", 2: "w"}, "age": {1: 1.0, 2: 2.0, 4: 4.0}, "plan": {2: "a", 3: "b"}}
    assert user_features_of(log) == expected
    users = np.array([3, 0, 2, 1, 0])  # in any order
    some = merged_features(verified_columns(features_of(log.segments, USERS)), users)
    assert list(some) == list(log.user_features)
    for name, column in some.items():
        np.testing.assert_array_equal(column.data, log.user_features[name].data[users])
    first = {"region": {1: "n", 2: "s"}, "age": {1: 1, 2: 2}}
    assert user_features_of(EventLog.open(log.path, last_segment=1)) == first
    assert [log.users.ids(log.changed_users(after)).tolist() for after in range(4)] == changed
    compact_log(log.path)
    log = EventLog.open(log.path)
    assert user_features_of(log) == expected
    assert [log.users.ids(log.changed_users(after)).tolist() for after in range(4)] == changed
    again = EventLog.from_frame(None, log.path, append=True, users={"user": [1], "region": ["s"]})
    assert user_features_of(again)["region"] == {1: "s", 2: "w"}  # a value that no user had when the log was compacted
    log.verify()


@pytest.mark.parametrize("user", [1, 2])
def test_erasing_a_user_drops_the_row(tmp_path: Path, user: int) -> None:
    add_users(tmp_path, user=[1, 2], region=["secret-1", "secret-2"], age=[1.0, 2.0])
    path, other = tmp_path / "log", 3 - user
    erase_users(path, [user])
    rest = {"region": {other: f"secret-{other}"}, "age": {other: float(other)}}
    assert user_features_of(EventLog.open(path)) == rest
    assert EventLog.open(path).changed_users(1).tolist() == [user - 1]
    compact_log(path)
    assert user_features_of(EventLog.open(path)) == rest
    content = b"".join(file.read_bytes() for file in path.rglob("*.npy"))
    assert f"secret-{user}".encode() not in content and f"secret-{other}".encode() in content
    with pytest.raises(DataError, match="none of the log's users"):  # the id is gone
        add_users(tmp_path, append=True, user=[user], age=[9.0])


def test_features_after_an_erasure_count(tmp_path: Path) -> None:
    add_users(tmp_path, user=[1, 2], region=["n", "s"], age=[1.0, 2.0])
    path = tmp_path / "log"
    erase_users(path, [1])
    add_users(tmp_path, append=True, user=[1], region=["e"])
    expected = {"region": {1: "e", 2: "s"}, "age": {2: 2.0}}
    assert user_features_of(EventLog.open(path)) == expected
    compact_log(path)
    assert user_features_of(EventLog.open(path)) == expected  # the id stays, because the user has a row


BAD: dict[str, tuple[dict[str, list[Any]], dict[str, Any], str]] = {
    "two rows": ({"user": [1, 2, 1], "p": ["a", "b", "a"]}, {}, "row 3, column 'user': user 1 is also in row 1 of"),
    "no user of the log": ({"user": [8], "p": ["a"]}, {}, "contains none of the log's users, such as 1; use the log's"),
    "lists": (
        {"user": [1], "tags": [["a"]]}, {},
        r"column 'tags' has type List\(String\), but a user has one value per column; name the other columns under "
        r"users\.categories or users\.numbers",
    ),
    "vectors": ({"user": [1], "v": [[1.0]]}, {}, r"has type List\(Float64\), but a user has one value per column"),
    "integers": (
        {"user": [1], "zip": [1]}, {},
        r"column 'zip' has type Int64 and could be categories or numbers; .* under users\.categories or users\.numbers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_table_is_refused_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    columns, named, message = BAD[name]
    with pytest.raises(DataError, match=rf"users\.parquet.*{message}"):
        add_users(tmp_path, **columns, named=named)  # type: ignore[arg-type]
    assert not (tmp_path / "log").exists()


def test_damage_is_found_before_the_row_of_an_erased_user_is_dropped(tmp_path: Path) -> None:
    add_users(tmp_path, user=[1, 2], region=["n", "s"])
    path = tmp_path / "log"
    erase_users(path, [1])
    replace_array(path / "segment-000001", "user_features/0.offsets.npy", np.array([0, 9, 2]))
    with pytest.raises(LogFormatError, match="offsets are not ascending"):
        EventLog.open(path)
