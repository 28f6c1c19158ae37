"""`vista simulate`: logs of long histories, with impressions whose true label probabilities are known.

`simulate` writes a folder of Parquet files that `prepare` reads as source kind `simulated`:

    events.parquet       user, item, timestamp, action            users in order, each by time
    impressions.parquet  user, item, timestamp, click, like, long_view (0, 1 or null), click_probability,
                         like_probability, long_view_probability, decisive_age       users in order, each by time
    items.parquet        item, topic, quality                      the ground truth, hidden from models
    simulation.json      the config, and the times at which validation and test labels begin

Ids are int64 and start at 1. Timestamps are int64 ms and strictly increase within a user's events. Actions are the
strings of `ACTIONS`. The probabilities of an impression depend on the user's events strictly before its timestamp. An
impression is not an event: clicks are not fed back into the history. Like and long_view are known only if the
impression was clicked, and null otherwise; their probabilities, given a click, are there for every impression. Only the
world `share` has them; the other worlds have clicks alone.
`decisive_age` is the number of the user's events since the newest event of the candidate's topic, or -1 if the user has
no such event.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.random import SFC64, Generator
from numpy.typing import NDArray

from vista.arrays import Floats, Int, offsets_of
from vista.config import SimulateConfig
from vista.errors import ConfigError, DataError
from vista.files import checked_path, make_folders, remove_leftovers, replace_text, replaced_file
from vista.installation import require_module
from vista.logistic_regression import fit_probability, predict_probability
from vista.progress_bar import progress_bar
from vista.simulation.streams import ACTIONS, SimulatedChunk, SimulatedLog, make_catalog, pooled_features, split_times
from vista.simulation.worlds import WORLDS
from vista.text_table import text_table

if TYPE_CHECKING:
    import polars as pl


# The best possible metrics on a simulated log, of four kinds of predictor on the same impressions and labels:
#
# - `oracle`: the probability that the labels were drawn from. Nothing does better except by chance.
# - `last N`: an estimate of the best that is possible from the last N events before an impression. It knows more than a
#   model could: the true topics of the events, and the true topic and quality of the candidate. It estimates the
#   conditional expectation of the true probability from what the world says about these events (`window_features`).
# - `whole history`: the same with unlimited N. It shows that the log contains what the oracle knows.
# - `pooled`: the best linear function of pooled vectors (`pooled_features`).
#
# The estimates are logistic regressions. They are fitted to true probabilities rather than to drawn labels, which
# spares the sampling error of labels. Those of `last N` and `whole history` are fitted on the validation and test
# impressions of one half of the users and measured on the other half, and vice versa. That of `pooled` is fitted on all
# users' impressions before the test part.

WINDOWS = (2000, 200, 32)
MAX_IMPRESSIONS = 200_000
"""Maximum number of impressions that are measured, to bound memory."""
MAX_FITTED = 40_000
"""Maximum number of impressions on which a predictor is fitted, approximately."""


@dataclass(frozen=True, slots=True)
class OracleMetrics:
    """Metrics of one predictor for one task on one set of impressions."""

    predictor: str
    """oracle | whole history | last N | pooled"""
    task: str
    num_impressions: int
    """Test impressions (the last 15% of the period) with a known label."""
    auc: float
    auc_error: float
    """Standard error of the AUC (Hanley and McNeil, 1982)."""
    ne: float
    """Normalized entropy: log loss divided by the entropy of the base rate."""


def area_under_curve(labels: NDArray[np.bool_], scores: NDArray[np.floating]) -> float:
    """AUC of scores [N] for labels [N]. Ties count half; NaN unless both classes occur."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    num_true = int(labels.sum())
    num_false = len(labels) - num_true
    if num_true == 0 or num_false == 0:
        return float("nan")
    return float((ranks[labels].sum() - num_true * (num_true + 1) / 2) / (num_true * num_false))


def area_error(auc: float, num_true: int, num_false: int) -> float:
    """Standard error of an AUC (Hanley and McNeil, 1982)."""
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    spread = auc * (1 - auc) + (num_true - 1) * (q1 - auc**2) + (num_false - 1) * (q2 - auc**2)
    return float(np.sqrt(spread / max(num_true * num_false, 1)))


