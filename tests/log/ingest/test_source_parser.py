"""The parser: a file that panics, crashes, hangs or fills memory ends the child alone, with a typed error."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tests.log.conftest import run, write_csv
from vista.config import SourceConfig
from vista.config.checks import OnBadRows
from vista.errors import DataError
from vista.log.event_log import EventLog
from vista.log.ingest.rows import read_part
from vista.log.ingest.source_files import MAX_COLUMNS, MAX_LINE_BYTES
from vista.log.ingest.source_parser import SourceParser
from vista.log.ingest.sources import open_sources

ROWS = [(1, 10, 5), (2, 20, 6)]


@pytest.fixture
def parser() -> Iterator[SourceParser]:
    with SourceParser() as made:
        yield made


def child_of(parser: SourceParser) -> subprocess.Popen[bytes]:
    assert parser._child is not None
    return parser._child


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


def test_the_child_ends_with_its_parent(tmp_path: Path) -> None:
    """Also while it waits in Polars for the writer of a named pipe, and can run no Python."""
    pipe = tmp_path / "pipe.parquet"
    os.mkfifo(pipe)
    request = {"task": "metadata", "path": str(pipe), "folder": "/", "memory_bytes": 1 << 32, "rows_bytes": 1 << 20}
    line = json.dumps(request | {"arguments": {}}).encode() + b"\n"
    code = (
        "import sys, time; from vista.log.ingest.source_parser import SourceParser; p = SourceParser(); "
        f"request = {line!r}; "
        f"p.call('column_types', sys.argv[1]); print(p._child.pid, flush=True); "
        "p._child.stdin.write(request), p._child.stdin.flush(), time.sleep(600)"
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


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, parser: SourceParser) -> None:
    file = write_csv(tmp_path / "a.csv", ROWS)
    config = SourceConfig(paths=[str(file)], timestamp="timestamp", time_unit="s")
    (source,) = open_sources(config, "events", parser)
    write_csv(file, [*ROWS, (3, 30, 7)])
    with pytest.raises(DataError, match=r"a\.csv: changed while it was read; wait until its writer is done"):
        read_part(source, {"user": "int", "item": "int"}, "events", tmp_path, 0, OnBadRows.error)


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
