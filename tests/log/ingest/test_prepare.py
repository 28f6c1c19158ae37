"""Ingest: round trips, append, determinism, atomicity, and what is refused."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import vista
from tests.log.conftest import run, write_csv
from tests.log.log_oracle import values_of
from vista.config import SourceColumns
from vista.config.choices import IdType
from vista.errors import ConfigError, DataError
from vista.log import segment_writer
from vista.log.event_log import EventLog
from vista.log.ingest.prepare import prepare_frames


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


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=EVENTS, cut=st.integers(0, 40), bucket=st.integers(1, 50), named=st.tuples(st.booleans(), st.booleans()))
def test_any_frame_round_trips(
    rows: list[tuple], cut: int, bucket: int, named: tuple[bool, bool], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One segment or two, any bucket size: histories equal a stable sort by time, then sequence.

    Args:
        named: whether the features of events are read, in each part.
    """
    path = tmp_path_factory.mktemp("round") / "log"
    names = ["user", "item", "timestamp", "step", "kind", "stars", "device", "dwell"]
    parts = [part for part in (rows[:cut], rows[cut:]) if part]
    assume(len(parts) < 2 or parts[0] != parts[1])  # equal parts would be refused as the same source
    for number, part in enumerate(parts):
        frame = {name: [row[place] for row in part] for place, name in enumerate(names)}
        columns = SourceColumns(sequence="step", action="kind", rating="stars")
        features = {"categories": ["device"], "numbers": ["dwell"]} if named[number] else {}
        prepare_frames(frame, path, columns=columns, time_unit="s", append=number > 0, bucket_events=bucket, **features)
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