def normalized_entropy(labels: NDArray[np.bool_], probabilities: NDArray[np.floating]) -> float:
    """Log loss of probabilities [N], divided by the entropy of the labels' base rate."""
    p = np.clip(probabilities.astype(np.float64), 1e-7, 1 - 1e-7)
    rate = labels.mean()
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    return float(-np.where(labels, np.log(p), np.log1p(-p)).mean() / entropy)


def predict_from_window(log: SimulatedLog, window: int | None, chosen: NDArray[np.bool_], task: int = 0) -> Floats:
    """Best estimate [chosen.sum()] of a task's probability from the last `window` events, fitted on other users.

    Args:
        window: number of newest events that are known; None for all.
        chosen: [N] impressions to predict.
        task: index into the world's tasks.

    Raises:
        ValueError: if fewer than two users have late impressions with a known label.
    """
    late = log.impression_timestamp >= split_times(log.config)[0]
    fitted_on = _some(late & (log.label[:, task] >= 0))
    used = chosen | fitted_on
    features = WORLDS[log.config.world].window_features(log, window, used)
    target, half, fitted_on = log.probability[used, task], log.impression_user[used] % 2 == 0, fitted_on[used]
    if not (half & fitted_on).any() or not (~half & fitted_on).any():
        raise ValueError("reference predictors need impressions of at least two users; simulate more users")
    estimate = np.empty(len(features))
    for fold in (half, ~half):
        weights = fit_probability(features[~fold & fitted_on], target[~fold & fitted_on])
        estimate[fold] = predict_probability(features[fold], weights)
    return estimate[chosen[used]]


