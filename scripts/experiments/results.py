"""Results: one JSON line per run in docs/results/<table>.jsonl, and a Markdown table of these lines.

    python -m scripts.experiments.results docs/results/ml-1m.jsonl      # prints the table

A row has the keys {table, data, model, seed, metrics: {"ndcg@10": …}, command, config, commit, hardware, seconds}, and
may have five more:

- completed: the date on which settings that it had left to a default were written into its config;
- errors: {metric: standard error over users}, where the metrics are means over users;
- curve: [[seconds, NDCG@10], …] of the validations of its run;
- seeds: all seeds, if the row is a mean over several; `seed` is then the first;
- resolved: {part of the split: settings of the model that is measured there}, with those that `config` leaves to the
  plan of the run (null). Rows are compared by `config`, which then has the constants of the plan.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from vista.arrays import Floats
from vista.config.checks import Architecture
from vista.config.model_config import CONFIGS, readers_of
from vista.errors import DataError, VistaError
from vista.evaluation.metrics import mean_and_error
from vista.machine import cpu_name, usable_cores

_TYPE_OF_KEY: dict[str, type | tuple[type, ...]] = {
    "table": str,
    "data": str,
    "model": str,
    "seed": int,
    "metrics": dict,
    "command": str,
    "config": dict,
    "commit": str,
    "hardware": dict,
    "seconds": (int, float),
}
_OPTIONAL = {"completed": str, "errors": dict, "seeds": list, "resolved": dict, "curve": list}

_OVER_SEEDS = "Mean ± sample standard deviation over seeds"
_OVER_USERS = "Mean over seeds ± standard error over users"
_TWO_MODELS = (
    " The metrics on validation and on test are those of two models of the same settings, each trained on all events "
    "before the labels of its part, which are also those that counting baselines count. Seconds are those of both."
)
_LEGEND = "; – where a metric is undefined. A command is as its commit has it."


def paired_cell(name: str, values: Floats, others: Floats) -> str:
    """Mean of values [N] and its standard error, and in brackets those of their differences from others [N]."""
    (mean, error), (change, of_change) = mean_and_error(values), mean_and_error(values - others)
    return f"{name} {mean:.4f} ± {error:.4f} ({change:+.4f} ± {of_change:.4f})"


def append_result(path: str | os.PathLike[str], row: Mapping[str, Any]) -> None:
    """Append one result as one JSON line, durably: the line is on the disk when this returns.

    Args:
        path: docs/results/<table>.jsonl; created with its folder if missing.
        row: {table, data, model, seed, metrics, command, config, commit, hardware, seconds}. `metrics` maps names to
            finite numbers, or to None if a metric is undefined. `seconds` is the time of the run.

    Raises:
        DataError: if a key is missing, unknown or of another type, or a number is not finite; names the key.
    """
    validate_result(row)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(row, allow_nan=False, ensure_ascii=False).encode() + b"\n"
    with target.open("ab+", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a crash left the previous line unfinished
                line = b"\n" + line
        written = file.write(line)
        if written != len(line):
            raise OSError(
                f"{target}: only {written} of {len(line)} bytes were written; free disk space and append again"
            )
        os.fsync(file.fileno())


def read_results(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All rows of a file, in its order, validated.

    Raises:
        DataError: if the file is missing or a line is not a result; names file, line and remedy.
    """
    rows = read_lines(path)
    for number, row in rows:
        try:
            validate_result(row)
        except DataError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
    return [row for _, row in rows]


