"""Ingest of values: times in every unit, pandas frames, kinds of ids, impressions."""

from pathlib import Path

import polars as pl
import pytest

from tests.log.conftest import COLUMNS, PARSER, run, write_csv
from vista.config import PrepareConfig, SourceColumns, SourceConfig
from vista.config.choices import IdType
from vista.errors import ConfigError, DataError
from vista.log.event_log import EventLog
from vista.log.ingest.prepare import prepare


def items_of(log: EventLog, user: int | str) -> list:
    return log.items.ids(log[user].item).tolist()


TIME_MS = 1_714_564_800_123  # 2024-05-01T12:00:00.123Z


@pytest.mark.parametrize(
    ("values", "unit", "want"),
    [
        ([1_714_564_800], "s", 1_714_564_800_000),
        (["1714564800"], "s", 1_714_564_800_000),
        ([1_714_564_800.1234], "s", TIME_MS),
        (["1714564800.1234"], "s", TIME_MS),
        ([TIME_MS], "ms", TIME_MS),
        ([float(TIME_MS)], "ms", TIME_MS),
        ([TIME_MS * 1000 + 999], "us", TIME_MS),
        ([TIME_MS * 1_000_000 + 999_999], "ns", TIME_MS),
        (["2024-05-01T12:00:00.123Z"], "iso", TIME_MS),
        (["2024-05-01 12:00:00.123"], "iso", TIME_MS),
        (["2024-05-01T14:00:00.123+02:00"], "iso", TIME_MS),
        (["2024-05-01T12:00"], "iso", 1_714_564_800_000),
        (["2024-05-01"], "iso", 1_714_521_600_000),
        (pl.Series([TIME_MS]).cast(pl.Datetime("ms")), None, TIME_MS),
        (pl.Series([TIME_MS * 1000 + 999]).cast(pl.Datetime("us")), None, TIME_MS),
        (pl.Series([TIME_MS]).cast(pl.Datetime("ms", "Asia/Tokyo")), None, TIME_MS),
        (pl.Series(["2024-05-01"]).str.to_date(), None, 1_714_521_600_000),
        ([0], "s", 0),
        ([4_102_444_799], "s", 4_102_444_799_000),
    ],
)
def test_times_become_milliseconds(tmp_path: Path, values: object, unit: str | None, want: int) -> None:
    frame = pl.DataFrame({"user": [1], "item": [1]}).with_columns(pl.Series("timestamp", values))
    assert EventLog.from_frame(frame, tmp_path / "log", time_unit=unit)[1].timestamp.tolist() == [want]
    frame.write_csv(tmp_path / "a.csv")
    if unit is not None:
        run(tmp_path / "csv", [tmp_path / "a.csv"], time_unit=unit)
        assert EventLog.open(tmp_path / "csv")[1].timestamp.tolist() == [want]


@pytest.mark.parametrize(
    ("values", "unit", "message"),
    [
        (pl.Series([TIME_MS]).cast(pl.Datetime("ms")), "s", r"has type Datetime.*; leave events.time_unit out"),
        ([5], "iso", r"has type Int64, not text"),
        ([5], None, r"set the unit of"),
    ],
)
def test_units_that_do_not_match_the_column_are_refused(
    tmp_path: Path, values: object, unit: str, message: str
) -> None:
    frame = pl.DataFrame({"user": [1], "item": [1]}).with_columns(pl.Series("timestamp", values))
    with pytest.raises(ConfigError, match=message):
        EventLog.from_frame(frame, tmp_path / "log", time_unit=unit)
    assert not list(tmp_path.iterdir())


def test_pandas_frames(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {
            "user": ["b", "a", "b"],
            "item": pandas.array([3, 2, 1], dtype="Int64"),
            "timestamp": pandas.to_datetime(["2024-05-02", "2024-05-01", "2024-05-01"]).tz_localize("Asia/Tokyo"),
            "kind": pandas.Categorical(["view", "buy", "buy"]),
            "stars": [1.0, 2.0, 3.5],
            "unused": [object(), None, {}],
        },
        index=[7, 7, 7],
    )
    log = EventLog.from_frame(frame, tmp_path / "log", columns=SourceColumns(action="kind", rating="stars"))
    assert items_of(log, "b") == [1, 3]
    assert log["b"].timestamp.tolist() == [1_714_521_600_000 - 9 * 3_600_000, 1_714_608_000_000 - 9 * 3_600_000]
    assert [log.actions[code] for code in log["b"].action] == ["buy", "view"]
    assert log["b"].rating is not None
    assert log["b"].rating.tolist() == [3.5, 1.0]
    frame["item"] = pandas.array([3, None, 1], dtype="Int64")
    with pytest.raises(DataError, match="row 2, column 'item': the value is missing"):
        EventLog.from_frame(frame, tmp_path / "bad", columns=SourceColumns(action="kind"))
    frame["item"] = [3, "x", 1]
    with pytest.raises(DataError, match="column 'item' mixes types"):
        EventLog.from_frame(frame, tmp_path / "bad", columns=SourceColumns(action="kind"))
    with pytest.raises(TypeError, match="pandas or Polars DataFrame or a mapping"):
        EventLog.from_frame([1, 2], tmp_path / "bad")


