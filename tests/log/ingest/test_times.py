"""Times that are text: formats that are set, formats that a column shows, and day and month told apart."""

import shlex
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from tests.log.conftest import run, write_csv
from vista.config import PrepareConfig
from vista.config.composition import compose_config
from vista.errors import ConfigError, DataError
from vista.log.event_log import EventLog
from vista.log.ingest.times import FORMS

START = datetime(2017, 1, 2, 11, 53, tzinfo=UTC)
TIMES = [START + timedelta(days=9 * day, minutes=day) for day in range(12)]
"""Some of them have a day after the 12th."""
NO_FORM = {"time_unit": None}


def in_form(time: datetime, form: str) -> str:
    return time.isoformat() if form == "iso" else time.strftime(form.replace("%.f", ".%f"))


def read_back(text: str, form: str) -> int:
    """The time in ms, read by the standard library."""
    parsed = datetime.fromisoformat(text) if form == "iso" else datetime.strptime(text, form.replace("%.f", ".%f"))
    return int(parsed.replace(tzinfo=UTC).timestamp() * 1000)


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=pytest.mark.nightly if place % 5 else ()) for place, form in enumerate(FORMS)]
)
def test_common_formats_are_inferred(tmp_path: Path, form: str) -> None:
    """In `make test`, each date with two or three of the clocks, and each clock with several dates."""
    texts = [in_form(time, form) for time in TIMES]
    frame = pl.DataFrame({"user": [1] * len(texts), "item": range(len(texts)), "timestamp": texts})
    log = EventLog.from_frame(frame, tmp_path / "log")
    assert log[1].timestamp.tolist() == [read_back(text, form) for text in texts]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_us_dates_of_a_file(tmp_path: Path, ending: str) -> None:
    """The one row that tells comes last, after the rows that are looked at first."""
    texts = ["1/2/2017 11:53"] * 2_000 + ["01/25/2017 9:05"]
    frame = pl.DataFrame({"user": range(2_001), "item": 7, "timestamp": texts})
    file = tmp_path / f"clicks.{ending}"
    frame.write_csv(file) if ending == "csv" else frame.write_parquet(file)
    report = run(tmp_path / "log", [file], **NO_FORM)
    assert EventLog.open(tmp_path / "log")[5].timestamp.tolist() == [1483357980000]
    assert report.warnings == [
        f"events: column 'timestamp' is read with the month first, because row 2001 of {file} is '01/25/2017 9:05'; "
        "'events.time_format=%m/%d/%Y %H:%M' confirms it"
    ]


def test_one_of_several_files_tells(tmp_path: Path) -> None:
    first = write_csv(tmp_path / "a.csv", [(1, 2, "01/02/2017")])
    second = write_csv(tmp_path / "b.csv", [(1, 3, "13/02/2017")])
    report = run(tmp_path / "log", [first, second], **NO_FORM)
    assert EventLog.open(tmp_path / "log")[1].timestamp.tolist() == [1485907200000, 1486944000000]
    assert f"row 1 of {second} is '13/02/2017'" in report.warnings[0]


def test_day_or_month_is_asked_for(tmp_path: Path) -> None:
    """Each word of the message can be pasted, and gives the times that it says."""
    file = write_csv(tmp_path / "a.csv", [(1, 2, "01/02/2017 11:53"), (1, 2, "")])
    with pytest.raises(ConfigError, match=r"no row tells whether the day or the month comes first; set ") as error:
        run(tmp_path / "log", [file], on_bad_rows="quarantine", **NO_FORM)
    assert str(file) in str(error.value) and "'01/02/2017 11:53'" in str(error.value)
    _, words = str(error.value).rsplit("set ", 1)
    times = []
    for number, word in enumerate(words.split(" or ")):
        chosen = compose_config(PrepareConfig, shlex.split(word)).events.time_format
        out = tmp_path / str(number)
        run(out, [file], on_bad_rows="quarantine", time_unit=None, time_format=chosen)
        times.append(EventLog.open(out)[1].timestamp.tolist())
    assert times == [[1485949980000], [1483357980000]]


def test_a_column_with_both_orders_is_refused(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", [(1, 2, "03/04/2017"), (1, 2, "01/25/2017"), (1, 3, "25/01/2017")])
    message = (
        rf"has the (day|month) first in row \d of {file} \('../../2017'\), but the (day|month) in row \d of .*; set "
        r"events\.time_format=%d/%m/%Y or events\.time_format=%m/%d/%Y, and on_bad_rows=quarantine"
    )
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "log", [file], **NO_FORM)
    report = run(tmp_path / "log", [file], on_bad_rows="quarantine", time_unit=None, time_format="%m/%d/%Y")
    assert (report.num_events, report.num_quarantined, report.warnings) == (2, 1, [])


def test_a_value_in_another_format_is_a_bad_row(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", [(1, 2, "25.12.2017 10:00"), (1, 2, "yesterday")])
    message = (
        r"a\.csv: row 2, column 'timestamp': 'yesterday' is not a time in this format; correct it, or check "
        r"events\.time_format \(now %d\.%m\.%Y %H:%M\); on_bad_rows=quarantine"
    )
    with pytest.raises(DataError, match=message):
        run(tmp_path / "log", [file], **NO_FORM)
    with pytest.raises(DataError, match=message):
        run(tmp_path / "log", [file], time_unit=None, time_format="%d.%m.%Y %H:%M")


def test_a_format_with_an_offset(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", [(1, 2, "25/Dec/2017:10:00:00 +0200")])
    run(tmp_path / "log", [file], time_unit=None, time_format="%d/%b/%Y:%H:%M:%S %z")
    assert EventLog.open(tmp_path / "log")[1].timestamp.tolist() == [1514188800000]
