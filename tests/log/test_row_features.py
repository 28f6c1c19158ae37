"""Features of events and impressions: types, views, appends, what is refused, and warnings."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tests.log.conftest import PARSER, run
from tests.log.log_oracle import (
    Oracle,
    Step,
    Values,
    assert_reads_as,
    contents,
    edit_manifest,
    replace_array,
    values_of,
    write,
)
from vista.config import EventFilterConfig, ImpressionsConfig, PrepareConfig, SourceColumns, SourceConfig
from vista.errors import ConfigError, DataError, LogFormatError
from vista.log.compaction import compact_log
from vista.log.deletions import erase_users
from vista.log.event_log import EventLog
from vista.log.features import code_type
from vista.log.histories import RowFeatures, rows_that_fit
from vista.log.ingest import rows
from vista.log.ingest.prepare import PrepareReport, prepare
from vista.log.segment_files import EVENTS
from vista.log.segment_writer import FeatureWriter, SegmentWriter
from vista.log.splits import visible_blocks
from vista.log.vocabulary import Vocabulary

BOTH = ("device", "dwell")
STEPS = [
    Step(events=[(0, 1, 5, 0), (0, 2, 7, 1), (1, 0, 3, 0), (4, 2, 2, 0)], impressions=[(1, 1, 4, 1)], columns=BOTH),
    Step(events=[(2, 1, 6, 0), (0, 0, 4, 1)], impressions=[(0, 2, 3, 0)]),
]


@pytest.mark.parametrize(("num_values", "dtype"), [(128, "i1"), (129, "i2"), (32_768, "i2"), (32_769, "i4")])
def test_codes_take_the_smallest_type(tmp_path: Path, num_values: int, dtype: str) -> None:
    assert np.dtype(code_type(num_values)).str[1:] == dtype
    segment = SegmentWriter(tmp_path)
    values = Vocabulary.empty("str").extended([f"{number:06d}" for number in range(num_values)])
    writer = FeatureWriter(segment, EVENTS, 2)
    writer.begin({"domain": values})
    writer.append(RowFeatures({"domain": np.array([-1, num_values - 1], np.int32)}))
    writer.close()
    stored = np.load(tmp_path / "event_features" / "0.codes.npy")
    assert stored.dtype.str[1:] == dtype and stored.tolist() == [-1, num_values - 1]


def test_blocks_read_features_only_on_demand_and_are_then_smaller(tmp_path: Path) -> None:
    log = write(tmp_path / "log", STEPS)
    blocks = list(visible_blocks(log, log.lengths, 6))
    assert len(blocks) == 1 and blocks[0].features.columns == {}
    read = list(visible_blocks(log, log.lengths, 6, features=True))
    assert len(read) > 1 and all(list(block.features.columns) == list(BOTH) for block in read)
    assert sum(block.num_events for block in read) == log.num_events
    assert (rows_that_fit(1000, 20, 0), rows_that_fit(1000, 20, 5), rows_that_fit(1, 20, 100)) == (1000, 250, 1)


def test_a_compaction_writes_all_values(tmp_path: Path) -> None:
    steps = [*STEPS, Step(events=[(3, 1, 5, 0)], columns=("device",)), Step(forgotten=[(0, 2, 7, 1)])]
    path = tmp_path / "log"
    before = write(path, steps).event_features["device"]
    compact_log(path)
    log = EventLog.open(path)
    after = log.event_features["device"]
    assert before is not None and after is not None and after.digest() == before.digest()
    assert_reads_as(log, Oracle(steps), np.random.default_rng(0))


def _columns(*kinds: str) -> Callable[[Path], None]:
    columns = [{"name": name, "kind": kind} for name, kind in zip(BOTH, kinds, strict=False)]
    return lambda segment: edit_manifest(segment, event_features=columns)


def _twice(segment: Path) -> None:
    edit_manifest(segment, event_features=[{"name": "dwell", "kind": "number"}] * 2)
    replace_array(segment, "event_features/0.numbers.npy", np.zeros(4, np.float32))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_columns("number"), "does not list event_features/0.numbers.npy"),
        (_columns("category", "category"), "does not list event_features/1.values.ids.npy"),
        (lambda segment: replace_array(segment, "event_features/0.codes.npy", np.zeros(4, np.int64)), "of int8"),
        (lambda segment: replace_array(segment, "event_features/0.codes.npy", np.zeros(3, np.int8)), "the 4 rows of"),
        (_twice, "column names of event_features must be unique"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    path = tmp_path / "log"
    write(path, STEPS)
    damage(path / "segment-000001")
    with pytest.raises(LogFormatError, match=message):
        EventLog.open(path)


def test_a_column_of_two_kinds_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log"
    write(path, [STEPS[0], Step(events=[(2, 1, 6, 0), (0, 0, 4, 1)], columns=("device",))])
    segment = path / "segment-000002"
    edit_manifest(segment, event_features=[{"name": "device", "kind": "number"}])
    replace_array(segment, "event_features/0.numbers.npy", np.zeros(2, np.float32))
    with pytest.raises(LogFormatError, match="'device' of the events is a number, but in an earlier segment it is a c"):
        EventLog.open(path)


KEYS = {"user": [1, 1, 2], "item": [7, 8, 7], "timestamp": [1_700_000_001, 1_700_000_002, 1_700_000_003]}
NAN, INF = float("nan"), float("inf")


def add(folder: Path, form: str = "parquet", *, append: bool = False, **columns: Any) -> PrepareReport:
    """Prepare three events with these columns; `categories` and `numbers` name the features."""
    settings = {
        name: columns.pop(name) for name in ("categories", "numbers", "on_bad_rows", "max_values") if name in columns
    }
    file = folder / f"events-{append}.{form}"
    frame = pl.DataFrame(KEYS | columns)
    frame.write_csv(file) if form == "csv" else frame.write_parquet(file)
    return run(folder / "log", [file], append=append, **settings)


def features_of(folder: Path) -> list[Values]:
    """The features of all events, by user and time."""
    log = EventLog.open(folder / "log")
    return values_of(log.gather(np.arange(log.num_users)).features, log.event_features)


def test_values_become_text(tmp_path: Path) -> None:
    columns = {
        "device": ["web", None, ""],
        "hour": [7, None, 23],
        "is_member": [True, False, None],
        "surface": pl.Series(["home", "cart", None], dtype=pl.Categorical),
    }
    report = add(tmp_path, **columns, note=["ignored"] * 3, categories=list(columns))
    assert features_of(tmp_path) == [
        {"device": "web", "hour": "7", "is_member": "true", "surface": "home"},
        {"device": None, "hour": None, "is_member": "false", "surface": "cart"},
        {"device": None, "hour": "23", "is_member": None, "surface": None},
    ]
    assert report.features[:2] == [
        "device: category of 1 value, 33% of events",
        "hour: category of 2 values, 67% of events",
    ]
    assert "feature device: category of 1 value, 33% of events" in str(report)


def test_numbers_may_be_integers_booleans_or_text(tmp_path: Path) -> None:
    columns = {
        "a": [True, False, None],
        "b": ["1e2", "", None],
        "c": pl.Series(["1.50", "2", None]).cast(pl.Decimal(9, 2)),
        "dwell": [1.5, None, NAN],
        "price": [3, -2, None],
    }
    add(tmp_path, **columns, numbers=list(columns))
    assert [tuple(row.values()) for row in features_of(tmp_path)] == [
        (1, 100, 1.5, 1.5, 3),
        (0, None, 2, None, -2),
        (None,) * 5,
    ]


def test_frames(tmp_path: Path) -> None:
    """Of Polars and pandas; columns that are not named are ignored."""
    import pandas as pd

    frame = KEYS | {"device": ["web", None, "app"], "dwell": [0.5, 1.0, None], "more": [1, 2, 3]}
    shown = {"user": [1, 2], "item": [7, 7], "timestamp": [5, 6], "click": [1, 0], "hour": [3, 4], "load": [0.5, NAN]}
    for number, form in enumerate((pd.DataFrame, pl.DataFrame, dict)):
        log = EventLog.from_frame(
            form(frame),
            tmp_path / str(number),
            time_unit="s",
            columns=SourceColumns(labels=["click"]),
            impressions=form(shown),
            categories=["device"],
            numbers=["dwell"],
            request_categories=["hour"],
            request_numbers=["load"],
        )
        assert values_of(log.gather(np.arange(2)).features, log.event_features) == [
            {"device": "web", "dwell": 0.5},
            {"device": None, "dwell": 1.0},
            {"device": "app", "dwell": None},
        ]
        assert log.impressions is not None
        requests = values_of(log.impressions.features, log.request_features)
        assert requests == [{"hour": "3", "load": 0.5}, {"hour": "4", "load": None}]
    with pytest.raises(ConfigError, match="request_categories, request_numbers: name columns of impressions; give"):
        EventLog.from_frame(frame, tmp_path / "none", time_unit="s", request_numbers=["dwell"])


def test_a_column_that_arrives_later_is_missing_before(tmp_path: Path) -> None:
    add(tmp_path, device=["web", "app", "web"], categories=["device"])
    more = {"device": ["tv", "web", None], "dwell": [1.0, 2.0, 3.0]}
    report = add(tmp_path, append=True, **more, categories=["device"], numbers=["dwell"])
    assert report.features == [
        "device: category of 3 values, 67% of events, 1 of the values are new",
        "dwell: number, 100% of events",
    ]
    log = EventLog.open(tmp_path / "log")
    device = log.event_features["device"]
    assert device is not None and device.ids(np.arange(3)).tolist() == ["app", "web", "tv"]
    user = values_of(log[1].features, log.event_features)
    assert user == [
        {"device": "web", "dwell": None},
        {"device": "tv", "dwell": 1},
        {"device": "app", "dwell": None},
        {"device": "web", "dwell": 2},
    ]


def test_a_column_that_changes_its_kind_is_refused(tmp_path: Path) -> None:
    add(tmp_path, hour=[1, 2, 3], categories=["hour"])
    before = contents(tmp_path / "log")
    message = "'hour' of the events is a number, but in the log it is a category; name it under events.categories"
    with pytest.raises(DataError, match=message):
        add(tmp_path, append=True, hour=[1, 2, 4], numbers=["hour"])
    assert contents(tmp_path / "log") == before


BAD_COLUMNS: dict[str, tuple[list[Any], str, str]] = {
    "floats as a category": (
        [1.0, 2.0, 3.0],
        "categories",
        r"column 'x' has type Float64 and cannot be a category; name it under events\.numbers, or leave it out",
    ),
    "lists as a category": (
        [["a"], ["b"], []],
        "categories",
        r"has type List\(String\) and cannot be a category; convert it",
    ),
    "dates as a number": (
        [datetime.date(2024, 1, 1)] * 3,
        "numbers",
        "has type Date and cannot be a number; convert it",
    ),
    "text as a number": (
        ["1", "", "long"],
        "numbers",
        r"row 3, column 'x': 'long' is not a number; correct it, or name the column under events\.categories; "
        "on_bad_rows=quarantine sets bad rows aside instead",
    ),
    "an infinite number": (
        [1.0, INF, 2.0],
        "numbers",
        "row 2, column 'x': inf is not a finite number; correct it, or leave it empty",
    ),
}


@pytest.mark.parametrize("name", BAD_COLUMNS)
def test_bad_columns_are_refused_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    values, key, message = BAD_COLUMNS[name]
    with pytest.raises(DataError, match=message):
        add(tmp_path, x=values, **{key: ["x"]})
    assert not (tmp_path / "log").exists()


def test_rows_with_bad_numbers_are_set_aside(tmp_path: Path) -> None:
    report = add(tmp_path, "csv", dwell=["1", "soon", "inf"], numbers=["dwell"], on_bad_rows="quarantine")
    assert (report.num_events, report.num_quarantined) == (1, 2)
    quarantine = pl.read_csv(tmp_path / "log/segment-000001/quarantine.csv")
    assert quarantine["column"].to_list() == ["dwell", "dwell"] and quarantine["value"].to_list() == ["soon", "inf"]
    assert features_of(tmp_path) == [{"dwell": 1.0}]


def test_values_of_rows_that_are_left_out_are_no_values(tmp_path: Path) -> None:
    """Of rows that are set aside, and of those that a filter drops."""
    columns = {"dwell": ["1", "soon", "2"], "device": ["tv", "app", "web"]}
    add(tmp_path, **columns, categories=["device"], numbers=["dwell"], on_bad_rows="quarantine")
    pl.DataFrame(KEYS | {"device": ["car", "tv", "watch"]}).write_parquet(tmp_path / "more.parquet")
    events = SourceConfig(
        paths=[str(tmp_path / "more.parquet")], timestamp="timestamp", time_unit="s", categories=["device"]
    )
    out = str(tmp_path / "filtered")
    chosen = EventFilterConfig(min_user_events=2)
    prepare(PrepareConfig(out=out, events=events, filter=chosen), parser=PARSER)
    for folder, want in (("log", ["tv", "web"]), ("filtered", ["car", "tv"])):
        device = EventLog.open(tmp_path / folder).event_features["device"]
        assert device is not None and device.ids(np.arange(len(device))).tolist() == want


@pytest.mark.parametrize(("num_values", "count"), [(1000, "1,000"), (90_000, r"about \d\d,\d\d\d or more")])
def test_too_many_values_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_values: int, count: str
) -> None:
    """If there are far too many, their number is estimated, so that they need no memory."""
    monkeypatch.setattr(rows, "_FIRST_ROWS", 500)
    keys = {"user": [1] * num_values, "item": [7] * num_values, "timestamp": np.arange(num_values)}
    frame = keys | {"url": [f"page {n}" for n in range(num_values)], "few": [f"{n % 300}" for n in range(num_values)]}
    pl.DataFrame(frame).write_parquet(tmp_path / "events.parquet")
    message = (
        rf"events\.parquet: with column 'url' the log would have {count} distinct values, but a category may have at "
        r"most 900; leave it out, merge rare values, or, for a category that .*, raise events\.max_values"
    )
    with pytest.raises(DataError, match=message):
        run(tmp_path / "log", [tmp_path / "events.parquet"], categories=["few", "url"], max_values=900)
    assert not (tmp_path / "log").exists()


def test_values_of_all_segments_count(tmp_path: Path) -> None:
    add(tmp_path, x=["a", "b", "c"], categories=["x"])
    before = contents(tmp_path / "log")
    with pytest.raises(DataError, match="with column 'x' the log would have 5 distinct values"):
        add(tmp_path, append=True, x=["c", "d", "e"], categories=["x"], max_values=4)
    assert contents(tmp_path / "log") == before
    add(tmp_path, append=True, x=["c", "d", "e"], categories=["x"], max_values=5)
    assert {values["x"] for values in features_of(tmp_path)} == set("abcde")


def add_impressions(folder: Path, num: int, **columns: Any) -> PrepareReport:
    """Prepare `num` impressions with these columns, half of which were clicked."""
    pl.DataFrame(KEYS).write_parquet(folder / "events.parquet")
    shown = {"user": [1] * num, "item": [7] * num, "timestamp": np.arange(num), "click": np.arange(num) % 2}
    pl.DataFrame(shown | columns).write_parquet(folder / "impressions.parquet")
    source: dict[str, Any] = {"timestamp": "timestamp", "time_unit": "s"}
    numbers = [name for name in columns if name in ("load", "watched")]
    requests = ImpressionsConfig(
        paths=[str(folder / "impressions.parquet")],
        labels=["click"],
        categories=[name for name in columns if name not in numbers],
        numbers=numbers,
        **source,
    )
    events = SourceConfig(paths=[str(folder / "events.parquet")], **source)
    config = PrepareConfig(out=str(folder / "log"), events=events, impressions=requests)
    return prepare(config, parser=PARSER)


def test_features_of_requests_that_equal_a_label_are_reported(tmp_path: Path) -> None:
    num = 400
    clicked = np.arange(num) % 2 == 1
    almost = clicked.copy()
    almost[0] = True
    report = add_impressions(
        tmp_path,
        num,
        result=np.where(almost, "clicked", "not clicked"),
        target=[f"page {n % 7}" if click else None for n, click in enumerate(clicked)],
        watched=np.where(clicked, np.arange(num) + 0.5, 0),
        hour=np.arange(num) % 24,
        load=np.arange(num) % 3,
    )
    named = [warning.partition(" of the")[0] for warning in report.warnings]
    assert named == ["column 'result'", "column 'target'", "column 'watched'"]
    assert report.warnings[0] == (
        "column 'result' of the impressions equals the label 'click' in at least 99% of the rows; if it is not known "
        "before the label, leave it out of impressions.categories"
    )
    log = EventLog.open(tmp_path / "log")
    assert log.impressions is not None
    hours = [row["hour"] for row in values_of(log.impressions.features, log.request_features)]
    assert hours == [str(n % 24) for n in range(num)]


def test_erased_users_leave_no_values_behind(tmp_path: Path) -> None:
    add(tmp_path, device=["web", "app", "secret"], categories=["device"])
    erase_users(tmp_path / "log", [2])
    compact_log(tmp_path / "log")
    assert [row["device"] for row in features_of(tmp_path)] == ["web", "app"]
    assert not any(b"secret" in content for content in contents(tmp_path / "log").values())


def test_an_append_finds_damaged_values(tmp_path: Path) -> None:
    """Otherwise, new values could get the codes of other ones."""
    add(tmp_path, device=["web", "app", "web"], categories=["device"])
    file = tmp_path / "log" / "segment-000001" / "event_features" / "0.values.ids.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"q")
    with pytest.raises(LogFormatError, match=r"0\.values\.ids\.npy: its content has changed"):
        add(tmp_path, append=True, device=["web", "app", "tv"], categories=["device"])


def test_a_set_with_fixed_columns_has_no_others(tmp_path: Path) -> None:
    (tmp_path / "ratings.dat").write_text("1::10::4::978300760\n")
    with pytest.raises(
        ConfigError, match=r"events\.numbers: column 'dwell' cannot be read, because events\.kind=ml-1m has fixed"
    ):
        run(tmp_path / "log", [tmp_path], kind="ml-1m", timestamp=None, time_unit=None, numbers=["dwell"])
