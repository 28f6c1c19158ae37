"""`vista report`: measure a run next to other runs and baselines, and write one HTML file about it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from vista.config import EvaluateConfig, ReportConfig
from vista.config.checks import Target
from vista.device import cpu_settings
from vista.errors import ConfigError
from vista.evaluation.comparison import Measure
from vista.files import replace_text, writable_file
from vista.installation import __version__, install_command
from vista.log.event_log import EventLog
from vista.log.splits import leaves_out_seen, split_until, visible_counts
from vista.progress_bar import progress_bar
from vista.report.case_parts import (
    ACTIVE_DAYS,
    CasePart,
    activity_parts,
    age_parts,
    category_ages,
    item_ages,
    length_parts,
    similar_ages,
)
from vista.report.html_page import PageSection, paragraph, render_page
from vista.report.report_data import ComparisonData, Latency, MeasuredRun, TrainedRun, without_summary
from vista.report.sections import (
    calibration_section,
    curves_section,
    latency_section,
    limits_section,
    popularity_section,
    quality_section,
    quality_text,
    split_section,
    training_section,
    verdict,
)
from vista.runs.run_list import EPOCH_0
from vista.store.record_encoding import read_key
from vista.text_table import fitted

logger = logging.getLogger(__name__)
NUM_LATENCY_USERS = 5
NUM_CANDIDATES = 500
TRAINED_BASELINES = (
    "baselines of rankings that take minutes to fit: EASE, TIFU-KNN, pooled factors, pooled vectors, boosted trees; "
    "vista evaluate baselines=trained measures them, and needs the extra baselines"
)


@dataclass(frozen=True, slots=True)
class WrittenReport:
    """A report that was written."""

    path: Path
    bytes: int
    seconds: float
    verdict: list[str]
    """Three lines: better than baselines, what the summary adds, and whether it is fresh."""
    tables: str
    """Quality next to all baselines, as plain text."""
    findings: dict[str, str]
    """{title of a section: its first sentence}."""

    def __str__(self) -> str:
        written = f"{self.path}: {self.bytes / 1e3:.0f} kB in {self.seconds:.1f} s"
        return "\n\n".join([self.tables, "\n".join(fitted(line, 2) for line in self.verdict), written])


def write_report(config: ReportConfig, *, latency: Latency | None = None, notes: tuple[str, ...] = ()) -> WrittenReport:
    """Measure and write.

    Args:
        latency: of the run's scorer; None measures it for some users of the log.
        notes: sentences for the head of the page.

    Raises:
        ConfigError: `run` or one of `others` is not a run folder, has no exported model yet, or was measured on other
            cases; there is nothing to measure.
        CheckpointError, StoreError: a model or the store cannot be read, or the store is of another model.
        LeakageError: the store covers labels.
        LogFormatError: a file of the log is damaged.
    """
    began = time.perf_counter()
    record = TrainedRun.read(config.run)
    out = Path(config.out) if config.out is not None else record.folder / "report.html"
    writable_file(out, "out")
    others = {_name(folder, config): TrainedRun.read(folder, "others") for folder in config.others}
    log = EventLog.open(config.data or record.config.data.path)
    if config.verify_log:
        log.verify()
    asked = EvaluateConfig(
        split=config.split, target=config.target, horizon_events=[config.horizon_events], top_k=[config.top_k]
    )
    with ExitStack() as stack, cpu_settings(config.num_threads):
        name = _name(config.run, config)
        key = read_key(config.authentication_key_file) if config.store is not None else None
        own = MeasuredRun.of(
            name, record, log, asked, stack, store=config.store, key=key, scratch=out.parent, popularity=True
        )
        runs = [own]
        if record.epoch_0 is not None:
            runs.append(MeasuredRun.of(EPOCH_0, record, log, asked, stack, folder=record.epoch_0, scratch=out.parent))
        for other, other_record in others.items():
            logger.info("measuring %s", other_record.folder)
            runs.append(MeasuredRun.of(other, other_record, log, asked, stack, scratch=out.parent))
        has_trees = find_spec("sklearn") is not None
        data = ComparisonData.of(runs, log, asked, baselines=config.baselines, trees=has_trees)
        if latency is None and own.scorer is not None:
            latency = _latency(own, log, config.split)
    lines = verdict(data, own, without_summary(runs), log, config.split)
    builders: list[Callable[[], PageSection | str]] = [
        lambda: quality_section(data, config.split),
        lambda: _length_section(data),
        lambda: _activity_section(data, own, log, config),
        lambda: _age_section(data, own, log, config),
        lambda: calibration_section(data),
        lambda: popularity_section(own, log, config.category),
        lambda: "latency, because the model reads raw histories" if latency is None else latency_section(latency),
        lambda: training_section(own, log),
        lambda: curves_section(record.files),
    ]
    parts = [build() for build in progress_bar(builders, desc="sections", unit="section")]
    sections = [part for part in parts if isinstance(part, PageSection)]
    missing = [part for part in parts if isinstance(part, str)]
    if not config.baselines:
        missing.append("baselines, because baselines=false")
    elif data.impressions is not None and not has_trees:
        missing.append(f"trees on earlier labels, which need scikit-learn: {install_command('baselines')}")
    if data.ranking:
        missing.append(TRAINED_BASELINES)
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    intro = [paragraph(note, "") for note in notes]
    intro.append(paragraph(f"Run {record.folder}; {config.split} labels; vista {__version__}; {when}."))
    page = render_page(f"Report: {name}", lines, intro, [*sections, limits_section(missing)])
    replace_text(out, page)
    findings = {section.title: section.finding for section in sections}
    return WrittenReport(
        out, len(page.encode()), time.perf_counter() - began, lines, quality_text(data, config.split), findings
    )


def _name(folder: str, config: ReportConfig) -> str:
    """The name of a run in the report: the name of its folder, or its path if two folders have the same name."""
    short = Path(folder).resolve().name
    names = [Path(each).resolve().name for each in (config.run, *config.others)]
    return short if names.count(short) == 1 else folder


def _length_section(data: ComparisonData) -> PageSection | str:
    length = [(measure, length_parts(measure)) for measure in data.measures]
    definition = "History length is the number of the user's events before the case."
    return split_section("Quality by history length", definition, data, length, "events before the case")


def _activity_section(data: ComparisonData, own: MeasuredRun, log: EventLog, config: ReportConfig) -> PageSection | str:
    if not log.has_time:
        return "quality by user activity, because the log has no times"
    until = split_until(own.model.data, config.split)
    active = [(measure, activity_parts(measure, log, until)) for measure in data.measures]
    end = "the held-out labels begin" if until.before is not None else "the log ends"
    definition = f"Activity is the number of the user's events in the {ACTIVE_DAYS} days before {end}."
    return split_section("Quality by user activity", definition, data, active, f"events in {ACTIVE_DAYS} days")


def _age_section(data: ComparisonData, own: MeasuredRun, log: EventLog, config: ReportConfig) -> PageSection | str:
    if config.target is Target.window:
        return "quality by the age of the deciding event, because a window has several labels"
    aged: list[tuple[Measure, list[CasePart]]] = []
    if (column := config.category) is not None:
        aged = [(measure, age_parts(category_ages(measure, log, column))) for measure in data.measures]
        definition = (
            f"The deciding event is the user's newest event whose item has the same {column} as the candidate or "
            "label. Its age is the number of the user's later events."
        )
    elif leaves_out_seen(log, own.model.data) and own.model.has_retrieval:
        aged = [(measure, age_parts(similar_ages(measure, log, own.model))) for measure in data.measures]
        definition = (
            "The deciding event is the event whose item vector, in this run's model, is most similar to that of the "
            "candidate or label. Its age is the number of the user's later events."
        )
    else:
        aged = [(measure, age_parts(item_ages(measure, log))) for measure in data.measures]
        definition = (
            "The deciding event is the user's newest event with the same item as the candidate or label. Its age is "
            "the number of the user's later events."
        )
    return split_section("Quality by age of the deciding event", definition, data, aged, "age in events")


def _latency(run: MeasuredRun, log: EventLog, split: str) -> Latency:
    """Latency for users of the log, from the shortest history to the longest."""
    assert run.scorer is not None
    counts = visible_counts(log, split_until(run.model.data, split))
    order = np.argsort(counts, kind="stable")
    order = order[counts[order] > 0]
    if not len(order):
        raise ConfigError(f"{log.path}: no user has an event before the {split} labels")
    rows = order[np.unique(np.linspace(0, len(order) - 1, NUM_LATENCY_USERS).astype(np.int64))]
    rng = np.random.default_rng(0)
    items = run.model.items.ids(rng.integers(0, len(run.model.items), NUM_CANDIDATES))
    newest = log.time_range()
    now = 0 if newest is None else newest[1] + 1
    ids = log.users.ids(rows).tolist()
    return Latency.measure(run.scorer, ids, counts[rows].tolist(), run.scorer.encode(items), now)
