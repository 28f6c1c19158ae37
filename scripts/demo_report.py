"""The demo's report: report.md with the numbers, and report.png with three plots."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray

from scripts.experiments.results import describe_hardware, hardware
from vista.arrays import Int
from vista.evaluation.cases import ImpressionCases, NextItemCases, next_item_cases
from vista.evaluation.evaluation_report import EvaluationReport
from vista.evaluation.metrics import auc, ndcg
from vista.evaluation.protocol import impression_metrics
from vista.log.event_log import EventLog
from vista.log.splits import split_until, visible_counts
from vista.model import inference
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshReport

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

AGE_BOUNDS = (0, 8, 32, 200, 1000, 1 << 40)


@dataclass(frozen=True, slots=True)
class DemoLatency:
    """Score latency of a user with `length` events, seconds."""

    length: int
    median_s: float
    p90_s: float


@dataclass(frozen=True, slots=True)
class DemoReport:
    """The contents of the report."""

    name: str
    source: Path
    log: EventLog
    model: VistaModel
    run_dir: Path
    evaluation: EvaluationReport
    evaluation_float32: EvaluationReport
    refresh: RefreshReport
    latency: list[DemoLatency]
    num_candidates: int
    prepare_seconds: float
    train_seconds: float
    seconds: float


@dataclass(frozen=True, slots=True)
class DemoAgeCurve:
    """Quality by the age of the most relevant event: a value per bucket of ages, and the oracle's if it is known."""

    title: str
    unit: str
    labels: list[str]
    values: list[float]
    best: list[float] | None
    counts: list[int]


def write_report(report: DemoReport, folder: Path) -> Path:
    """Write report.png and report.md; returns the path of report.md."""
    curve = age_curve(report)
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2))
    _plot_losses(axes[0], report.run_dir / "metrics.jsonl")
    _plot_age(axes[1], curve)
    _plot_latency(axes[2], report)
    figure.suptitle(f"vista demo: {report.name}")
    figure.tight_layout()
    figure.savefig(folder / "report.png", dpi=110)
    plt.close(figure)
    path = folder / "report.md"
    path.write_text(_markdown(report, curve))
    return path


def age_curve(report: DemoReport) -> DemoAgeCurve:
    """Quality by the age of the most relevant event.

    With impressions: AUC by the number of events since the user's newest event with the candidate's topic. Without
    impressions: NDCG@10 by the number of events since the one whose item vector is most similar to the label's.
    """
    evaluation = report.evaluation
    if evaluation.impressions is not None and evaluation.probabilities is not None:
        cases = evaluation.impressions
        age = _topic_age(report.log, cases, report.source / "items.parquet")
        oracle = None if cases.probability is None else cases.probability[:, 0]
        return _curve(
            f"AUC of {cases.tasks[0]}, test impressions",
            "events since the newest event of the candidate's topic",
            age,
            lambda part: _auc(cases.label[part, 0], evaluation.probabilities[part, 0]),
            None if oracle is None else (lambda part: _auc(cases.label[part, 0], oracle[part])),
        )
    assert evaluation.ranks is not None
    ranks = evaluation.ranks
    seen = visible_counts(report.log, split_until(report.model.data, "test"))
    age = _similar_age(report, next_item_cases(report.log, seen))
    return _curve(
        "NDCG@10, test items",
        "events since the event most similar to the label (cosine of item vectors)",
        age,
        lambda part: ndcg(ranks[part], 10),
        None,
    )


def _auc(label: NDArray[np.float32], score: NDArray[np.float32]) -> float:
    return auc(label, score) if 0 < label.mean() < 1 else float("nan")


def _curve(title, unit, age, quality, best) -> DemoAgeCurve:  # type: ignore[no-untyped-def]
    labels, values, bests, counts = [], [], [], []
    for low, high in pairwise(AGE_BOUNDS):
        part = (age >= low) & (age < high)
        if part.sum() < 30:
            continue
        labels.append(f"{low}+" if high == AGE_BOUNDS[-1] else f"{low}–{high - 1}")
        counts.append(int(part.sum()))
        values.append(quality(part))
        if best is not None:
            bests.append(best(part))
    return DemoAgeCurve(title, unit, labels, values, bests or None, counts)