@pytest.mark.parametrize(
    ("first", "kind"), [("7", "int"), ("-7", "int"), ("007", "str"), ("u7", "str"), ("7.5", "str"), ("0", "int")]
)
def test_the_first_value_of_a_text_file_decides_the_kind_of_ids(tmp_path: Path, first: str, kind: str) -> None:
    run(tmp_path / "log", [write_csv(tmp_path / "a.csv", [(first, 1, 1)])])
    log = EventLog.open(tmp_path / "log")
    assert log.users.kind == kind
    assert items_of(log, int(first) if kind == "int" else first) == [1]


def test_the_config_sets_the_kind_of_ids(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", [(7, "01", 1), (7, "1", 2)])
    run(tmp_path / "log", [file], user_ids=IdType("str"), item_ids=IdType("str"))
    assert items_of(EventLog.open(tmp_path / "log"), "7") == ["01", "1"]


def test_parquet_integers_can_be_read_as_text(tmp_path: Path) -> None:
    pl.DataFrame({"user": [7.0], "item": [3], "timestamp": [1]}).write_parquet(tmp_path / "a.parquet")
    run(tmp_path / "log", [tmp_path / "a.parquet"], item_ids=IdType("str"))
    log = EventLog.open(tmp_path / "log")
    assert (log.users.kind, items_of(log, 7)) == ("int", ["3"])


def test_files_of_one_call_need_the_same_columns(tmp_path: Path) -> None:
    for name, header in (("a", "user_id:token\titem_id:token\trating:float"), ("b", "user_id:token\titem_id:token")):
        (tmp_path / f"{name}.inter").write_text(header + "\n1\t2\t3\n"[: None if name == "a" else -3] + "\n")
    with pytest.raises(DataError, match=r"b\.inter: has the columns user, item, but .*a\.inter has user, item, rating"):
        run(tmp_path / "log", [tmp_path], kind="recbole")


def test_impressions_from_files(tmp_path: Path) -> None:
    seen = tmp_path / "seen.csv"
    seen.write_text("who,what,when,click,like\n1,10,5,1,\n2,30,6,0,1\n1,10,4,0,0\n")
    config = PrepareConfig(
        out=str(tmp_path / "log"),
        events=SourceConfig(paths=[str(write_csv(tmp_path / "a.csv", [(1, 10, 1), (1, 20, 2)]))], **COLUMNS),
        impressions=SourceConfig(
            paths=[str(seen)], user="who", item="what", timestamp="when", time_unit="s", labels=["click", "like"]
        ),
        progress=False,
    )
    assert prepare(config, parser=PARSER).num_impressions == 3
    log = EventLog.open(tmp_path / "log")
    assert log.impressions is not None
    assert log.impressions.tasks == ["click", "like"]
    assert log.impressions.offsets.tolist() == [0, 2, 3]
    assert log.impressions.timestamp.tolist() == [4000, 5000, 6000]
    assert log.impressions.label.tolist() == [[0, 0], [1, 0], [0, 1]]
    assert log.impressions.mask.tolist() == [[1, 1], [1, 0], [1, 1]]
    assert log.impressions.probability is None
    config.append = True
    config.events.paths = [str(write_csv(tmp_path / "b.csv", [(1, 10, 9)]))]
    with pytest.raises(DataError, match=r"seen\.csv: segment 1 already contains it"):
        prepare(config, parser=PARSER)
    assert config.impressions is not None
    seen.write_text("who,what,when,click,like\n1,10,7,1,1\n")
    config.impressions.labels = ["like"]
    with pytest.raises(DataError, match=r"labels \['like'\] differ from the log's \['click', 'like'\]"):
        prepare(config, parser=PARSER)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": []}, r"impressions\.labels: name at least one"),
        ({"timestamp": None}, r"impressions\.timestamp: impressions need times"),
        ({"kind": "ml-1m"}, r"impressions\.kind: ml-1m has no impressions"),
        ({"probabilities": ["p"], "labels": ["a", "b"]}, r"impressions\.probabilities: name one column per label"),
    ],
)
def test_impressions_need_labels_and_times(tmp_path: Path, change: dict, message: str) -> None:
    file = str(write_csv(tmp_path / "a.csv", [(1, 10, 1)]))
    given_ = {"paths": [file], "labels": ["item"], **COLUMNS} | change
    config = PrepareConfig(
        out=str(tmp_path / "log"),
        events=SourceConfig(paths=[file], **COLUMNS),
        impressions=SourceConfig(**given_),
        progress=False,
    )
    with pytest.raises(ConfigError, match=message):
        prepare(config, parser=PARSER)


def test_impressions_need_a_log_with_times(tmp_path: Path) -> None:
    frame = {"user": [1], "item": [1], "click": [1]}
    with pytest.raises(ConfigError, match="impressions need times"):
        EventLog.from_frame(
            frame, tmp_path / "log", columns=SourceColumns(timestamp=None, labels=["click"]), impressions=frame
        )
