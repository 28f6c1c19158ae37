"""The parser: a file that panics, crashes, hangs or fills memory ends the child alone, with a typed error."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tests.log.conftest import PARSER, run, write_csv
from tests.log.ingest.source_mutations import mutated
from vista.config import ItemTableConfig, PrepareConfig, SourceConfig
from vista.config.checks import OnBadRows
from vista.errors import ConfigError, DataError
from vista.log.event_log import EventLog
from vista.log.ingest.prepare import prepare
from vista.log.ingest.rows import read_part
from vista.log.ingest.source_files import MAX_COLUMNS, MAX_LINE_BYTES
from vista.log.ingest.source_parser import SourceParser, memory_limit
from vista.log.ingest.sources import open_sources

ROWS = [(1, 10, 5), (2, 20, 6)]
BOMB_ROWS = 18_000_000


@pytest.fixture
def parser() -> Iterator[SourceParser]:
    with SourceParser() as made:
        yield made


def child_of(parser: SourceParser) -> subprocess.Popen[bytes]:
    assert parser._child is not None
    return parser._child


def _frame() -> pl.DataFrame:
    chance = np.random.default_rng(0)
    return pl.DataFrame(
        {
            "user": chance.integers(0, 40, 300),
            "item": chance.integers(0, 90, 300),
            "timestamp": np.sort(chance.integers(1_600_000_000_000, 1_700_000_000_000, 300)),
            "action": [("view", "like", "buy")[code] for code in chance.integers(0, 3, 300)],
            "rating": chance.random(300).astype(np.float32),
        }
    )


def _parquet(compression: str) -> bytes:
    buffer = BytesIO()
    _frame().write_parquet(buffer, compression=compression, row_group_size=128)  # type: ignore[arg-type]
    return buffer.getvalue()


def _items() -> pl.DataFrame:
    chance = np.random.default_rng(0)
    return pl.DataFrame(
        {
            "item": chance.permutation(200),
            "kind": [("a", "b", None)[code] for code in chance.integers(0, 3, 200)],
            "tags": [["x", "yy", "z"][:code] for code in chance.integers(0, 4, 200)],
            "price": chance.random(200),
            "vector": chance.random((200, 3)).astype(np.float32),
        }
    )


def _items_parquet() -> bytes:
    buffer = BytesIO()
    _items().write_parquet(buffer, row_group_size=64)
    return buffer.getvalue()


def _npz() -> bytes:
    buffer, frame = BytesIO(), _frame()
    users, user = np.unique(frame["user"].to_numpy(), return_inverse=True)
    items, item = np.unique(frame["item"].to_numpy(), return_inverse=True)
    times = frame["timestamp"].to_numpy() // 1000
    np.savez_compressed(buffer, user=user, item=item, user_raw=users, item_raw=items, time=times)
    return buffer.getvalue()


FORMATS = {  # file name -> the undamaged content
    "events.parquet": lambda: _parquet("zstd"),
    "plain.parquet": lambda: _parquet("uncompressed"),
    "events.csv": lambda: _frame().write_csv().encode(),
    "events.csv.gz": lambda: gzip.compress(_frame().write_csv().encode(), mtime=0),
    "events.tsv": lambda: _frame().write_csv(separator="\t").encode(),
    "events.npz": _npz,
    "items.parquet": _items_parquet,
    "items.csv": lambda: _items().select("item", "kind", "price").write_csv().encode(),
}


@pytest.mark.parametrize("name", FORMATS)
def test_mutations_are_taken_or_refused(tmp_path: Path, name: str) -> None:
    """A source has no checksum, so a damaged one may be taken."""
    content, chance, refused = FORMATS[name](), random.Random(f"{name} 0"), 0
    file, log = tmp_path / name, tmp_path / "log"
    kind = "npz" if name.endswith(".npz") else "table"
    columns = {"timestamp": "timestamp", "time_unit": "ms", "action": "action", "rating": "rating"}
    source = SourceConfig(kind=kind, paths=[str(file)], **(columns if kind == "table" else {}))
    items = None
    if name.startswith("items"):
        items = ItemTableConfig(paths=[str(file)])
        source.paths = [str(tmp_path / "whole.csv")]
        (tmp_path / "whole.csv").write_bytes(FORMATS["events.csv"]())
    for number in range(16):
        file.write_bytes(mutated(content, chance))
        bad_rows = OnBadRows.error if number % 2 else OnBadRows.quarantine
        settings = PrepareConfig(out=str(log), events=source, items=items, on_bad_rows=bad_rows)
        began = time.monotonic()
        try:
            prepare(settings, parser=PARSER)
            assert items is None or EventLog.open(log).item_features
        except (DataError, ConfigError) as error:
            refused += isinstance(error, DataError)
            assert not log.exists() and "\n" not in str(error)
        assert time.monotonic() - began < 60, f"mutation {number}: a damaged file of a few kilobytes took too long"
        shutil.rmtree(log, ignore_errors=True)
    assert refused > 2


def test_the_child_stays_for_the_next_file_and_restarts_after_a_crash(tmp_path: Path, parser: SourceParser) -> None:
    file = write_csv(tmp_path / "a.csv", ROWS)
    assert parser.call("column_types", file)[0] == {"user": "String", "item": "String", "timestamp": "String"}
    child = child_of(parser)
    assert parser.call("column_types", file)[0] and child_of(parser) is child
    child.kill()
    child.wait()
    assert parser.call("column_types", file)[0] and child_of(parser) is not child
    parser.close()
    assert child.returncode == -signal.SIGKILL


@pytest.mark.nightly
def test_a_child_that_dies_in_a_call_is_reported(tmp_path: Path, parser: SourceParser) -> None:
    file = write_csv(tmp_path / "a.csv", ROWS)
    parser.call("column_types", file)
    child_of(parser).send_signal(signal.SIGSTOP)
    threading.Timer(1, child_of(parser).kill).start()
    with pytest.raises(DataError, match=r"a\.csv: cannot be read: the parser was killed by SIGKILL"):
        parser.call("column_types", file)
    assert parser.call("column_types", file)[0]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("a.csv", "the file is damaged, or the disk is too slow: write the file again, or split it"),
        ("a.csv.gz", r"it holds too much for a compressed file of \d+ bytes: decompress it, or split it"),
    ],
)
def test_a_child_that_hangs_is_ended(tmp_path: Path, name: str, why: str) -> None:
    file = write_csv(tmp_path / "a.csv", ROWS)
    if name != file.name:
        packed = tmp_path / name
        packed.write_bytes(gzip.compress(file.read_bytes()))
        file = packed
    with SourceParser(timeout_s=60) as parser:
        parser.call("column_types", file)
        parser._timeout_s = 0.2
        child = child_of(parser)
        child.send_signal(signal.SIGSTOP)
        with pytest.raises(DataError, match=rf"/{name}: the parser gave no rows within 0 s; {why}"):
            parser.call("column_types", file)
        assert child.poll() == -signal.SIGKILL


@pytest.mark.parametrize(
    "activity", ["time.sleep(600)", "p._child.stdin.write(request), p._child.stdin.flush(), time.sleep(600)"]
)
def test_the_child_ends_with_its_parent(tmp_path: Path, activity: str) -> None:
    """Also while it waits in Polars for the writer of a named pipe, and can run no Python."""
    pipe = tmp_path / "pipe.parquet"
    os.mkfifo(pipe)
    request = {"task": "metadata", "path": str(pipe), "folder": "/", "memory_bytes": 1 << 32, "rows_bytes": 1 << 20}
    line = json.dumps(request | {"arguments": {}}).encode() + b"\n"
    code = (
        "import sys, time; from vista.log.ingest.source_parser import SourceParser; p = SourceParser(); "
        f"request = {line!r}; "
        f"p.call('column_types', sys.argv[1]); print(p._child.pid, flush=True); {activity}"
    )
    file = write_csv(tmp_path / "a.csv", ROWS)
    parent = subprocess.Popen([sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(0.5)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and Path(f"/proc/{child}/stat").exists():
        if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{child}").exists()


def test_a_named_pipe_is_refused(tmp_path: Path, parser: SourceParser) -> None:
    os.mkfifo(tmp_path / "pipe.parquet")
    with pytest.raises(DataError, match=r"pipe\.parquet: is not a regular file"):
        parser.call("metadata", tmp_path / "pipe.parquet")


@pytest.mark.nightly
def test_a_script_without_a_main_guard(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", ROWS)
    (tmp_path / "script.py").write_text(
        "from vista.config import PrepareConfig, SourceConfig\n"
        "from vista.log.ingest.prepare import prepare\n"
        "source = SourceConfig(paths=['a.csv'], timestamp='timestamp', time_unit='s')\n"
        "print(prepare(PrepareConfig(out='log', events=source)).num_events)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr


@pytest.mark.nightly
def test_a_small_file_cannot_take_much_disk_space(tmp_path: Path) -> None:
    file = tmp_path / "a.csv.gz"
    file.write_bytes(gzip.compress(b"user,item\n" + b"1,2\n" * 500_000))
    assert file.stat().st_size < 10_000
    config = SourceConfig(paths=[str(file)])
    with SourceParser(rows_bytes=1 << 20) as parser:
        (source,) = open_sources(config, "events", parser)
        with pytest.raises(DataError, match=r"a\.csv\.gz: has too many rows for a file of its size"):
            read_part(source, {"user": "int", "item": "int"}, "events", tmp_path, 0, OnBadRows.error)
    run(tmp_path / "log", [file], timestamp=None, time_unit=None)
    assert EventLog.open(tmp_path / "log").num_events == 500_000


@pytest.mark.parametrize(
    ("shape", "declared_bytes", "message"),
    [
        (2, 1 << 40, r"its arrays hold 2,199,023,255,552 bytes, but at most"),
        (1 << 40, None, r"cannot be read: the parser exited with code 1 \(MemoryError: Unable to allocate 8\.00 TiB"),
    ],
)
def test_arrays_of_a_small_file_cannot_take_much_memory(
    tmp_path: Path, shape: int, declared_bytes: int | None, message: str
) -> None:
    """The directory of the archive, or the header of an array, speaks of terabytes."""
    header = BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": (shape,)})
    with zipfile.ZipFile(tmp_path / "events.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("user.npy", "item.npy"):
            archive.writestr(name, header.getvalue() + bytes(16))
            archive.getinfo(name).file_size = declared_bytes or archive.getinfo(name).file_size
    with pytest.raises(DataError, match=rf"events\.npz: {message}"):
        run(tmp_path / "log", [tmp_path / "events.npz"], kind="npz", timestamp=None, time_unit=None)


def test_a_small_parquet_file_cannot_take_much_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row group of equal values: 1 KB that takes gigabytes. However the parser ends, the next file is read."""
    ids = pl.repeat(7, BOMB_ROWS, dtype=pl.Int64, eager=True)
    frame = pl.DataFrame({"user": ids, "item": ids, "timestamp": ids, "rating": ids})
    frame.write_parquet(tmp_path / "a.parquet", row_group_size=BOMB_ROWS, statistics=False, data_page_size=1 << 30)
    size = (tmp_path / "a.parquet").stat().st_size
    with monkeypatch.context() as patch:
        patch.setattr("vista.log.ingest.source_parser.MEMORY_BYTES", 512 << 20)
        patch.setattr("vista.log.ingest.source_parser.THREAD_BYTES", 0)
        assert size < 10_000 and memory_limit(size) < 8 * len(frame.columns) * BOMB_ROWS
        with pytest.raises(DataError, match=r"a\.parquet: cannot be read: .*needs more than [\d,]+ MiB of memory"):
            run(tmp_path / "log", [tmp_path / "a.parquet"], rating="rating")
    run(tmp_path / "log", [write_csv(tmp_path / "a.csv", ROWS)])


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, parser: SourceParser) -> None:
    file = write_csv(tmp_path / "a.csv", ROWS)
    config = SourceConfig(paths=[str(file)], timestamp="timestamp", time_unit="s")
    (source,) = open_sources(config, "events", parser)
    write_csv(file, [*ROWS, (3, 30, 7)])
    with pytest.raises(DataError, match=r"a\.csv: changed while it was read; wait until its writer is done"):
        read_part(source, {"user": "int", "item": "int"}, "events", tmp_path, 0, OnBadRows.error)


