"""The runs that a table still needs: their rows and seeds, estimated times, and commands."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from statistics import fmean
from typing import Any

from scripts.experiments.results import changed_settings, hardware
from scripts.experiments.row_origin import MACHINE
from scripts.experiments.sets import SETS
from scripts.experiments.tables import TABLES
from scripts.experiments.tables.table import WITHOUT_COUNTERS, Table, TableRow
from vista.config import EvaluateConfig, TrainConfig
from vista.config.checks import Architecture, Split, Target, to_dict
from vista.config.composition import ConfigKeys, compose_config
from vista.config.model_config import CONFIGS, TEMPERATURES
from vista.errors import ConfigError
from vista.evaluation.baseline_evaluation import (
    GROUP_DECAYS,
    OWN_WEIGHTS,
    RIDGES,
    TEMPERATURES_AND_RATES,
    asked_horizons,
)
from vista.evaluation.counting_baselines import MAX_USERS, MIN_SEEN, SHORT_EVENTS, TRANSITION_WEIGHTS
from vista.log.splits import RETURNING
from vista.training import run_plan

_GRIDS: dict[str, dict[str, Sequence[Any]]] = {
    "transitions and own frequency": {"transition_weights": TRANSITION_WEIGHTS},
    "EASE": {"ridges": RIDGES},
    "TIFU-KNN": {"group_decays": GROUP_DECAYS, "own_weights": OWN_WEIGHTS},
    "pooled vectors": {"temperatures_and_rates": TEMPERATURES_AND_RATES},
}
"""Values that `Tuned` chooses from."""
_FITTED = (*_GRIDS, "pooled factors", "counter trees", "new-item trees")
OF_ROW_FEATURES = ("tail_features", "hashed_features")
"""Keys of ModelConfig for features of events, requests, and users, which no table's rows read, and for hashed ones."""
UNTRAINED_SEED = 0
PLANNED = {
    "data": ("exclude_seen", "num_negatives", "tokens_per_batch"),
    "model": ("counter_keys", "temperature"),
    "optim": ("epochs", "warmup_steps", "next_weight", "window_weight"),
}
"""Settings that `vista.training.run_plan.plan_run` decides where they are null."""
PLAN = {
    "batches_per_epoch": run_plan.BATCHES_PER_EPOCH,
    "tokens_per_batch": list(run_plan.TOKENS_PER_BATCH),
    "steps": run_plan.STEPS,
    "most_epochs": run_plan.MOST_EPOCHS,
    "most_negatives": run_plan.MOST_NEGATIVES,
    "warmup_share": run_plan.WARMUP_SHARE,
    "most_warmup": run_plan.MOST_WARMUP,
    "returning": RETURNING,
}
"""Constants of that plan. A line of a row with planned settings does not count as done after one of them changed."""
PLAN_WITH_COUNTERS = {
    "batches_with_counters": run_plan.BATCHES_WITH_COUNTERS,
}
"""Those of models that may have counters, if steps or batches are planned."""
NO_RETURNS = (*WITHOUT_COUNTERS, "optim.next_weight=1", "optim.window_weight=0")
"""Settings of tables without windows, which were measured before training planned these from the log."""
SPLIT = ("split", "validation_from", "test_from", "gap_minutes", "validation_share", "test_share", "exclude_seen")
"""Keys of DataConfig that the untrained rows depend on."""
Line = Mapping[str, Any]


def baseline_settings(name: str, horizons: Sequence[int]) -> dict[str, Any]:
    """The settings of a baseline, in types of JSON; empty for one that only counts.

    Args:
        name: of a baseline of `vista.evaluation.baselines`, or of a predictor of `vista.simulation.simulate`.
        horizons: numbers of next events that it is asked about. It is fitted to each of them.
    """
    if name not in _FITTED:
        return {}
    settings: dict[str, Any] = {"name": name, "fitted_to": list(horizons)}
    if name in _GRIDS:
        settings |= {key: [_plain(value) for value in values] for key, values in _GRIDS[name].items()}
        settings |= {"tuning_users": MAX_USERS, "tuning_min_seen": MIN_SEEN, "short_events": SHORT_EVENTS}
    return settings


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True, slots=True)
class TableRun:
    """One model and seed of a table, with its lines that are still missing."""

    name: str
    row: TableRow
    seed: int
    config: dict[str, Any]
    """The recorded configuration: a line counts as done only if it has the same one."""
    missing: tuple[str, ...]
    changed: tuple[str, ...]
    """Why existing lines do not count, such as "optim.epochs (12 -> 20)"."""
    estimate_s: float

    @property
    def label(self) -> str:
        """Name and seed, for the progress bar."""
        return self.name if self.row.untrained else f"{self.name}, seed {self.seed}"


