"""Fixtures of the tests of logs and of ingestion."""

import atexit
from pathlib import Path

import pytest

from vista.config import PrepareConfig, SourceConfig
from vista.config.checks import OnBadRows
from vista.log.ingest.prepare import PrepareReport, prepare
from vista.log.ingest.source_parser import SourceParser

PARSER = SourceParser()
"""Shared by the tests, because its start takes longer than most of them."""
atexit.register(PARSER.close)
COLUMNS = {"timestamp": "timestamp", "time_unit": "s"}


def run(
    out: Path, paths: list[Path], *, append: bool = False, on_bad_rows: str = "raise", **source: object
) -> PrepareReport:
    config = SourceConfig(paths=[str(path) for path in paths], **(COLUMNS | source))
    bad_rows = OnBadRows(on_bad_rows)
    settings = PrepareConfig(out=str(out), events=config, append=append, on_bad_rows=bad_rows)
    return prepare(settings, parser=PARSER)


def write_csv(path: Path, rows: list[tuple], header: str = "user,item,timestamp") -> Path:
    path.write_text(header + "\n" + "".join(",".join(map(str, row)) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests write thousands of files and are not about power cuts, which tests/faults simulates."""
    monkeypatch.setattr("vista.log.segment_writer.sync", lambda path: None)
    monkeypatch.setattr("vista.log.compaction.sync", lambda path: None)
