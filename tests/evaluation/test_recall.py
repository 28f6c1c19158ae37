"""The metric "recall": windows lie in their bands, negatives are new to the user, and the decoder judges events."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import Served
from tests.evaluation.conftest import evaluated
from vista.config import EvaluateConfig
from vista.errors import ConfigError
from vista.evaluation import recall
from vista.evaluation.evaluate import _check
from vista.evaluation.recall import AGES, WINDOW, RecallReport, bands, measure_recall, recall_of_user
from vista.log.histories import Histories
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.scorer import Scorer
from vista.store.writer import erase


@given(
    lengths=st.lists(st.integers(0, 10_000), min_size=1, max_size=20),
    band=st.integers(0, len(AGES) - 1),
    seed=st.integers(0, 1000),
)
def test_windows_lie_in_their_band(lengths: list[int], band: int, seed: int) -> None:
    end = AGES[band + 1] if band + 1 < len(AGES) else None
    windows = recall._random_windows(np.array(lengths), AGES[band], end, np.random.default_rng(seed))
    assert windows[0].tolist() == [row for row, length in enumerate(lengths) if length > AGES[band]]
    for row, start, stop in zip(*windows, strict=True):
        assert 0 <= start < stop <= lengths[row] - AGES[band] and stop - start <= WINDOW
        assert end is None or lengths[row] - start <= end


def test_shares_equal_a_loop_over_the_decoders_distances(served: Served) -> None:
    """Event by event: the prediction, its distances to the event and to the negatives, and the share beaten."""
    log, model = served.log, served.model
    users = np.arange(6)
    histories = log.gather(users, log.lengths[users])
    items = recall.RecallItems(model, log)
    windows = recall._random_windows(histories.lengths, 0, 32, np.random.default_rng(3))
    with Scorer.open(model, served.exact_store) as scorer:
        summary = torch.from_numpy(scorer.store.get_many(log.users.ids(users)).summary)
    shares = recall._share_beaten(model, items, histories, windows, [summary], np.random.default_rng(4))[0]

    rng, expected = np.random.default_rng(4), []
    lengths = windows[2] - windows[1]
    all_rows = np.concatenate([items.rows[histories.slice(r, a, b).item] for r, a, b in zip(*windows, strict=True)])
    negatives = items.alike(all_rows, rng)
    place = 0
    for row, start, length in zip(windows[0], windows[1], lengths, strict=True):
        history = histories.slice(int(row))
        rows = items.rows[history.item]
        gap = (
            recall.history_gaps(np.asarray(history.timestamp), np.array([0, len(rows)]))
            if model.encoder.gap is not None
            else rows * 0
        )

        with torch.no_grad():
            events = torch.stack([_embed(model, history, gap, int(rows[t]), t) for t in range(start, start + length)])
            offsets, age = torch.tensor([0, length]), torch.tensor([len(rows) - start])
            predicted = model.decoder(summary[row : row + 1], events, offsets, age)
            for step in range(length):
                new_items = [int(i) for i in negatives[place] if i not in set(rows.tolist())]
                at = (model, predicted[step], history, gap, int(start) + step)
                own = _distance(*at, int(rows[start + step]))
                theirs = [_distance(*at, item) for item in new_items]
                if new_items:
                    expected.append(np.mean([(own < each) + 0.5 * (own == each) for each in theirs]))
                place += 1
    np.testing.assert_allclose(shares, expected, atol=0.02)


def _distance(
    model: VistaModel, predicted: torch.Tensor, history: Histories, gap: np.ndarray, t: int, item: int
) -> float:
    """From a prediction to event t with an item."""
    return float((predicted - _embed(model, history, gap, item, t)).square().sum())


def _embed(model: VistaModel, history: Histories, gap: np.ndarray, item: int, t: int) -> torch.Tensor:
    """The embedding of event t with another item."""
    rating = None if history.rating is None else torch.tensor(history.rating[t])
    action = torch.tensor(int(history.action[t]))
    return model.encoder(model.item_vectors(torch.tensor(item)), action, torch.tensor(int(gap[t])), rating)


def test_negatives_are_about_as_popular(served: Served) -> None:
    items = recall.RecallItems(served.model, served.log)
    asked = np.repeat(items.by_popularity, 3)
    drawn = items.alike(asked, np.random.default_rng(0), num_neighbors=2)
    step = np.abs(items.rank[drawn] - items.rank[asked][:, None])
    assert step.min() == 1 and step.max() == 2


def test_items_that_histories_show_as_unknown_are_not_judged(served: Served) -> None:
    log, model = served.log, copy.deepcopy(served.model)
    is_known = model.rows_of(log.items) <= 20
    model.num_trained_items = 20
    items = recall.RecallItems(model, log)
    assert 0 < is_known.sum() < len(is_known)
    np.testing.assert_array_equal(items.rows > 0, is_known)
    assert np.sort(items.by_popularity).tolist() == list(range(1, 21))
    histories = log.gather(np.arange(log.num_users))
    windows = recall._random_windows(histories.lengths, 0, 32, np.random.default_rng(3))
    with Scorer.open(served.model, served.exact_store) as scorer:
        summary = torch.from_numpy(scorer.store.get_many(log.users.ids(np.arange(log.num_users))).summary)
    shares = recall._share_beaten(model, items, histories, windows, [summary], np.random.default_rng(4))
    index = recall.ranges(histories.offsets[:-1][windows[0]] + windows[1], windows[2] - windows[1])
    asked = is_known[histories.item[index]]
    assert 0 < shares.shape[1] <= asked.sum() < len(asked)


def test_equal_summaries_recall_nothing(served: Served) -> None:
    """If all records hold one summary, own and other are the same."""
    with Scorer.open(served.model, served.exact_store) as scorer:
        report = measure_recall(scorer, served.log, seed=1)
        again = measure_recall(scorer, served.log, seed=1)
        assert report.num_events[0] > 0 and np.array_equal(report.own, again.own, equal_nan=True)
        stored = scorer.store.get_many

        def alike(ids: object) -> object:
            batch = stored(ids)  # type: ignore[arg-type]
            return replace(batch, summary=np.broadcast_to(batch.summary[:1], batch.summary.shape).copy())

        scorer.store.get_many = alike  # type: ignore[assignment,method-assign]
        flat = measure_recall(scorer, served.log, seed=1)
        assert np.array_equal(flat.own, flat.other, equal_nan=True)


class Recalling(torch.nn.Module):
    """A decoder that predicts a window's events exactly from the summary of their user, and else predicts zeros."""

    def __init__(self, summaries: torch.Tensor, owners: list[set[bytes]]) -> None:
        super().__init__()
        self.summaries, self.owners = summaries, owners

    def forward(
        self, summary: torch.Tensor, events: torch.Tensor, offsets: torch.Tensor, age: torch.Tensor
    ) -> torch.Tensor:
        out = torch.zeros_like(events)
        for window, (start, stop) in enumerate(pairwise(offsets.tolist())):
            (user,) = (self.summaries == summary[window]).flatten(1).all(1).nonzero()[:1].flatten().tolist()
            known = [event.numpy().tobytes() in self.owners[user] for event in events[start:stop]]
            out[start:stop][known] = events[start:stop][known]
        return out