def table_runs(settings: argparse.Namespace, lines: Sequence[Line]) -> list[TableRun]:
    """Runs of the chosen rows and seeds, also finished ones: all models of a seed, then the next seed.

    Raises:
        ConfigError: if the table lacks one of the rows.
    """
    table = TABLES[settings.table]
    names = list(dict.fromkeys(settings.rows or table.rows))
    unknown = [name for name in names if name not in table.rows]
    if unknown:
        raise ConfigError(f"--rows {unknown[0]}: {settings.table} has no such row; choose from {', '.join(table.rows)}")
    newest = {(line["model"], line["seed"]): line for line in lines}
    machine, runs = hardware(), []
    for asked in dict.fromkeys(settings.seeds):
        for name in names:
            row = table.rows[name]
            if row.untrained and asked != settings.seeds[0]:
                continue
            seed = UNTRAINED_SEED if row.untrained else asked
            config = recorded_config(table, row)
            missing: list[str] = []
            changed: dict[str, None] = {}
            for served in row.served(name):
                line = newest.get((served, seed))
                changes = changed_settings(line["config"], config) if line else []
                changed |= dict.fromkeys(changes)
                if changes or not line:
                    missing.append(served)
            estimate = _estimate_s(name, row, lines, machine)
            runs.append(TableRun(name, row, seed, config, tuple(missing), tuple(changed), estimate))
    return runs


def train_config(table: Table, row: TableRow) -> TrainConfig:
    """The training configuration of a row."""
    words = [f"experiment={table.experiment}"] if table.experiment else []
    words += SETS[table.data].words if table.simulation is None else ()
    ignored = {*_composed(*words).model.ignore, "item_features", "user_features"}
    words.append(f"model.ignore=[{','.join(sorted(ignored))}]")
    words += () if table.windows or table.curve or table.task else NO_RETURNS
    return deepcopy(_composed(*words, *table.words, *row.words))


@cache
def _composed(*words: str) -> TrainConfig:
    """The configuration of words, of which the model takes those that its architecture reads."""
    model = [word.removeprefix("model.kind=") for word in words if word.startswith("model.kind=")]
    chosen = Architecture.__members__.get(model[-1] if model else "", Architecture.vista)
    keys = ConfigKeys.of(TrainConfig).keys
    read = [
        word for word in words if not (key := keys.get(word.partition("=")[0])) or chosen in (key.readers or CONFIGS)
    ]
    return compose_config(TrainConfig, read)


def part_configs(table: Table, row: TableRow) -> dict[str, TrainConfig]:
    """The parts of the split that a row is measured on -> training configuration of the model that is measured there.

    In a table with `windows`, each part has a model of its own, which is trained on all events before the labels of the
    part, as counting baselines are counted. All settings are the same; null ones are planned from these events. In
    other tables, and with validation, one model is measured on test; validation chose its epoch.
    """
    config = train_config(table, row)
    if not table.windows or config.optim.validate_every:
        return {"test": config}
    if row.trial:
        return {"validation": config}
    changes: dict[str, Any] = (
        {"validation_from": config.data.test_from} if config.data.split is Split.time else {"validation_share": 0.0}
    )
    return {"validation": config, "test": replace(config, data=replace(config.data, **changes))}


