"""Validation during training: the protocol's cases, answered by the model with float32 summaries and no store."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vista.arrays import Float32s, Floats, Int
from vista.config import EvaluateConfig, TrainConfig
from vista.errors import NonFiniteLossError
from vista.evaluation.answers import RawHistoryAnswers
from vista.evaluation.cases import (
    ImpressionCases,
    NextItemCases,
    WindowCases,
    case_requests,
    impression_cases,
    looks_at,
    next_item_cases,
    window_cases,
    with_tasks,
)
from vista.evaluation.comparison import Estimate
from vista.evaluation.counting_baselines import counting_baselines, fitted_scores
from vista.evaluation.protocol import (
    WindowReport,
    calibrated,
    case_batches,
    entropy_of_users,
    impression_metrics,
    rank_next_items,
    rank_windows,
    ranking_metrics,
    ranking_values,
    window_lengths,
    window_metric,
)
from vista.examples.batch_source import trained_tasks
from vista.examples.item_spaces import PooledHistories
from vista.examples.item_statistics import CounterRequests, HistoryCounters
from vista.log.event_log import EventLog
from vista.log.histories import Histories, RowFeatures, rows_that_fit, token_groups
from vista.log.splits import (
    EVENTS_PER_BLOCK,
    READ_EVENT_BYTES,
    Until,
    last_refresh,
    leaves_out_seen,
    part_counts,
    part_times,
)
from vista.model import inference
from vista.model.baselines.history_model import HistoryModel
from vista.model.features import log_encoder
from vista.model.history_states import GrowingStates
from vista.model.inference import LogUsers
from vista.model.ranking_model import NEXT_TASK, RankingModel
from vista.model.serving_model import PaddedTail, pad_tail
from vista.model.target_attention import TargetContext
from vista.model.vista_model import VistaModel
from vista.ranks import ALONE, Ranks
from vista.refresh.log_reading import item_values
from vista.store.item_values import ItemValues
from vista.training.run_plan import Progress

# Letters: N cases, V items of the model.

CASES_PER_BATCH = 512


class SummaryAnswers:
    """A model, and summaries of the leading events of some users."""

    def __init__(
        self,
        model: VistaModel,
        log: EventLog,
        item_rows: Int,
        users: Int,
        covered: Int,
        events_per_batch: int,
        growing: GrowingStates | None = None,
    ) -> None:
        """
        Args:
            item_rows: int64 [log.num_items], the model row of each of the log's items.
            users: int64 sorted rows of the log, those of all cases.
            covered: int64 [num_users] events that summaries cover.
            events_per_batch: most events that are summarized at once (a longer history is summarized alone); fewer of
                events with features.
            growing: states of earlier events of the same users; None summarizes all events.
        """
        self._model, self._log, self._item_rows = model, log, item_rows
        self._history_rows = model.history_rows(item_rows)
        self._users, self._covered = users, covered
        self._recode = model.event_recoder(log.event_features)
        most = rows_that_fit(events_per_batch, READ_EVENT_BYTES, len(log.event_features))
        groups = [users[part] for part in token_groups(covered[users], most)]
        self._summaries = torch.cat([self._summarized(group, growing) for group in groups])
        self._items = inference.item_vectors(model) if model.has_retrieval else None
        self._encode_requests = log_encoder(model.request_features, log.request_features)
        self._log_users = LogUsers(model.user_features, log)

    def _summarized(self, users: Int, growing: GrowingStates | None) -> torch.Tensor:
        model = self._model
        if not model.reads_attention:
            return torch.zeros(len(users), model.config.num_seeds, model.config.dim, device=model.device)
        histories = self._model_rows(self._log.gather(users, self._covered[users]))
        return inference.summarize(model, histories) if growing is None else growing.summarize(users, histories)

    def catalog_scores(self, cases: NextItemCases | WindowCases) -> Float32s:
        """Scores float32 [N, V] of all items for the users of some cases, at the times of the questions."""
        assert self._items is not None
        model, tail = self._model, self._tail(cases.user, cases.seen)
        gap = inference.request_gap(model, cases.now, tail)
        counters = pooled = None
        counted, histories, requests = self._requests(cases.user, cases.seen, cases.now)
        if counted is not None and requests is not None:
            counters = counted.at(requests)
        if histories is not None and requests is not None:
            pooled = torch.from_numpy(histories.at(requests, model.config.tail_len)).to(model.device)
        users = inference.user_vectors(model, self._context(cases.user, tail), gap, pooled)
        out = inference.catalog_scores(model, users, self._items, counters, tail.item, pooled)
        scores: Float32s = out.float().cpu().numpy()
        return scores

    def probabilities(self, cases: ImpressionCases) -> Float32s:
        """float32 [N, num_tasks]."""
        model, out = self._model, np.zeros(cases.label.shape, np.float32)
        for low in range(0, len(cases.user), CASES_PER_BATCH):
            part = slice(low, low + CASES_PER_BATCH)
            user, seen, time, item = cases.user[part], cases.seen[part], cases.timestamp[part], cases.item[part]
            tail, codes, inputs = self._tail(user, seen), None, None
            rows = self._item_rows[item]
            candidates = torch.from_numpy(rows[:, None]).to(model.device)
            counted, histories, requests = self._requests(user, seen, time)
            if counted is not None and requests is not None:
                codes = torch.from_numpy(counted.of_items(requests, rows)[:, None]).to(model.device)
            if histories is not None and requests is not None:
                cosines = torch.from_numpy(histories.of_items(requests, model.config.tail_len, rows)).to(model.device)
                inputs = model.candidate_inputs(cosines.unsqueeze(1), candidates)
            features = self._encode_requests(cases.features.select(part), len(user))
            asked = inference.request_vectors(model, time, tail, features)
            _, first, request = np.unique(user * (seen.max() + 1) + seen, return_index=True, return_inverse=True)
            context = self._context(user[first], self._tail(user[first], seen[first]))  # once per request
            of_cases = context.select(torch.from_numpy(request).to(model.device))
            logits = inference.candidate_logits(model, of_cases, asked, candidates, codes, inputs)
            out[part] = logits[:, 0].sigmoid().float().cpu().numpy()
        return out

    def _context(self, user: Int, tail: PaddedTail) -> TargetContext:
        own = torch.from_numpy(np.searchsorted(self._users, user)).to(self._model.device)
        # A store has no record of a user without covered events, so the scorer does not know the user's features.
        users = self._log_users.encoded(np.where(self._covered[user] > 0, user, -1))
        return inference.request_context(self._model, self._summaries[own], tail, users=users)

    def _tail(self, user: Int, seen: Int) -> PaddedTail:
        tail = self._model_rows(self._log.gather_ranges(user, seen - self._model.config.tail_len, seen))
        return pad_tail(
            self._model,
            tail.item,
            np.asarray(tail.timestamp),
            np.asarray(tail.action),
            tail.offsets,
            tail.features.columns,
        )

    def _requests(
        self, user: Int, seen: Int, now: Int | None
    ) -> tuple[HistoryCounters | None, PooledHistories | None, CounterRequests | None]:
        """Counters and pooled vectors of histories, each None for a model without; and requests on them, which know the
        events that summaries cover, and the tail. A model without both reads no whole histories, so all are None."""
        model, covered = self._model, self._covered[user]
        if model.item_keys is None and not model.stage1.pooled_dim:
            return None, None, None
        whole, requests = case_requests(
            self._log, self._history_rows, user, seen, now, covered=covered, tail_len=model.config.tail_len
        )
        counters = None if model.item_keys is None else HistoryCounters.of(model.item_keys, whole)
        pooled = None
        if model.stage1.pooled_dim:
            space, fold = model.item_space.cpu().numpy()[None], np.zeros(len(whole.user), np.int64)
            weight = None
            if model.item_space_weights is not None:
                weight = model.item_space_weights.cpu().numpy()[whole.item, whole.action]
            pooled = PooledHistories(space, fold, whole.item, whole.offsets, weight)
        return counters, pooled, requests

    def _model_rows(self, histories: Histories) -> Histories:
        features = self._recode(histories.features, histories.num_events)
        item = self._history_rows[histories.item].astype(np.int32)
        return dataclasses.replace(histories, item=item, features=features)


def reference_scores(
    model: VistaModel, log: EventLog, item_rows: Int, users: Int, covered: Int, now: Int, rows: Int
) -> dict[str, Float32s]:
    """Scores of some items for users at some times, for the reference of `vista monitor`.

    Args:
        item_rows: int64 [log.num_items], the model row of each of the log's items.
        users: int64 [U] rows of the log, each once.
        covered: int64 [U] events that summaries cover.
        now: int64 [U] ms.
        rows: int64 [C] rows of `model.items`.

    Returns:
        float32 [U, C] by task.
    """
    if not len(users):
        return {}
    all_covered = np.zeros(log.num_users, np.int64)
    all_covered[users] = covered
    answers = SummaryAnswers(model, log, item_rows, np.sort(users), all_covered, EVENTS_PER_BLOCK)
    scores = {}
    if model.has_retrieval:
        cases = NextItemCases(users, covered, np.zeros(len(users), np.int64), now)
        parts = [slice(low, low + USERS_SCORED) for low in range(0, len(users), USERS_SCORED)]
        scores[NEXT_TASK] = np.concatenate([answers.catalog_scores(cases.part(part))[:, rows] for part in parts])
    if tasks := model.schema.tasks:
        shape = len(users) * len(rows), len(tasks)
        pairs = ImpressionCases(
            user=np.repeat(users, len(rows)),
            seen=np.repeat(covered, len(rows)),
            item=np.tile(log.items.rows(model.items.ids(rows).tolist()), len(users)),
            timestamp=np.repeat(now, len(rows)),
            label=np.zeros(shape, np.float32),
            mask=np.zeros(shape, bool),
            probability=None,
            tasks=tasks,
            features=RowFeatures.missing(log.request_features, shape[0]),
        )
        probabilities = answers.probabilities(pairs)
        scores |= {task: probabilities[:, place].reshape(len(users), -1) for place, task in enumerate(tasks)}
    return scores


USERS_SCORED = 64
USERS_PER_BATCH = 512
logger = logging.getLogger(__name__)


class Validation:
    """Validation metrics of a model. The cases are chosen once. Several ranks each answer some of them."""

    def __init__(
        self,
        log: EventLog,
        item_rows: Int,
        config: TrainConfig,
        ranks: Ranks = ALONE,
        *,
        events_per_batch: int = EVENTS_PER_BLOCK,
    ) -> None:
        """
        Args:
            item_rows: int64 [log.num_items], the model row of each of the log's items.
            ranks: processes that measure together.
            events_per_batch: most events of histories that are read at once (a longer history is read alone).
        """
        self._log, self._item_rows, self._ranks, data = log, item_rows, ranks, config.data
        self._windows = EvaluateConfig(horizon_events=[data.horizon_events], horizon_days=data.horizon_days)
        ((self._length, _),) = window_lengths(self._windows).items()
        self._events_per_batch = events_per_batch
        self._exclude_seen = leaves_out_seen(log, config.data)
        optim, limit = config.optim, config.optim.validation_users
        self._cut, self._first, stop = part_counts(log, config.data, "validation")
        begin, end = part_times(config.data, "validation")
        self._impressions: ImpressionCases | None = None
        self._ranked: NextItemCases | WindowCases | None = None
        """What users are asked: the next item, or, in a run that trains windows only, the items of a window."""
        if (tasks := trained_tasks(log, optim)) and begin is not None:
            shown = with_tasks(impression_cases(log, begin, end, max_cases=limit * 4), tasks)
            self._impressions = shown if len(shown.user) else None
            self._looks = looks_at(log, shown, optim.examined_tasks, data)
            self._item_values: dict[int, ItemValues | None] = {}
            """By time of a refresh in ms, once a model was measured."""
        if config.ranks_items:
            if config.next_weight == 0:
                self._ranked = self._window_cases(stop, begin, limit)
            if self._ranked is None:
                cases = next_item_cases(log, self._cut, self._first, stop, max_users=limit)
                self._ranked = cases if len(cases.user) else None
        self.ranking_metric = ""
        """NDCG@10 of the ranked items, by its name in `vista evaluate`; empty if the log has no such cases."""
        if self._ranked is not None:
            is_window = isinstance(self._ranked, WindowCases)
            self.ranking_metric = window_metric("ndcg@10", self._length) if is_window else "ndcg@10"
        self.metric = self._deciding_metric()
        """The metric that decides which model is best: NE of the first task with labels of both kinds (smaller is
        better), else `ranking_metric`; empty if the log has no cases."""
        self.of_users: Floats = np.zeros(0)
        """float64 [U] `metric` of each user in the last call, whose mean is that of all; NaN for users without it."""
        num_tasks = 0 if self._impressions is None else len(self._impressions.tasks)
        self.calibration: Floats = np.tile([1.0, 0.0], (num_tasks, 1))
        """float64 [num_tasks, 2] slope and shift of logits that fitted the labels in the last call with `calibrates`
        (`RankingModel.calibrated`)."""
        self.ranked_users: Floats = np.zeros(0)
        """float64 [U'] `ranking_metric` of each user in the last call, likewise."""

    @classmethod
    def of(cls, log: EventLog, item_rows: Int, config: TrainConfig, ranks: Ranks) -> Validation | None:
        """That of a run; None without validations, or if the log has no case."""
        if config.optim.validate_every == 0:
            return None
        validation = cls(log, item_rows, config, ranks)
        if not validation.metric:
            logger.warning("%s has no case to validate on: the last model will be exported, not the best", log)
            return None
        return validation

    def _window_cases(self, stop: Int, now: int | None, max_users: int) -> WindowCases | None:
        """The cases of `vista evaluate target=window split=validation` for the trained length; None without any."""
        least = {"min_seen": self._windows.min_seen, "min_after": self._windows.min_after}
        length = window_lengths(self._windows)[self._length]
        cases = window_cases(
            self._log, self._cut, stop, first=self._first, now=now, max_users=max_users, **least, **length
        )
        if len(cases.item):
            logger.info("validation asks %d users for the items of their next %s", len(cases), self._length)
            return cases
        logger.warning(
            "validation asks for next items, although only windows are trained: no user has %d events before the "
            "validation labels, %d of these, and one in the next %s; train with data.split=time or data.split=share, "
            "which hold out more than one event",
            *least.values(),
            self._length,
        )
        return None

    def _deciding_metric(self) -> str:
        if (cases := self._impressions) is not None:
            for index, task in enumerate(cases.tasks):
                if len(np.unique(cases.label[cases.mask[:, index], index])) == 2:
                    return f"ne/{task}"
        return self.ranking_metric

    def better(self, value: float, best: float | None) -> bool:
        """Whether a value of `metric` is better than the best so far; None means that there is no best yet."""
        if best is None:
            return True
        return value > best if self.metric == self.ranking_metric else value < best

    def since_best(self, history: Sequence[Mapping[str, float]]) -> int:
        """Validations after the best one of a training, without epoch 0: attention may need some epochs to add to it.
        `history`: metrics, with "epoch"."""
        values = [row[self.metric] for row in history if row["epoch"]]
        place, best = 0, None
        for place_of_value, value in enumerate(values):
            if self.better(value, best):
                place, best = place_of_value, value
        return max(len(values) - 1 - place, 0)

    def baselines(self) -> tuple[dict[str, dict[str, float]], list[float]]:
        """Metrics of the counting baselines on the same ranked items, by name, and `ranking_metric` of each user by the
        best of them; empty if there are no such cases.

        They are logged.
        """
        if self._ranked is None:
            return {}, []
        began = time.perf_counter()
        is_window = isinstance(self._ranked, WindowCases)
        chosen = counting_baselines(
            has_time=self._log.has_time,
            horizon_events=self._windows.horizon_events[0] if is_window else 1,
            returns=is_window or not self._exclude_seen,
        )
        measured, of_users = dict[str, dict[str, float]](), dict[str, Floats]()
        for baseline in chosen:
            score = fitted_scores(baseline, self._log, self._cut, self._item_rows - 1)
            measured[baseline.name] = self._ranking_metrics(self._ranked, score)
            of_users[baseline.name] = self.ranked_users
        numbers = ", ".join(f"{name} {metrics[self.ranking_metric]:.4f}" for name, metrics in measured.items())
        seconds = time.perf_counter() - began
        logger.info("counting baselines (%.1f s), validation %s: %s", seconds, self.ranking_metric, numbers)
        return measured, of_users[_best_baseline(measured, self.ranking_metric)].tolist()

    def _ranking_metrics(
        self,
        cases: NextItemCases | WindowCases,
        score: Callable[[NextItemCases | WindowCases], NDArray[np.floating[Any]]],
    ) -> dict[str, float]:
        columns = self._item_rows - 1
        cases = cases.part(self._ranks.part_of(cases.seen + 1))
        batches = case_batches(cases, self._log.num_items, USERS_PER_BATCH, self._events_per_batch)
        if isinstance(cases, NextItemCases):
            ranks = rank_next_items(self._log, cases, columns, score, batches, exclude_seen=self._exclude_seen)
            ranks = self._ranks.of_all_cases({"rank": ranks})["rank"]
            self.of_users = self.ranked_users = ranking_values(ranks, [10])["ndcg@10"]
            return ranking_metrics(ranks, [10])
        measured = rank_windows(self._log, {self._length: cases}, columns, score, batches, [10])[self._length]
        report = WindowReport({self._length: self._ranks.of_all_cases(measured)})
        self.of_users = self.ranked_users = report.per_user()[self.ranking_metric]
        # NaN if no window has items of the kind.
        return {k: v for k, v in report.metrics().items() if k.startswith("ndcg@10") and not math.isnan(v)}

    def __call__(self, model: RankingModel, *, calibrates: bool = False) -> dict[str, float]:
        """All metrics of the validation split. `calibrates`: whether to set `calibration`, and measure what the model
        answers with it."""
        was_training = model.training
        model.eval()
        metrics: dict[str, float] = {}
        users, shown = [], None
        if self._ranked is not None:
            users.append(self._ranked.user[self._ranks.part_of(self._ranked.seen + 1)])
        if self._impressions is not None:
            shown = self._impressions.part(self._ranks.part_of(np.ones_like(self._impressions.user)))
            users.append(shown.user)
        growing = GrowingStates.of(model, self._log.num_users) if isinstance(model, VistaModel) else None
        answers = self._answers(model, np.unique(np.concatenate(users)), growing=growing)

        def score(cases: NextItemCases | WindowCases) -> Float32s:
            assert answers is not None  # a rank without cases does not score
            return self._finite(answers.catalog_scores(cases), cases.user)

        if self._ranked is not None:
            metrics |= self._ranking_metrics(self._ranked, score)
        if self._impressions is not None and shown is not None:
            predicted = np.zeros(shown.label.shape, np.float32)
            if answers is not None:
                predicted = self._finite(self._probabilities(model, shown, answers, growing), shown.user)
            predicted = self._ranks.of_all_cases({"predicted": predicted})["predicted"]
            if calibrates:
                predicted, self.calibration = calibrated(self._impressions, predicted, self._looks)
            predicted = predicted * self._looks  # probabilities of the labels as they were observed
            metrics |= impression_metrics(self._impressions, predicted)
            if self.metric != self.ranking_metric:
                self.of_users = entropy_of_users(self._impressions, predicted, self.metric.removeprefix("ne/"))
        model.train(was_training)
        return metrics

    def _probabilities(
        self,
        model: RankingModel,
        shown: ImpressionCases,
        first: RawHistoryAnswers | SummaryAnswers,
        growing: GrowingStates | None,
    ) -> Float32s:
        """float32 [N, num_tasks] of impressions, from the last refresh before each; `first` answers as of the first."""
        if isinstance(first, RawHistoryAnswers):
            return first.probabilities(shown)
        out = np.zeros(shown.label.shape, np.float32)
        refresh, times = last_refresh(model.data, "validation", shown.timestamp)
        for index in np.unique(refresh).tolist():
            own = np.flatnonzero(refresh == index)
            cases = shown.part(own)
            if index == 0:
                out[own] = first.probabilities(cases)
                continue
            time = int(times[index])
            covered = self._log.counts_before(time)
            answers = self._answers(self._refreshed(model, time, covered), np.unique(cases.user), covered, growing)
            assert answers is not None
            out[own] = answers.probabilities(cases)
        return out

    def _refreshed(self, model: RankingModel, time: int, covered: Int) -> RankingModel:
        """A model as it is served after a refresh at a time in ms, which also writes values of items."""
        if not isinstance(model, VistaModel) or not model.reads_item_values:
            return model
        if time not in self._item_values:
            self._item_values[time] = item_values(model, self._log, self._item_rows, covered, Until(before=time))
        values = self._item_values[time]
        return model if values is None else model.with_item_values(values.statistics, values.rates, values.tasks)

    def _answers(
        self, model: RankingModel, users: Int, covered: Int | None = None, growing: GrowingStates | None = None
    ) -> RawHistoryAnswers | SummaryAnswers | None:
        """None without users. `covered`: int64 [num_users] events that summaries cover; None for those before the
        validation labels."""
        if not len(users):
            return None
        if isinstance(model, HistoryModel):
            return RawHistoryAnswers(model, self._log, self._item_rows)
        assert isinstance(model, VistaModel)
        covered = self._cut if covered is None else covered
        return SummaryAnswers(model, self._log, self._item_rows, users, covered, self._events_per_batch, growing)

    def _finite(self, scores: Float32s, users: Int) -> Float32s:
        bad = users[~np.isfinite(scores).all(axis=1)]
        if len(bad):
            named = self._log.users.ids(np.unique(bad)[:20]).tolist()
            raise NonFiniteLossError(
                f"validation: the scores of users {named} are not finite; lower optim.learning_rate, or look at the "
                "features of these users"
            )
        return scores


WITHOUT_COUNTERS = (
    "train longer (optim.epochs or optim.minutes), or take more and smaller steps (data.tokens_per_batch), or "
    "set model.counter_keys=[item]"
)
WITH_COUNTERS = "train longer (optim.epochs or optim.minutes), or count more (model.counter_keys)"
"""What to change (docs/guides/train.md)."""


def compare_with_baselines(progress: Progress, validation: Validation, *, counts: bool) -> None:
    """Log whether the best model of a run ranks items better than the best counting baseline; warn if it is behind.

    Args:
        validation: its `metric` chose that model, and its `ranking_metric` compares both.
        counts: whether the model has counters.
    """
    metric = validation.ranking_metric
    best = [validated for validated in progress.history if validated[validation.metric] == progress.best]
    if not best or not progress.baselines:
        return
    name = _best_baseline(progress.baselines, metric)
    lead = Estimate(*progress.lead)
    reached = f"validation {metric} {best[0][metric]:.4f}"
    found = f"{reached}, {lead.text(signed=True)} compared with the best counting baseline, {name}"
    if lead.standing == "behind":
        logger.warning("%s: behind; %s", found, WITH_COUNTERS if counts else WITHOUT_COUNTERS)
    else:
        logger.info("%s: %s", found, "level, within two standard errors" if lead.standing == "level" else lead.standing)


def _best_baseline(measured: dict[str, dict[str, float]], metric: str) -> str:
    """The counting baseline with the highest metric."""
    return max(measured, key=lambda name: measured[name][metric])