def _some(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Every k-th of the impressions of a mask, so that about MAX_FITTED remain at most."""
    kept = np.zeros_like(mask)
    places = np.flatnonzero(mask)
    kept[places[:: -(-len(places) // MAX_FITTED) or 1]] = True
    return kept


def predict_from_pooled_vectors(
    log: SimulatedLog, fitted_on: NDArray[np.bool_], chosen: NDArray[np.bool_], task: int = 0
) -> Floats:
    """Estimate [chosen.sum()] of a task's probability by the best linear function of pooled vectors.

    Args:
        fitted_on: [N] impressions to fit on.
        chosen: [N] impressions to predict.
        task: index into the world's tasks.
    """
    views = WORLDS[log.config.world].pooled_views(log.catalog)
    weights = fit_probability(pooled_features(log, views, fitted_on), log.probability[fitted_on, task])
    return predict_probability(pooled_features(log, views, chosen), weights)


def oracle_metrics(log: SimulatedLog, *, tasks: Sequence[str] = ("click",)) -> list[OracleMetrics]:
    """AUC and NE of all predictors for each task, on the impressions of the test part.

    Args:
        tasks: some of the world's tasks; like and long_view are measured where their label is known. Beyond
            MAX_IMPRESSIONS, only the first users' impressions are used.

    Raises:
        ValueError: if a task is unknown, if both labels do not occur, or if no impression precedes the test part.
    """
    test = log.impression_timestamp >= split_times(log.config)[1]
    rows = []
    for name in tasks:
        task = WORLDS[log.config.world].tasks.index(name)
        known = log.label[:, task] >= 0
        chosen, earlier = test & known, _some(~test & known)
        chosen &= np.cumsum(chosen) <= MAX_IMPRESSIONS
        labels = log.label[chosen, task] == 1
        num_true = int(labels.sum())
        if num_true == 0 or num_true == len(labels):
            raise ValueError(
                f"{name}: not both labels occur in the {len(labels)} test impressions; simulate more users"
            )
        if not earlier.any():
            raise ValueError(f"{name}: no impression precedes the test part; simulate more users")
        estimates: list[tuple[str, NDArray[np.floating]]] = [
            ("oracle", log.probability[chosen, task]),
            ("whole history", predict_from_window(log, None, chosen, task)),
            *((f"last {window}", predict_from_window(log, window, chosen, task)) for window in WINDOWS),
            ("pooled", predict_from_pooled_vectors(log, earlier, chosen, task)),
        ]
        for predictor, estimate in estimates:
            auc = area_under_curve(labels, estimate)
            error = area_error(auc, num_true, len(labels) - num_true)
            ne = normalized_entropy(labels, estimate)
            rows.append(OracleMetrics(predictor, name, len(labels), auc, error, ne))
    return rows


def format_oracle_metrics(rows: Sequence[OracleMetrics]) -> str:
    """The metrics as a plain-text table."""
    cells = [
        [row.predictor, row.task, f"{row.auc:.4f}", f"{row.auc_error:.4f}", f"{row.ne:.4f}", str(row.num_impressions)]
        for row in rows
    ]
    return text_table(["predictor", "task", "AUC", "+-", "NE", "test impressions"], cells)


@dataclass(frozen=True, slots=True)
class SimulationReport:
    """What a simulation wrote, and how long it took."""

    out: Path
    num_users: int
    num_events: int
    num_impressions: int
    validation_from: int
    """Suggested split, ms: labels from this time on are validation labels."""
    test_from: int
    """Suggested split, ms: labels from this time on are test labels."""
    generate_s: float
    write_s: float
    reference: tuple[OracleMetrics, ...] = ()
    """The best possible metrics, if the config asks for them."""

    def __str__(self) -> str:
        rate = self.num_events / max(self.generate_s, 1e-9)
        text = (
            f"{self.out}: {self.num_users} users, {self.num_events} events, {self.num_impressions} impressions; "
            f"generated in {self.generate_s:.2f} s ({rate / 1e6:.2f}M events/s), written in {self.write_s:.2f} s "
            f"(together {self.num_events / max(self.generate_s + self.write_s, 1e-9) / 1e6:.2f}M events/s)"
        )
        return f"{text}\n{format_oracle_metrics(self.reference)}" if self.reference else text


EVENTS_FILE, IMPRESSIONS_FILE, ITEMS_FILE, MANIFEST_FILE = (
    "events.parquet",
    "impressions.parquet",
    "items.parquet",
    "simulation.json",
)
CHUNK_EVENTS = 250_000
"""Events that are drawn at once."""
LENGTH_SPREAD = 0.35
"""Standard deviation of the logarithm of a history's length."""


def generate(config: SimulateConfig, *, chunk_events: int = CHUNK_EVENTS) -> SimulatedLog:
    """Draw a log in memory. The same arguments give the same bytes (with one version of NumPy).

    Args:
        config: what to draw.
        chunk_events: events that are drawn at once, approximately. Changing it changes what a seed gives.
    """
    root = np.random.SeedSequence(config.seed)
    catalog_seed, length_seed, chunk_seed = root.spawn(3)
    catalog = make_catalog(config, catalog_seed)
    lengths = _draw_lengths(config, Generator(SFC64(length_seed)))
    users = list(_user_chunks(lengths, chunk_events))
    seeds = chunk_seed.spawn(len(users))

    def draw(index: int) -> SimulatedChunk:
        return WORLDS[config.world].make_chunk(config, catalog, lengths[users[index]], seeds[index])

    if config.num_threads > 1:
        with ThreadPoolExecutor(config.num_threads) as pool:
            drawn = pool.map(draw, range(len(users)))
            chunks = list(progress_bar(drawn, desc="simulate", unit="chunk", total=len(users)))
    else:
        chunks = [draw(index) for index in progress_bar(range(len(users)), desc="simulate", unit="chunk")]
    joined = {
        field.name: np.concatenate([getattr(chunk, field.name) for chunk in chunks])
        for field in dataclasses.fields(SimulatedChunk)
    }
    return SimulatedLog(
        config=config,
        catalog=catalog,
        offsets=offsets_of(lengths),
        impression_user=np.repeat(np.arange(config.num_users), config.impressions_per_user),
        **joined,
    )


def _draw_lengths(config: SimulateConfig, rng: Generator) -> Int:
    """Lengths of the histories, [num_users], at least 1: log-normal, between about 1/3 and 3 times the median."""
    weight = np.clip(np.exp(LENGTH_SPREAD * rng.standard_normal(config.num_users)), 1 / 3, 3)
    ends = np.rint(np.cumsum(weight) / weight.sum() * config.num_users * config.events_per_user)
    return np.asarray(np.maximum(np.diff(ends, prepend=0), 1), dtype=np.int64)


def _user_chunks(lengths: Int, chunk_events: int) -> Iterator[slice]:
    """Ranges of consecutive users with about `chunk_events` events each; a longer history is a range by itself."""
    ends = np.cumsum(lengths)
    group = (ends - lengths) // chunk_events
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    for start, stop in zip(starts, np.append(starts[1:], len(lengths)), strict=True):
        yield slice(int(start), int(stop))


def simulate(config: SimulateConfig) -> SimulationReport:
    """Draw a log and write it to `config.out`, replacing an earlier simulation.

    Raises:
        DataError: if the folder cannot be written.
        ConfigError: if `config.reference` is set and there are too few test impressions to measure it.
    """
    out = checked_path(config.out, ConfigError)
    begin = time.perf_counter()
    log = generate(config)
    generate_s = time.perf_counter() - begin
    reference: tuple[OracleMetrics, ...] = ()
    if config.reference:
        try:
            reference = tuple(oracle_metrics(log, tasks=WORLDS[config.world].tasks))
        except ValueError as error:
            raise ConfigError(f"reference=true: {error}, or leave it out") from error
    begin = time.perf_counter()
    try:
        write(log, out)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error}); choose another folder with out=...") from error
    write_s = time.perf_counter() - begin
    validation_from, test_from = split_times(config)
    return SimulationReport(
        out=out,
        num_users=config.num_users,
        num_events=log.num_events,
        num_impressions=len(log.impression_item),
        validation_from=validation_from,
        test_from=test_from,
        generate_s=generate_s,
        write_s=write_s,
        reference=reference,
    )


