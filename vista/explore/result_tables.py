"""Tables of results: files of `scripts.experiments.reproduce` (.jsonl) and of `vista evaluate out=...` (.json)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vista.errors import DataError
from vista.files import read_limited
from vista.runs.metric_order import badness

MAX_BYTES = 256 << 20
_HEAD_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class ResultTable:
    """One file: a row per model (and data set, if there are several), with the mean of each metric over seeds."""

    name: str
    rows: list[dict[str, Any]]
    """Each with "model", "seeds", and a value per metric; None where it is undefined."""
    metrics: list[str]

    def values(self, metric: str) -> list[dict[str, Any]]:
        """Model and value of one metric, without undefined ones, best first, or largest first if none is better."""
        known = [{"model": row["model"], "value": row[metric]} for row in self.rows if row.get(metric) is not None]

        def place(row: dict[str, Any]) -> float:
            bad = badness(metric, row["value"])
            return -row["value"] if bad is None else bad

        return sorted(known, key=place)


def result_files(folder: Path) -> list[Path]:
    """Files of results in a folder, by name; none if it does not exist. Benchmarks and other files are left out.

    Raises:
        DataError: the folder cannot be read.
    """
    if not folder.is_dir():
        return []
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix in (".jsonl", ".json") and path.is_file())
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error}); name another folder with results=...") from error
    return [path for path in files if not path.name.startswith("bench_") and _has_metrics(path)]


def _has_metrics(file: Path) -> bool:
    """Whether the first bytes of a file name metrics. Also true if it cannot be read: `read_table` then says why."""
    try:
        with file.open("rb") as opened:
            return b'"metrics"' in opened.read(_HEAD_BYTES)
    except OSError:
        return True


def read_table(file: Path) -> ResultTable:
    """Read one file of results.

    Raises:
        DataError: the file cannot be read, or holds no metrics; the message names the line.
    """
    try:
        text = read_limited(file, MAX_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({error}); name another folder with results=...") from error
    lines = [text] if file.suffix == ".json" else text.splitlines()
    latest: dict[tuple[str, Any], dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}, line {number}: is not JSON ({error}); remove the line") from error
        if not isinstance(row, dict) or not isinstance(row.get("metrics"), dict):
            raise DataError(f"{file}, line {number}: has no metrics, so it is not a result; choose another file")
        latest[_name(row), row.get("seed", 0)] = row  # of a row that was measured twice, the last one counts
    by_model: dict[str, list[dict[str, Any]]] = {}
    for (model, _), row in latest.items():
        by_model.setdefault(model, []).append(row["metrics"])
    metrics = list(dict.fromkeys(name for rows in by_model.values() for row in rows for name in row))
    rows = [
        {"model": model, "seeds": len(seeds), **{name: _mean([seed.get(name) for seed in seeds]) for name in metrics}}
        for model, seeds in by_model.items()
    ]
    return ResultTable(file.stem, rows, [name for name in metrics if any(row[name] is not None for row in rows)])


def _name(row: dict[str, Any]) -> str:
    """The model of a row, with its data set if that is not the table's own."""
    model, data, table = (str(row.get(key, "")) for key in ("model", "data", "table"))
    return f"{model} ({data})" if data and table and data != table else model


def _mean(values: list[Any]) -> float | None:
    known = [value for value in values if isinstance(value, (int, float)) and math.isfinite(value)]
    return sum(known) / len(known) if known else None
