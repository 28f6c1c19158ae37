"""`vista monitor`: compare the newest window of a log, its store, and its scores with the training data.

The model's folder says what is normal (`vista.evaluation.reference`). The command writes an HTML page and gauges in
Prometheus' text format, and says which action is due.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path

import numpy as np

from vista.arrays import Floats, Int
from vista.config import MonitorConfig, RefreshOptions
from vista.config.checks import OnMissing
from vista.device import cpu_settings
from vista.errors import ConfigError, RecordError, VistaError
from vista.evaluation.answers import ScorerAnswers
from vista.evaluation.cases import impression_cases, looks_at, with_tasks
from vista.evaluation.protocol import USERS_PER_BATCH
from vista.evaluation.reference import (
    FALSE_ALARMS,
    Check,
    Reference,
    WindowCounts,
    WindowNumber,
    WindowRows,
    arcsine,
    count_scores,
    count_window,
    is_one_sided,
    scored_users,
    spread,
    student_quantile,
)
from vista.files import replace_text, writable_file
from vista.installation import __version__
from vista.log.event_log import EventLog
from vista.log.splits import parse_time
from vista.log.vocabulary import Vocabulary
from vista.model.saved_model import ModelDescription
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.report.html_page import PageSection, Series, heading, line_chart, paragraph, render_page, table
from vista.scorer import Scorer
from vista.store.record_encoding import read_key
from vista.text_table import fitted, text_table

logger = logging.getLogger(__name__)
NUM_EARLIER = 7
"""Earlier windows that are read too, to tell a sudden change from a slow one."""
SUDDEN = 0.5
"""A change is sudden if at least this part of it came from one window to the next."""
MOST_RECORDS = 512
"""Users of the window whose records are read."""
MOST_IMPRESSIONS = 4096
"""Impressions of a window whose labels are compared with predictions; of more, random ones."""
CALIBRATION_SLACK = 0.1
"""Relative difference between predicted and observed labels up to which there is no alarm, whatever chance explains."""
DISTRIBUTIONS = "event.", "user.", "item.", "request.", "items", "action ", "label ", "score ", "mean score "
"""Beginnings of the names of checks that also change slowly, as tastes do."""


class Action(Enum):
    """What to do about an alarm."""

    source = "look at the source"
    refresh = "vista refresh"
    items_add = "vista items add"
    retrain = "vista train"


MEANING = {
    Action.source: "Something upstream has changed at once: compare what the source writes with what it wrote before.",
    Action.refresh: "The store misses events or users: refresh it, or look why its refresh does not run.",
    Action.items_add: "Users act on items that the model does not know: add them by their features.",
    Action.retrain: "The data have slowly moved away from the training data: train again on newer data.",
}


@dataclass(frozen=True, slots=True)
class Reading:
    """One check of the window."""

    name: str
    value: float
    """A count, a share, a population stability index, or a mean."""
    expected: str
    """What is normal."""
    deviation: float
    """Distance from what is normal, divided by the limit: above 1 is an alarm."""
    action: Action
    """What to do if it is one."""
    earlier: Floats | None = None
    """float64 [earlier windows + 1] of the compared numbers, oldest first; None if there is no such series."""
    error: float | None = None
    """Standard error of the value, if it has one."""

    @property
    def is_alarm(self) -> bool:
        """Whether the window is outside the limits."""
        return self.deviation > 1


@dataclass(frozen=True, slots=True)
class MonitorReport:
    """What the monitor found."""

    begin: int
    end: int
    """Of the window, ms."""
    readings: list[Reading]

    @property
    def alarms(self) -> list[Reading]:
        """Readings outside the limits, the most unusual first."""
        return sorted((one for one in self.readings if one.is_alarm), key=lambda one: -one.deviation)

    @property
    def due(self) -> dict[Action, list[Reading]]:
        """Alarms by what to do."""
        return {action: own for action in Action if (own := [one for one in self.alarms if one.action is action])}

    def __str__(self) -> str:
        head = f"window {_time(self.begin)} to {_time(self.end)}: {len(self.readings)} checks"
        ratios = [f"{one.name}: {_value(one)}" for one in self.readings if one.error is not None]
        if not self.alarms:
            return "\n".join([f"{head}, nothing is due", *ratios])
        rows = [[one.name, _value(one), one.expected, f"{one.deviation:.1f}", one.action.value] for one in self.alarms]
        found = text_table(["check", "value", "normal", "of limit", "due"], rows)
        return "\n".join(
            [
                f"{head}, {len(rows)} alarm{'s' * (len(rows) > 1)}",
                *ratios,
                found,
                *(fitted(f"{a.value}: {MEANING[a]}") for a in self.due),
            ]
        )


def monitor(config: MonitorConfig) -> MonitorReport:
    """Read, compare, and write the page and the gauges.

    Raises:
        ConfigError: a file cannot be written, or `now` is not a time.
        CheckpointError: the model cannot be read, or has no reference.
        StoreError: the store cannot be read.
        LogFormatError: the log cannot be read.
    """
    for key, path in (("out", config.out), ("metrics_file", config.metrics_file)):
        if path is not None:
            writable_file(Path(path), key)
    reference = Reference.read(Path(config.model))
    log = EventLog.open(config.data)
    if not log.has_time:
        raise ConfigError(f"data={config.data}: has no times, so it has no newest window")
    now = round(time.time() * 1000) if config.now is None else parse_time(config.now)
    with ExitStack() as stack, cpu_settings(config.num_threads):
        scorer = None
        if config.store is not None:
            secret = read_key(config.authentication_key_file)
            scorer = stack.enter_context(Scorer.open(config.model, config.store, key=secret, on_missing=OnMissing.nan))
        report = read_monitor(reference, log, Path(config.model), now, scorer, is_live=config.now is None)
    if config.out is not None:
        replace_text(Path(config.out), _page(report, reference, config))
    if config.metrics_file is not None:
        replace_text(Path(config.metrics_file), gauges(report))
    return report


def read_monitor(
    reference: Reference, log: EventLog, model: Path, now: int, scorer: Scorer | None, *, is_live: bool = True
) -> MonitorReport:
    """Compare the window before `now`, in ms, with the reference.

    Args:
        model: folder of the model.
        scorer: of the model and its store, with `OnMissing.nan`, which leaves out damaged records; None leaves out
            records and scores.
        is_live: whether events after `now` are errors.
    """
    description = ModelDescription.read(model)
    description.check_files(model, "items.*")
    items = Vocabulary.load(model, "items")
    unknown = Action.items_add if description.schema.item_features else Action.retrain
    begins = [now - reference.window_ms * place for place in range(NUM_EARLIER + 1, 0, -1)]
    begins = [begin for begin in begins if begin >= reference.first_ms or begin == begins[-1]]
    windows = [WindowRows.read(log, begin, begin + reference.window_ms) for begin in begins]
    counts = [counted(window, reference, items) for window in windows]
    newest = windows[-1]
    extra: list[Reading] = []
    if is_live:
        late = int((log.lengths - log.counts_before(now)).sum())
        extra.append(_share_reading("events in the future", late, late + newest.num_events, 0.0, Action.source))
    if scorer is not None:
        if reference.items:
            _count_scores(newest, counts[-1], reference, scorer)
        extra += _record_readings(newest, reference, scorer, description.data.staleness_share)
        if description.schema.tasks and log.impressions is not None:
            extra += _calibration_readings(windows[-2:], reference, scorer.model)
    return MonitorReport(newest.begin, newest.end, [*judged(reference, counts, unknown), *extra])


def judged(reference: Reference, counts: Sequence[WindowCounts], unknown: Action = Action.retrain) -> list[Reading]:
    """The checks of the last of some consecutive windows; those for which it has no rows are left out. `unknown`: what
    to do about unknown items."""
    readings = [_reading(name, check, counts, reference, unknown) for name, check in reference.checks.items()]
    return [one for one in readings if one is not None]


def counted(window: WindowRows, reference: Reference, items: Vocabulary) -> WindowCounts:
    """Count a window as the reference windows were counted; items: that the model knows."""
    log = window.log
    edges = {name: check.edges for name, check in reference.checks.items() if name.partition(".")[0] in OWNERS}
    missing = (name.removeprefix("missing ") for name in reference.checks if name.startswith("missing "))
    edges |= {name: [] for name in missing if name not in edges}
    actions = [name.removeprefix("action ") for name in reference.checks if name.startswith("action ")]

    def is_known(rows: Int) -> np.ndarray:
        return items.rows(log.items.ids(rows).tolist()) >= 0

    return count_window(window, edges, actions, is_known, reference.first_ms)


OWNERS = "event", "user", "item", "request"


def _reading(
    name: str, check: Check, counts: Sequence[WindowCounts], reference: Reference, unknown: Action
) -> Reading | None:
    """One check of the newest window; None if it has no rows for it."""
    numbers = [each.get(name, WindowNumber(check.kind)) for each in counts]
    values = np.array([number.transformed(check) for number in numbers])
    if not math.isfinite(values[-1]):
        return None
    limit = reference.limit(name, numbers[-1].size)
    distance = values[-1] - check.mean
    deviation = (distance if is_one_sided(name, check) else abs(distance)) / limit
    action = Action.source
    if name == "unknown items":
        action = unknown
    elif name.startswith(DISTRIBUTIONS) and len(values) > 1 and spread(values) < SUDDEN * abs(distance):
        action = Action.retrain
    return Reading(name, numbers[-1].shown(check), _normal(check, limit), max(deviation, 0.0), action, values)


def _normal(check: Check, limit: float) -> str:
    """The range of healthy windows, as numbers that people know."""
    low, high = check.mean - limit, check.mean + limit
    if check.kind == "amount":
        return f"{_number(math.exp(low))} to {_number(math.exp(high))}"
    if check.kind == "share":
        ends = [math.sin(min(max(end, 0.0), math.pi / 2)) ** 2 for end in (low, high)]
        return " to ".join(map(_number, ends))
    if check.kind == "bins":
        return f"up to {_number(high**3)}"
    return f"{_number(low)} to {_number(high)}"


def _share_reading(name: str, k: int, n: int, usual: float, action: Action) -> Reading:
    """A share that should be at most `usual`, with the sampling error of n rows. One error of a source is an alarm."""
    if usual == 0 and action is Action.source:
        return Reading(name, k / max(n, 1), "0", 2.0 * k, action)
    mean, value = arcsine(usual * n, n), arcsine(k, n)
    limit = student_quantile(FALSE_ALARMS / 100, 1000) / math.sqrt(4 * n + 2)
    most = math.sin(min(mean + limit, math.pi / 2)) ** 2
    return Reading(name, k / max(n, 1), f"up to {_number(most)}", max(value - mean, 0.0) / limit, action)


def _count_scores(window: WindowRows, counts: WindowCounts, reference: Reference, scorer: Scorer) -> None:
    users = scored_users(window, reference.num_users)
    if not len(users):
        return
    ids = window.log.users.ids(users).tolist()
    scores = scorer.predict(ids, reference.items, now=window.begin)
    edges = {name: check.edges for name, check in reference.checks.items() if name.startswith("score ")}
    count_scores(counts, {task: values for task, values in scores.items() if f"score {task}" in edges}, edges)


def _record_readings(window: WindowRows, reference: Reference, scorer: Scorer, stale: float) -> list[Reading]:
    """Whether the store has current and readable records of the window's users.

    A model is trained with a share of windows (`data.staleness_share`) whose summaries are older than their tail
    reaches. More users than that are a reason to refresh.
    """
    old = np.flatnonzero(window.starts)
    places = np.random.default_rng(0).permutation(old)[:MOST_RECORDS]
    users = window.users[places]
    ids, damaged, found, covered = window.log.users.ids(users).tolist(), 0, [], []
    for user in ids:
        try:
            record = scorer.store.get_many([user])
        except RecordError:
            damaged += 1
            found.append(True)
            covered.append(np.iinfo(np.int64).max)
            continue
        found.append(bool(record.found[0]))
        covered.append(int(record.event_count[0]))
    missing = window.starts[places] - np.array(covered, np.int64)
    is_stale = (missing > scorer.served.config.tail_len) & np.array(found, bool)
    num, usual = len(ids), max(stale, 0.0)
    return [
        _share_reading("damaged records", damaged, num, 0.0, Action.source),
        _share_reading("users without a record", num - sum(found), num, 0.0, Action.refresh),
        _share_reading(
            "users with events that neither record nor tail holds", int(is_stale.sum()), num, usual, Action.refresh
        ),
    ]


def _calibration_readings(windows: Sequence[WindowRows], reference: Reference, model: VistaModel) -> list[Reading]:
    """Predicted over observed labels of each task, of impressions of consecutive windows.

    The impressions of a window are answered from summaries of what came before it, and from the events since. The store
    in service does not do: it may cover what users did after an impression. Training has calibrated the ratio to 1.
    """
    log, found = windows[0].log, dict[str, list[tuple[float, float]]]()
    try:
        with tempfile.TemporaryDirectory(prefix="vista-monitor-") as folder:
            for window in windows:
                shown = impression_cases(log, window.begin, window.end, max_cases=MOST_IMPRESSIONS)
                cases, store = with_tasks(shown, model.schema.tasks), Path(folder, str(window.begin))
                if not len(cases.user):
                    found = {}
                    continue
                options, users = RefreshOptions(verify_log=False), np.unique(cases.user)
                refresh(model, log, store, until=window.begin, options=options, users=users)
                with Scorer.open(model, store) as scorer:
                    answers = ScorerAnswers(scorer, log, requests_per_batch=USERS_PER_BATCH).probabilities(cases)
                answers = answers * looks_at(log, cases, model.schema.examined_tasks, model.data)
                found = {
                    task: [*found.get(task, []), _ratio(cases.user[known], answers[known, place], label[known])]
                    for place, (task, known, label) in enumerate(
                        zip(cases.tasks, cases.mask.T, cases.label.T, strict=True)
                    )
                    if known.any()
                }
    except VistaError as error:
        logger.warning("predictions are not compared with labels: %s", error)
        return []
    return [_calibration_reading(task, ratios, reference) for task, ratios in found.items()]


def _ratio(user: Int, predicted: Floats, label: Floats) -> tuple[float, float]:
    """Sum of probabilities [N] over sum of labels [N], and its standard error if the probabilities are true: that of
    independent users, whose impressions may depend on each other, but not less than that of independent impressions."""
    p, observed = predicted.astype(np.float64), max(float(label.sum()), 0.5)
    _, owner = np.unique(user, return_inverse=True)
    of_users = np.bincount(owner, p - label)
    return float(p.sum()) / observed, math.sqrt(max((of_users**2).sum(), (p * (1 - p)).sum())) / observed


def _calibration_reading(task: str, ratios: Sequence[tuple[float, float]], reference: Reference) -> Reading:
    """That of the last window. Chance includes the usual change of the label's rate between training windows."""
    values, (ratio, error) = np.array(ratios)[:, 0], ratios[-1]
    deviation, degrees = error, 1000
    if (check := reference.checks.get(f"label {task}")) is not None and 0 < check.mean < math.pi / 2:
        change = 2 * check.deviation / math.tan(check.mean)  # the arcsine's deviation, as a share of the rate
        deviation, degrees = max(error, change * math.sqrt(1 + 1 / check.num_windows)), check.num_windows - 1
    tail = FALSE_ALARMS / 2 / (len(reference.checks) + 1)
    limit, distance = max(student_quantile(tail, degrees) * deviation, CALIBRATION_SLACK), abs(ratio - 1)
    slow = len(values) > 1 and spread(values) < SUDDEN * distance
    action = Action.retrain if slow else Action.source
    normal = f"{_number(max(1 - limit, 0.0))} to {_number(1 + limit)}"
    return Reading(f"predicted / observed {task}", ratio, normal, distance / limit, action, values, error)


