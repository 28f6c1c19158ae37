"""What was trained: the data, the settings, and the model card."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from vista.config import TrainConfig
from vista.config.checks import to_dict
from vista.config.config_keys import value_text
from vista.log.event_log import EventLog
from vista.log.splits import Until, split_until
from vista.report.html_page import PageSection, folded, heading, paragraph, table
from vista.report.measured_run import MeasuredRun
from vista.report.trained_run import TrainedRun


def training_section(run: MeasuredRun, log: EventLog) -> PageSection:
    """The data, what the settings differ in from the defaults, and the model card."""
    record, data = run.record, run.model.data
    architecture = record.config.model.architecture.value
    size = sum(parameter.numel() for parameter in run.model.parameters())
    finding = (
        f"The model is {architecture} with {size:,} parameters, trained on the events of {log.num_users:,} users "
        f"{_before(split_until(data, 'train'))}."
    )
    rows: list[tuple[str, str]] = [("log", str(log.path)), ("users", f"{log.num_users:,}")]
    rows += [("items", f"{log.num_items:,}"), ("events", f"{log.num_events:,}")]
    times = log.time_range() if log.has_time else None
    rows.append(("time of events", "no times" if times is None else " to ".join(_day(time) for time in times)))
    if log.impressions is not None:
        rows.append(("impressions", f"{log.impressions.num_impressions:,}"))
    rows.append(("split", data.split.value))
    summary, validations = record.summary, record.files.validations
    if summary.seconds is not None:
        rows.append(("training time", f"{summary.seconds:.0f} s for {validations[-1]['step']:,} steps"))
    body = [table(["data", ""], rows, is_text=True)]
    if summary.state != "finished":
        why = f" ({summary.reason})" if summary.reason else ""
        body.append(
            paragraph(
                f"The run is {summary.state}{why}{_done(record)}. All figures are for the best model so far.", "finding"
            )
        )
    changed = list(_changed(to_dict(record.config), to_dict(TrainConfig())))
    if changed:
        body += [heading("Settings that differ from the defaults"), table(["key", "value"], changed, is_text=True)]
    if record.card:
        body.append(folded("Model card", record.card))
    return PageSection("What was trained", finding, body)


def _done(record: TrainedRun) -> str:
    """How many epochs of an unfinished run are done, as the end of a sentence."""
    validations, problem = record.files.validations, record.files.metrics_problem
    if not validations and problem is not None:
        why = "" if problem in (record.summary.reason or "") else f", because {problem}"
        return f", and how many epochs are done is unknown{why}"
    of = "" if record.config.optim.epochs is None else f" of {record.config.optim.epochs}"
    return f": {validations[-1]['epoch'] if validations else 0}{of} epochs are done"


def _before(until: Until) -> str:
    """Which events training used, in words."""
    if until.before is not None:
        return f"before {_day(until.before)}"
    if until.held_share:
        return f"without the last {100 * until.held_share:g} % of each user's events"
    return f"without the last {until.held_out} of each user"


def _day(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).date().isoformat()


def _changed(values: dict[str, Any], defaults: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Keys and values that differ, as the command line writes them."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _changed(value, defaults[name], f"{prefix}{name}.")
        elif value != defaults[name]:
            yield f"{prefix}{name}", value_text(value)