@pytest.mark.parametrize("filler", [b"x", b"\r"])
def test_a_long_line_is_named(tmp_path: Path, filler: bytes) -> None:
    file = tmp_path / "a.csv"
    start = b"user,item,timestamp\n" + b"1,2,3\n" * 500_000
    for length, held in ((MAX_LINE_BYTES, False), (MAX_LINE_BYTES + 1, True)):
        file.write_bytes(start + b"4," + filler * (length - 2) + b"\n5,6,7\n")
        message = "line 500002 is longer than 1,048,576 bytes" if held else "row 500001, column 'item'"
        with pytest.raises(DataError, match=rf"a\.csv: {message}"):
            run(tmp_path / "log", [file], ids="int")
    file.write_bytes(start + b"4,5,6" * (1 << 18))
    with pytest.raises(DataError, match=r"line 500002 is longer"):
        run(tmp_path / "log", [file])


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"u" * (MAX_LINE_BYTES + 1), "line 1 is longer than 1,048,576 bytes"),
        (b"user,item,timestamp" + b",c" * (MAX_COLUMNS - 2), "has 4,097 columns, but at most 4,096 are possible"),
        (b'user,"' + b"i" * 200_000 + b'"', "the header cannot be read .field larger than field limit"),
    ],
)
def test_a_header_that_is_too_large_is_refused(tmp_path: Path, header: bytes, message: str) -> None:
    (tmp_path / "a.csv").write_bytes(header + b"\n1,2,3\n")
    with pytest.raises(DataError, match=message):
        run(tmp_path / "log", [tmp_path / "a.csv"])


