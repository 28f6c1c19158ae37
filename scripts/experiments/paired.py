"""Paired differences between rows of a table: the same users, with their metrics averaged over seeds first.

The metrics per user lie in the work folder, next to the models, so a difference is measured where its rows were.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.experiments.results import defined, newest_rows
from scripts.experiments.row_measurement import per_user_file, reported_metrics, row_folder
from scripts.experiments.row_origin import RowOrigin
from scripts.experiments.table_run import UNTRAINED_SEED, command_of
from scripts.experiments.tables import TABLES
from vista.errors import ConfigError
from vista.evaluation.comparison import Comparison, PerUserMetrics


def paired_lines(settings: argparse.Namespace, lines: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """A result for each pair of rows of the table whose metrics per user exist, unless `lines` has it already.

    Its metrics are those of the pair's first row minus those of the second on test, as `vista compare` shows them with
    the second row as `a`. Its errors are their standard errors over users.
    """
    table = TABLES[settings.table]
    title = f"{settings.table}, paired differences"
    newest = newest_rows(lines)
    for pair in table.pairs:
        seeds = _common_seeds(settings, pair, newest)
        files = {row: _files(settings, row, seeds) for row in pair}
        if not seeds or not all(file.exists() for own in files.values() for file in own):
            continue
        row, reference = (measured_users(settings, name, seeds) for name in pair)
        differences, reported = Comparison.of(reference, row).differences, reported_metrics(table)
        line = {
            "table": title,
            "data": table.data,
            "model": " − ".join(pair),
            "seed": seeds[0],
            "seeds": seeds,
            "metrics": defined({name: differences[name].difference for name in reported}),
            "errors": defined({name: differences[name].standard_error for name in reported}),
            "command": command_of(settings, pair, seeds),
            "config": {"seeds": seeds, "runs": {row: own[0].parts[-3] for row, own in files.items()}},
            **RowOrigin(0.0).fields(),
        }
        before = newest.get((title, table.data, line["model"]), [])
        if not any(all(old[key] == line[key] for key in ("metrics", "config")) for old in before):
            yield line


def measured_users(settings: argparse.Namespace, row: str, seeds: Sequence[int]) -> list[PerUserMetrics]:
    """Metrics per user of a row on test, for each seed.

    Raises:
        ConfigError: the row was not measured in the work folder with one of the seeds.
    """
    for file in (files := _files(settings, row, seeds)):
        if not file.exists():
            raise ConfigError(f"{file}: does not exist; measure the row {row!r} with `reproduce` first")
    return [PerUserMetrics.load(file) for file in files]


def _common_seeds(
    settings: argparse.Namespace,
    pair: Sequence[str],
    newest: Mapping[tuple[str, str, str], Sequence[Mapping[str, Any]]],
) -> list[int]:
    """Seeds of all trained rows of a pair."""
    table = TABLES[settings.table]
    trained = [row for row in pair if not table.rows[row].untrained]
    seeds = [{line["seed"] for line in newest.get((settings.table, table.data, row), [])} for row in trained]
    return sorted(set.intersection(*seeds)) if seeds else [UNTRAINED_SEED]


def _files(settings: argparse.Namespace, row: str, seeds: Sequence[int]) -> list[Path]:
    own = [UNTRAINED_SEED] if TABLES[settings.table].rows[row].untrained else seeds
    return [per_user_file(row_folder(settings, row, seed), row, "test") for seed in own]
