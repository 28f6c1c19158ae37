"""Which columns of a table hold users, items, and times, guessed from their names and first values."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vista.config import SourceConfig
from vista.config.checks import from_dict, to_dict
from vista.errors import ConfigError, DataError, shell_word, shown
from vista.files import checked_path
from vista.installation import require_module
from vista.log.histories import LATEST_MS
from vista.log.ingest.public.public_sets import PUBLIC_SETS
from vista.log.ingest.source_files import read_header, scan_text, text_fault
from vista.log.ingest.source_parser import SourceParser
from vista.log.ingest.sources import detect_kind, is_parquet, text_separator
from vista.log.ingest.times import FORMS, fits
from vista.log.segment import find_segments
from vista.log.segment_files import read_segment_manifest

if TYPE_CHECKING:
    import polars as pl
else:
    pl = require_module("polars", "data")

_LOG = logging.getLogger("vista.prepare")
_DEFAULT = SourceConfig()
_SAMPLE = 1_000
"""First rows that are looked at."""
_SEPARATORS = (";", "\t", "|")
_USERS = "user customer visitor client member household account reviewer buyer shopper subscriber player student person"
_ITEMS = (
    "item product movie article sku asin stock track song artist album video book game news ad page content listing "
    "offer isbn show recipe restaurant business merchant goods"
)
_TIMES = "timestamp datetime time date ts created when"
_ACTIONS = frozenset(["action", "event", "event_type", "type"])
"""Names of columns of actions."""
_MAX_ACTIONS = 20
"""A column with more distinct texts is not taken for actions."""
_WORDS = {"user": frozenset(_USERS.split()), "item": frozenset(_ITEMS.split()), "timestamp": frozenset(_TIMES.split())}
"""What names of columns contain, by role."""
_IDS = frozenset(["id", "ids", "uid", "uuid", "code", "key", "no", "number", "num", "index", "sk"])
"""Words that names of columns of ids have next to these."""
_TOGETHER = ({"time_unit", "time_format"}, {"categories", "numbers"})
"""Keys of which none is taken from earlier files if one is set: they say what the same columns are."""
_EARLIEST_S = 631_152_000
"""Numbers are taken for times from 1990 on, so that each is a time in at most one unit."""
_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def settings_of(config: SourceConfig | None, time_form: str | None = None) -> dict[str, Any]:
    """The keys and values with which files of events were read; empty if they were not files of a table. `time_form`:
    what the times are, if the configuration leaves that open."""
    if config is None or not config.paths or config.kind != _DEFAULT.kind:
        return {}
    if config.time_form is None and time_form is not None:
        is_format = "%" in time_form
        config = replace(
            config, time_format=time_form if is_format else None, time_unit=None if is_format else time_form
        )
    values, defaults = to_dict(config), to_dict(_DEFAULT)
    return {key: value for key, value in values.items() if value != defaults[key] and key not in ("paths", "ids")}


def with_earlier_settings(config: SourceConfig, log: Path) -> SourceConfig:
    """The configuration of files that are appended to a log, where what it leaves open is as for the log's last files.

    Args:
        config: keys that are not the default are kept. Files of another kind have nothing in common with earlier ones.

    Raises:
        LogFormatError: there is no log, or its newest manifest is damaged.
        ConfigError: the settings that are kept contradict those of the log.
    """
    if config.kind != _DEFAULT.kind:
        return config
    earlier = read_segment_manifest(find_segments(log)[-1])["read_with"]
    own = {key for key, value in to_dict(config).items() if value != getattr(_DEFAULT, key)} - {"ids"}
    for both in _TOGETHER:
        own |= both if both & own else set()
    reused = {key: value for key, value in earlier.items() if key not in own}
    if reused:
        words = (
            shell_word(f"events.{key}", value if isinstance(value, list) else str(value))
            for key, value in reused.items()
        )
        _LOG.info("read like the earlier files of %s: %s", log, " ".join(words))
    return from_dict(SourceConfig, to_dict(config) | reused)


def with_guesses(config: SourceConfig, files: Sequence[str], parser: SourceParser) -> SourceConfig:
    """The configuration of files of events, where what it leaves open is guessed and logged.

    A folder of a public data set and a file in a known format are read as such. Of other files, the columns of users,
    items, times, and actions are guessed, and a separator that is not a comma; columns that the configuration names are
    kept.

    Args:
        config: kind, columns, separator.
        files: files of events, or folders of public data sets.

    Raises:
        ConfigError: if a column is uncertain, with the words that decide.
        DataError: if a file cannot be read.
    """
    first = checked_path(files[0], ConfigError)
    config = replace(config, paths=list(files))
    kind = detect_kind(first) if config.kind == _DEFAULT.kind else config.kind
    required = _required_columns(kind, first)
    found = None
    if required is not None:
        found, _ = parser.call("guess_columns", first, config=to_dict(config), required=required)
    if found is None:
        _LOG.info("%s: read as %s", first, shell_word("events.kind", kind))
        return replace(config, kind=kind)
    guesses, others = found
    words = " ".join(shell_word(f"events.{key}", value) for key, value in guesses.items())
    if words:
        _LOG.info("%s: guessed %s", first, words)
    if config.timestamp is None and "timestamp" not in guesses:
        _LOG.warning(
            "%s: no column of times was found, so events are in the order of the rows; if there is one, name it with "
            "events.timestamp=...",
            first,
        )
    if others:
        keys = "events.action, events.rating, events.categories, and events.numbers"
        _LOG.info("%s: not read: %s; %s can name these columns", first, ", ".join(others), keys)
    if words:
        _LOG.info("to confirm, add to the command: %s", words)
    return replace(config, **guesses)


def _required_columns(kind: str, path: Path) -> list[str] | None:
    """The columns without which a file is not of a kind; None if its name is enough, or it is a folder."""
    if kind == _DEFAULT.kind:
        return []
    form = PUBLIC_SETS[kind].form_of(path, "events") if kind in PUBLIC_SETS and path.is_file() else None
    if form is None or form.read is not None or form.read_named is not None:
        return None
    return [form.columns[role] for role in _WORDS if role in form.columns] or None


def guess_columns(file: Path, config: SourceConfig, required: Sequence[str]) -> tuple[dict[str, str], list[str]] | None:
    """Guess the columns of a table.

    Args:
        config: `user` and `item` are kept if they are not the default or if the file has them; `timestamp` is kept.
        required: columns of a public data set.

    Returns:
        (keys of SourceConfig to set, columns without a role); None if the file has the columns of the data set.

    Raises:
        ConfigError: if a column is uncertain.
        DataError: if the file cannot be read.
    """
    separator, rows = _first_rows(file, config)
    names = rows.columns
    if required and set(required) <= set(names):
        return None
    kept: dict[str, str | None] = {role: getattr(config, role) for role in _WORDS}
    for role in ("user", "item"):
        if kept[role] == getattr(_DEFAULT, role) and kept[role] not in names:
            kept[role] = None
    known = [*kept.values(), config.action, config.rating, config.sequence, *config.categories, *config.numbers]
    left = [name for name in names if name not in known]
    times = {name: unit for name in left if (unit := _time_unit(rows[name])) is not None}
    guesses = {} if separator == config.separator else {"separator": separator}
    doubts = dict[str, list[str]]()
    for role in (role for role in _WORDS if kept[role] is None):
        candidates = _time_candidates(left, times) if role == "timestamp" else _id_candidates(role, left, times, rows)
        if len(candidates) == 1:
            guesses[role] = candidates[0]
            left.remove(candidates[0])
        elif candidates or role != "timestamp" or _best(role, left):
            doubts[role] = candidates
    if doubts:
        texts = [_doubt(role, candidates, rows.select(left)) for role, candidates in doubts.items()]
        raise ConfigError(f"{file}: {'; '.join(texts)}")
    actions = [name for name in left if _is_action(name, rows[name])] if config.action is None else []
    if len(actions) == 1:
        guesses["action"] = actions[0]
        left.remove(actions[0])
    unit = times.get(guesses.get("timestamp", ""), "")
    if unit and config.time_form is None:
        guesses["time_unit"] = unit
    return guesses, left


def _first_rows(file: Path, config: SourceConfig) -> tuple[str, pl.DataFrame]:
    """The separator of a file, as configured or by its header, and its first rows."""
    if is_parquet(file):
        return config.separator, pl.scan_parquet(file, glob=False).head(_SAMPLE).collect()
    separator = text_separator(file, config.separator, "events")
    header = read_header(file, separator)
    if len(header) == 1 and config.separator == _DEFAULT.separator:
        headers = {other: read_header(file, other) for other in _SEPARATORS}
        separator = max(headers, key=lambda other: len(headers[other]))
        header = headers[separator]
    fields = [f"column {number}" for number in range(len(header))]
    try:
        rows = scan_text(file, fields, separator, '"', 1).head(_SAMPLE).select(fields).collect()
    except pl.exceptions.PolarsError as error:
        if fault := text_fault(file, str(error)):
            raise DataError(f"{file}: {fault}") from error
        raise
    is_given = separator == text_separator(file, config.separator, "events")
    return config.separator if is_given else separator, pl.DataFrame(
        [rows[field].alias(name) for field, name in zip(fields, header, strict=True) if header.count(name) == 1]
    )


def _time_unit(values: pl.Series) -> str | None:
    """The unit of times that are numbers, "" for dates and text, and None if the values are not times."""
    values = values.drop_nulls()
    if values.dtype in (pl.Datetime, pl.Date):
        return ""
    if not len(values) or not (values.dtype.is_numeric() or values.dtype == pl.String):
        return None
    frame = values.alias("value").to_frame()
    numbers = values.cast(pl.Float64, strict=False)
    if not numbers.is_null().any():
        for unit, factor in _PER_SECOND.items():
            if numbers.is_between(_EARLIEST_S * factor, LATEST_MS / 1000 * factor).all():
                return unit
    if values.dtype != pl.String:
        return None
    shares = frame.select(fits(pl.col("value"), form).mean().alias(form) for form in FORMS).row(0)
    return "" if max(shares) > 0.5 else None


def _parts(name: str) -> list[str]:
    """The words of a column's name, in lower case."""
    return [part.lower() for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def _is_action(name: str, values: pl.Series) -> bool:
    """Whether a column has few distinct texts, none of them a number, and the name of a column of actions."""
    if "_".join(_parts(name)) not in _ACTIONS or values.dtype not in (pl.String, pl.Categorical, pl.Enum):
        return False
    texts = values.drop_nulls().cast(pl.String).unique()
    return 0 < len(texts) <= _MAX_ACTIONS and texts.cast(pl.Float64, strict=False).is_null().all()


def _rank(role: str, name: str) -> int | None:
    """How well a column's name says its role, from 0 for the best; None if it does not."""
    parts, words = _parts(name), _WORDS[role]
    if parts and parts[-1].endswith("id") and parts[-1][:-2] in words:  # such as visitorid
        parts = [*parts[:-1], parts[-1][:-2], "id"]
    others = [part for part in parts if part not in words]
    if len(others) == len(parts):
        return None
    if role == "timestamp":
        return int(bool(others))
    ids = [part for part in others if part in _IDS]
    return 2 * (len(others) > len(ids)) + (not ids)


def _best(role: str, names: Sequence[str]) -> list[str]:
    """The columns whose names say a role best; none if no name says it."""
    ranks = {name: rank for name in names if (rank := _rank(role, name)) is not None}
    return [name for name, rank in ranks.items() if rank == min(ranks.values())]


def _time_candidates(left: Sequence[str], times: Mapping[str, str]) -> list[str]:
    """Columns of times by name, or else those with text or dates, which hardly anything else looks like."""
    possible = [name for name in left if name in times]
    return _best("timestamp", possible) or [name for name in possible if not times[name]]


def _id_candidates(role: str, left: Sequence[str], times: Mapping[str, str], rows: pl.DataFrame) -> list[str]:
    def can_be_ids(name: str) -> bool:
        values = rows[name]
        if not (values.dtype.is_integer() or values.dtype.is_float() or values.dtype == pl.String):
            return values.dtype in (pl.Categorical, pl.Enum)
        numbers = values.cast(pl.Float64, strict=False).drop_nulls()
        return times.get(name) != "" and bool((numbers == numbers.floor()).all())

    return _best(role, [name for name in left if can_be_ids(name)])


def _doubt(role: str, candidates: Sequence[str], left: pl.DataFrame) -> str:
    """What is uncertain about a role, with the words that decide. `left`: the columns without a role."""
    plural = {"user": "users", "item": "items", "timestamp": "times"}[role]
    if candidates:
        words = " or ".join(shell_word(f"events.{role}", name) for name in candidates)
        return f"several columns are named like {plural}; add {words}"
    if role != "timestamp":
        names = ", ".join(left.columns) or "its columns"
        return f"no column is named like {plural}; add events.{role}=... and one of {names}"
    name = _best(role, left.columns)[0]
    value = next(iter(left[name].drop_nulls()), "")
    return (
        f"column {name!r} is named like {plural}, but {shown(value)} is not a time that is recognized; add "
        f"{shell_word('events.timestamp', name)} and events.time_unit=... or events.time_format=..., or rename it"
    )
