"""EventLog: reading equals a plain sort of what was written, with one and several segments. Damage in the files of
a log: found by `verify`, before anything is trained, refreshed, evaluated, or compacted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import polars as pl
import pytest

from tests.conftest import Served, run_python, small_config
from tests.log.conftest import run, write_csv
from tests.log.log_oracle import contents, edit_manifest
from vista.arrays import map_array
from vista.cli.main import main
from vista.config import EvaluateConfig, SourceColumns
from vista.errors import DataError, LogFormatError, UnknownUserError
from vista.evaluation.evaluate import evaluate
from vista.log import histories
from vista.log.compaction import compact_log
from vista.log.deletions import erase_users, forget_events
from vista.log.event_log import EventLog
from vista.log.histories import Histories
from vista.log.inspection import verify_log
from vista.refresh import RefreshOptions, refresh, refresh_incremental
from vista.training.trainer import Trainer, train


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
    assert (segment.name, manifest["format"], manifest["version"]) == ("segment-000001", "vista-event-log", 8)


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
        (manifest_says(version=2), r"format version 2, but this version of vista reads 8"),
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


FIRST, LAST = "segment-000001", "segment-000004"


def flip(file: Path, place: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << bit
    file.write_bytes(content)


@pytest.fixture(scope="module")
def full_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log with every kind of file: two segments of events and features, one of deleted events, one of erasures."""
    path = tmp_path_factory.mktemp("verify") / "log"
    rng = np.random.default_rng(0)
    for number in range(2):
        events = {
            "user": [f"u{user}" for user in rng.integers(0, 9, 60)],
            "item": rng.integers(0, 20, 60),
            "timestamp": [*range(59), -1],
            "kind": rng.choice(["buy", "view"], 60),
            "stars": rng.random(60).astype(np.float32),
            "device": ["web", "app", None] * 20,
            "dwell": rng.random(60),
        }
        shown = {name: events[name][:20] for name in ("user", "item", "timestamp")}
        columns = SourceColumns(action="kind", rating="stars", labels=["like"], probabilities=["p"])
        shown |= {"like": rng.integers(0, 2, 20), "p": rng.random(20), "hour": ["h1", "h2"] * 10}
        items = {"item": np.arange(20), "kind": ["a", "b"] * 10, "price": rng.random(20), "v": rng.random((20, 3))}
        users = {"user": [f"u{user}" for user in range(9)], "region": ["n", "s", "e"] * 3, "age": rng.random(9)}
        tables = {"impressions": shown, "items": items, "users": users, "on_bad_rows": "quarantine"}
        tables |= {"categories": ["device"], "numbers": ["dwell"], "request_categories": ["hour"]}
        EventLog.from_frame(events, path, time_unit="ms", columns=columns, append=number > 0, **tables)
    forget_events(path, {name: events[name][:3] for name in ("user", "item", "timestamp")})
    erase_users(path, ["u1"])
    return path


@pytest.fixture
def log_folder(full_log: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(full_log, tmp_path / "log"))