def read_lines(path: str | os.PathLike[str]) -> list[tuple[int, dict[str, Any]]]:
    """(1-based line number, object) of every nonempty line; errors as in `read_results`."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); run scripts.experiments.reproduce to write it"
        ) from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(
                f"{path}, line {number}: is not JSON ({error}); remove the line and rerun its case"
            ) from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: is not a JSON object; remove the line")
        rows.append((number, row))
    return rows


def validate_result(row: Mapping[str, Any]) -> None:
    """Raise DataError unless the row has the keys and types of a result, and no unknown key."""
    missing, unknown = _TYPE_OF_KEY.keys() - row.keys(), row.keys() - _TYPE_OF_KEY.keys() - _OPTIONAL.keys()
    if missing or unknown:
        raise DataError(
            f"result: missing keys {sorted(missing)}, unknown keys {sorted(unknown)}; give exactly the keys of a row"
        )
    for key, expected in {**_TYPE_OF_KEY, **{key: kind for key, kind in _OPTIONAL.items() if key in row}}.items():
        if not isinstance(row[key], expected) or isinstance(row[key], bool):
            raise DataError(
                f"result: {key} is a {type(row[key]).__name__}; give a value of type {_type_name(expected)}"
            )
    for key in ("table", "data", "model", "command", "commit"):
        if not row[key] or "\n" in row[key]:
            raise DataError(f"result: {key} must be one line of text, got {row[key]!r}")
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", str(row.get("completed", "2026-01-01"))):
        raise DataError(f"result: completed must be a date such as 2026-11-27, got {row['completed']!r}")
    if not (math.isfinite(row["seconds"]) and row["seconds"] >= 0):
        raise DataError(f"result: seconds must be a finite number >= 0, got {row['seconds']}")
    if not row["metrics"]:
        raise DataError("result: metrics is empty; give at least one metric")
    for key in ("metrics", "errors"):
        for name, value in row.get(key, {}).items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (value is None or (number and math.isfinite(value))):
                raise DataError(f"result: {key}[{name!r}] is {value!r}; give a finite number, or None if undefined")
    try:
        json.dumps(row, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"result: cannot be written as JSON ({error})") from error


def _type_name(expected: type | tuple[type, ...]) -> str:
    return expected.__name__ if isinstance(expected, type) else " or ".join(one.__name__ for one in expected)


def markdown_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Results as Markdown: a line per data and model, with metrics as mean ± sample standard deviation over seeds, or ±
    standard error over users if the rows have `errors`.

    The rows are those of `newest_rows`. Commands, commits and machines follow the table, so that every number can be
    reproduced; models with the same ones share a line. Data and models keep the order of their first row.
    """
    newest = newest_rows(rows)
    parts = []
    for table in dict.fromkeys(key[0] for key in newest):
        groups = {key[1:]: group for key, group in newest.items() if key[0] == table}
        metrics = list(dict.fromkeys(name for group in groups.values() for row in group for name in row["metrics"]))
        lines = [f"# {table}", "", _line(["data", "model", "seeds", *metrics, "seconds"])]
        lines.append(_line(["---", "---", "---:", *("---:" for _ in metrics), "---:"]))
        over_users = any("errors" in row for group in groups.values() for row in group)
        spread = _mean_over_users if over_users else _mean_over_seeds
        for (data, model), group in groups.items():
            numbers = [spread(group, name) for name in metrics]
            seconds = f"{fmean(row['seconds'] for row in group):.0f}"
            lines.append(_line([data, model, str(len(_seeds(group))), *numbers, seconds]))
        two_models = any(len(row.get("resolved", {})) > 1 for group in groups.values() for row in group)
        legend = (_OVER_USERS if over_users else _OVER_SEEDS) + _LEGEND + (_TWO_MODELS if two_models else "")
        lines += ["", legend, ""]
        lines += _origins(groups)
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def newest_rows(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str, str], list[Mapping[str, Any]]]:
    """(table, data, model) -> the rows of its mean, one per seed.

    A later row replaces an earlier row of the same seed. Seeds whose configuration differs from the model's last row do
    not count.
    """
    newest: dict[tuple[str, str, str], dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        seeds = newest.setdefault((row["table"], row["data"], row["model"]), {})
        for seed in [seed for seed, other in seeds.items() if changed_settings(other["config"], row["config"])]:
            del seeds[seed]
        seeds[row["seed"]] = row
    return {key: list(seeds.values()) for key, seeds in newest.items()}


REMOVED: dict[str, Any] = {
    "model.num_interests": 0,
    "model.item_start": "random",
    "model.tail_in_summary": True,
    "model.use_action": True,
    "model.use_rating": True,
    "model.feed_forward_ratio": 2.0,
    "model.activation": "silu",
    "model.normalization_alpha": 1.0,
    "model.embedding_hashes": 2,
    "model.num_reconstruction_layers": 1,
    "model.reconstruction_target": "vectors",
    "model.stop_gradient": True,
    "model.search_top_k": 100,
    "model.search_share": 0.0,
    "model.id_dropout": 0.1,
    "data.num_cuts": 2,
    "data.negative_power": 0.0,
    "data.frequencies": "exact",
    "data.reconstruction_len": 64,
    "optim.weight_decay": 0.01,
    "optim.gradient_clip": 1.0,
    "optim.counted_rate": 5.0,
    "model.search": "soft",
    "data.item_categories": None,
    "data.category_column": "category",
}
"""Settings that no longer exist, and the constants in their place. Lines that recorded these did the same as today."""
NORMALIZATIONS = {"separable": "length", "bidirectional": "none"}
"""Values of model.mixing, and the constants in the place of model.normalization that go with them."""


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Differences between the configurations of two rows except for seeds, such as "optim.epochs (12 -> 20)"."""
    old, new = (_without_removed(_flat(config)) for config in (before, now))
    return [f"{key} ({old.get(key)} -> {new.get(key)})" for key in old | new if old.get(key) != new.get(key)]


def _without_removed(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that still exist, and those that had another value than the constant in their place.

    Lines of baselines recorded settings that only other architectures read.
    """
    constants = REMOVED | {"model.normalization": NORMALIZATIONS.get(flat.get("model.mixing", ""))}
    kind = Architecture(flat.get("model.architecture", "vista"))
    readers = {key: readers_of(key.removeprefix("model.")) for key in flat if key.startswith("model.")}
    flat = {key: value for key, value in flat.items() if kind in (readers.get(key) or CONFIGS)}
    if flat.get("model.search") == "hard":
        flat |= {"model.search_category": flat.pop("data.category_column")}
        flat = {key: value for key, value in flat.items() if key not in ("model.search", "data.item_categories")}
    constants |= {f"base.{key}": value for key, value in constants.items()}
    return {key: value for key, value in flat.items() if key not in constants or value != constants[key]}


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The configuration with dotted keys and without seeds: {"optim.epochs": 12, ...}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if key != "seed":
            flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _origins(groups: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]) -> list[str]:
    """The origin of the numbers: one line for all models with the same commands, seeds, commits and machines."""
    models: dict[tuple[str, str], list[str]] = {}
    for (data, model), group in groups.items():
        seeds = " ".join(map(str, _seeds(group)))
        # Join commands that differ only in the seed.
        commands = dict.fromkeys(
            row["command"]
            if "seeds" in row
            else re.sub(rf"--seeds {row['seed']}\b", f"--seeds {seeds}", row["command"])
            for row in group
        )
        commits = dict.fromkeys(row["commit"] for row in group)
        machines = dict.fromkeys(describe_hardware(row["hardware"]) for row in group)
        origin = f"`{'`, `'.join(commands)}` (seed {seeds}; commit {', '.join(commits)}; {'; '.join(machines)})"
        models.setdefault((data, origin), []).append(model)
    return [f"- {_escaped(data)}, {_escaped(' / '.join(names))}: {origin}" for (data, origin), names in models.items()]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_escaped, cells)) + " |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _seeds(group: Sequence[Mapping[str, Any]]) -> list[int]:
    return [seed for row in group for seed in row.get("seeds", [row["seed"]])]