def recorded_config(table: Table, row: TableRow) -> dict[str, Any]:
    """The configuration as a line records it, without paths, which belong to the machine.

    With `windows`, it is that of the model for validation; `part_configs` makes that of the model for the test from it.
    """
    config = train_config(table, row)
    values = to_dict(config)
    data = {
        key: value for key, value in values["data"].items() if key in SPLIT or (not row.untrained and key != "path")
    }
    for key in ("gap_minutes", "refresh_days"):
        if not getattr(config.data, key):
            data.pop(key, None)  # lines from before the key existed have none either
    if config.model.architecture.ranks_only or row.untrained == "oracle":
        del data["exclude_seen"]  # it applies only to next items
    # The log's size is part of the experiment.
    recorded = {"data": data} | ({} if table.simulation is None else {"simulation": table.simulation})
    recorded |= {"asked": dict(table.asked)} if table.asked else {}
    if table.answers_labels(row):
        return recorded | {"baseline": {"name": row.untrained}}
    if row.untrained:
        target = Target.window if table.windows else Target.next
        settings = baseline_settings(row.untrained, asked_horizons(EvaluateConfig(target=target)))
        return recorded | ({"baseline": settings} if settings else {})
    unread = {*OF_ROW_FEATURES, "ignore"}
    if config.model.counter_keys == []:
        unread.add("counted_dropout")
    model = {key: value for key, value in values["model"].items() if key not in unread}
    model |= {"use_time": config.model.reads("times")}  # as lines from before the key `ignore` have it
    model |= {"use_item_features": True} if config.model.reads("item_features") else {}
    optim = values["optim"]
    learns_slowly = not config.ranks_items and config.model.space_dim > 0
    if optim["table_rate"] is None and not learns_slowly:
        optim["table_rate"] = 1.0
    recorded |= {"model": model, "optim": optim}
    if row.texts:
        recorded["texts"] = row.texts
    if any(recorded[group].get(key, "absent") is None for group, keys in PLANNED.items() for key in keys):
        recorded["plan"] = dict(PLAN)
        if recorded["model"].get("temperature", "absent") is None:
            recorded["plan"]["temperatures"] = list(TEMPERATURES)
        if config.model.counter_keys != [] and None in (config.data.tokens_per_batch, config.optim.epochs):
            recorded["plan"] |= PLAN_WITH_COUNTERS
    if row.base:
        kept = recorded_config(table, table.rows[row.base])
        flat = {f"{group}.{key}": value for group in kept for key, value in kept[group].items()}
        recorded["base"] = {"row": row.base, "until": row.until, **flat}
    return recorded


def _estimate_s(name: str, row: TableRow, lines: Sequence[Line], machine: Line) -> float:
    """The mean time of the row's earlier lines, preferably on this kind of machine, or else the table's estimate."""
    earlier = [line for line in lines if line["model"] in row.served(name)]
    here = [line for line in earlier if all(line["hardware"].get(key) == machine[key] for key in MACHINE)]
    return fmean(line["seconds"] for line in here or earlier) if earlier else 60 * row.minutes


def listing(settings: argparse.Namespace, runs: Sequence[TableRun]) -> str:
    """A readable list of the runs: their states, estimated times and commands."""
    pending = [run for run in runs if run.missing]
    left = sum(run.estimate_s for run in pending) / 60
    lines = [f"{settings.table}: {len(runs) - len(pending)} of {len(runs)} runs done, about {left:.0f} minutes left"]
    for name in dict.fromkeys(run.name for run in runs):
        own = [run for run in runs if run.name == name]
        seeds = " ".join(str(run.seed) for run in own if run.missing)
        state = "done" if not seeds else "to run" if own[0].row.untrained else f"to run with seed {seeds}"
        lines.append(f"\n{name}: {state}; {own[0].estimate_s / 60:.1f} minutes per run")
        changed = dict.fromkeys(change for run in own for change in run.changed)
        lines += [f"  was run with another {', '.join(changed)}"] if changed else []
        lines.append(f"  {command_of(settings, [name], [run.seed for run in own])}")
    return "\n".join(lines)


def command_of(settings: argparse.Namespace, rows: Sequence[str], seeds: Sequence[int]) -> str:
    """The command that reproduces some rows for some seeds."""
    table = TABLES[settings.table]
    words = ["python", "-m", "scripts.experiments.reproduce", settings.table, "--rows", *rows]
    words += [] if table.simulation is not None else ["--data", SETS[table.data].folder or table.data]
    words += [] if all(table.rows[row].untrained for row in rows) else ["--seeds", *map(str, seeds)]
    words += ["--threads", str(settings.threads)] if settings.threads else []
    return shlex.join(words)
