"""Bad sources of every kind: the error names file, row, column, value, and remedy, and nothing is written."""

import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tests.log.conftest import run
from vista.config import SourceColumns
from vista.config.checks import IdType
from vista.errors import ConfigError, DataError
from vista.log.event_log import EventLog
from vista.log.ingest.prepare import PrepareReport

HEADER = "user,item,time,stars\n"
GOOD = "1,10,1600000000,4\n2,20,1600000001,3.5\n"


def ingest(path: Path, out: Path, on_bad_rows: str = "raise", **options: object) -> PrepareReport:
    return run(out, [path], on_bad_rows=on_bad_rows, **({"timestamp": "time", "rating": "stars"} | options))


BAD_ROWS = {
    "missing user": (",10,1600000000,4", r"column 'user': the value is missing; give every row a user id"),
    "missing item": ("1,,1600000000,4", r"column 'item': the value is missing"),
    "text as user": ("bob,10,1600000000,4", r"column 'user': 'bob' is not an integer id.*events\.ids=str"),
    "leading zero": ("007,10,1600000000,4", r"column 'user': '007' is not a plain integer.*ids=str"),
    "too large an id": (
        "1,99999999999999999999,1600000000,4",
        r"column 'item': '99999999999999999999' is not an integer id",
    ),
    "missing time": ("1,10,,4", r"column 'time': the value is missing; give every row a time"),
    "text as time": ("1,10,noon,4", r"column 'time': 'noon' is not a number; .*time_unit \(now s\)"),
    "negative time": ("1,10,-5,4", r"column 'time': '-5' is negative \(before 1970\)"),
    "absurd time": ("1,10,1600000000000,4", r"column 'time': '1600000000000' is after 2100; .*time_unit"),
    "overflowing time": ("1,10,9000000000000000000,4", r"column 'time': '9000000000000000000' is after 2100"),
    "time not a number": ("1,10,NaN,4", r"column 'time': 'NaN' is not a number"),
    "missing rating": ("1,10,1600000000,", r"column 'stars': the value is missing"),
    "text as rating": ("1,10,1600000000,good", r"column 'stars': 'good' is not a number"),
    "rating not a number": ("1,10,1600000000,NaN", r"column 'stars': 'NaN' is not a finite number"),
    "infinite rating": ("1,10,1600000000,inf", r"column 'stars': 'inf' is not a finite number"),
    "a field too many": ("1,10,1600000000,4,9", r"beyond the last column: '9' is one field too many; quote text"),
    "two fields too many": ("1,10,1600000000,4,,9", r"beyond the last column: '9' is one field too many; quote text"),
    "a field too few": ("1,10", r"column 'time': the value is missing"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    line, message = BAD_ROWS[name]
    file = tmp_path / "log.csv"
    file.write_text(HEADER + GOOD + line + "\n")
    with pytest.raises(DataError, match=rf"log\.csv: row 3, {message}") as caught:
        ingest(file, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv"]


def test_bad_rows_are_set_aside_with_reasons(tmp_path: Path) -> None:
    file = tmp_path / "log.csv"
    lines = [line for line, _ in BAD_ROWS.values()]
    file.write_text(HEADER + GOOD + "".join(line + "\n" for line in lines) + "\n3,10,1600000002,1\n")
    report = ingest(file, tmp_path / "out", "quarantine")
    assert (report.num_events, report.num_quarantined) == (3, len(lines))
    assert str(report.quarantine) in str(report)
    aside = pl.read_csv(report.quarantine, infer_schema=False)
    assert aside["row"].to_list() == [str(row) for row in range(3, 3 + len(lines))]
    assert set(aside["file"]) == {str(file)}
    assert aside["reason"].is_not_null().all()
    assert aside.filter(pl.col("column") == "user")["value"].to_list() == [None, "bob", "007"]
    assert '"stars":"good"' in aside.filter(pl.col("value") == "good")["record"][0]
    log = EventLog.open(tmp_path / "out")
    assert log.users.ids(np.arange(log.num_users)).tolist() == [1, 2, 3]
    assert log.manifests[0]["quarantined"] == len(lines)


def test_a_file_without_good_rows_is_an_error_even_with_quarantine(tmp_path: Path) -> None:
    file = tmp_path / "log.csv"
    file.write_text(HEADER + "1,2,x,3\n")
    with pytest.raises(DataError, match=r"no row of the file is valid \(bad rows: 1\)"):
        ingest(file, tmp_path / "out", "quarantine")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"log\.csv: the file is empty"),
        (HEADER.encode(), r"log\.csv: has no rows"),
        (HEADER.encode() + b"\n\n", r"log\.csv: has no rows"),
        (b"\n1,2,3,4\n", r"log\.csv: the first line is blank"),
        (b"user,time,stars\n1,2,3\n", r"column 'item' is missing, the file has: user, time, stars; .*events\.item="),
        (b"user;item;time\n1;2;3\n", r"has: user;item;time; .*, or set events\.separator="),
        (
            b"user,item,stars\n1,2,3\n",
            r"column 'time' is missing.*events\.timestamp=\.\.\., or leave it out for a log without",
        ),
        (b"user,user,item,time,stars\n1,1,2,3,4\n", r"column 'user' occurs twice"),
        (HEADER.encode() + b"1,2,1600000000,4\n1,\xff,1600000000,4\n", r"log\.csv: line 3: .*is not UTF-8"),
        (b"user,\xff\n", r"log\.csv: the header is not UTF-8"),
        *(
            (
                f'{HEADER[:-1]},note\n1,2,1600000000,4,"a ""b"",\nc"\n1,2,1600000000,{bad}\n{GOOD * 2000}'.encode(),
                r"log\.csv: line 4 has a quote within a field, or one that is not closed; correct",
            )
            for bad in ('"4"b,', '4,"4', '4,4"b', '4,\u00fc"')
        ),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "log.csv"
    file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        ingest(file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


def test_what_is_no_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"events\.paths: name at least one file"):
        run(tmp_path / "out", [])
    (tmp_path / "log.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match=r"log\.parquet: cannot be read as table"):
        ingest(tmp_path / "log.parquet", tmp_path / "out")
    with pytest.raises(DataError, match=r"absent\.csv: no such file or folder; check events\.paths"):
        ingest(tmp_path / "absent.csv", tmp_path / "out")
    (tmp_path / "tables").mkdir()
    os.mkfifo(tmp_path / "tables" / "pipe.csv")
    for path in (tmp_path / "tables" / "pipe.csv", tmp_path / "tables"):
        with pytest.raises(DataError, match=r"pipe\.csv: is not a regular file; write its contents to a file first"):
            ingest(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"time_unit": None},
            r"events\.time_unit: set the unit of column 'time'.*seconds that are read as milliseconds",
        ),
        ({"time_unit": "minutes"}, r"events\.time_unit: unknown unit 'minutes'; use one of s, ms, us, ns, iso"),
        ({"kind": "netflix"}, r"events\.kind: unknown kind 'netflix'; use one of auto, table"),
        ({"separator": ";;"}, r"events\.separator: must be one character"),
        ({"action": "item"}, r"a column is named twice"),
    ],
)
def test_a_contradictory_config_is_refused(tmp_path: Path, options: dict, message: str) -> None:
    file = tmp_path / "log.csv"
    file.write_text(HEADER + GOOD)
    with pytest.raises(ConfigError, match=message):
        ingest(file, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("user", [1.5, 2.0], r"row 1, column 'user': 1\.5 is not a whole number"),
        ("user", [[1], [2]], r"column 'user' has type List\(Int64\) and cannot be a user"),
        ("user", ["a", ""], r"row 2, column 'user': '' is missing"),
        (
            "user",
            ["a", "b" * 501],
            r"row 2, column 'user': 'b+ … .423 characters left out. … b+' is too long; ids may have at most 500 bytes",
        ),
        ("user", pl.Series([1, 2**63], dtype=pl.UInt64), r"row 2, column 'user': 9223372036854775808 does not fit"),
        ("timestamp", [1.0, float("nan")], r"row 2, column 'timestamp': nan is not a number"),
        ("stars", [float("nan"), 1.0], r"row 1, column 'stars': nan is not a finite number"),
        ("kind", ["a", None], r"row 2, column 'kind': the value is missing"),
    ],
)
def test_a_bad_frame_is_named(tmp_path: Path, column: str, values: object, message: str) -> None:
    frame = pl.DataFrame(
        {"user": [1, 2], "item": [3, 4], "timestamp": [5, 6], "stars": [1.0, 2.0], "step": [1, 2], "kind": ["a", "b"]}
    ).with_columns(pl.Series(column, values))
    with pytest.raises(DataError, match=r"<events frame>: " + message):
        EventLog.from_frame(
            frame,
            tmp_path / "log",
            time_unit="s",
            columns=SourceColumns(rating="stars", sequence="step", action="kind"),
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("like", [1, 2], r"row 2, column 'like': 2 is not a label; write 0, 1, or nothing for like"),
        ("like", ["1", "yes"], r"row 2, column 'like': 'yes' is not a number"),
        ("p", [0.5, 1.5], r"row 2, column 'p': 1\.5 is not a probability"),
        ("timestamp", [5, None], r"row 2, column 'timestamp': the value is missing"),
    ],
)
def test_bad_impressions_are_named(tmp_path: Path, column: str, values: list, message: str) -> None:
    events_ = {"user": [1, 2], "item": [3, 4], "timestamp": [5, 6]}
    shown = pl.DataFrame({**events_, "like": [0, 1], "p": [0.5, 0.5]}).with_columns(pl.Series(column, values))
    with pytest.raises(DataError, match=r"<impressions frame>: " + message):
        EventLog.from_frame(
            events_,
            tmp_path / "log",
            time_unit="s",
            impressions=shown,
            columns=SourceColumns(labels=["like"], probabilities=["p"]),
        )
    assert list(tmp_path.iterdir()) == []