def test_appending_equals_one_prepare_of_all(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    files = []
    for number in range(3):
        rows = zip(rng.integers(0, 30, 200), rng.integers(0, 99, 200), rng.integers(0, 50, 200), strict=True)
        files.append(write_csv(tmp_path / f"part-{number}.csv", list(rows)))
    run(tmp_path / "whole", files)
    for number, file in enumerate(files):
        run(tmp_path / "grown", [file], append=number > 0)
    whole, grown = EventLog.open(tmp_path / "whole"), EventLog.open(tmp_path / "grown")
    assert grown.last_segment == 3
    assert (whole.num_users, whole.num_items, whole.num_events) == (grown.num_users, grown.num_items, 600)
    for user in whole.users.ids(np.arange(whole.num_users)):
        assert items_of(whole, user) == items_of(grown, user)
        assert whole[user].timestamp.tolist() == grown[user].timestamp.tolist()


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
out, bucket, *paths = sys.argv[1:]
source = SourceConfig(paths=paths, timestamp="timestamp", time_unit="s", action="kind", rating="stars")
source.categories, source.numbers = ["device", "hour"], ["dwell"]
prepare(PrepareConfig(out=out, events=source, progress=False), bucket_events=int(bucket))
"""


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    """With any number of threads, chunk size of the stream, and bucket size of the sort."""
    rng = np.random.default_rng(1)
    for name in ("one", "two"):
        num = 60_000
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
        frame.sample(num, shuffle=True, seed=1).write_parquet(tmp_path / f"{name}.parquet", row_group_size=7000)
    for form in ("csv", "parquet"):
        prints = []
        for threads, morsel, bucket in ((1, 100_000, 1 << 22), (2, 1000, 9000)):
            out = tmp_path / f"{form}-{threads}-{morsel}-{bucket}"
            environment = {
                **os.environ,
                "POLARS_MAX_THREADS": str(threads),
                "POLARS_IDEAL_MORSEL_SIZE": str(morsel),
                "PYTHONPATH": str(Path(vista.__file__).parents[1]),
            }
            paths = [str(tmp_path / f"{name}.{form}") for name in ("two", "one")]
            command = [sys.executable, "-c", DETERMINISM, str(out), str(bucket), *paths]
            subprocess.run(command, env=environment, check=True)
            prints.append(fingerprint(out))
        assert len(prints[0]) >= 16
        assert prints[0] == prints[1]


def test_equal_times_keep_the_order_of_file_names_and_rows(tmp_path: Path) -> None:
    second = write_csv(tmp_path / "b.csv", [(1, 3, 9), (1, 4, 9)])
    first = write_csv(tmp_path / "a.csv", [(1, 1, 9), (1, 2, 9), (1, 0, 3)])
    run(tmp_path / "log", [second, first])
    assert items_of(EventLog.open(tmp_path / "log"), 1) == [0, 1, 2, 3, 4]


def test_a_sequence_orders_equal_times(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", [(1, 1, 9, 5), (1, 2, 9, -1), (1, 3, 1, 7)], "user,item,timestamp,step")
    run(tmp_path / "log", [file], sequence="step")
    assert items_of(EventLog.open(tmp_path / "log"), 1) == [3, 2, 1]


def test_ordinals_in_a_log_without_times(tmp_path: Path) -> None:
    no_time = {"timestamp": None, "time_unit": None}
    run(tmp_path / "log", [write_csv(tmp_path / "a.csv", [(2, 9), (1, 7), (2, 8)], "user,item")], **no_time)
    run(tmp_path / "log", [write_csv(tmp_path / "b.csv", [(3, 9), (2, 1)], "user,item")], append=True, **no_time)
    log = EventLog.open(tmp_path / "log")
    assert not log.has_time
    assert log.manifests[0]["timestamp"] == "ordinal of the event in its history"
    assert (items_of(log, 2), log[2].timestamp.tolist()) == ([9, 8, 1], [0, 1, 2])
    assert log[3].timestamp.tolist() == [0]
    assert log.actions == ["event"]
    assert log[2].rating is None


def test_actions_are_added_by_later_segments(tmp_path: Path) -> None:
    first = write_csv(tmp_path / "a.csv", [(1, 1, 1, "view"), (1, 2, 2, "buy")], "user,item,timestamp,kind")
    later = write_csv(tmp_path / "b.csv", [(1, 3, 3, "add"), (1, 4, 4, "view")], "user,item,timestamp,kind")
    old = "all times are before 1971; check events.time_unit, in case seconds were read as milliseconds"
    assert run(tmp_path / "log", [first], action="kind").warnings == [old]
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


def test_out_must_be_new_or_a_log(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", [(1, 1, 1)])
    run(tmp_path / "log", [file])
    with pytest.raises(DataError, match=r"log: already exists; add these sources to it with append=true"):
        run(tmp_path / "log", [write_csv(tmp_path / "b.csv", [(1, 1, 2)])])
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
            r"the log has timestamps; name their col",
        ),
        ("user,item,timestamp,stars", [(1, 1, 1, 1)], {"rating": "stars"}, DataError, r"no ratings; leave them out"),
        (
            "user,item,timestamp",
            [(1, 1, 5)],
            {"user_ids": IdType("str")},
            ConfigError,
            r"user ids of the log are int; leave",
        ),
        ("user,item,timestamp", [("bob", 1, 5)], {}, DataError, r"row 1, column 'user': 'bob' is not an integer"),
        ("user,item,timestamp", [(1, 1, -5)], {}, DataError, r"row 1, column 'timestamp': '-5' is negative"),
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


def test_the_report_has_the_time_of_each_stage(tmp_path: Path) -> None:
    report = run(tmp_path / "log", [write_csv(tmp_path / "a.csv", [(1, 1, 1_600_000_000), (2, 1, 1_700_000_000)])])
    assert (report.segment, report.num_users, report.num_items, report.num_events) == (1, 2, 1, 2)
    assert sum(report.shares.values()) == pytest.approx(1)
    assert "2020-09-13 to 2023-11-14" in str(report)
    assert "rows/s: open" in str(report)