def _numbers(group: Sequence[Mapping[str, Any]], key: str, metric: str) -> list[float]:
    return [row[key][metric] for row in group if row.get(key, {}).get(metric) is not None]


def _mean_over_seeds(group: Sequence[Mapping[str, Any]], metric: str) -> str:
    numbers = _numbers(group, "metrics", metric)
    mean = f"{fmean(numbers):.4f}" if numbers else "–"
    return f"{mean} ± {stdev(numbers):.4f}" if len(numbers) > 1 else mean


def _mean_over_users(group: Sequence[Mapping[str, Any]], metric: str) -> str:
    numbers, errors = _numbers(group, "metrics", metric), _numbers(group, "errors", metric)
    mean = f"{fmean(numbers):.4f}" if numbers else "–"
    return f"{mean} ± {fmean(errors):.4f}" if errors else mean


def describe_hardware(machine: Mapping[str, Any]) -> str:
    """A short description of a row's `hardware`: processor or GPU, cores, torch, precision of training."""
    name = machine.get("gpu") or machine.get("processor") or machine.get("cpu") or "unknown machine"
    # Older rows have no profile of the processor but its vector units, of which the last one is the widest.
    vectors = "" if machine.get("gpu") else "".join(f" ({flag})" for flag in machine.get("flags", [])[-1:])
    precision = f", trained in {machine['precision']}" if "precision" in machine else ""
    elsewhere = f", partly on {'; '.join(machine['elsewhere'])}" if "elsewhere" in machine else ""
    return (
        f"{name}{vectors}, {machine.get('cores', '?')} cores, torch {machine.get('torch', '?')}{precision}{elsewhere}"
    )


def defined(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Metrics as a row has them: None where a number is not finite."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def hardware() -> dict[str, Any]:
    """The machine and the numeric setup of this process, as recorded in a result.

    Returns:
        {cpu, cores (available to this process), processor (the profile that vista_kernels.processor chose), memory_gib,
        gpu (or None), platform, python, torch, numpy, threads (of torch)}. Rows of reproduce.py add precision (of
        training) and elsewhere (other machines that trained or measured).

    Raises:
        ProcessorError: if VISTA_PROCESSOR is not a profile.
    """
    import numpy  # imported here, so that printing a table needs neither numpy nor torch
    import torch

    from vista_kernels.processor import processor

    return {
        "cpu": cpu_name() or platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "processor": processor().name,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "threads": torch.get_num_threads(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the Markdown tables of result files; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.experiments.results", description="Print the Markdown tables of result files."
    )
    parser.add_argument("files", nargs="+", help="docs/results/<table>.jsonl")
    files: list[str] = parser.parse_args(arguments).files
    try:
        print(markdown_table(row for file in files for row in read_results(file)), end="")
    except VistaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
