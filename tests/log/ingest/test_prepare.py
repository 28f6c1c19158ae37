"""Ingest: round trips, append, determinism, atomicity, values of all types, impressions, and what is refused."""

import hashlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.conftest import run_python
from tests.log.conftest import COLUMNS, PARSER, run, write_csv
from tests.log.log_oracle import values_of
from vista.config import ImpressionsConfig, PrepareConfig, SourceColumns, SourceConfig
from vista.config.checks import IdType
from vista.errors import ConfigError, DataError
from vista.log import segment_writer
from vista.log.event_log import EventLog
from vista.log.ingest.prepare import prepare, prepare_frames


def fingerprint(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def items_of(log: EventLog, user: int | str) -> list:
    return log.items.ids(log[user].item).tolist()


EVENTS = st.one_of(
    st.lists(st.tuples(*ids, st.integers(0, 4), st.integers(-2, 2), st.sampled_from("xyz"), st.floats(-9, 9, width=32),
                       st.sampled_from([None, "", "é", "é ", "b", "1"]),
                       st.one_of(st.none(), st.floats(-9, 9, width=32))),
             min_size=1, max_size=40)
    for ids in (
        (st.integers(-3, 4), st.integers(-(2**63), 2**63 - 1)),
        (st.sampled_from(["a", "b", "Ω", "a b", "a,b"]), st.text(min_size=1, max_size=3)),
        (st.integers(0, 4), st.text(min_size=1, max_size=3)),
    )
)  # fmt: skip


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=EVENTS, cut=st.integers(0, 40), bucket=st.integers(1, 50), named=st.tuples(st.booleans(), st.booleans()))
def test_any_frame_round_trips(
    rows: list[tuple], cut: int, bucket: int, named: tuple[bool, bool], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One segment or two, any bucket size: histories equal a stable sort by time, then sequence. `named`: whether the
    features of events are read, in each part."""
    path = tmp_path_factory.mktemp("round") / "log"
    names = ["user", "item", "timestamp", "step", "kind", "stars", "device", "dwell"]
    parts = [part for part in (rows[:cut], rows[cut:]) if part]
    assume(len(parts) < 2 or parts[0] != parts[1])  # equal parts would be refused as the same source
    for number, part in enumerate(parts):
        frame = {name: [row[place] for row in part] for place, name in enumerate(names)}
        columns = {"timestamp": "timestamp", "sequence": "step", "action": "kind", "rating": "stars"}
        features = {"categories": ["device"], "numbers": ["dwell"]} if named[number] else {}
        events = {"events": (frame, SourceConfig(**columns, time_unit="s", **features))}
        prepare_frames(events, path, append=number > 0, bucket_events=bucket)
    log = EventLog.open(path)
    any_named = any(named[: len(parts)])
    assert list(log.event_features) == (["device", "dwell"] if any_named else [])
    assert log.num_users == len({row[0] for row in rows})
    assert log.num_items == len({row[1] for row in rows})
    for user in {row[0] for row in rows}:
        placed = [
            ((row[2], number, row[3], place), row, named[number])  # time, segment, sequence, input order
            for number, part in enumerate(parts)
            for place, row in enumerate(part)
            if row[0] == user
        ]
        placed.sort(key=lambda entry: entry[0])
        want = [row for _, row, _ in placed]
        history = log[user]
        assert log.items.ids(history.item).tolist() == [row[1] for row in want]
        assert history.timestamp.tolist() == [row[2] * 1000 for row in want]
        assert [log.actions[code] for code in history.action] == [row[4] for row in want]
        assert history.rating is not None
        assert history.rating.tolist() == [row[5] for row in want]
        if any_named:
            features = [(row[6] or None, row[7]) if is_named else (None, None) for _, row, is_named in placed]
            values = values_of(history.features, log.event_features)
            assert [(row["device"], row["dwell"]) for row in values] == features


def test_appending_keeps_the_rows_of_ids(tmp_path: Path) -> None:
    run(tmp_path / "log", [write_csv(tmp_path / "a.csv", [(5, 50, 1), (7, 70, 1)])])
    run(tmp_path / "log", [write_csv(tmp_path / "b.csv", [(6, 60, 2), (5, 40, 2)])], append=True)
    run(tmp_path / "log", [write_csv(tmp_path / "c.csv", [(7, 50, 3)])], append=True)  # nothing new
    log = EventLog.open(tmp_path / "log")
    assert log.users.ids([0, 1, 2]).tolist() == [5, 7, 6]
    assert log.items.ids([0, 1, 2, 3]).tolist() == [50, 70, 40, 60]
    assert items_of(log, 7) == [70, 50]


DETERMINISM = """
import sys
from vista.config import PrepareConfig, SourceConfig
from vista.log.ingest.prepare import prepare
from vista.log.ingest.source_parser import SourceParser
folder, out, bucket = sys.argv[1:]
parser = SourceParser()
for form in ("csv", "parquet"):
    paths = [f"{folder}/{name}.{form}" for name in ("two", "one")]
    source = SourceConfig(paths=paths, timestamp="timestamp", time_unit="s", action="kind", rating="stars")
    source.categories, source.numbers = ["device", "hour"], ["dwell"]
    prepare(PrepareConfig(out=f"{out}/{form}", events=source), bucket_events=int(bucket), parser=parser)
parser.close()
"""


def test_the_same_files_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With any number of threads, chunk size of the stream, and bucket size of the sort."""
    rng = np.random.default_rng(1)
    for name in ("one", "two"):
        num = 6_000
        frame = pl.DataFrame(
            {
                "user": [f"u{n}" for n in rng.integers(0, 300, num)],
                "item": rng.integers(0, 2000, num),
                "timestamp": rng.integers(0, 500, num),
                "kind": rng.choice(["view", "buy", "like"], num),
                "stars": rng.integers(1, 6, num),
                "device": rng.choice(["", *(f"device {name} {number}" for number in range(400))], num),
                "hour": rng.integers(0, 24, num),
                "dwell": rng.random(num).astype(np.float32),
            }
        )
        frame.write_csv(tmp_path / f"{name}.csv")
        frame.sample(num, shuffle=True, seed=1).write_parquet(tmp_path / f"{name}.parquet", row_group_size=1000)
    prints = []
    for threads, morsel, bucket in ((1, 100_000, 1 << 22), (2, 1000, 5000)):
        monkeypatch.setenv("POLARS_MAX_THREADS", str(threads))
        monkeypatch.setenv("POLARS_IDEAL_MORSEL_SIZE", str(morsel))
        done = run_python(DETERMINISM, str(tmp_path), str(tmp_path / f"{threads}"), str(bucket))
        assert done.returncode == 0, done.stderr
        prints.append(fingerprint(tmp_path / f"{threads}"))
    assert len(prints[0]) >= 2 * 16
    assert prints[0] == prints[1]


def test_equal_times_keep_the_order_of_file_names_and_rows(tmp_path: Path) -> None:
    second = write_csv(tmp_path / "b.csv", [(1, 3, 9), (1, 4, 9)])
    first = write_csv(tmp_path / "a.csv", [(1, 1, 9), (1, 2, 9), (1, 0, 3)])
    run(tmp_path / "log", [second, first])
    assert items_of(EventLog.open(tmp_path / "log"), 1) == [0, 1, 2, 3, 4]


def test_actions_are_added_by_later_segments(tmp_path: Path) -> None:
    first = write_csv(tmp_path / "a.csv", [(1, 1, 1, "view"), (1, 2, 2, "buy")], "user,item,timestamp,kind")
    later = write_csv(tmp_path / "b.csv", [(1, 3, 3, "add"), (1, 4, 4, "view")], "user,item,timestamp,kind")
    old = "all times are before 1971; check events.time_unit, in case seconds were read as milliseconds"
    report = run(tmp_path / "log", [first], action="kind")
    assert report.warnings == [old]
    warned = run(tmp_path / "log", [later], append=True, action="kind").warnings
    assert warned[1:] == [
        "the log has the new actions add; models that use actions do not know them, so retrain these models before the "
        "next refresh"
    ]
    log = EventLog.open(tmp_path / "log")
    assert log.actions == ["buy", "view", "add"]
    assert log[1].action.tolist() == [1, 0, 2, 1]


def test_a_source_counts_once(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", [(1, 1, 1)])
    copy = write_csv(tmp_path / "copy.csv", [(1, 1, 1)])
    with pytest.raises(DataError, match=r"copy\.csv: has the same content as .*a\.csv"):
        run(tmp_path / "log", [file, copy])
    run(tmp_path / "log", [file])
    before = fingerprint(tmp_path / "log")
    with pytest.raises(DataError, match=r"copy\.csv: segment 1 already contains it \(as a\.csv\); leave it out"):
        run(tmp_path / "log", [copy], append=True)
    frame = {"user": [1], "item": [2], "timestamp": [3]}
    EventLog.from_frame(frame, tmp_path / "other", time_unit="s")
    with pytest.raises(DataError, match="segment 1 already contains it"):
        EventLog.from_frame(frame, tmp_path / "other", time_unit="s", append=True)
    assert fingerprint(tmp_path / "log") == before


def test_out_must_be_new_or_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, synced = write_csv(tmp_path / "a.csv", [(1, 1, 1)]), list[Path]()
    run(tmp_path / "log", [file])
    with monkeypatch.context() as patch:
        patch.setattr("vista.log.segment_writer.sync", synced.append)
        with pytest.raises(DataError, match=r"log: already exists; add these sources to it with append=true"):
            run(tmp_path / "log", [write_csv(tmp_path / "b.csv", [(1, 1, 2)])])
        assert synced == [tmp_path]  # A run that was killed may have renamed the log without a sync.
        for error, answer in (
            (PermissionError(13, "Permission denied"), "already exists"),  # in another account's folder of mode 711
            (OSError(5, "Input/output error"), "its name cannot be synced"),
        ):
            patch.setattr("vista.log.segment_writer.sync", Mock(side_effect=error))
            with pytest.raises(DataError, match=f"log: {answer}"):
                run(tmp_path / "log", [file])
    with pytest.raises(DataError, match="no such log; leave append out"):
        run(tmp_path / "absent", [file], append=True)
    (tmp_path / "empty").mkdir()
    run(tmp_path / "empty", [file])
    assert EventLog.open(tmp_path / "empty").num_events == 1


@pytest.mark.parametrize(
    ("header", "rows", "source", "error", "message"),
    [
        (
            "user,item",
            [(1, 1)],
            {"timestamp": None, "time_unit": None},
            DataError,
            r"column 'timestamp' is missing, the file has: user, item; name the right one",
        ),
        (
            "user,item,timestamp",
            [(1, 1, 5)],
            {"ids": IdType("str")},
            ConfigError,
            r"user ids of the log are int; leave",
        ),
        ("user,item,timestamp", [("bob", 1, 5)], {}, DataError, r"row 1, column 'user': 'bob' is not an integer"),
    ],
)
def test_an_append_that_does_not_match_leaves_the_log_unchanged(
    tmp_path: Path, header: str, rows: list, source: dict, error: type[Exception], message: str
) -> None:
    run(tmp_path / "log", [write_csv(tmp_path / "a.csv", [(1, 1, 1)])])
    before = fingerprint(tmp_path / "log")
    with pytest.raises(error, match=message):
        run(tmp_path / "log", [write_csv(tmp_path / "b.csv", rows, header)], append=True, **source)
    assert fingerprint(tmp_path / "log") == before


@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_failure_at_the_end_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, append: bool, failure: BaseException
) -> None:
    if append:
        run(tmp_path / "log", [write_csv(tmp_path / "a.csv", [(1, 1, 1)])])
    file = write_csv(tmp_path / "b.csv", [(1, 1, 2)])
    before = fingerprint(tmp_path)

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(segment_writer.SegmentWriter, "write_manifest", fail)
    with pytest.raises((KeyboardInterrupt, DataError)) as caught:
        run(tmp_path / "log", [file], append=append)
    if isinstance(failure, OSError):
        assert "free disk space" in str(caught.value)
    assert fingerprint(tmp_path) == before
    assert not list(tmp_path.rglob("*.tmp"))
    monkeypatch.undo()
    assert run(tmp_path / "log", [file], append=append).num_events == 1


def test_leftovers_of_a_killed_writer_are_removed(tmp_path: Path) -> None:
    leftover = tmp_path / ".log.tmp"
    (leftover / "segment-000001").mkdir(parents=True)
    (leftover / "segment-000001" / "item.npy").write_bytes(b"half")
    (leftover / "junk").write_bytes(b"half")
    run(tmp_path / "log", [write_csv(tmp_path / "a.csv", [(1, 1, 1)])])
    assert not leftover.exists()
    assert [path.name for path in (tmp_path / "log").iterdir()] == ["segment-000001"]


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", [(1, 1, 1)])
    with segment_writer.staged_folder(tmp_path / "log") as staging:
        with pytest.raises(DataError, match="another process is writing it"):
            run(tmp_path / "log", [file])
        (staging / "x").write_text("x")
    assert [path.name for path in (tmp_path / "log").iterdir()] == ["x"]


TIME_MS = 1_714_564_800_123  # 2024-05-01T12:00:00.123Z


@pytest.mark.parametrize(
    ("values", "unit", "want"),
    [
        ([1_714_564_800], "s", 1_714_564_800_000),
        (["1714564800"], "s", 1_714_564_800_000),
        ([1_714_564_800.1234], "s", TIME_MS),
        (["1714564800.1234"], "s", TIME_MS),
        ([TIME_MS], "ms", TIME_MS),
        ([TIME_MS * 1000 + 999], "us", TIME_MS),
        ([TIME_MS * 1_000_000 + 999_999], "ns", TIME_MS),
        (["2024-05-01T12:00:00.123Z"], "iso", TIME_MS),
        (["2024-05-01T14:00:00.123+02:00"], "iso", TIME_MS),
        (pl.Series([TIME_MS * 1000 + 999]).cast(pl.Datetime("us")), None, TIME_MS),
        (pl.Series([TIME_MS]).cast(pl.Datetime("ms", "Asia/Tokyo")), None, TIME_MS),
        (pl.Series(["2024-05-01"]).str.to_date(), None, 1_714_521_600_000),
        ([0], "s", 0),
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
        (pl.Series([TIME_MS]).cast(pl.Datetime("ms")), "s", r"has type Datetime.*; set events.time_unit=iso"),
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


def test_the_config_sets_the_kind_of_ids(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", [(7, "01", 1), (7, "1", 2)])
    run(tmp_path / "log", [file], ids=IdType("str"))
    assert items_of(EventLog.open(tmp_path / "log"), "7") == ["01", "1"]
    pl.DataFrame({"user": [7.0], "item": [3], "timestamp": [1]}).write_parquet(tmp_path / "a.parquet")
    run(tmp_path / "other", [tmp_path / "a.parquet"], ids=IdType("str"))
    log = EventLog.open(tmp_path / "other")
    assert (log.users.kind, items_of(log, "7.0")) == ("str", ["3"])


def test_files_of_one_call_need_the_same_columns(tmp_path: Path) -> None:
    np.savez(tmp_path / "events.npz", user=[1], item=[2], rating=[3.0])
    (tmp_path / "more").mkdir()
    np.savez(tmp_path / "more" / "events.npz", user=[1], item=[2])
    message = r"more/events\.npz: has the columns user, item, but .*/events\.npz has user, item, rating"
    with pytest.raises(DataError, match=message):
        run(tmp_path / "log", [tmp_path, tmp_path / "more"], kind="npz")


def test_impressions_from_files(tmp_path: Path) -> None:
    seen = tmp_path / "seen.csv"
    seen.write_text("who,what,when,click,like\n1,10,5,1,\n2,30,6,0,1\n1,10,4,0,0\n")
    config = PrepareConfig(
        out=str(tmp_path / "log"),
        events=SourceConfig(paths=[str(write_csv(tmp_path / "a.csv", [(1, 10, 1), (1, 20, 2)]))], **COLUMNS),
        impressions=ImpressionsConfig(
            paths=[str(seen)], user="who", item="what", timestamp="when", time_unit="s", labels=["click", "like"]
        ),
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
        out=str(tmp_path / "log"), events=SourceConfig(paths=[file], **COLUMNS), impressions=ImpressionsConfig(**given_)
    )
    with pytest.raises(ConfigError, match=message):
        prepare(config, parser=PARSER)