def test_too_many_actions_are_refused(tmp_path: Path) -> None:
    frame = {"user": [1] * 300, "item": range(300), "timestamp": range(300), "kind": [str(i) for i in range(300)]}
    with pytest.raises(DataError, match=r"with column 'kind' the log would have 300 actions, but at most 256"):
        EventLog.from_frame(frame, tmp_path / "log", time_unit="s", columns=SourceColumns(action="kind"))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    file = tmp_path / "log.csv"
    file.write_text(HEADER + GOOD)
    with pytest.raises(DataError, match=r"log\.csv/out: cannot be written"):
        ingest(file, file / "out")


def test_append_without_the_logs_actions(tmp_path: Path) -> None:
    """A file without the action column would add a new action, which trained models do not know."""
    first, second = tmp_path / "a.csv", tmp_path / "b.csv"
    first.write_text("user,item,time,what\n1,10,1600000000,view\n2,20,1600000001,buy\n")
    second.write_text("user,item,time\n1,11,1600000100\n")
    run(tmp_path / "log", [first], timestamp="time", action="what")
    with pytest.raises(DataError, match=r"b\.csv: column 'what' is missing, .*events\.action"):
        run(tmp_path / "log", [second], timestamp="time", append=True)
    assert EventLog.open(tmp_path / "log").num_events == 2


def test_a_quote_beyond_the_last_column_hides_no_row(tmp_path: Path) -> None:
    file = tmp_path / "log.csv"
    more = '1,10,1600000000,4,,6" x\n'
    file.write_text(HEADER + more + GOOD + more + GOOD)
    with pytest.raises(DataError, match=r"log\.csv: "):
        ingest(file, tmp_path / "out", ids=IdType("int"))
    assert not (tmp_path / "out").exists()