def test_cells_of_the_quarantine_are_no_formulas(tmp_path: Path) -> None:
    cells = ["=cmd|' /C calc'!A0", "+1+1", "@sum(a)", "-x", "-5", "+1e3", "\tx", "'x"]
    rows = "".join(f'1,2,"{cell}"\n' for cell in cells)
    (tmp_path / "a.csv").write_text("user,item,=time\n3,4,5\n" + rows)
    report = run(tmp_path / "log", [tmp_path / "a.csv"], on_bad_rows="quarantine", timestamp="=time")
    aside = pl.read_csv(report.quarantine, infer_schema=False)
    assert EventLog.open(tmp_path / "log").num_events == 2  # +1e3 is a time
    assert aside["value"].to_list() == ["'=cmd|' /C calc'!A0", "'+1+1", "'@sum(a)", "'-x", "-5", "'\tx", "'x"]
    assert set(aside["column"]) == {"'=time"}


MANY = 10_000_000
MAX_GIB = 4
"""Memory of `vista prepare` and of its parser, at their highest: ten times the text, since Polars reads in parallel."""
PREPARE = """
import json, resource, sys
from vista.config import ItemTableConfig, PrepareConfig, SourceConfig
from vista.errors import DataError
from vista.log.ingest.prepare import prepare
given = json.loads(sys.argv[1])
events, items = SourceConfig(**given["events"]), given["items"] and ItemTableConfig(**given["items"])
message = ""
try:
    prepare(PrepareConfig(out=given["out"], events=events, items=items))
except DataError as error:
    message = str(error)
peaks = [resource.getrusage(who).ru_maxrss / 2**20 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(json.dumps([message, max(peaks)]))
"""


