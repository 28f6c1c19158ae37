"""The parser: a file that panics, crashes, hangs or fills memory ends the child alone, with a typed error."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tests.log.conftest import run, write_csv
from tests.log.ingest.source_mutations import FORMATS, outcomes
from vista.config import SourceConfig
from vista.config.choices import OnBadRows
from vista.errors import DataError
from vista.log.event_log import EventLog
from vista.log.ingest.parts import read_part
from vista.log.ingest.source_parser import SourceParser, memory_limit
from vista.log.ingest.sources import open_sources
from vista.log.ingest.text_files import MAX_COLUMNS, MAX_LINE_BYTES

ROWS = [(1, 10, 5), (2, 20, 6)]
BOMB_ROWS = 40_000_000


@pytest.fixture
def parser() -> Iterator[SourceParser]:
    with SourceParser() as made:
        yield made


def child_of(parser: SourceParser) -> subprocess.Popen[bytes]:
    assert parser._child is not None
    return parser._child


@pytest.mark.parametrize("name", FORMATS)
def test_mutations_are_taken_or_refused(tmp_path: Path, parser: SourceParser, name: str) -> None:
    counts = outcomes(name, 40, tmp_path, parser)
    assert counts.total() == 40 and counts["DataError"] > 5


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


def test_a_child_that_dies_in_a_call_is_reported(tmp_path: Path, parser: SourceParser) -> None:
    file = write_csv(tmp_path / "a.csv", ROWS)
    parser.call("column_types", file)
    child_of(parser).send_signal(signal.SIGSTOP)
    threading.Timer(3, child_of(parser).kill).start()
    with pytest.raises(DataError, match=r"a\.csv: cannot be read: the parser was killed by SIGKILL"):
        parser.call("column_types", file)
    assert parser.call("column_types", file)[0]


def test_a_child_that_hangs_is_ended(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", ROWS)
    with SourceParser(timeout_s=60) as parser:
        parser.call("column_types", file)
        parser._timeout_s = 0.2
        child = child_of(parser)
        child.send_signal(signal.SIGSTOP)
        with pytest.raises(DataError, match=r"a\.csv: could not be read within 0 s"):
            parser.call("column_types", file)
        assert child.poll() == -signal.SIGKILL


def test_the_child_ends_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import sys, time; from vista.log.ingest.source_parser import SourceParser; p = SourceParser(); "
        "p.call('column_types', sys.argv[1]); print(p._child.pid, flush=True); time.sleep(600)"
    )
    file = write_csv(tmp_path / "a.csv", ROWS)
    parent = subprocess.Popen([sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
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


def test_a_script_without_a_main_guard(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", ROWS)
    (tmp_path / "script.py").write_text(
        "from vista.config import PrepareConfig, SourceConfig\n"
        "from vista.log.ingest.prepare import prepare\n"
        "source = SourceConfig(paths=['a.csv'], timestamp='timestamp', time_unit='s')\n"
        "print(prepare(PrepareConfig(out='log', events=source, progress=False)).num_events)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr


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


def test_a_small_parquet_file_cannot_take_much_memory(tmp_path: Path) -> None:
    """One row group of equal values: 1 KB that takes gigabytes. However the parser ends, the next file is read."""
    ids = pl.repeat(7, BOMB_ROWS, dtype=pl.Int64, eager=True)
    frame = pl.DataFrame({"user": ids, "item": ids, "timestamp": ids, "rating": ids})
    frame.write_parquet(tmp_path / "a.parquet", row_group_size=BOMB_ROWS, statistics=False, data_page_size=1 << 30)
    size = (tmp_path / "a.parquet").stat().st_size
    assert size < 10_000
    needed = memory_limit(size) // (8 * len(frame.columns))
    if needed > BOMB_ROWS:
        pytest.skip("the limit grows with the number of processors")
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
            run(tmp_path / "log", [file], item_ids="int")
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
