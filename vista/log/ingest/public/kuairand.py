"""KuaiRand: every row of its logs is a video that was shown, with what the user did."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from vista.installation import require_module
from vista.log.ingest.column_names import check_columns
from vista.log.ingest.file_scan import EXTRA, ROW, FileScan
from vista.log.ingest.public.file_form import FileForm
from vista.log.ingest.public.public_set import PublicSet
from vista.log.ingest.text_files import read_header, scan_text

if TYPE_CHECKING:
    import polars as pl
else:
    pl = require_module("polars", "data")

ACTIONS = ("follow", "forward", "comment", "like", "long_view", "click")
"""The action of an event is the first of these whose flag is set, or else VIEW."""
VIEW = "view"
_FLAGS = {f"is_{action}" if action != "long_view" else action: action for action in ACTIONS}
_COLUMNS = {"user": "user_id", "item": "video_id", "timestamp": "time_ms"}
_SHOWN = {**_COLUMNS, "time_unit": "ms"}
_LABELS = ["is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view"]


def read_plays(file: Path, features: Mapping[str, str]) -> FileScan:
    """The rows that are events: those with a play time, and without the flag `is_hate`.

    Args:
        features: other columns to read, canonical names to those of the file.

    Raises:
        DataError: if the file lacks a column.
    """
    columns = {**_COLUMNS, **features}
    used = {*columns.values(), *_FLAGS, "play_time_ms", "is_hate"}
    header = read_header(file, ",", '"')
    check_columns(str(file), columns | {name: name for name in used}, header, "events", KUAIRAND.remedy)
    rows = scan_text(file, [name if name in used else "" for name in header], ",", '"', 1)
    is_event = pl.col("play_time_ms").ne_missing("0") & pl.col("is_hate").ne_missing("1")
    # A row without flags gets no action, so that a short or blank line does not become an event.
    flagged = [pl.when(pl.col(flag) == "1").then(pl.lit(action)) for flag, action in _FLAGS.items()]
    action = pl.coalesce(*flagged, pl.when(pl.col("is_click").is_not_null()).then(pl.lit(VIEW)))
    values = [pl.col(own).alias(name) for name, own in columns.items()]
    frame = rows.filter(is_event).select(ROW, *values, action.alias("action"), EXTRA)
    return FileScan(frame, columns | {"action": "is_click"}, is_text=True, time_unit="ms")


KUAIRAND = PublicSet(
    events=(FileForm(("log_standard_*.csv",), _SHOWN, read_named=read_plays),),
    impressions=(FileForm(("log_standard_*.csv",), {**_SHOWN, "labels": _LABELS, "categories": ["tab"]}),),
    items=(
        FileForm(
            ("video_features_basic_*.csv",),
            {
                "item": "video_id",
                "categories": ["video_type", "upload_type", "music_type", "tag"],
                "numbers": ["video_duration", "server_width", "server_height"],
                "value_separator": ",",
            },
        ),
    ),
    users=(
        FileForm(
            ("user_features_*.csv",),
            {
                "user": "user_id",
                "categories": [
                    *("user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author"),
                    *("follow_user_num_range", "fans_user_num_range", "friend_user_num_range", "register_days_range"),
                    *(f"onehot_feat{number}" for number in range(18)),
                ],
                "numbers": ["follow_user_num", "fans_user_num", "friend_user_num", "register_days"],
            },
        ),
    ),
    url="https://zenodo.org/records/10439422",
)