def prepared(folder: Path, events: dict[str, Any], items: dict[str, Any] | None = None) -> tuple[str, float]:
    """Prepare a log in a process of its own; returns the error, and the peak memory in GiB."""
    words = {
        "out": str(folder / "log"),
        "events": {"timestamp": "timestamp", "time_unit": "s"} | events,
        "items": items,
    }
    done = subprocess.run(
        [sys.executable, "-c", PREPARE, json.dumps(words)], capture_output=True, text=True, check=True
    )
    message, peak = json.loads(done.stdout.splitlines()[-1])
    return message, peak


def events_file(folder: Path, num_events: int, **columns: pl.Series) -> str:
    rows = np.arange(num_events)
    file = folder / "events.parquet"
    pl.DataFrame({"user": rows % 1000, "item": rows % 1000, "timestamp": rows} | columns).write_parquet(file)
    return str(file)


def texts(count: int) -> pl.Series:
    return pl.select(value=pl.format("https://shop.example/page/{}", pl.int_range(count)))["value"]


@pytest.mark.research
def test_ten_million_categories_of_events_are_refused(tmp_path: Path) -> None:
    file = events_file(tmp_path, MANY, url=texts(MANY))
    message, peak = prepared(tmp_path, {"paths": [file], "categories": ["url"]})
    assert "column 'url' the log would have about " in message and "raise events.max_values" in message
    assert peak < MAX_GIB and not (tmp_path / "log").exists()


@pytest.mark.research
def test_ten_million_categories_of_items_are_refused(tmp_path: Path) -> None:
    file, each = events_file(tmp_path, 1000), MANY // 1000
    lists = pl.DataFrame({"item": np.repeat(np.arange(1000), each), "page": texts(MANY)}).group_by("item").all()
    lists.write_parquet(tmp_path / "items.parquet")
    message, peak = prepared(tmp_path, {"paths": [file]}, {"paths": [str(tmp_path / "items.parquet")]})
    assert "column 'page' the log would have about " in message and "raise items.max_values" in message
    assert peak < MAX_GIB and not (tmp_path / "log").exists()


@pytest.mark.research
def test_two_million_values_are_read_where_they_may_be(tmp_path: Path) -> None:
    count = 2_000_000
    source = {"paths": [events_file(tmp_path, count, url=texts(count))], "categories": ["url"], "max_values": count}
    message, _ = prepared(tmp_path, source)
    log = EventLog.open(tmp_path / "log")
    values = log.event_features["url"]
    assert message == "" and values is not None and len(values) == count == log.num_events