def test_own_and_other_are_not_swapped(served: Served) -> None:
    log, model = served.log, copy.deepcopy(served.model)
    users = np.arange(log.num_users)
    with Scorer.open(model, served.exact_store) as scorer:
        summaries = torch.from_numpy(scorer.store.get_many(log.users.ids(users)).summary)
        owners = []
        for user in users.tolist():
            history = log.slice(user)
            rows = torch.from_numpy(model.item_rows(log.items.ids(history.item)))
            gap = torch.from_numpy(recall.history_gaps(np.asarray(history.timestamp), np.array([0, len(rows)])))
            rating = None if history.rating is None else torch.from_numpy(np.array(history.rating))
            action = torch.from_numpy(history.action.astype(np.int64))
            with torch.no_grad():
                events = model.encoder(model.item_vectors(rows), action, gap, rating)
            owners.append({event.numpy().tobytes() for event in events})
        model.decoder = Recalling(summaries, owners)  # type: ignore[assignment]
        report = measure_recall(scorer, log)
        longest = int(log.lengths.argmax())
        of_user = recall_of_user(scorer, log, recall.RecallItems(model, log), longest)
    assert report.own[0] == 1.0 and report.other[0] < 0.9
    assert of_user is not None and of_user.own[0] == of_user.own[1] == 1.0 and of_user.other[0] < 0.9
    assert np.isnan(of_user.own[2:]).all() and of_user.num_events[0] > recall.WINDOW


def test_a_user_without_a_record_has_no_recall(served: Served, tmp_path: Path) -> None:
    shutil.copytree(served.exact_store, tmp_path / "store")
    erase(tmp_path / "store", served.log.users.ids([0]).tolist())
    items = recall.RecallItems(served.model, served.log)
    with Scorer.open(served.model, tmp_path / "store") as scorer:
        assert recall_of_user(scorer, served.log, items, 0) is None
        assert recall_of_user(scorer, served.log, items, 4) is not None


def test_events_that_only_the_tail_holds_are_not_asked_for(served: Served, tmp_path: Path) -> None:
    config = replace(served.model.config, tail_in_summary=False)
    model = VistaModel(config, served.model.schema, served.model.items, served.model.data).eval()
    model.load_state_dict(served.model.state_dict())
    refresh(model, served.log, tmp_path / "store")
    with Scorer.open(model, tmp_path / "store") as scorer:
        asked = measure_recall(scorer, served.log).num_events
    covered = np.clip(served.log.lengths - config.tail_len, 0, 32).sum()  # those of the first band
    assert 0.9 * covered < asked[0] <= covered


def test_report_and_refusal(served: Served) -> None:
    evaluation = evaluated(served.model, served.test_store, served.log, recall=True)
    assert isinstance(evaluation.recall, RecallReport)
    assert set(evaluation.recall.metrics()) == {f"recall/{band}" for band in bands()} <= set(evaluation.metrics)
    assert "age in events" in str(evaluation)


def test_a_model_without_summaries_is_refused(served: Served) -> None:
    config = replace(served.model.config, num_seeds=0)
    model = VistaModel(config, served.model.schema, served.model.items, served.model.data)
    with pytest.raises(ConfigError, match="no summaries"):
        _check(model, served.log, EvaluateConfig(recall=True))