def damages(folder: Path) -> Iterator[Path]:
    """Each file of a log, changed in a byte of its start, header, middle, or end in turn, then restored."""
    for number, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        content = file.read_bytes()
        place = min((0, 70, len(content) // 2, len(content) - 1)[number % 4], len(content) - 1)
        flip(file, place, bit=place % 8)
        yield file
        file.write_bytes(content)


@pytest.mark.parametrize("compacted", [False, True])
def test_one_changed_byte_in_any_file_is_an_error_that_names_it(log_folder: Path, compacted: bool) -> None:
    size = EventLog.open(log_folder).verify()
    if compacted:
        compact_log(log_folder)
        size = EventLog.open(log_folder).verify()
    manifests = sum(file.stat().st_size for file in log_folder.rglob("manifest.json"))
    assert size + manifests == sum(len(content) for content in contents(log_folder).values())
    names, folders = set(), set()
    for file in damages(log_folder):
        names.add(file.name)
        folders.add(file.parent.name)
        with pytest.raises(LogFormatError, match=r"; (restore|check the path|install|prepare the log again)") as caught:
            EventLog.open(log_folder).verify()
        assert str(file) in str(caught.value)
        assert verify_log(log_folder).damaged == [str(file.relative_to(log_folder))]
    EventLog.open(log_folder).verify()
    assert folders >= {"features", "user_features", "event_features", "request_features"}
    expected = {"manifest.json", "new_users.offsets.npy", "offsets.npy", "rating.npy", "probability.npy"}
    expected |= {"items.npy", "0.codes.npy", "0.offsets.npy", "0.values.ids.npy", "1.numbers.npy", "2.vectors.npy"}
    assert names >= expected | (
        {"changed.npy", "new_users.blank.npy"} if compacted else {"quarantine.csv", "erased.npy"}
    )


def test_opening_and_extending_a_log_finds_damaged_ids_offsets_and_deletions(log_folder: Path, tmp_path: Path) -> None:
    """A log with deletions reads these files as it is opened: damage must not end in an IndexError."""
    for name in ("users.npy", "offsets.npy", "new_users.offsets.npy", "impressions/offsets.npy"):
        content = (log_folder / FIRST / name).read_bytes()
        flip(log_folder / FIRST / name, len(content) - 9, 5)
        with pytest.raises(LogFormatError, match=f"{FIRST}/{name}: its content has changed"):
            EventLog.open(log_folder)
        (log_folder / FIRST / name).write_bytes(content)
    path = tmp_path / "plain"
    run(path, [write_csv(tmp_path / "a.csv", [(1, 1, 1), (2, 2, 2)])])
    flip(path / FIRST / "new_users.ids.npy", 128)
    EventLog.open(path)
    before = contents(path)
    acts: list[Callable[[], object]] = [
        lambda: run(path, [write_csv(tmp_path / "b.csv", [(1, 3, 3)])], append=True),
        lambda: forget_events(path, {"user": [2], "item": [2], "timestamp": [2000]}),
        lambda: erase_users(path, [2]),
    ]
    for act in acts:
        with pytest.raises(LogFormatError, match=r"new_users\.ids\.npy: its content has changed"):
            act()
    assert contents(path) == before


def test_only_new_segments_are_read_in_full(log_folder: Path) -> None:
    log = EventLog.open(log_folder)
    everything, newest, none = (log.verify(newer_than=number) for number in (0, 1, log.last_segment))
    assert everything > newest > none > 0
    flip(log_folder / FIRST / "timestamp.npy", -1)
    log = EventLog.open(log_folder)
    log.verify(newer_than=1)
    with pytest.raises(LogFormatError, match=r"segment-000001/timestamp\.npy: its content has changed"):
        log.verify()
    flip(log_folder / "segment-000002" / "timestamp.npy", -1)
    with pytest.raises(LogFormatError, match=r"segment-000002/timestamp\.npy"):
        EventLog.open(log_folder).verify(newer_than=1)


def test_a_log_of_many_small_segments_keeps_no_file_open(tmp_path: Path) -> None:
    path = tmp_path / "log"
    run(path, [write_csv(tmp_path / "a.csv", [(1, 1, 1), (2, 2, 2)])])
    log = EventLog.open(path)
    opened = [file.resolve() for file in Path("/proc/self/fd").iterdir() if file.exists()]
    assert not [file for file in opened if file.is_relative_to(path)]
    assert log[1].timestamp.tolist() == [1000]


def test_a_manifest_that_no_reader_accepts_is_not_written(tmp_path: Path) -> None:
    frame = {"user": [1], "item": [1], "timestamp": [1], "kind": ["k" * 5000]}
    with pytest.raises(
        DataError,
        match=r"a log cannot hold this \(actions: expected a list in which each entry is a string of at most 4096",
    ):
        EventLog.from_frame(frame, tmp_path / "log", time_unit="s", columns=SourceColumns(action="kind"))
    assert list(tmp_path.iterdir()) == []


def test_a_compaction_of_a_damaged_log_changes_nothing(log_folder: Path) -> None:
    flip(log_folder / FIRST / "rating.npy", -1)
    before = contents(log_folder)
    with pytest.raises(LogFormatError, match=r"rating\.npy: its content has changed"):
        compact_log(log_folder)
    assert contents(log_folder) == before


class TestCommand:
    def test_every_damaged_file_is_listed(self, log_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["log", "verify", f"data={log_folder}"]) == 0
        assert "files with" in capsys.readouterr().out
        flip(log_folder / FIRST / "item.npy", -1)
        flip(log_folder / LAST / "manifest.json", 5)
        (log_folder / FIRST / "action.npy").unlink()
        assert main(["log", "verify", f"data={log_folder}"]) == 1
        error = capsys.readouterr().err
        assert "3 damaged or missing file(s): " in error and "restore them from a copy" in error
        for name in (f"{FIRST}/item.npy", f"{LAST}/manifest.json", f"{FIRST}/action.npy"):
            assert name in error

    def test_manifests_that_contradict_each_other_are_refused(
        self, log_folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        edit_manifest(log_folder / LAST, num_items=99)
        assert main(["log", "verify", f"data={log_folder}"]) == 1
        assert "the vocabularies contain 9 users" in capsys.readouterr().err


class TestUse:
    """A time that differs in its lowest bit: nothing but the digest can find it."""

    @pytest.fixture
    def damaged(self, served: Served, tmp_path: Path) -> Path:
        path = Path(shutil.copytree(served.log.path, tmp_path / "log"))
        flip(path / FIRST / "timestamp.npy", -8)
        return path

    def test_training(self, damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        log = EventLog.open(damaged)
        config = small_config(log, tmp_path / "run", optim__epochs=1)
        with pytest.raises(LogFormatError, match=r"timestamp\.npy: its content has changed"):
            train(config, log)
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["train.log"]
        config.verify_log = False
        monkeypatch.setattr(Trainer, "_step", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(config, log)

    def test_a_full_refresh(self, served: Served, damaged: Path, tmp_path: Path) -> None:
        log = EventLog.open(damaged)
        with pytest.raises(LogFormatError, match=r"timestamp\.npy: its content has changed"):
            refresh(served.model, log, tmp_path / "store")
        assert not (tmp_path / "store").exists()
        refresh(served.model, log, tmp_path / "store", options=RefreshOptions(verify_log=False))

    def test_an_incremental_refresh(self, served: Served, tmp_path: Path) -> None:
        path = Path(shutil.copytree(served.log.path, tmp_path / "log"))
        refresh(served.model, EventLog.open(path), tmp_path / "store")
        later = {"user": [100], "item": [0], "timestamp": [4_000_000_000_000], "action": ["like"], "rating": [1.0]}
        columns = SourceColumns(action="action", rating="rating")
        EventLog.from_frame(later, path, time_unit="ms", columns=columns, append=True)
        flip(path / FIRST / "rating.npy", -1)  # not read again
        refresh_incremental(served.model, EventLog.open(path), tmp_path / "store")
        EventLog.from_frame(
            later | {"timestamp": [4_000_000_000_001]}, path, time_unit="ms", columns=columns, append=True
        )
        flip(path / "segment-000003" / "timestamp.npy", -8)
        with pytest.raises(LogFormatError, match=r"segment-000003/timestamp\.npy: its content has changed"):
            refresh_incremental(served.model, EventLog.open(path), tmp_path / "store")
        options = RefreshOptions(verify_log=False)
        report = refresh_incremental(served.model, EventLog.open(path), tmp_path / "store", options=options)
        assert report.counts["appended"] == 1

    def test_an_evaluation(self, served: Served, damaged: Path) -> None:
        config = EvaluateConfig(data=str(damaged), model=str(served.model_dir), store=str(served.test_store))
        with pytest.raises(LogFormatError, match=r"timestamp\.npy: its content has changed"):
            evaluate(config)
        config.verify_log = False
        evaluate(config)


@pytest.mark.parametrize("array", [np.arange(3), np.zeros((0, 2), np.uint8), np.ones((4, 2), np.float32)])
def test_an_array_is_mapped_only_if_its_header_fits(tmp_path: Path, array: np.ndarray) -> None:
    file = tmp_path / "array.npy"
    np.save(file, array)
    mapped = map_array(file, "remedy")
    assert mapped.dtype == array.dtype and mapped.shape == array.shape and not mapped.flags.writeable
    assert mapped.tolist() == array.tolist()
    content = file.read_bytes()
    size = f"({len(array)},".encode()
    for old, new in (
        (size, b"(9,"),
        (size, b"(-2,"),
        (size, b"(" + b"9" * 18 + b","),
        (array.dtype.str.encode(), b"|O8"),
        (b"False", b"True "),
        (b"{", b"("),
        (b"v\0", b"w\0"),
        (content, content[:20]),
        (content, b""),
    ):
        assert old in content
        file.write_bytes(content.replace(old, new))
        with pytest.raises(LogFormatError, match=r"array\.npy: (not a \.npy file|has \d+ bytes, which does).*; remedy"):
            map_array(file, "remedy")
