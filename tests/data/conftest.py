"""What the tests of ingest share."""

from pathlib import Path

from vista.config_data import PrepareConfig, SourceConfig
from vista.data.ingest import prepare
from vista.data.prepare_report import PrepareReport

COLUMNS = {"timestamp": "timestamp", "time_unit": "s"}


def run(out: Path, paths: list[Path], *, append: bool = False, **source: object) -> PrepareReport:
    config = SourceConfig(paths=[str(path) for path in paths], **(COLUMNS | source))
    return prepare(PrepareConfig(out=str(out), events=config, append=append, progress=False))


def write_csv(path: Path, rows: list[tuple], header: str = "user,item,timestamp") -> Path:
    path.write_text(header + "\n" + "".join(",".join(map(str, row)) + "\n" for row in rows))
    return path
