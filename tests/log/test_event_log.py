"""EventLog: reading equals a plain sort of what was written, with one and several segments."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tests.conftest import run_python
from tests.log.log_oracle import edit_manifest
from vista.config import SourceColumns
from vista.errors import LogFormatError, UnknownUserError
from vista.log import histories
from vista.log.event_log import EventLog
from vista.log.histories import Histories


def random_frame(seed: int, num_events: int, num_users: int = 20) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "user": rng.integers(100, 100 + num_users, num_events),
            "item": rng.integers(0, 50, num_events),
            "timestamp": rng.integers(0, 40, num_events) + 1_600_000_000,
            "kind": rng.choice(["view", "buy"], num_events),
            "stars": rng.integers(1, 6, num_events).astype(np.float32),
        }
    )


def write(path: Path, frames: list[pl.DataFrame]) -> EventLog:
    for number, frame in enumerate(frames):
        log = EventLog.from_frame(
            frame, path, time_unit="s", columns=SourceColumns(action="kind", rating="stars"), append=number > 0
        )
    return log


def expected_history(frames: list[pl.DataFrame], user: int) -> pl.DataFrame:
    """A stable sort by time of the concatenated frames."""
    return pl.concat(frames).filter(pl.col("user") == user).sort("timestamp", maintain_order=True)


def assert_history(log: EventLog, history: Histories, want: pl.DataFrame) -> None:
    assert log.items.ids(history.item).tolist() == want["item"].to_list()
    assert history.timestamp.tolist() == (want["timestamp"] * 1000).to_list()
    assert [log.actions[code] for code in history.action] == want["kind"].to_list()
    assert history.rating is not None
    assert history.rating.tolist() == want["stars"].to_list()
    assert history.offsets.tolist() == [0, want.height]
    assert history.item.dtype == np.int32
    assert history.rating.dtype == np.float32
    assert history.action.dtype == np.uint8


@pytest.fixture(scope="module", params=[1, 3], ids=["one segment", "three segments"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[EventLog, list]:
    """Three segments that overlap in time and users; the last one has new users."""
    frames = [random_frame(1, 300), random_frame(2, 40, 5), random_frame(3, 120, 30)][: request.param]
    return write(tmp_path_factory.mktemp("log") / "log", frames), frames


def test_every_history(case: tuple[EventLog, list]) -> None:
    log, frames = case
    everything = pl.concat(frames)
    assert log.num_events == everything.height == log.lengths.sum()
    assert log.num_users == everything["user"].n_unique()
    assert log.num_items == everything["item"].n_unique()
    assert log.last_segment == len(frames) and log.impressions is None
    for user in everything["user"].unique():
        assert_history(log, log[user], expected_history(frames, user))


def test_gather_equals_users_one_by_one(case: tuple[EventLog, list]) -> None:
    log, _ = case
    rows = np.array([3, 0, 7, 7, 1])
    counts = np.array([2, 0, 5, 1000, 1])
    together = log.gather(rows, counts)
    assert together.num_users == 5
    for place, (row, count) in enumerate(zip(rows, counts, strict=True)):
        alone = log.slice(row, 0, count)
        for name in ("item", "timestamp", "action", "rating"):
            assert getattr(together.slice(place), name).tolist() == getattr(alone, name).tolist()
    assert log.gather(rows).lengths.tolist() == log.lengths[rows].tolist()
    assert log.gather(np.array([], np.int64)).num_events == 0
    assert log.slice(2, -3).item.tolist() == log.slice(2).item[-3:].tolist()
    assert log.slice(2, 5, 2).num_events == 0


GOLDEN_SEGMENT = {
    "action.npy": ("|u1", "000101"),
    "item.npy": ("<i4", "010000000000000000000000"),
    "new_items.ids.npy": ("<i8", "07000000000000002c01000000000000"),
    "new_users.ids.npy": ("|u1", "6162"),
    "new_users.offsets.npy": ("<i8", "000000000000000001000000000000000200000000000000"),
    "offsets.npy": ("<i8", "000000000000000001000000000000000300000000000000"),
    "rating.npy": ("<f4", "000000400000c03f00004040"),
    "timestamp.npy": ("<i8", "e803000000000000d0070000000000008813000000000000"),
    "users.npy": ("<i8", "00000000000000000100000000000000"),
}
"""Types and bytes of the arrays of a segment, without the headers, which are NumPy's."""


