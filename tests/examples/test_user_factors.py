"""Item vectors from a factorization of which users had which items: values, users left out, what they may read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.conftest import small_config
from tests.examples.grouped_logs import grouped_log, visible
from vista.config.choices import ItemStart
from vista.errors import CheckpointError
from vista.examples import user_factors
from vista.examples.item_factors import START_RMS
from vista.examples.user_factors import MIN_USERS, UserFactors
from vista.log.event_log import EventLog
from vista.training.item_start import FrozenItems
from vista.training.metrics_writer import MetricsWriter
from vista.training.trainer import Trainer, train

NUM_ITEMS, NUM_USERS = 24, 12
ROWS = np.arange(NUM_ITEMS) + 1


def log_of(folder: Path, *, future: int = 0) -> EventLog:
    lengths = [6 + 2 * user for user in range(NUM_USERS)]
    return grouped_log(folder, lengths, num_items=NUM_ITEMS, group_size=16, offset=8, future=future)


def matrix_of(log: EventLog) -> NDArray[np.float64]:
    """W by a loop, [users, NUM_ITEMS]; items that too few users had are 0."""
    had = np.zeros((log.num_users, NUM_ITEMS))
    for user, count in enumerate(visible(log).tolist()):
        had[user, np.asarray(log.slice(user, 0, count).item)] = 1
    length, num_users = had.sum(1, keepdims=True), had.sum(0)
    weighted = had / np.sqrt(np.maximum(length, 1)) / np.maximum(num_users, 1) ** 0.25
    return np.where(num_users >= MIN_USERS, weighted, 0.0)


def cosines(vectors: NDArray[np.floating]) -> NDArray[np.float64]:
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)
    return (unit @ unit.T).astype(np.float64)


@pytest.mark.parametrize("dim", [4, 8])
def test_vectors_are_those_of_a_dense_svd(tmp_path: Path, dim: int) -> None:
    log = log_of(tmp_path / "log")
    factors = UserFactors(log, ROWS, visible(log), dim, seed=1)
    weighted = matrix_of(log)
    known = np.flatnonzero(weighted.any(0))
    assert np.flatnonzero(factors.has_vector).tolist() == ROWS[known].tolist() and len(known) < NUM_ITEMS
    vectors = factors.vectors(ROWS[known])
    assert vectors.dtype == np.float32
    _, _, right = np.linalg.svd(weighted, full_matrices=False)
    np.testing.assert_allclose(cosines(vectors), cosines(right[:dim].T[known]), atol=1e-3)
    np.testing.assert_allclose(np.sqrt(np.mean(vectors**2, axis=1)), START_RMS, rtol=1e-4)
    assert not factors.vectors(np.array([0])).any()  # the unknown item


def test_a_vector_without_users_is_the_sum_over_the_others(tmp_path: Path) -> None:
    log = log_of(tmp_path / "log")
    factors = UserFactors(log, ROWS, visible(log), 4, seed=1)
    weighted, rows = matrix_of(log), np.flatnonzero(factors.has_vector)
    left, scale, _ = np.linalg.svd(weighted, full_matrices=False)
    of_users = left[:, :4] / scale[:4]
    for without in ([0], [1, 5, 6], list(range(8))):
        others = weighted.copy()
        others[without] = 0
        expected = (others.T @ of_users)[rows - 1]
        vectors = factors.vectors(rows, np.array(without))
        np.testing.assert_allclose(cosines(vectors), cosines(expected), atol=5e-3)
        some = rows[::3]
        np.testing.assert_allclose(factors.vectors(some, np.array(without)), vectors[::3], rtol=1e-5, atol=1e-7)
    assert not factors.vectors(rows, np.arange(log.num_users)).any()
    assert factors.vectors(rows[:0], np.array([0])).shape == (0, 4)


def test_no_vector_depends_on_hidden_events(tmp_path: Path) -> None:
    first, second = (log_of(tmp_path / str(future), future=future) for future in (0, 7))
    made = [UserFactors(log, ROWS, visible(log), 8, seed=1).vectors(ROWS) for log in (first, second)]
    assert np.array_equal(*made)
    assert not np.array_equal(UserFactors(first, ROWS, first.lengths, 8, seed=1).vectors(ROWS), made[0])


def test_leaving_a_user_out_removes_most_of_what_vectors_know_of_pure_noise(tmp_path: Path) -> None:
    """Users draw items by popularity, so their items should be no more alike than others of the same popularity."""
    num_users, num_items, length = 300, 800, 40
    rng = np.random.default_rng(1)
    share = rng.gamma(0.7, size=num_items)
    share /= share.sum()
    items = np.stack([rng.choice(num_items, length, replace=False, p=share) for _ in range(num_users)])
    frame = {"user": np.repeat(np.arange(num_users), length), "item": items.ravel()}
    log = EventLog.from_frame(frame | {"timestamp": np.arange(items.size)}, tmp_path / "log", time_unit="s")
    factors = UserFactors(log, np.arange(log.num_items) + 1, log.lengths, 64, seed=1)
    rows = np.flatnonzero(factors.has_vector)
    popularity = np.bincount(log.items.rows(items.ravel()) + 1, minlength=log.num_items + 1)[rows]

    def excess(user: int, vectors: NDArray[np.float32]) -> float:
        unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)
        own = np.isin(rows, log.items.rows(items[user]) + 1)
        history, labels = np.array_split(rng.permutation(np.flatnonzero(own)), 2)
        mean = unit[history].mean(0)
        cosine = unit @ mean / np.linalg.norm(mean)
        differences = []
        for label in labels:
            others = ~own & (np.abs(popularity - popularity[label]) <= 1)
            if others.any():
                differences.append(cosine[label] - cosine[others].mean())
        return float(np.mean(differences))

    asked, everyone = rng.choice(num_users, 60, replace=False).tolist(), factors.vectors(rows)
    with_user = np.mean([excess(user, everyone) for user in asked])
    without = np.mean([excess(user, factors.vectors(rows, log.users.rows([user]))) for user in asked])
    assert with_user > 0.1 and abs(without) < with_user / 3


def test_large_logs_read_some_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    log = log_of(tmp_path / "log")
    whole = UserFactors(log, ROWS, visible(log), 4, seed=1)
    monkeypatch.setattr(user_factors, "MOST_EVENTS", 100)
    drawn = {UserFactors(log, ROWS, visible(log), 4, seed=seed).vectors(ROWS).tobytes() for seed in range(4)}
    assert len(drawn) > 1 and whole.vectors(ROWS).tobytes() not in drawn
    assert caplog.text.count("random users of 12") == 4


def test_a_log_without_visible_events_has_no_vectors(tmp_path: Path) -> None:
    log = log_of(tmp_path / "log")
    factors = UserFactors(log, ROWS, np.zeros(log.num_users, np.int64), 4, seed=1)
    assert not factors.has_vector.any() and not factors.vectors(ROWS).any()


def test_a_frozen_table_is_trained_on_vectors_without_the_users_of_the_batch(tmp_path: Path) -> None:
    log = log_of(tmp_path / "log")
    config = small_config(
        log, tmp_path / "run", model__item_start=ItemStart.user_factors, optim__table_rate=0.0, optim__epochs=1
    )
    trainer = Trainer(config, log)
    model = train(config, log)
    counts = trainer.source.counts
    factors = UserFactors(log, ROWS, counts, 16, seed=config.seed)
    rows = np.flatnonzero(factors.has_vector)
    table = model.item_table.detach()
    np.testing.assert_array_equal(table[rows].numpy(), factors.vectors(rows))  # not trained, and of all users
    batch = trainer.source.batch(0, 0)
    with torch.no_grad():
        trainer.model.item_table.copy_(table)
    frozen = FrozenItems.of(trainer.model, log, counts, trainer.config)
    assert frozen is not None and frozen.change() == 0
    vectors = frozen.vectors(batch).numpy()
    known = factors.has_vector[batch.rows.numpy()]
    users = np.unique(batch.user.numpy())
    np.testing.assert_array_equal(vectors[known], factors.vectors(batch.rows.numpy()[known], users))
    np.testing.assert_array_equal(vectors[~known], table[batch.rows[torch.from_numpy(~known)]].numpy())
    assert not np.array_equal(vectors, table[batch.rows].numpy())


def test_a_run_resumes_only_with_the_factors_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = log_of(tmp_path / "log")
    config = small_config(
        log, tmp_path / "run", model__item_start=ItemStart.user_factors, optim__table_rate=0.0, optim__epochs=1
    )
    whole = UserFactors.vectors
    flip = np.where(np.arange(16) == 3, -1, 1).astype(np.float32)
    (tmp_path / "run").mkdir()
    metrics = MetricsWriter(tmp_path / "run")
    begun = Trainer(config, log)
    begun._start(metrics)
    begun._save()
    Trainer(config, log)._start(metrics)
    with monkeypatch.context() as patched:
        patched.setattr(UserFactors, "vectors", lambda *given: whole(*given) * flip)
        with pytest.raises(CheckpointError, match=r"its item vectors are factors that come out \d+% different here"):
            train(config, log)
    finished = train(config, log)
    monkeypatch.setattr(UserFactors, "vectors", lambda *given: whole(*given) * flip)
    assert torch.equal(train(config, log).item_table, finished.item_table), "a finished run needs no factors"