def gauges(report: MonitorReport) -> str:
    """All readings in Prometheus' text format, for the textfile collector of its node exporter."""
    due = report.due
    families = {
        "vista_monitor_value": ("The number of a check: a count, a share, a stability index, or a mean.", "value"),
        "vista_monitor_deviation": (
            "Distance from what is normal, divided by the limit; above 1 is an alarm.",
            "deviation",
        ),
        "vista_monitor_error": ("Standard error of a ratio of predicted to observed labels.", "error"),
    }
    lines = []
    for family, (what, attribute) in families.items():
        lines += [f"# HELP {family} {what}", f"# TYPE {family} gauge"]
        rows = [(one.name, getattr(one, attribute)) for one in report.readings]
        lines += [f'{family}{{check="{_label(name)}"}} {value:.6g}' for name, value in rows if value is not None]
    lines += ["# HELP vista_monitor_due Number of alarms by what to do.", "# TYPE vista_monitor_due gauge"]
    lines += [f'vista_monitor_due{{action="{action.value}"}} {len(due.get(action, []))}' for action in Action]
    end = "vista_monitor_window_end_timestamp_seconds"
    lines += [f"# HELP {end} End of the window.", f"# TYPE {end} gauge", f"{end} {report.end / 1000:.3f}"]
    return "\n".join(lines) + "\n"