def test_golden_bytes_of_a_segment(tmp_path: Path) -> None:
    frame = {"user": ["b", "a", "b"], "item": [7, 300, 7], "timestamp": [2, 1, 5]}
    frame |= {"kind": ["view", "buy", "view"], "stars": [1.5, 2.0, 3.0]}
    write(tmp_path / "log", [pl.DataFrame(frame)])
    (segment,) = (tmp_path / "log").glob("segment-*")
    arrays = {path.name: np.load(path) for path in segment.glob("*.npy")}
    assert {name: (array.dtype.str, array.tobytes().hex()) for name, array in arrays.items()} == GOLDEN_SEGMENT
    manifest = json.loads((segment / "manifest.json").read_text())
    assert {path.name for path in segment.iterdir()} == {*GOLDEN_SEGMENT, "manifest.json"}
    assert (segment.name, manifest["format"], manifest["version"]) == ("segment-000001", "vista-event-log", 7)


@pytest.mark.parametrize(
    ("lengths", "groups"),
    [
        ([], []),
        ([0, 0], [(0, 2)]),
        ([3, 4, 3], [(0, 2), (2, 3)]),
        ([7, 0, 1], [(0, 2), (2, 3)]),
        ([0, 9, 0, 9, 1], [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]),
    ],
)
def test_groups_hold_as_many_histories_as_fit(lengths: list[int], groups: list[tuple[int, int]]) -> None:
    """Up to 7 events; a longer history is a group by itself."""
    found = histories.token_groups(np.array(lengths, np.int64), 7)
    assert [(group.start, group.stop) for group in found] == groups


def test_unknown_users_and_rows(case: tuple[EventLog, list]) -> None:
    log, _ = case
    assert 100 in log
    assert 5 not in log
    with pytest.raises(UnknownUserError, match="user 5 is not in"):
        log[5]
    with pytest.raises(IndexError, match="user rows must lie in"):
        log.gather([log.num_users])
    with pytest.raises(TypeError, match="one-dimensional array of integers"):
        log.gather([0.5])
    for bounds in ([0.5], ["x"], [True], [2**63], [10**30]):
        with pytest.raises(TypeError, match="must be int64"):
            log.gather([0], bounds)
    for bounds in ([], [1, 2], [[1]], 1):
        with pytest.raises(ValueError, match="must have shape"):
            log.gather_ranges([0], [0], bounds)


def truncate(folder: Path) -> None:
    file = folder / "segment-000001" / "item.npy"
    file.write_bytes(file.read_bytes()[:-4])


def delete_column(folder: Path) -> None:
    (folder / "segment-000001" / "timestamp.npy").unlink()


def delete_segment(folder: Path) -> None:
    shutil.rmtree(folder / "segment-000001")


def manifest_says(**values: object) -> Callable[[Path], None]:
    return lambda folder: edit_manifest(folder / "segment-000001", **values)


def tear_manifest(folder: Path) -> None:
    file = folder / "segment-000001" / "manifest.json"
    file.write_text(file.read_text()[:50])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"item\.npy: expected \d+ bytes, found \d+; the file is truncated: copy it again"),
        (delete_column, r"timestamp\.npy: missing; prepare the log again"),
        (delete_segment, r"segment-000001 is missing, but segment-000002"),
        (manifest_says(version=2), r"format version 2, but this version of vista reads 7"),
        (tear_manifest, r"manifest\.json: cannot be read"),
    ],
)
def test_a_damaged_log_is_refused(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder = tmp_path / "log"
    write(folder, [random_frame(1, 50), random_frame(2, 50)])
    damage(folder)
    with pytest.raises(LogFormatError, match=message):
        EventLog.open(folder)


def test_a_folder_that_is_not_a_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LogFormatError, match="no such folder; make the log with `vista prepare"):
        EventLog.open(tmp_path / "absent")
    with pytest.raises(LogFormatError, match="not an EventLog, because it has no segment"):
        EventLog.open(tmp_path)


def test_reading_imports_neither_polars_nor_torch(tmp_path: Path) -> None:
    write(tmp_path / "log", [random_frame(1, 50)])
    code = (
        "import sys; from vista.log import splits; from vista.log.event_log import EventLog\n"
        "import vista.examples.item_statistics\n"
        f"log = EventLog.open({str(tmp_path / 'log')!r}); log.gather([1, 0]); splits.visible_counts(log, 'all')\n"
        "print([m for m in ('polars', 'torch', 'pandas', 'hydra', 'triton') if m in sys.modules])"
    )
    assert run_python(code).stdout == "[]\n"
