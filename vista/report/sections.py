"""The sections of a report. N cases of a measure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

import numpy as np

from vista.arrays import Floats, Int
from vista.config import TrainConfig
from vista.config.checks import to_dict
from vista.config.composition import value_text
from vista.evaluation.comparison import LEVEL, AucMeasure, Estimate, Measure
from vista.evaluation.metrics import calibration, gauc, mean_and_error, normalized_entropy
from vista.log.event_log import EventLog
from vista.log.histories import DAY_MS
from vista.log.splits import Until, split_until
from vista.model.item_feature_table import category_codes
from vista.model.vista_model import VistaModel
from vista.report.case_parts import CasePart
from vista.report.html_page import (
    PageSection,
    Series,
    folded,
    heading,
    interval_chart,
    line_chart,
    pair,
    paragraph,
    preformatted,
    table,
)
from vista.report.report_data import ORACLE, WIDE_SPREAD, ComparisonData, Latency, MeasuredRun, TrainedRun
from vista.runs.run_list import RunFiles, thinned
from vista.text_table import text_table

NUM_BINS = 10
"""Groups of predictions whose calibration is shown."""
NOT_LOSSES = ("step", "epoch", "learning_rate", "gradient_norm", "tokens_per_s", "waiting_share")
MAX_POINTS = 400
"""Most points of a curve; longer ones are thinned."""
ALWAYS = (
    "other seeds: each run was trained once, and the intervals do not include differences between training runs",
    "the effect on users: past clicks depend on what was shown to them",
    "differences between groups of users",
    "concurrent requests, and a service over HTTP",
)
"""What no report measures."""
MAX_NAMED_EPOCHS = 12
"""An axis with more epochs has round numbers."""
MOST_GROUPS = 20
"""Groups of items whose exposure is shown."""
MOST_VALUES = 50
"""Values of a category that forms groups of items, if none is named."""
FRESH_DAYS = 30
"""Newest days of a log whose events per user are counted."""
MIN_CASES = 30
"""A part with fewer cases is not shown."""


def verdict(data: ComparisonData, own: MeasuredRun, without: str | None, log: EventLog, split: str) -> list[str]:
    """Three lines: whether the run is better than the best baseline, what its summary adds, and whether it is fresh.
    `without`: the run whose model has no summary; None without one."""
    found = (_against_baselines(data, each, split) for each in data.measures)
    lines = [" ".join(["Better than simple baselines?", *found])]
    if without is None:
        lines.append(
            "What does the summary add? Not measured: train the same model with model.num_seeds=0, and name its run in "
            "`others`."
        )
    else:
        added = [(each, each.difference(data.own, without)) for each in data.measures if without in each.names]
        changes = "; ".join(f"{each.title} {gain.text(signed=True)} ({_added(gain)})" for each, gain in added)
        unread = " Validation chose epoch 0, whose scores do not read it." if own.record.best_epoch == 0 else ""
        lines.append(f"What does the summary add to the same model without one, {without}? {changes}.{unread}")
    lines.append(f"Is it fresh? {_freshness(own, log, split)}")
    return lines


def _against_baselines(data: ComparisonData, measure: Measure, split: str) -> str:
    estimates = measure.estimates()
    own, best = estimates[data.own], data.best_baseline(measure, estimates)
    if best is None:
        return f"{measure.title} on {split} is {own.value:.4f}; no baseline was measured."
    gain = measure.difference(data.own, best)
    within = ", within two standard errors" if gain.standing == "level" else ""
    return f"{measure.title} on {split} {own.value:.4f}: {_standing(gain)} {best} ({gain.text(signed=True)}{within})."


def _standing(gain: Estimate) -> str:
    return {"ahead": "ahead of", "behind": "behind", "level": "level with"}.get(gain.standing, "not comparable to")


def _added(gain: Estimate) -> str:
    return {"ahead": "better", "behind": "worse", "level": "level"}.get(gain.standing, "unknown")


def _freshness(own: MeasuredRun, log: EventLog, split: str) -> str:
    if not isinstance(own.model, VistaModel):
        return "The model reads the history up to each question."
    missing, tail_len, refresh_days = (
        own.missing_events(log, split),
        own.model.config.tail_len,
        own.model.data.refresh_days,
    )
    if missing is None or not len(missing):
        return f"Here, each question comes right after the refresh. {_of_one_day(log, tail_len)}"
    often = f"The store is refreshed every {refresh_days:g} days" if refresh_days else "The store is refreshed once"
    lost = float((missing > tail_len).mean())
    return (
        f"{often}, so half of the impressions come at most {np.median(missing):.0f} events after the refresh. The tail "
        f"adds up to {tail_len} of them: {1 - lost:.0%} of the impressions know all earlier events."
    )


def _of_one_day(log: EventLog, tail_len: int) -> str:
    """Whether the tail has room for the events that a summary lacks between two refreshes a day apart."""
    measured = "`vista evaluate staleness=N` measures summaries that lack each user's newest N events."
    if (times := log.time_range()) is None:
        return measured
    newest = times[1] // DAY_MS
    midnights = range(newest - FRESH_DAYS + 1, newest + 2)
    per_day = np.diff(np.stack([log.counts_before(day * DAY_MS) for day in midnights]), axis=0)
    active = per_day[per_day > 0]
    return (
        "A store that is refreshed every night lacks the events of the day. On "
        f"{(active <= tail_len).mean():.0%} of the days on which a user was active, these are at most {tail_len} "
        f"events, which the tail has room for. {measured}"
    )


def quality_text(data: ComparisonData, split: str) -> str:
    """What the parts of the model add, and the run next to everything else, as plain-text tables."""
    tables = []
    for measure in data.measures:
        estimates, gains = measure.estimates(), measure.gains()
        order = sorted(measure.names, key=lambda name: (np.isnan(estimates[name].value), -estimates[name].value))
        rows = [[name, estimates[name].text()] for name in order]
        for row in rows:
            if row[0] in gains:
                row += [gains[row[0]].text(signed=True), gains[row[0]].standing]
        head = [f"{measure.title}, {split}", "", f"{data.own} minus it", data.own]
        tables.append(text_table(head, [[*row, "", ""][: len(head)] for row in rows]))
    return "\n\n".join([*tables, LEVEL])


def quality_section(data: ComparisonData, split: str) -> PageSection:
    """What each part of the model adds, and quality next to other runs and to baselines that need no training. One
    chart and table for the labels of impressions, and one for the ranking of items."""
    findings, charts, tables = [], [], []
    for measure in data.measures:
        estimates, gains = measure.estimates(), measure.gains()
        findings.append(_finding(data, measure, estimates, gains))
        order = sorted(measure.names, key=lambda name: (np.isnan(estimates[name].value), -estimates[name].value))
        label = f"{measure.title}, {split} labels, with 95 % intervals"
        charts.append(interval_chart([(name, estimates[name]) for name in order], own=data.own, x_label=label))
        more = _more_metrics(data, measure)
        head = ["", measure.metric, f"{data.own} minus it", data.own, *next(iter(more.values()))]
        rows = []
        for name in order:
            gain = gains.get(name)
            cells = ("", "") if gain is None else (gain.text(signed=True), gain.standing)
            rows.append((name, estimates[name].text(), *cells, *more[name].values()))
        tables += [heading(measure.title), paragraph(_cases(measure)), table(head, rows, own=data.own)]
    body = [heading("What each part adds"), _parts(data)] if len(data.parts) > 1 else []
    body += [pair(*charts), *tables]
    if data.impressions is not None and len(data.impressions.tasks) > 1:
        body += [heading("Further tasks"), _further_tasks(data)]
    body.append(
        paragraph(
            "± is one standard error over users. Differences are paired: both models answer the same cases of the same "
            f"users. Ahead and behind mean by two standard errors; {LEVEL}. The baselines count events, or fit trees "
            "(label trees and pooled label vectors) or a logistic regression to earlier labels, and read all events "
            "and labels before each question."
        )
    )
    return PageSection("Quality", " ".join(findings), body)


def _parts(data: ComparisonData) -> str:
    """The parts of the model, one after the other, and what each changes."""
    rows = []
    for index, (name, what) in enumerate(data.parts.items()):
        cells: list[str] = []
        for measure in data.measures:
            change = measure.difference(name, list(data.parts)[index - 1]) if index else None
            added = ("", "") if change is None else (change.text(signed=True), _added(change))
            cells += [measure.estimates()[name].text(), *added]
        rows.append((f"{name}: {what}", *cells))
    head = [column for measure in data.measures for column in (measure.title, "change", "")]
    return table(["", *head], rows, own=None)


def _cases(measure: Measure) -> str:
    what = "impressions" if isinstance(measure, AucMeasure) else "cases"
    return f"{len(measure.user):,} {what} of {len(np.unique(measure.user)):,} users."


def _finding(data: ComparisonData, measure: Measure, estimates: dict[str, Estimate], gains: dict[str, Estimate]) -> str:
    """What the run gains on each other run, and on the best baseline."""
    finding = f"{measure.title}: {data.own} reaches {estimates[data.own].value:.4f}"
    runs = [name for name in data.runs if name in gains and name not in data.parts]
    best = data.best_baseline(measure, estimates)
    compared = [f"{_standing(gains[name])} {name} ({gains[name].text(signed=True)})" for name in runs]
    compared += (
        [f"{_standing(gains[best])} {best}, the best baseline ({gains[best].text(signed=True)})"] if best else []
    )
    return f"{finding}; {'; '.join(compared)}." if compared else f"{finding}; it was not compared with anything."


def _more_metrics(data: ComparisonData, measure: Measure) -> dict[str, dict[str, str]]:
    """Further metrics of each predictor, as cells by the head of their column."""
    if isinstance(measure, AucMeasure):
        return _task_metrics(measure)
    names = [name for name in next(iter(data.ranking.values())).values if name != measure.metric]
    return {
        predictor: {name: f"{mean_and_error(each.values[name])[0]:.4f}" for name in names}
        for predictor, each in data.ranking.items()
    }


def _task_metrics(measure: AucMeasure) -> dict[str, dict[str, str]]:
    """GAUC, normalized entropy, and calibration of the first task."""
    return {
        name: {
            "GAUC": f"{gauc(measure.user, measure.label, values):.4f}",
            "NE": f"{normalized_entropy(measure.label, values):.4f}",
            "calibration": f"{calibration(measure.label, values).ratio:.3f}",
        }
        for name, values in measure.probabilities.items()
    }


def _further_tasks(data: ComparisonData) -> str:
    """AUC of every task but the first, with intervals."""
    cases = data.impressions
    assert cases is not None
    columns: dict[str, dict[str, Estimate]] = {}
    for index, task in enumerate(cases.tasks[1:], 1):
        mask = cases.mask[:, index]
        values = {name: each[mask, index] for name, each in data.probabilities.items()}
        measure = AucMeasure(task, cases.user[mask], cases.seen[mask], None, cases.label[mask, index], values)
        columns[measure.title] = measure.estimates()
    rows = [(name, *(each[name].text() for each in columns.values())) for name in data.probabilities]
    return table(["", *columns], rows, own=data.own)


def calibration_section(data: ComparisonData) -> PageSection | str:
    """A chart and a table per task of the run; or why there is none."""
    cases = data.impressions
    if cases is None or not cases.tasks:
        return "calibration, because there are no labeled impressions"
    findings, charts, bins, measured = [], [], [], {}
    for index, task in enumerate(cases.tasks):
        mask = cases.mask[:, index]
        label, predicted = cases.label[mask, index], data.probabilities[data.own][mask, index]
        if not len(label) or not 0 < label.mean() < 1:
            continue
        own = measured[task] = calibration(label, predicted, NUM_BINS)
        findings.append(f"{task} {own.ratio:.3f}")
        ends = [0.0, float(max(own.bin_predictions.max(), own.bin_labels.max()))]
        chart = line_chart(
            [
                Series(data.own, own.bin_predictions.tolist(), own.bin_labels.tolist(), color=0),
                Series("perfect", ends, ends, color=6, dashed=True, has_points=False),
            ],
            x_label="mean predicted probability",
            y_label=f"{task}: share of labels that are 1",
            from_zero=True,
        )
        charts.append(chart)
        bins.append(heading(task) + _bins(own.bin_predictions, own.bin_labels, own.bin_counts))
    if not measured:
        return "calibration, because no task has labels of both kinds"
    errors = [(task, f"{own.ratio:.4f}", f"{own.expected_error:.4f}") for task, own in measured.items()]
    head = [
        paragraph(
            "Cases are sorted by prediction and divided into ten groups of equal size. The ratio is the mean "
            "prediction divided by the mean label; the error is the mean distance of the groups from the diagonal."
        ),
        table(["task", "ratio", "error"], errors),
    ]
    finding = f"Ratio of the mean prediction to the mean label (1 is perfect): {', '.join(findings)}."
    return PageSection(
        "Calibration", finding, [pair(*charts), folded("Groups", *head, *bins)], is_narrow=len(charts) == 1
    )


def _bins(predictions: Floats, labels: Floats, counts: Int) -> str:
    rows = zip(predictions, labels, counts, strict=True)
    return table(["predicted", "observed", "cases"], [(f"{p:.4f}", f"{y:.4f}", f"{n:,}") for p, y, n in rows])


def curves_section(files: RunFiles) -> PageSection | str:
    """Curves of the losses and the validation metrics; or why there are none."""
    steps, validations = files.steps, files.validations
    if not steps and not validations:
        return f"training curves, because {files.metrics_problem or 'metrics.jsonl has no measurements'}"
    charts, tables = [], []
    if steps:
        steps = thinned(steps, MAX_POINTS)
        names = [name for name in steps[0] if name not in NOT_LOSSES and _is_positive(steps[0][name])]
        series = [
            Series(
                f"{name} (from {steps[0][name]:.2f})",
                [row["step"] for row in steps],
                [_number(row.get(name)) / steps[0][name] for row in steps],
                color=index,
                has_points=False,
            )
            for index, name in enumerate(names)
        ]
        if len(steps) > 1:
            charts.append(
                line_chart(series, x_label="step", y_label="loss relative to its first value", from_zero=True)
            )
        losses = [(name, *(f"{_number(row.get(name)):.4f}" for row in (steps[0], steps[-1]))) for name in names]
        tables.append(table(["loss", f"step {steps[0]['step']}", f"step {steps[-1]['step']}"], losses))
    finding = "The run was not validated, so only losses are shown."
    if validations:
        best = files.best or validations[-1]
        last = validations[-1]
        finding = f"Validation was best after epoch {best['epoch']} of {last['epoch']}; that model is measured above."
        if best is last:
            finding += " This is the last epoch, so longer training may improve the model further."
        of_validation, rows = _validation(validations)
        charts += of_validation
        tables.append(rows)
    return PageSection("Training", finding, [pair(*charts), folded("Tables", *tables)])


def _validation(validations: Sequence[dict[str, Any]]) -> tuple[list[str], str]:
    """A chart of the most important metric, and a table of all."""
    names = list(validations[0]["validation"])
    plotted = [name for start in ("auc/", "ndcg@") for name in names if name.startswith(start)] or names
    epochs = [row["epoch"] for row in validations]
    is_long = len(epochs) > MAX_NAMED_EPOCHS
    charts = [
        line_chart(
            [Series(name, epochs if is_long else range(len(epochs)), [_metric(row, name) for row in validations])],
            x_label="epoch",
            y_label=f"validation: {name}",
            x_names=None if is_long else [str(epoch) for epoch in epochs],
        )
        for name in plotted[:1]
    ]
    rows = [(name, *(f"{_metric(row, name):.4f}" for row in validations)) for name in names]
    return charts, table(["metric", *(f"epoch {row['epoch']}" for row in validations)], rows)


def _metric(row: dict[str, Any], name: str) -> float:
    return _number(row["validation"].get(name))


def _number(value: Any) -> float:
    """A number of metrics.jsonl, where null stands for an undefined one."""
    return float(value) if isinstance(value, (int, float)) else float("nan")


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and value > 0 and math.isfinite(value)


def latency_section(latency: Latency) -> PageSection:
    """A chart and a table, with the load of the machine."""
    milliseconds = [[1e3 * value for value in values] for values in (latency.median_s, latency.p90_s)]
    low, high = min(milliseconds[0]), max(milliseconds[0])
    finding = (
        f"Scoring {latency.num_candidates:,} candidates takes {low:.1f} to {high:.1f} ms (median) for histories of "
        f"{min(latency.lengths):,} to {max(latency.lengths):,} events."
    )
    chart = line_chart(
        [
            Series("median", latency.lengths, milliseconds[0], color=0),
            Series("90th percentile", latency.lengths, milliseconds[1], color=6, dashed=True),
        ],
        x_label="events in the history",
        y_label=f"ms per request of {latency.num_candidates:,} candidates",
        log_x=max(latency.lengths) > 10 * min(latency.lengths) > 0,
        from_zero=True,
    )
    rows = [
        (f"{length:,}", f"{median:.2f}", f"{p90:.2f}", f"{p90 / median:.2f}")
        for length, median, p90 in zip(latency.lengths, *milliseconds, strict=True)
    ]
    before, after = latency.load
    threads = "1 thread" if latency.num_threads == 1 else f"{latency.num_threads} threads"
    conditions = (
        f"One user per request, {threads} on {latency.num_cores} cores; load average of the "
        f"machine {before:.2f} before and {after:.2f} after. Medians over {latency.num_rounds} rounds."
    )
    if latency.is_wide:
        conditions += (
            f" The spread stayed wide: in at least half of the rounds, the 90th percentile exceeded {WIDE_SPREAD:g} "
            "times the median. Rely on the medians alone, and measure again on an idle machine."
        )
    return PageSection(
        "Latency",
        finding,
        [pair(chart, table(["events", "median, ms", "p90, ms", "ratio"], rows)), paragraph(conditions)],
    )


def popularity_section(run: MeasuredRun, log: EventLog, category: str | None) -> PageSection | str:
    """How much the lists follow popularity, and the exposure of groups of items. `category`: of items, whose values are
    the groups; None takes the first one with few values."""
    report = run.evaluation.popularity
    if report is None:
        return "popularity and exposure, because the model does not rank next items here"
    k, top = report.k, report.recommended_share[-1]
    finding = (
        f"The most popular items, with a tenth of the training events, take {top:.0%} of the places in lists of {k}; "
        f"{report.coverage:.0%} of all items are in at least one list."
    )
    shares = report.num_items, report.label_share, report.recommended_share, report.hit_rate, report.ndcg
    rows = [
        [str(d + 1), f"{items:,}", f"{labels:.1%}", f"{shown:.1%}", f"{hits:.4f}", f"{gain:.4f}"]
        for d, (items, labels, shown, hits, gain) in enumerate(zip(*shares, strict=True))
    ]
    note = paragraph("Each decile has a tenth of the training events; the tenth has the most popular items.")
    body = [
        folded(
            "Popularity", note, table(["decile", "items", "labels", "places in lists", f"hr@{k}", f"ndcg@{k}"], rows)
        )
    ]
    if category is None:
        few = (name for name, one in log.item_features.items() if one.values is not None and one.size <= MOST_VALUES)
        category = next(few, None)
    if category is not None:
        body.append(_exposure(run, log, category, report.events, report.places))
    return PageSection("Popularity and exposure", finding, body, is_narrow=True)


def _exposure(run: MeasuredRun, log: EventLog, category: str, events: Int, places: Int) -> str:
    """Shares of groups of items in the training events and in lists, largest groups first."""
    codes = category_codes(log.item_features, category, "category")[1:]
    of_model = run.model.rows_of(log.items) - 1
    known, values = of_model >= 0, log.item_features[category].values
    assert values is not None
    size = 1 + len(values)
    of_events, of_places = (np.bincount(codes[known], each[of_model[known]], size) for each in (events, places))
    names = ["(none)", *(str(value) for value in values.ids(np.arange(len(values))).tolist())]
    rows = []
    for code in np.argsort(-of_events, kind="stable")[:MOST_GROUPS].tolist():
        trained, shown = (each[code] / max(each.sum(), 1) for each in (of_events, of_places))
        if trained:
            rows.append([names[code], f"{trained:.1%}", f"{shown:.1%}", f"{shown / trained:.2f}"])
    note = f"Groups by {category}. Below 1, lists show a group less often than users chose it in training."
    return folded("Exposure", paragraph(note), table(["group", "training events", "places in lists", "ratio"], rows))


def limits_section(reasons: Sequence[str]) -> PageSection:
    """A list of what is missing. `reasons`: what is missing from this report in particular, each with its reason."""
    entries = "".join(f"<li>{escape(each)}</li>" for each in (*reasons, *ALWAYS))
    return PageSection("What was not measured", "This report does not cover:", [f"<ul>{entries}</ul>"])


def split_section(
    title: str, definition: str, data: ComparisonData, parts: Sequence[tuple[Measure, Sequence[CasePart]]], label: str
) -> PageSection | str:
    """Each measure over its parts, as a chart and a table; or why there is none.

    Args:
        definition: what the parts are, as a sentence.
        parts: measures with their parts, in order; parts with few cases are left out.
        label: name of the horizontal axis.
    """
    findings, charts, tables = [], [], []
    for measure, own_parts in parts:
        kept = [part for part in own_parts if part.cases.sum() >= MIN_CASES]
        if len(kept) < 2:
            continue
        shown = [name for name in data.shown if name in measure.names]
        estimates = [measure.estimates(part.cases) for part in kept]
        series = [_series(name, data, estimates) for name in shown]
        findings.append(_split_finding(measure, data, kept, estimates, shown))
        chart = line_chart(
            series, x_label=label, y_label=f"{measure.title}, with 95 % intervals", x_names=[part.name for part in kept]
        )
        rows = [
            (part.name, f"{int(part.cases.sum()):,}", *(each[name].text() for name in shown))
            for part, each in zip(kept, estimates, strict=True)
        ]
        charts.append(chart)
        tables.append(heading(measure.title) + table([label, "cases", *shown], rows))
    if not findings:
        return f"{title[0].lower()}{title[1:]}, because fewer than two groups have {MIN_CASES} cases"
    body = [paragraph(definition), pair(*charts), folded("Tables", *tables)]
    return PageSection(title, " ".join(findings), body, is_narrow=len(charts) == 1)


def _series(name: str, data: ComparisonData, estimates: Sequence[dict[str, Estimate]]) -> Series:
    own = [each[name] for each in estimates]
    return Series(
        name,
        range(len(own)),
        [each.value for each in own],
        [each.ends() for each in own],
        color=data.color(name),
        dashed=name == ORACLE,
    )


def _split_finding(
    measure: Measure,
    data: ComparisonData,
    parts: Sequence[CasePart],
    estimates: Sequence[dict[str, Estimate]],
    shown: Sequence[str],
) -> str:
    """Where the run is furthest ahead of each other run and of the best baseline, if it is clearly ahead anywhere."""
    runs = [name for name in shown if name in data.runs[1:]]
    baselines = [name for name in shown if name not in (*data.runs, ORACLE)]
    leads = {f" of {name}": _lead(data.own, parts, estimates, [name]) for name in runs}
    if baselines:
        leads[" of the baselines" if runs else ""] = _lead(data.own, parts, estimates, baselines)
    if not leads:
        first, last = estimates[0][data.own].value, estimates[-1][data.own].value
        return f"{measure.title} of {data.own}: {first:.4f} for {parts[0].name}, {last:.4f} for {parts[-1].name}."
    found = [f"furthest ahead{whom} for {where}" for whom, where in leads.items() if where]
    if unclear := [whom for whom, where in leads.items() if not where]:
        found.append(f"not clearly ahead{' or'.join(unclear)} in any group")
    return f"{measure.title}: {data.own} is {', and '.join(found)}."


def _lead(
    own: str, parts: Sequence[CasePart], estimates: Sequence[dict[str, Estimate]], others: Sequence[str]
) -> str | None:
    """Where a run is furthest ahead of the best of some others, if it is beyond the intervals anywhere."""
    found: tuple[float, str] | None = None
    for part, each in zip(parts, estimates, strict=True):
        best = max(others, key=lambda name: np.nan_to_num(each[name].value, nan=-np.inf, posinf=-np.inf))
        lead = each[own].value - each[best].value
        # The intervals of both, added in squares as if independent, are wider than that of a paired difference.
        noise = np.hypot(each[own].half_width, each[best].half_width)
        if lead > noise and (found is None or lead > found[0]):
            found = lead, f"{part.name} ({lead:+.4f}{'' if len(others) == 1 else f' ahead of {best}'})"
    return None if found is None else found[1]


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
    body = [folded("Data", table(["data", ""], rows, is_text=True))]
    if summary.state != "finished":
        why = f" ({summary.reason})" if summary.reason else ""
        body.append(
            paragraph(
                f"The run is {summary.state}{why}{_done(record)}. All figures are for the best model so far.", "finding"
            )
        )
    changed = list(_changed(to_dict(record.config), to_dict(TrainConfig())))
    if changed:
        body.append(folded("Settings that differ from the defaults", table(["key", "value"], changed, is_text=True)))
    if record.card:
        body.append(folded("Model card", preformatted(record.card)))
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
