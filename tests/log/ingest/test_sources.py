"""Readers: MovieLens in each format, on small samples and on the real data sets in VISTA_DATA_DIR. Bad sources of
every kind: the error names file, row, column, value, and remedy, and nothing is written. The parser: a file that
panics, crashes, hangs or fills memory ends the child alone, with a typed error."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tests.conftest import real_set
from tests.log.conftest import PARSER, run, write_csv
from vista.config import ImpressionsConfig, PrepareConfig, SimulateConfig, SourceColumns, SourceConfig
from vista.config.checks import IdType, OnBadRows, to_dict
from vista.errors import ConfigError, DataError
from vista.log.event_log import EventLog
from vista.log.ingest.prepare import PrepareReport, prepare
from vista.log.ingest.rows import read_part
from vista.log.ingest.source_files import MAX_COLUMNS, MAX_LINE_BYTES
from vista.log.ingest.source_parser import SourceParser
from vista.log.ingest.sources import detect_kind, open_sources

ROWS = [(3, 50, 4.0, 978300760), (1, 1193, 5.0, 978300275), (3, 7, 1.0, 978300019), (1, 661, 3.0, 978300275)]


def ratings_dat(folder: Path) -> Path:
    (folder / "ratings.dat").write_text("".join(f"{u}::{i}::{r:.0f}::{t}\n" for u, i, r, t in ROWS))
    return folder / "ratings.dat"


def ratings_csv(folder: Path) -> Path:
    lines = "".join(f"{u},{i},{r},{t}\r\n" for u, i, r, t in ROWS)
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\r\n" + lines, newline="")
    return folder / "ratings.csv"


def u_data(folder: Path) -> Path:
    (folder / "u.data").write_text("".join(f"{u}\t{i}\t{r:.0f}\t{t}\n" for u, i, r, t in ROWS))
    return folder / "u.data"


def npz(folder: Path) -> Path:
    user, item, rating, time = (np.array(column) for column in zip(*ROWS, strict=True))
    user_raw, user_row = np.unique(user, return_inverse=True)
    item_raw, item_row = np.unique(item, return_inverse=True)
    np.savez(
        folder / "events.npz",
        user=user_row,
        item=item_row,
        user_raw=user_raw,
        item_raw=item_raw,
        time=time,
        rating=rating,
    )
    return folder / "events.npz"


def load(paths: list[Path], kind: str, out: Path) -> EventLog:
    run(out, paths, kind=kind, timestamp=None, time_unit=None)
    return EventLog.open(out)


FORMS = {"ml-1m": ratings_dat, "ml-latest-small": ratings_csv, "ml-100k": u_data, "npz": npz}


@pytest.mark.parametrize("kind", FORMS)
def test_every_format_gives_the_same_log(tmp_path: Path, kind: str) -> None:
    file = FORMS[kind](tmp_path)
    log = load([file], kind, tmp_path / "log")
    assert load([tmp_path], "auto", tmp_path / "found").sources_digest(1) == log.sources_digest(1)
    assert (log.num_users, log.num_items, log.num_events) == (2, 4, 4)
    assert log.users.ids([0, 1]).tolist() == [1, 3]
    assert log.items.ids(log[1].item).tolist() == [1193, 661]
    assert log.items.ids(log[3].item).tolist() == [7, 50]
    assert log[3].timestamp.tolist() == [978300019000, 978300760000]
    assert log[1].rating is not None
    assert log[1].rating.tolist() == [5.0, 3.0]
    assert log.actions == ["event"]


def test_kinds_are_recognized(tmp_path: Path) -> None:
    for kind, write in FORMS.items():
        folder = tmp_path / kind
        folder.mkdir()
        assert detect_kind(write(folder)) == kind
        assert detect_kind(folder) == kind
    (tmp_path / "mine.csv").write_text("user,item\n1,2\n")
    assert detect_kind(tmp_path / "mine.csv") == "table"
    with pytest.raises(DataError, match="has the files of none of ml-1m, ml-latest-small, ml-100k, npz"):
        detect_kind(tmp_path)
    (tmp_path / "events.parquet").touch()  # not enough for a simulation or for Complete Journey
    with pytest.raises(DataError, match=r"has the files of none of .*; name the kind, or to read a table of your own"):
        detect_kind(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        detect_kind(tmp_path / "absent")


@pytest.mark.parametrize(
    ("kind", "name", "text", "message"),
    [
        (
            "ml-1m",
            "ratings.dat",
            "1::2::3::4\n1::2::x::4\n",
            r"ratings\.dat: row 2, column 'rating': 'x' is not a number",
        ),
        ("ml-100k", "u.data", "1\t2\t3\t4\na\t2\t3\t4\n", r"u\.data: row 2, column 'user': 'a' is not an integer id"),
        ("npz", "events.npz", "no archive", r"events\.npz: not a valid \.npz archive"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, kind: str, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        load([tmp_path / name], kind, tmp_path / "log")
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"user": [0]}, r"array 'item' is missing, the file has: user"),
        ({"user": [0, 1], "item": [0]}, r"the arrays differ in length \({'user': 2, 'item': 1}\)"),
        (
            {"user": [0, 1], "item": [0, 5], "item_raw": [9]},
            r"row 2, column 'item': 5 is not an index into item_raw \(1 ids\)",
        ),
        ({"user": [0.5], "item": [0], "user_raw": [9]}, r"array 'user' has type float64 and cannot index user_raw"),
    ],
)
def test_bad_arrays_are_named(tmp_path: Path, arrays: dict, message: str) -> None:
    np.savez(tmp_path / "events.npz", **arrays)
    with pytest.raises(DataError, match=r"events\.npz: " + message):
        load([tmp_path], "npz", tmp_path / "log")


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    """Cut short, or with a byte of its compressed arrays changed."""
    path = tmp_path / "events.npz"
    np.savez_compressed(path, user=np.arange(1000) // 9, item=np.arange(1000) % 37)
    whole = path.read_bytes()
    middle = bytearray(whole)
    middle[len(whole) // 4] ^= 0xFF
    for damaged in (whole[: int(len(whole) * 0.95)], bytes(middle)):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"events\.npz: not a valid \.npz archive"):
            load([tmp_path], "npz", tmp_path / "log")


def test_npz_without_times_keeps_its_order(tmp_path: Path) -> None:
    np.savez(tmp_path / "events.npz", user=[0, 0, 1, 1], item=[3, 1, 2, 2], user_raw=[10, 20], item_raw=[5, 6, 7, 8])
    log = load([tmp_path], "auto", tmp_path / "log")
    assert not log.has_time
    assert log.items.ids(log[10].item).tolist() == [8, 6]


def test_tables_in_every_format(tmp_path: Path) -> None:
    """CSV with a byte order mark and quotes, gzip, TSV, another separator, and Parquet give the same log."""
    header, rows = ("who", "what", "more"), [("ann", "a,b", 1), ("bob", "c", 2)]
    text = "".join(f'{u},"{i}",{m}\n' for u, i, m in rows)
    (tmp_path / "a.csv").write_text("\ufeff" + ",".join(header) + "\n" + text, encoding="utf-8")
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress((",".join(header) + "\n" + text).encode()))
    (tmp_path / "c.tsv").write_text("\n".join("\t".join(map(str, row)) for row in (header, *rows)))
    (tmp_path / "d.txt").write_text("\n".join("|".join(map(str, row)) for row in (header, *rows)))
    pl.DataFrame(rows, schema=header, orient="row").write_parquet(tmp_path / "e.parquet")
    for name, separator in (("a.csv", ","), ("b.csv.gz", ","), ("c.tsv", ","), ("d.txt", "|"), ("e.parquet", ",")):
        columns = {"user": "who", "item": "what", "timestamp": None, "time_unit": None}
        run(tmp_path / f"log-{name}", [tmp_path / name], separator=separator, **columns)
        log = EventLog.open(tmp_path / f"log-{name}")
        assert log.users.ids([0, 1]).tolist() == ["ann", "bob"]
        assert log.items.ids(log["ann"].item).tolist() == ["a,b"]


def test_a_folder_of_tables(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(3):
        pl.DataFrame({"user": [1], "item": [number]}).write_parquet(folder / f"{2 - number}.parquet")
    log = load([folder], "table", tmp_path / "log")
    assert log.items.ids(log[1].item).tolist() == [2, 1, 0]
    with pytest.raises(DataError, match=r"has no ratings\.dat, which events\.kind=ml-1m reads"):
        load([folder], "ml-1m", tmp_path / "other")


@pytest.mark.parametrize("kind", ["simulated", "auto"])
def test_a_simulation_includes_its_impressions(tmp_path: Path, kind: str) -> None:
    from vista.simulation.simulate import simulate

    simulate(SimulateConfig(out=str(tmp_path / "sim"), num_users=5, events_per_user=60, impressions_per_user=20))
    log = load([tmp_path / "sim"], kind, tmp_path / "log")
    raw = pl.read_parquet(tmp_path / "sim" / "events.parquet")
    shown = pl.read_parquet(tmp_path / "sim" / "impressions.parquet")
    assert log.num_events == raw.height
    assert set(log.actions) == set(raw["action"])
    seen = log.impressions
    assert seen is not None
    assert seen.tasks == ["click", "like", "long_view"]
    assert seen.num_impressions == shown.height
    assert seen.probability is not None
    for user in raw["user"].unique():
        mine = raw.filter(pl.col("user") == user)
        assert log.items.ids(log[user].item).tolist() == mine["item"].to_list()
        assert log[user].timestamp.tolist() == mine["timestamp"].to_list()
        row = int(log.users.rows([user])[0])
        here = slice(int(seen.offsets[row]), int(seen.offsets[row + 1]))
        want = shown.filter(pl.col("user") == user)
        assert log.items.ids(seen.item[here]).tolist() == want["item"].to_list()
        for place, task in enumerate(seen.tasks):
            assert seen.label[here, place].tolist() == want[task].fill_null(0).to_list()
            assert seen.mask[here, place].tolist() == want[task].is_not_null().cast(int).to_list()
            np.testing.assert_array_equal(seen.probability[here, place], want[f"{task}_probability"].to_numpy())


REAL_SETS = {
    "ml-1m": (6040, 3706, 1_000_209, 2314, False, False),
    "ml-latest-small": (610, 9724, 100_836, 2698, True, True),
}


@pytest.mark.data
@pytest.mark.parametrize("name", REAL_SETS)
def test_real_data_sets_equal_their_arrays(tmp_path: Path, name: str) -> None:
    """The published counts, and the same events and times as events.npz, up to the order of equal times."""
    folder, (users, items, events, longest, has_time, has_rating) = real_set(name), REAL_SETS[name]
    log = load([folder], "auto", tmp_path / "log")
    assert (log.num_users, log.num_items, log.num_events) == (users, items, events)
    assert (log.lengths.max(), log.has_time, log.has_rating) == (longest, has_time, has_rating)
    with np.load(folder / "events.npz") as arrays:
        whole = log.gather(np.arange(log.num_users))
        assert whole.offsets.tolist() == arrays["offsets"].tolist()
        assert log.users.ids(np.arange(log.num_users)).tolist() == arrays["user_raw"].tolist()
        owner = np.repeat(np.arange(log.num_users), log.lengths)
        ours = log.items.ids(whole.item)
        theirs = arrays["item_raw"][arrays["item"]]
        if not log.has_time:
            assert np.array_equal(ours, theirs)
            return
        assert np.array_equal(whole.timestamp, arrays["time"] * 1000)
        assert whole.rating is not None
        ours_order = np.lexsort((ours, whole.timestamp, owner))
        theirs_order = np.lexsort((theirs, arrays["time"], owner))
        assert np.array_equal(ours[ours_order], theirs[theirs_order])
        assert np.array_equal(whole.rating[ours_order], arrays["rating"][theirs_order])


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


@pytest.mark.parametrize("value", [0.0, -0.5, float("nan"), None, 1.5, 1e-60])
def test_a_bad_propensity_is_named_with_its_file_and_row(tmp_path: Path, value: float | None) -> None:
    refuse_number(tmp_path, "propensity", value, r"is not a propensity; write the probability, above 0 and at most 1")


@pytest.mark.parametrize("value", [0.0, 1.5, -1.0, float("nan"), None, float("inf")])
def test_a_bad_position_is_named_with_its_file_and_row(tmp_path: Path, value: float | None) -> None:
    refuse_number(tmp_path, "position", value, r"is not a position; write 1, 2, \.\.\.")


def refuse_number(folder: Path, column: str, value: float | None, message: str) -> None:
    """Prepare events and impressions of which the second has a bad value, from files."""
    rows = {"user": [1, 2], "item": [3, 4], "timestamp": [5, 6]}
    pl.DataFrame(rows).write_parquet(folder / "events.parquet")
    shown = pl.DataFrame({**rows, "like": [0, 1], column: pl.Series([1.0, value], dtype=pl.Float64)})
    for name, write in (("shown.parquet", shown.write_parquet), ("shown.csv", shown.write_csv)):
        write(folder / name)
        table = SourceConfig(
            paths=[str(folder / name)], timestamp="timestamp", time_unit="s", labels=["like"], numbers=[column]
        )
        config = PrepareConfig(
            out=str(folder / "log"),
            events=SourceConfig(paths=[str(folder / "events.parquet")], timestamp="timestamp", time_unit="s"),
            impressions=ImpressionsConfig(**to_dict(table)),
        )
        with pytest.raises(DataError, match=rf"{name}: row 2, column '{column}': .*{message}"):
            prepare(config, parser=PARSER)
        assert not (folder / "log").exists()


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


PARSED_ROWS = [(1, 10, 5), (2, 20, 6)]


@pytest.fixture
def parser() -> Iterator[SourceParser]:
    with SourceParser() as made:
        yield made


def child_of(parser: SourceParser) -> subprocess.Popen[bytes]:
    assert parser._child is not None
    return parser._child


def test_the_child_stays_for_the_next_file_and_restarts_after_a_crash(tmp_path: Path, parser: SourceParser) -> None:
    file = write_csv(tmp_path / "a.csv", PARSED_ROWS)
    assert parser.call("column_types", file)[0] == {"user": "String", "item": "String", "timestamp": "String"}
    child = child_of(parser)
    assert parser.call("column_types", file)[0] and child_of(parser) is child
    child.kill()
    child.wait()
    assert parser.call("column_types", file)[0] and child_of(parser) is not child
    parser.close()
    assert child.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("a.csv", "the file is damaged, or the disk is too slow: write the file again, or split it"),
        ("a.csv.gz", r"it holds too much for a compressed file of \d+ bytes: decompress it, or split it"),
    ],
)
def test_a_child_that_hangs_is_ended(tmp_path: Path, name: str, why: str) -> None:
    file = write_csv(tmp_path / "a.csv", PARSED_ROWS)
    if name != file.name:
        packed = tmp_path / name
        packed.write_bytes(gzip.compress(file.read_bytes()))
        file = packed
    with SourceParser(timeout_s=60) as parser:
        parser.call("column_types", file)
        parser._timeout_s = 0.2
        child = child_of(parser)
        child.send_signal(signal.SIGSTOP)
        with pytest.raises(DataError, match=rf"/{name}: the parser gave no rows within 0 s; {why}"):
            parser.call("column_types", file)
        assert child.poll() == -signal.SIGKILL


def test_the_child_ends_with_its_parent(tmp_path: Path) -> None:
    """Also while it waits in Polars for the writer of a named pipe, and can run no Python."""
    pipe = tmp_path / "pipe.parquet"
    os.mkfifo(pipe)
    request = {"task": "metadata", "path": str(pipe), "folder": "/", "memory_bytes": 1 << 32, "rows_bytes": 1 << 20}
    line = json.dumps(request | {"arguments": {}}).encode() + b"\n"
    code = (
        "import sys, time; from vista.log.ingest.source_parser import SourceParser; p = SourceParser(); "
        f"request = {line!r}; "
        f"p.call('column_types', sys.argv[1]); print(p._child.pid, flush=True); "
        "p._child.stdin.write(request), p._child.stdin.flush(), time.sleep(600)"
    )
    file = write_csv(tmp_path / "a.csv", PARSED_ROWS)
    parent = subprocess.Popen([sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(0.5)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and Path(f"/proc/{child}/stat").exists():
        if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{child}").exists()


@pytest.mark.nightly
def test_a_small_file_cannot_take_much_disk_space(tmp_path: Path) -> None:
    file = tmp_path / "a.csv.gz"
    file.write_bytes(gzip.compress(b"user,item\n" + b"1,2\n" * 500_000))
    assert file.stat().st_size < 10_000
    config = SourceConfig(paths=[str(file)])
    with SourceParser(rows_bytes=1 << 20) as parser:
        (source,) = open_sources(config, "events", parser)
        with pytest.raises(DataError, match=r"a\.csv\.gz: has too many rows for a file of its size"):
            read_part(source, {"user": "int", "item": "int"}, "events", tmp_path, 0, OnBadRows.error)
    run(tmp_path / "log", [file], timestamp=None, time_unit=None)
    assert EventLog.open(tmp_path / "log").num_events == 500_000


@pytest.mark.parametrize(
    ("shape", "declared_bytes", "message"),
    [
        (2, 1 << 40, r"its arrays hold 2,199,023,255,552 bytes, but at most"),
        (1 << 40, None, r"cannot be read: the parser exited with code 1 \(MemoryError: Unable to allocate 8\.00 TiB"),
    ],
)
def test_arrays_of_a_small_file_cannot_take_much_memory(
    tmp_path: Path, shape: int, declared_bytes: int | None, message: str
) -> None:
    """The directory of the archive, or the header of an array, speaks of terabytes."""
    header = BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": (shape,)})
    with zipfile.ZipFile(tmp_path / "events.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("user.npy", "item.npy"):
            archive.writestr(name, header.getvalue() + bytes(16))
            archive.getinfo(name).file_size = declared_bytes or archive.getinfo(name).file_size
    with pytest.raises(DataError, match=rf"events\.npz: {message}"):
        run(tmp_path / "log", [tmp_path / "events.npz"], kind="npz", timestamp=None, time_unit=None)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, parser: SourceParser) -> None:
    file = write_csv(tmp_path / "a.csv", PARSED_ROWS)
    config = SourceConfig(paths=[str(file)], timestamp="timestamp", time_unit="s")
    (source,) = open_sources(config, "events", parser)
    write_csv(file, [*PARSED_ROWS, (3, 30, 7)])
    with pytest.raises(DataError, match=r"a\.csv: changed while it was read; wait until its writer is done"):
        read_part(source, {"user": "int", "item": "int"}, "events", tmp_path, 0, OnBadRows.error)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"u" * (MAX_LINE_BYTES + 1), "line 1 is longer than 1,048,576 bytes"),
        (b"user,item,timestamp" + b",c" * (MAX_COLUMNS - 2), "has 4,097 columns, but at most 4,096 are possible"),
        (b'user,"' + b"i" * 200_000 + b'"', "the header cannot be read .field larger than field limit"),
    ],
)
def test_a_header_that_is_too_large_is_refused(tmp_path: Path, header: bytes, message: str) -> None:
    (tmp_path / "a.csv").write_bytes(header + b"\n1,2,3\n")
    with pytest.raises(DataError, match=message):
        run(tmp_path / "log", [tmp_path / "a.csv"])


def test_cells_of_the_quarantine_are_no_formulas(tmp_path: Path) -> None:
    cells = ["=cmd|' /C calc'!A0", "+1+1", "@sum(a)", "-x", "-5", "+1e3", "\tx", "'x"]
    rows = "".join(f'1,2,"{cell}"\n' for cell in cells)
    (tmp_path / "a.csv").write_text("user,item,=time\n3,4,5\n" + rows)
    report = run(tmp_path / "log", [tmp_path / "a.csv"], on_bad_rows="quarantine", timestamp="=time")
    aside = pl.read_csv(report.quarantine, infer_schema=False)
    assert EventLog.open(tmp_path / "log").num_events == 2  # +1e3 is a time
    assert aside["value"].to_list() == ["'=cmd|' /C calc'!A0", "'+1+1", "'@sum(a)", "'-x", "-5", "'\tx", "'x"]
    assert set(aside["column"]) == {"'=time"}
