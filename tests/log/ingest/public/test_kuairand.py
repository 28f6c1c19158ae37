"""KuaiRand, on a small sample of the public form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.log.conftest import PARSER, write_csv
from tests.log.feature_tables import features_of, user_features_of
from tests.log.ingest.set_logs import events_of, load
from tests.log.log_oracle import values_of
from vista.config import PrepareConfig, SourceConfig
from vista.errors import DataError
from vista.log.event_log import EventLog
from vista.log.ingest.prepare import prepare
from vista.log.ingest.sources import detect_kind

FLAGS = ("is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view")
COLUMNS = (
    *("user_id", "video_id", "date", "hourmin", "time_ms", *FLAGS, "play_time_ms", "duration_ms"),
    *("profile_stay_time", "comment_stay_time", "is_profile_enter", "is_rand", "tab"),
)
VIDEO_COLUMNS = (
    *("video_id", "author_id", "video_type", "upload_dt", "upload_type", "visible_status", "video_duration"),
    *("server_width", "server_height", "music_id", "music_type", "tag"),
)
USER_COLUMNS = (
    *("user_id", "user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author"),
    *("follow_user_num", "follow_user_num_range", "fans_user_num", "fans_user_num_range"),
    *("friend_user_num", "friend_user_num_range", "register_days", "register_days_range"),
    *(f"onehot_feat{number}" for number in range(18)),
)
NAMES = {
    "pure": ("log_standard_4_08_to_4_21_pure.csv", "log_standard_4_22_to_5_08_pure.csv"),
    "27k": ("log_standard_4_08_to_4_21_27k_part1.csv", "log_standard_4_08_to_4_21_27k_part2.csv"),
}
TIME = 1649400000000


def shown(user: int, video: int, seconds: int, flags: str, play_time_ms: int) -> tuple[int, ...]:
    """A row of the log; `flags` has one digit per name of FLAGS."""
    time = TIME + 1000 * seconds
    return (user, video, 20220408, 1400, time, *map(int, flags), play_time_ms, 9000, 0, 0, 0, 0, video % 3)


EARLIER = [
    shown(7, 10, 1, "1000001", 9000),  # long view
    shown(7, 11, 2, "0000000", 0),  # not played
    shown(7, 12, 3, "0000000", 500),
    shown(7, 13, 4, "1000010", 800),  # hated
    shown(9, 10, 5, "1110101", 9000),  # followed
]
LATER = [shown(9, 12, 60, "1100000", 4000), shown(9, 11, 61, "1000000", 100)]
VIDEOS = [
    (10, 1, "NORMAL", "2022-03-25", "ShortImport", 0, 9000, 720, 1280, 5, 9, '"12,65"'),
    (11, 2, "AD", "2022-03-26", "LongImport", 0, "", 1080, 1920, 6, "", 39),
    (99, 2, "NORMAL", "2022-03-26", "Web", 0, 1.0, 1080, 1920, 6, 4, ""),
]
PROFILES = [
    (7, "full_active", 0, 0, 1, 52, "(50,100]", 0, "0", 3, "[1,5)", 107, "61-90", 0, *[1] * 16, ""),
    (8, "UNKNOWN", 0, 0, 0, 5, "(0,10]", 1, "[1,10)", 0, "0", 8, "8-14", 1, *[0] * 16, 2.0),
]


def write(folder: Path, names: tuple[str, str]) -> Path:
    folder.mkdir()
    size = "27k" if "27k" in names[0] else "pure"
    for name, rows in zip(names, (EARLIER, LATER), strict=True):
        write_csv(folder / name, rows, ",".join(COLUMNS))
    write_csv(folder / f"log_random_4_22_to_5_08_{size}.csv", LATER, ",".join(COLUMNS))
    write_csv(folder / f"video_features_basic_{size}.csv", VIDEOS, ",".join(VIDEO_COLUMNS))
    profiles = [[f'"{value}"' if "," in str(value) else value for value in row] for row in PROFILES]
    write_csv(folder / f"user_features_{size}.csv", profiles, ",".join(USER_COLUMNS))
    return folder


@pytest.mark.parametrize("size", NAMES)
def test_events_impressions_and_videos(tmp_path: Path, size: str) -> None:
    folder = write(tmp_path / "data", NAMES[size])
    assert detect_kind(folder) == "kuairand"
    log = load(folder)
    assert events_of(log) == [
        (7, 10, TIME + 1000, "long_view"),
        (7, 12, TIME + 3000, "view"),
        (9, 10, TIME + 5000, "follow"),
        (9, 12, TIME + 60_000, "like"),
        (9, 11, TIME + 61_000, "click"),
    ]
    shown = log.impressions
    assert shown is not None and shown.tasks == list(FLAGS)
    assert shown.offsets.tolist() == [0, 4, 7] and shown.mask.all()
    assert log.items.ids(shown.item).tolist() == [10, 11, 12, 13, 10, 12, 11]
    assert ["".join(map(str, labels)) for labels in shown.label.tolist()] == [
        *("1000001", "0000000", "0000000", "1000010"),
        *("1110101", "1100000", "1000000"),
    ]
    assert features_of(log) == {
        "video_type": {10: ["NORMAL"], 11: ["AD"]},
        "upload_type": {10: ["ShortImport"], 11: ["LongImport"]},
        "music_type": {10: ["9"]},
        "tag": {10: ["12", "65"], 11: ["39"]},
        "video_duration": {10: 9000},
        "server_width": {10: 720, 11: 1080},
        "server_height": {10: 1280, 11: 1920},
    }
    assert values_of(shown.features, log.request_features) == [
        {"tab": str(video % 3)} for video in (10, 11, 12, 13, 10, 12, 11)
    ]
    numbers = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
    assert (
        user_features_of(log)
        == {
            name: {} if value == "" else {7: float(value) if name in numbers else str(value)}  # type: ignore[arg-type]
            for name, value in zip(USER_COLUMNS[1:], PROFILES[0][1:], strict=True)
        }
    )


def test_columns_of_plays_can_be_features_of_events(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", NAMES["pure"])
    log = load(folder, categories=["tab"], numbers=["play_time_ms"])
    features = values_of(log.gather(np.arange(2)).features, log.event_features)
    assert [(row["tab"], row["play_time_ms"]) for row in features] == [
        *(("1", 9000), ("0", 500)),
        *(("1", 9000), ("0", 4000), ("2", 100)),
    ]
    with pytest.raises(DataError, match="column 'dwell' is missing, the file has: user_id,"):
        load(folder.rename(tmp_path / "other"), numbers=["dwell"])


def test_more_columns_of_impressions_can_be_features_of_requests(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", NAMES["pure"])
    events = SourceConfig(kind="kuairand", paths=[str(folder)])
    shown = SourceConfig(kind="kuairand", paths=[str(folder)], categories=["tab", "is_rand"], numbers=["duration_ms"])
    prepare(PrepareConfig(out=str(tmp_path / "log"), events=events, impressions=shown, progress=False), parser=PARSER)
    assert list(EventLog.open(tmp_path / "log").request_features) == ["tab", "is_rand", "duration_ms"]


def test_random_exposures_can_be_named_as_impressions(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", NAMES["pure"])
    file = folder / "log_random_4_22_to_5_08_pure.csv"
    write_csv(file, [shown(7, 12, 90, "0100000", 100)], ",".join(COLUMNS))
    events = SourceConfig(kind="kuairand", paths=[str(folder)])
    both = SourceConfig(kind="kuairand", paths=[str(folder), str(file)])
    settings = PrepareConfig(out=str(tmp_path / "log"), events=events, impressions=both, progress=False)
    report = prepare(settings, parser=PARSER)
    assert (report.num_events, report.num_impressions) == (5, 8)


@pytest.mark.parametrize("lost", ["video_id", "is_click", "play_time_ms", "is_hate"])
def test_a_missing_column_is_named(tmp_path: Path, lost: str) -> None:
    folder = write(tmp_path / "data", NAMES["pure"])
    file = folder / NAMES["pure"][1]
    file.write_text(file.read_text().replace(lost, "other", 1))
    message = (
        rf"{file.name}: column '{lost}' is missing, the file has: user_id, .*; get the set from https://zenodo\.org"
    )
    with pytest.raises(DataError, match=message):
        load(folder)


def test_a_folder_without_the_standard_log(tmp_path: Path) -> None:
    write_csv(tmp_path / "log_random_4_22_to_5_08_pure.csv", LATER, ",".join(COLUMNS))
    with pytest.raises(DataError, match=r"has no log_standard_\*\.csv, which events\.kind=kuairand reads; get the set"):
        load(tmp_path, "kuairand")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("7,10,20220408,1400,1649400000000\n", r"row 6, column 'is_click': the value is missing"),
        ("7,10,20220408,1400,x" + ",1" * 14 + "\n", r"row 6, column 'time_ms': 'x' is not a number"),
        (
            "7,10,20220408,1400,1649400000000,2" + ",1" * 4 + ",0" * 9 + "\n",
            r"row 6, column 'is_click': '2' is not a lab",
        ),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, line: str, message: str) -> None:
    folder = write(tmp_path / "data", NAMES["pure"])
    with (folder / NAMES["pure"][0]).open("a") as file:
        file.write(line)
    with pytest.raises(DataError, match=message):
        load(folder)
