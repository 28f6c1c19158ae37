"""Features of events and impressions in a log: types on disk, views, and what contradicts itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.log.log_oracle import Oracle, Step, assert_reads_as, contents, edit_manifest, replace_array, write
from vista.errors import LogFormatError
from vista.log.compaction import compact_log
from vista.log.event_log import EventLog
from vista.log.log_verification import verify_log
from vista.log.row_feature_writer import RowFeatureWriter
from vista.log.row_features import RowFeatures, rows_that_fit
from vista.log.segment_files import EVENT_FEATURES
from vista.log.segment_row_features import code_type
from vista.log.segment_writer import SegmentWriter
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
    writer = RowFeatureWriter(segment, EVENT_FEATURES, 2, {"domain": values})
    writer.append(RowFeatures({"domain": np.array([-1, num_values - 1], np.int32)}))
    writer.close()
    stored = np.load(tmp_path / "event_features" / "0.codes.npy")
    assert stored.dtype.str[1:] == dtype and stored.tolist() == [-1, num_values - 1]


def test_a_column_that_a_segment_lacks_is_missing_there(tmp_path: Path) -> None:
    log = write(tmp_path / "log", STEPS)
    assert_reads_as(log, Oracle(STEPS), np.random.default_rng(0))
    history = log.slice(2)
    assert history.features.columns["device"].tolist() == [-1]
    assert np.isnan(history.features.columns["dwell"]).all()


def test_numbers_of_one_segment_are_views(tmp_path: Path) -> None:
    log = write(tmp_path / "log", STEPS[:1])
    column = log.gather(np.arange(log.num_users)).features.columns["dwell"]
    assert np.shares_memory(column, log.segments[0].events.features["dwell"])


def test_blocks_read_features_only_on_demand_and_are_then_smaller(tmp_path: Path) -> None:
    log = write(tmp_path / "log", STEPS)
    blocks = list(visible_blocks(log, log.lengths, 6))
    assert len(blocks) == 1 and blocks[0].features.columns == {}
    read = list(visible_blocks(log, log.lengths, 6, features=True))
    assert len(read) > 1 and all(list(block.features.columns) == list(BOTH) for block in read)
    assert sum(block.num_events for block in read) == log.num_events
    assert (rows_that_fit(1000, 20, 0), rows_that_fit(1000, 20, 5), rows_that_fit(1, 20, 100)) == (1000, 250, 1)


def test_a_log_without_features_has_none(tmp_path: Path) -> None:
    log = write(tmp_path / "log", STEPS[1:])
    assert log.event_features == {} == log.request_features
    assert log.slice(0).features.columns == {}
    assert log.impressions is not None and log.impressions.features.columns == {}


def test_changed_bytes_are_found(tmp_path: Path) -> None:
    path = tmp_path / "log"
    write(path, STEPS)
    files = [name for name in contents(path) if "_features/" in name]
    assert len(files) == 8
    for name in files:
        intact = (path / name).read_bytes()
        (path / name).write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
        assert verify_log(path).damaged == [name]
        (path / name).write_bytes(intact)


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
        (_columns("vector"), "event_features"),
        (lambda segment: replace_array(segment, "event_features/0.codes.npy", np.zeros(4, np.int64)), "of int8"),
        (lambda segment: replace_array(segment, "event_features/0.codes.npy", np.zeros(3, np.int8)), "has 3 rows, but"),
        (lambda segment: replace_array(segment, "event_features/1.numbers.npy", np.zeros(4)), "instead of float32"),
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
    with pytest.raises(
        LogFormatError, match="'device' of the events is a number, but in an earlier segment it is a cat"
    ):
        EventLog.open(path)