def _topic_age(log: EventLog, cases: ImpressionCases, items_file: Path) -> Int:
    import polars as pl

    items = pl.read_parquet(items_file)
    topic = np.zeros(log.num_items, np.int64)
    rows = log.items.rows(items["item"].to_numpy())
    topic[rows[rows >= 0]] = items["topic"].to_numpy()[rows >= 0]
    age = np.full(len(cases.user), -1, np.int64)
    for user in np.unique(cases.user):
        chosen = np.flatnonzero(cases.user == user)
        events = topic[np.asarray(log.slice(int(user)).item)]
        width = len(events) + 1
        key = np.sort(events * width + np.arange(len(events)))
        wanted = topic[cases.item[chosen]]
        at = np.searchsorted(key, wanted * width + cases.seen[chosen]) - 1
        has_event = (at >= 0) & (key[np.maximum(at, 0)] // width == wanted)
        age[chosen] = np.where(has_event, cases.seen[chosen] - 1 - key[np.maximum(at, 0)] % width, -1)
    return age


def _similar_age(report: DemoReport, cases: NextItemCases) -> Int:
    vectors = inference.item_vectors(report.model).cpu().numpy()
    columns = report.model.rows_of(report.log.items) - 1
    age = np.zeros(len(cases.user), np.int64)
    for index, (user, seen, item) in enumerate(zip(cases.user, cases.seen, cases.item, strict=True)):
        history = columns[np.asarray(report.log.slice(int(user), 0, int(seen)).item)]
        similarity = vectors[history] @ vectors[columns[item]]
        age[index] = len(history) - 1 - int(similarity.argmax()) if len(history) else -1
    return age


def _plot_losses(axes: Axes, path: Path) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    others = ("step", "epoch", "learning_rate", "gradient_norm", "tokens_per_s", "waiting_share")
    for name in [name for name in (steps[0] if steps else ()) if name not in others]:
        values = np.array([row[name] for row in steps if name in row])
        axes.plot(
            [row["step"] for row in steps if name in row], values / values[0], label=f"{name} (from {values[0]:.2f})"
        )
    axes.set(title="losses relative to their first value", xlabel="step", yscale="log")
    if steps:
        axes.legend(fontsize=8)


def _plot_age(axes: Axes, curve: DemoAgeCurve) -> None:
    places = np.arange(len(curve.labels))
    axes.bar(places, curve.values, label="vista, from the int8 store")
    if curve.best is not None:
        axes.plot(places, curve.best, "k_", markersize=30, label="best possible")
        axes.set_ylim(0.4, 1.0)
    axes.set_xticks(places, [f"{a}\n(n={n})" for a, n in zip(curve.labels, curve.counts, strict=True)], fontsize=8)
    axes.set(title=curve.title, xlabel=curve.unit)
    axes.xaxis.label.set_fontsize(8)
    axes.legend(fontsize=8)


def _plot_latency(axes: Axes, report: DemoReport) -> None:
    lengths = [row.length for row in report.latency]
    axes.plot(lengths, [row.median_s * 1e3 for row in report.latency], "o-", label="median")
    axes.plot(lengths, [row.p90_s * 1e3 for row in report.latency], "o:", label="90th percentile")
    axes.set(
        title=f"score latency, {report.num_candidates} candidates",
        xlabel="events in the history",
        ylabel="ms",
        xscale="log",
    )
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)


def _markdown(report: DemoReport, curve: DemoAgeCurve) -> str:
    evaluation, log = report.evaluation, report.log
    lines = [
        f"# vista demo: {report.name}",
        "",
        f"{log.num_users:,} users, {log.num_items:,} items, {log.num_events:,} events.",
        f"{describe_hardware(hardware())}.",
        "",
        "![losses, quality by age, latency](report.png)",
        "",
        "| step | |",
        "|---|---|",
        f"| prepare | {report.prepare_seconds:.1f} s |",
        f"| train | {report.train_seconds:.1f} s |",
        f"| refresh | {report.refresh} |",
        f"| all | {report.seconds:.0f} s |",
        "",
        f"Test quality, read from the int8 store ({evaluation.num_cases:,} cases):",
        "",
        "| metric | int8 store | float32 store | best possible |",
        "|---|---|---|---|",
    ]
    cases = evaluation.impressions
    best = impression_metrics(cases, cases.probability) if cases is not None and cases.probability is not None else {}
    for name, value in evaluation.metrics.items():
        exact = report.evaluation_float32.metrics[name]
        lines.append(f"| {name} | {value:.4f} | {exact:.4f} | {f'{best[name]:.4f}' if name in best else ''} |")
    lines += [
        "",
        f"{curve.title}, by {curve.unit}:",
        "",
        "| age | cases | vista | best possible |",
        "|---|---|---|---|",
    ]
    for index, label in enumerate(curve.labels):
        top = f"{curve.best[index]:.4f}" if curve.best is not None else ""
        lines.append(f"| {label} | {curve.counts[index]:,} | {curve.values[index]:.4f} | {top} |")
    lines += [
        "",
        f"Score latency, {report.num_candidates} candidates:",
        "",
        "| events | median | p90 |",
        "|---|---|---|",
    ]
    lines += [f"| {r.length:,} | {r.median_s * 1e3:.2f} ms | {r.p90_s * 1e3:.2f} ms |" for r in report.latency]
    return "\n".join(lines) + "\n"