def _label(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _page(report: MonitorReport, reference: Reference, config: MonitorConfig) -> str:
    due = report.due
    lines = [f"What is due? {action.value}: {', '.join(one.name for one in own)}." for action, own in due.items()]
    intro = [
        paragraph(
            f"Log {config.data}, model {config.model}, window {_time(report.begin)} to {_time(report.end)}; "
            f"{reference.num_windows} reference windows before {_time(reference.end_ms)}; vista {__version__}."
        )
    ]
    parts = []
    if report.alarms:
        body = [table(["check", "value", "normal", "of limit", "due"], map(_cells, report.alarms), is_text=True)]
        for one in report.alarms:
            if one.earlier is not None and len(one.earlier) > 1:
                x = list(range(1 - len(one.earlier), 1))
                body += [
                    heading(one.name),
                    line_chart(
                        [Series(one.name, x, one.earlier.tolist())], x_label="window", y_label="compared number"
                    ),
                ]
        parts.append(PageSection("Alarms", " ".join(MEANING[action] for action in due), body))
    rows = sorted(report.readings, key=lambda one: -one.deviation)
    parts.append(
        PageSection(
            "All checks",
            f"Limits are designed for one false alarm in {1 / FALSE_ALARMS:,.0f} healthy windows.",
            [table(["check", "value", "normal", "of limit", "due"], map(_cells, rows), is_text=True)],
        )
    )
    return render_page("Monitor", lines or ["What is due? Nothing."], intro, parts)


def _cells(one: Reading) -> list[str]:
    return [one.name, _value(one), one.expected, f"{one.deviation:.2f}", one.action.value if one.is_alarm else ""]


def _value(one: Reading) -> str:
    return _number(one.value) + ("" if one.error is None else f" ± {_number(one.error)}")


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _time(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
