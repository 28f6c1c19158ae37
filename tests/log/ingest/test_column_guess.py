"""`vista prepare events.csv`: columns are guessed and said, and asked for when they are uncertain."""

import re
import shlex
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tests.log.conftest import PARSER
from vista.cli.main import main
from vista.config import PrepareConfig
from vista.config.composition import compose_config
from vista.errors import ConfigError
from vista.log.event_log import EventLog
from vista.log.ingest.prepare import prepare

RETAIL = """InvoiceNo,StockCode,Description,Quantity,InvoiceDate,CustomerID
1,85123A,"light, white",6,01/02/2017 11:53,17850
2,71053,lamp,6,01/25/2017 09:01,17850
3,71053,lamp,2,01/26/2017 10:00,13047
"""


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*words: str) -> None:
    """`vista prepare` with these words, in the parser that tests share."""
    prepare(compose_config(PrepareConfig, words), parser=PARSER)


def messages(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.message for record in caplog.records)


def test_a_bare_file_is_prepared_and_the_guess_can_be_pasted(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("retail.csv").write_text(RETAIL)
    with caplog.at_level("INFO", "vista.prepare"):
        assert main(["prepare", "retail.csv", "out=guessed"]) == 0
    said = messages(caplog)
    assert "retail.csv: guessed events.user=CustomerID events.item=StockCode events.timestamp=InvoiceDate" in said
    assert "retail.csv: not read: InvoiceNo, Description, Quantity;" in said
    assert (said + capsys.readouterr().out).count("is read with the month first") == 1
    asked = "to confirm, add to the command: "
    (confirming,) = (line for line in said.splitlines() if line.startswith(asked))
    assert main(["prepare", "retail.csv", *shlex.split(confirming.removeprefix(asked)), "out=named"]) == 0
    for name in ("guessed", "named"):
        log = EventLog.open(name)
        assert (log.num_users, log.num_items) == (2, 2)
        assert log[17850].timestamp.tolist() == [1483357980000, 1485334860000]


@pytest.mark.parametrize("name", ["action", "eventType", "Type", "event"])
def test_columns_of_actions(name: str) -> None:
    Path("log.csv").write_text(f"user,item,time,{name}\n1,2,2017-01-25,view\n1,3,2017-01-26,buy\n1,2,2017-01-27,view\n")
    run("files=[log.csv]")
    log = EventLog.open("data/log")
    assert [log.actions[code] for code in log[1].action] == ["view", "buy", "view"]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("kind", ["view"] * 21),
        ("type", [str(n % 2) for n in range(21)]),
        ("action", [f"word-{chr(97 + n)}" for n in range(21)]),
        ("action,event", ["view,click"] * 21),
    ],
)
def test_columns_that_are_not_taken_for_actions(name: str, values: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """By their names, numbers, or many texts, or because there are two."""
    rows = [f"1,{n},{1112486027 + n},{value}\n" for n, value in enumerate(values)]
    Path("log.csv").write_text("".join([f"user,item,time,{name}\n", *rows]))
    with caplog.at_level("INFO", "vista.prepare"):
        run("files=[log.csv]")
    assert len(EventLog.open("data/log").actions) == 1
    assert f"log.csv: not read: {name.replace(',', ', ')};" in messages(caplog)


@pytest.mark.parametrize(
    ("header", "row", "guess"),
    [
        ("visitorid,itemid,timestamp,event", "1,2,1433221332117,view", "visitorid itemid timestamp time_unit=ms"),
        (
            "event_time,product_id,product_price,user_id,user_session",
            "2019-10-01 00:00:00 UTC,1,1.5,2,a",
            "user_id product_id event_time",
        ),
        ("player,user_name,track_id,track_name,ts", "p,n,1,x,2017-01-02T10:00:00Z", "player track_id ts"),
        ("customer;sku;date;updated", "1;2;25.12.2017;26.12.2017", "separator=; customer sku date"),
    ],
)
def test_names_of_well_known_logs(header: str, row: str, guess: str, caplog: pytest.LogCaptureFixture) -> None:
    Path("log.csv").write_text(f"{header}\n{row}\n")
    with caplog.at_level("INFO", "vista.prepare"):
        run("files=[log.csv]")
    (line,) = (line for line in messages(caplog).splitlines() if "guessed" in line)
    chosen = compose_config(PrepareConfig, shlex.split(line.split("guessed ")[1])).events
    given = {word.partition("=")[0]: word.partition("=")[2] for word in guess.split() if "=" in word}
    assert [chosen.user, chosen.item, chosen.timestamp] == [word for word in guess.split() if "=" not in word]
    assert (chosen.separator, chosen.time_unit) == (given.get("separator", ","), given.get("time_unit"))
    log = EventLog.open("data/log")
    assert log.has_time and log.num_events == 1


def test_parquet_columns_are_guessed_by_their_types() -> None:
    frame = pl.DataFrame({"buyer": ["a"], "offer": [7], "paid": [1.5]}).with_columns(bought=pl.date(2017, 1, 25))
    frame.write_parquet("log.parquet")
    run("files=[log.parquet]")
    log = EventLog.open("data/log")
    assert log["a"].timestamp.tolist() == [1485302400000] and log.items.ids([0]).tolist() == [7]


def test_columns_of_other_types_are_not_taken_for_ids() -> None:
    frame = pl.DataFrame(
        {
            "user_price": [1.5],
            "user_list": [[1]],
            "user_blob": [b"x"],
            "user_flag": [True],
            "user_name": pl.Series(["a"], dtype=pl.Categorical),
            "item_span": pl.Series([1], dtype=pl.Duration("ms")),
            "item_code": [7],
            "time": [1.7e9],
        }
    )
    frame.write_parquet("log.parquet")
    run("files=[log.parquet]")
    log = EventLog.open("data/log")
    assert log["a"].timestamp.tolist() == [1_700_000_000_000] and log.items.ids([0]).tolist() == [7]


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        (
            "user_id,client_id,item,time",
            "1,2,3,1112486027",
            "log.csv: several columns are named like users; add events.user=user_id or events.user=client_id",
        ),
        (
            "a,b,time",
            "1,2,1112486027",
            "no column is named like users; add events.user=... and one of a, b; no column is named like items; add "
            "events.item=... and one of a, b",
        ),
        (
            "user,item,created,date",
            "1,2,2017-01-02,2017-01-02",
            "several columns are named like times; add events.timestamp=created or events.timestamp=date",
        ),
        (
            "user,item,time",
            "1,2,35",
            "column 'time' is named like times, but '35' is not a time that is recognized; add events.timestamp=time "
            "and events.time_unit=... or events.time_format=...",
        ),
    ],
)
def test_what_is_uncertain_is_asked_for(header: str, row: str, message: str) -> None:
    """Nothing waits for an answer: the command ends, and the words of the message decide."""
    Path("log.csv").write_text(f"{header}\n{row}\n")
    with pytest.raises(ConfigError, match=re.escape(message)):
        run("files=[log.csv]")
    assert not Path("data/log").exists()