def write(log: SimulatedLog, out: Path) -> None:
    """Write the four files of a simulation durably, each of them atomically, the manifest last."""
    make_folders(out)
    remove_leftovers(out, EVENTS_FILE, IMPRESSIONS_FILE, ITEMS_FILE, MANIFEST_FILE)
    (out / MANIFEST_FILE).unlink(missing_ok=True)
    for name, frame in _frames(log).items():
        with replaced_file(out / name) as file:
            frame.write_parquet(file, compression="zstd", compression_level=1)
    validation_from, test_from = split_times(log.config)
    manifest = {
        "config": dataclasses.asdict(log.config) | {"world": log.config.world.value},
        "validation_from": validation_from,
        "test_from": test_from,
        "tasks": list(WORLDS[log.config.world].tasks),
        "actions": list(ACTIONS),
    }
    replace_text(out / MANIFEST_FILE, json.dumps(manifest, indent=2) + "\n")


def _frames(log: SimulatedLog) -> dict[str, pl.DataFrame]:
    """The tables of a simulation by the names of their files."""
    pl = require_module("polars", "data")
    tasks, num_items = WORLDS[log.config.world].tasks, len(log.catalog.topic)
    known = {task: pl.Series(log.label[:, index]) for index, task in enumerate(tasks)}
    return {
        EVENTS_FILE: pl.DataFrame(
            {
                "user": np.repeat(np.arange(1, log.config.num_users + 1), np.diff(log.offsets)),
                "item": log.item.astype(np.int64) + 1,
                "timestamp": log.timestamp,
                "action": pl.Series(np.array(ACTIONS, dtype=object), dtype=pl.String).gather(log.action),
            }
        ),
        IMPRESSIONS_FILE: pl.DataFrame(
            {
                "user": log.impression_user + 1,
                "item": log.impression_item.astype(np.int64) + 1,
                "timestamp": log.impression_timestamp,
                **{task: label.set(label < 0, None) for task, label in known.items()},
                **{
                    f"{task}_probability": np.ascontiguousarray(log.probability[:, index])
                    for index, task in enumerate(tasks)
                },
                "decisive_age": log.decisive_age,
                **_places(log),
            }
        ),
        ITEMS_FILE: pl.DataFrame(
            {
                "item": np.arange(1, num_items + 1),
                "topic": log.catalog.topic.astype(np.int64),
                "quality": log.catalog.quality,
            }
        ),
    }


def _places(log: SimulatedLog) -> dict[str, NDArray[Any]]:
    """The columns `position` and `propensity` of impressions, if the world shows lists."""
    world = WORLDS[log.config.world]
    if len(world.examination) == 1:
        return {}
    return {"position": log.place + 1, "propensity": world.examined(log.place)}