def test_keys_that_are_set_are_not_guessed() -> None:
    Path("log.csv").write_text("user_id,client_id,item,time\n1,2,3,1112486027\n")
    run("files=[log.csv]", "events.user=client_id", "events.time_unit=ms")
    assert EventLog.open("data/log")[2].timestamp.tolist() == [1112486027]


def test_appended_files_are_read_like_the_earlier_ones(caplog: pytest.LogCaptureFixture) -> None:
    """By the columns that were named and the format of times that was inferred; keys that are set count."""
    Path("0.csv").write_text("who;sku;at\n1;7;01/25/2017 09:00\n")
    for number in (1, 2):
        Path(f"{number}.csv").write_text(f"who;sku;at;day\n1;{number};02/03/2017 09:00;03.02.2017\n")
    columns = ["events.user=who", "events.item=sku", "events.timestamp=at", "events.separator=';'"]
    run("events.paths=[0.csv]", *columns)
    with caplog.at_level("INFO", "vista.prepare"):
        run("files=[1.csv]", "append=true")
    assert "read like the earlier files of data/log: " in messages(caplog)
    assert "events.item=sku" in messages(caplog) and "guessed" not in messages(caplog)
    run("events.paths=[2.csv]", "append=true", "events.timestamp=day", "events.time_format=%d.%m.%Y")
    log = EventLog.open("data/log")
    assert log.items.ids(log[1].item).tolist() == [7, 2, 1]
    ends = [np.datetime64(time) for time in ("2017-01-25T09:00", "2017-02-03T00:00", "2017-02-03T09:00")]
    assert log[1].timestamp.tolist() == np.array(ends, "datetime64[ms]").astype(np.int64).tolist()


def test_known_formats_are_recognized(caplog: pytest.LogCaptureFixture) -> None:
    Path("set").mkdir()
    Path("set/u.data").write_text("1\t2\t5\t881250949\n")
    with caplog.at_level("INFO", "vista.prepare"):
        run("files=[set]")
    assert "set: read as events.kind=ml-100k" in messages(caplog)
