"""RecTools as the baseline: both sides get the same events and are asked the same questions."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scripts.benchmarks.rectools_process import call_rectools, words_of
from scripts.experiments import crosscheck_rectools as crosscheck
from scripts.experiments import minutes_rectools
from scripts.experiments.crosscheck_rectools import LikeRecTools, cases_of
from scripts.experiments.results import read_results
from tests.conftest import LENGTHS, ratings_folder, small_frame
from vista.config import DataConfig, OptimConfig, SasrecConfig, SourceColumns, TrainConfig
from vista.errors import DataError
from vista.evaluation.cases import NextItemCases
from vista.evaluation.metrics import ranks_of_targets
from vista.examples.batch_source import BatchSource, ModelReads
from vista.log.event_log import EventLog
from vista.log.histories import Histories
from vista.log.splits import visible_counts
from vista.model.baselines.history_model import tiles
from vista.model.baselines.sequence_models import EmbeddedSequences, SASRec
from vista.model.features import Schema
from vista.training.validation import Validation

pytestmark = pytest.mark.research


LENGTH = 20
"""Inputs per user in these tests; three users of LENGTHS have more training events."""


def make_log(folder: Path, *, times: bool) -> EventLog:
    """Users with LENGTHS events and without repeated items."""
    frame = small_frame()
    frame["item"] = np.concatenate([np.random.default_rng(n).permutation(40)[:n] for n in LENGTHS])
    if times:
        return EventLog.from_frame(frame, folder, time_unit="ms")
    return EventLog.from_frame(frame, folder, columns=SourceColumns(timestamp=None))


@pytest.fixture(params=[True, False], ids=["times", "order"])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> EventLog:
    return make_log(tmp_path / "log", times=request.param)


def test_both_sides_get_the_newest_events(log: EventLog, tmp_path: Path) -> None:
    cut = crosscheck.cut_log(log, tmp_path / "cut", length=LENGTH)
    assert cut.has_time == log.has_time and not cut.has_rating
    assert cut.lengths.max() == LENGTH + 3 and visible_counts(cut, "leave-last-two-out").max() == LENGTH + 1
    for user in range(log.num_users):
        old = log.slice(user, max(int(log.lengths[user]) - LENGTH - 3, 0))
        new = cut[log.users.ids([user])[0]]
        assert cut.items.ids(new.item).tolist() == log.items.ids(old.item).tolist()
        if log.has_time:
            assert np.array_equal(new.timestamp, old.timestamp)


@pytest.mark.parametrize("times", [True, False])
def test_the_baseline_gets_the_split_of_the_log(log: EventLog, tmp_path: Path, times: bool) -> None:
    cases = crosscheck.write_split(log, tmp_path / "baseline.npz", times=times and log.has_time)
    assert cases["test"].user.tolist() == [user for user, n in enumerate(LENGTHS) if n >= 3]
    with np.load(tmp_path / "baseline.npz", allow_pickle=False) as arrays:
        split = dict(arrays)
    for user, length in enumerate(LENGTHS):
        parts = [""] if length < 3 else ["", "validation_", "test_"]
        mine = {part: split[f"{part}user"] == user for part in ("", "validation_", "test_")}
        assert [int(mine[part].sum()) for part in parts] == ([length] if length < 3 else [length - 2, 1, 1])
        item = np.concatenate([split[f"{part}item"][mine[part]] for part in parts])
        assert item.tolist() == log.slice(user).item.tolist()
        clock = np.concatenate([split[f"{part}timestamp"][mine[part]] for part in parts])
        assert (np.diff(clock) > 0).all() and clock.dtype == np.int64
        if times and log.has_time:
            assert clock.tolist() == (np.asarray(log.slice(user).timestamp) // 1000).tolist()
    for part, each in cases.items():
        assert each.item.tolist() == split[f"{part}_item"].tolist()


def test_a_repeated_item_is_refused(tmp_path: Path) -> None:
    log = EventLog.from_frame(
        {"user": [1, 1, 1, 2], "item": [5, 6, 5, 5]}, tmp_path / "log", columns=SourceColumns(timestamp=None)
    )
    with pytest.raises(DataError, match="1 events repeat an item of their user"):
        crosscheck.write_split(log, tmp_path / "baseline.npz", times=False)


def test_ranks_in_lists_are_ranks_of_scores() -> None:
    rng = np.random.default_rng(0)
    scores, label = rng.permuted(np.tile(np.arange(30.0), (50, 1)), axis=1), rng.integers(0, 30, 50)
    lists = np.argsort(-scores, axis=1)[:, :12]
    lists[:5, 3:] = -1  # shorter lists
    expected = ranks_of_targets(scores, label)
    expected[(expected >= 12) | ((np.arange(50) < 5) & (expected >= 3))] = 12
    assert crosscheck.label_ranks(lists, label).tolist() == expected.tolist()
    assert (expected < 12).any() and (expected[:5] == 12).any()


@pytest.fixture
def environment() -> Path:
    """RecTools' virtual environment; the test is skipped without it."""
    folder = os.environ.get("VISTA_RECTOOLS_VENV")
    if not folder:
        pytest.skip("VISTA_RECTOOLS_VENV names no virtual environment with RecTools")
    return Path(folder)


@pytest.mark.parametrize(("model", "times"), [("SASRec", False), ("HSTU", False), ("HSTU", True)])
def test_lists_of_the_real_baseline(environment: Path, tmp_path: Path, model: str, times: bool) -> None:
    log = make_log(tmp_path / "log", times=times)
    cases = crosscheck.write_split(log, tmp_path / "baseline.npz", times=times)
    words = words_of({"model": model, "session_max_len": 20, "n_factors": 16, "recommend": tmp_path / "lists.npz"})
    words += ["--relative-time"] if times else ["--mask-padding"]
    report = call_rectools(environment / "bin" / "python", tmp_path / "baseline.npz", [*words, "--top-k", "40"])
    with np.load(tmp_path / "lists.npz", allow_pickle=False) as arrays:
        for part, each in cases.items():
            lists, ranks = arrays[part], crosscheck.label_ranks(arrays[part], each.item)
            assert lists.shape == (len(each.user), 40)
            for row, user in enumerate(each.user):
                seen = log.slice(int(user), 0, int(each.seen[row])).item
                listed = lists[row][lists[row] >= 0]
                assert len(set(listed.tolist())) == len(listed) and not np.isin(listed, seen).any()
            assert report["metrics"][part]["hr@10"] == pytest.approx((ranks < 10).mean())


def test_the_whole_cross_check(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ratings_folder(tmp_path / "ml-1m")
    words = ["HSTU", "--data", str(data), "--seeds", "1", "2", "--epochs", "1", "--rectools-venv", str(environment)]
    words += ["--results", str(tmp_path / "results"), "--times"]
    assert crosscheck.main(words) == 1
    assert "repeat an item of their user" in capsys.readouterr().err
    rng = np.random.default_rng(0)
    rows = [(user, item, 60 * n) for user in range(1, 31) for n, item in enumerate(rng.permutation(80)[:30])]
    (data / "ratings.dat").write_text("".join(f"{user}::{item}::3::{978_300_000 + at}\n" for user, item, at in rows))
    assert crosscheck.main(words) == 0
    printed = capsys.readouterr().out
    assert printed.count("ranges ") == 4
    lines = read_results(tmp_path / "results" / "crosscheck-ml-1m.jsonl")
    assert [(line["model"], line["seed"]) for line in lines] == [
        (model, seed) for seed in (1, 2) for model in ("hstu, times", "hstu, times, RecTools")
    ]
    assert lines[1]["command"].startswith(
        "python -m scripts.experiments.crosscheck_rectools HSTU --data ml-1m --seeds 1 --times"
    )
    assert str(tmp_path) not in str(lines) and str(environment) not in str(lines)
    assert "| hstu, times, RecTools | 2 |" in (tmp_path / "results" / "crosscheck-ml-1m.md").read_text()


@pytest.mark.parametrize("training", [True, False])
def test_ours_like_rectools_equals_sasrec_with_reversed_positions(tmp_path: Path, training: bool) -> None:
    """Without dropout. In training the newest event is only a label, so it has no position."""
    log = make_log(tmp_path / "log", times=False)
    config = SasrecConfig(dim=16, num_heads=2, history_limit=LENGTH, dropout=0.0)
    parts = (config, Schema(list(log.actions), False, None, []), log.items, DataConfig())
    like, plain = LikeRecTools(*parts).train(training), SASRec(*parts).train(training)
    plain.load_state_dict(like.state_dict())
    histories = log.gather(np.arange(log.num_users), np.minimum(log.lengths, LENGTH))
    events = embedded(like, histories)
    for tile in tiles(events.offsets, torch.device("cpu")):
        states, _ = like._encode(events, tile)
        for row, length in enumerate(tile.valid.sum(1).tolist()):
            inputs = length - int(training)
            if inputs < 1:
                continue
            own = dataclasses.replace(
                tile, index=tile.index[row : row + 1, :inputs], valid=tile.valid[row : row + 1, :inputs]
            )
            with torch.no_grad():
                plain.position[:inputs] = like.position[:inputs].flip(0)
            expected, _ = plain._encode(events, own)
            torch.testing.assert_close(states[row, : inputs + 1], expected[0], rtol=1e-5, atol=1e-6)


def test_ours_like_rectools_is_initialized_and_trained_like_rectools(tmp_path: Path) -> None:
    """All events but each user's first are labels, predicted from the events before; biases of attention start at 0."""
    log = make_log(tmp_path / "log", times=False)
    options = crosscheck.parse(["SASRec", "--data", "tiny", "--batch-users", "4", "--dropout", "0"])
    config = crosscheck.our_config(options, log, 1, tmp_path / "run")
    model = LikeRecTools(config.model, Schema(list(log.actions), False, None, []), log.items, config.data)
    for block in model.blocks:
        assert not any(linear.bias.any() for linear in (block.query, block.key_value, block.out))
        assert block.up.bias.any()
    batch = BatchSource(log, ModelReads(model.rows_of(log.items)), config).batch(0, 0)
    vectors = model.item_vectors(batch.rows)
    loss = model.losses(batch, vectors, config.optim).total
    assert len(batch.negatives.item) == log.num_items, "the whole catalog"
    logits = torch.nn.functional.normalize(vectors, dim=-1)[batch.negatives.item].t() / config.model.temperature
    losses = []
    for start, stop in itertools.pairwise(batch.events.offsets.tolist()):
        x = vectors[batch.events.item[start : stop - 1]][None] * config.model.dim**0.5
        x = x + model.position[: stop - start - 1].flip(0)
        states, _ = model.states(x, batch.events.clock[None, start : stop - 1])
        users = torch.nn.functional.normalize(states[0], dim=-1)
        columns = torch.searchsorted(batch.negatives.item, batch.events.item[start + 1 : stop])
        losses.append(torch.nn.functional.cross_entropy(users @ logits, columns, reduction="none"))
    torch.testing.assert_close(loss, torch.cat(losses).mean(), rtol=1e-5, atol=1e-6)


def embedded(model: LikeRecTools, histories: Histories) -> EmbeddedSequences:
    """Embed histories as for a request, with items as rows of the model."""
    return model.embed(dataclasses.replace(histories, item=(histories.item + 1).astype(np.int32)))


TABLE = "newcomer-ml-latest-small"


NUM_USERS = 30


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Arguments for a small data set without repeated items."""
    data, rng = tmp_path / "ml-latest-small", np.random.default_rng(0)
    data.mkdir()
    rows = [(user, item, 60 * n) for user in range(1, NUM_USERS + 1) for n, item in enumerate(rng.permutation(80)[:30])]
    (data / "ratings.dat").write_text("".join(f"{user}::{item}::3::{978_300_000 + at}\n" for user, item, at in rows))
    return [
        *(TABLE, "--data", str(data), "--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")),
        *("--threads", "1", "--rectools-venv", str(tmp_path / "no-environment")),
    ]


@pytest.mark.parametrize("max_users", [0, 2, 100])
def test_validation_asks_the_users_that_training_asks(tmp_path: Path, max_users: int) -> None:
    log = make_log(tmp_path / "log", times=True)
    config = TrainConfig(data=DataConfig(exclude_seen=True), optim=OptimConfig(validation_users=max_users))
    expected = Validation(log, np.arange(log.num_items) + 1, config)._ranked
    cases = cases_of(log)["validation"]
    rows = minutes_rectools.asked_rows(log, cases, max_users)
    assert isinstance(expected, NextItemCases) and len(rows) == (max_users if max_users == 2 else len(cases))
    assert cases.user[rows].tolist() == expected.user.tolist()
    assert cases.item[rows].tolist() == expected.item.tolist()


def test_the_curve_is_computed_from_the_lists() -> None:
    labels = np.array([7, 8])
    lists = np.full((2, 2, 10), -1)
    lists[:, 0, :2] = [[1, 2], [1, 7]]
    lists[:, 1, 0] = 8
    expected = [0.5, (1 / np.log2(3) + 1) / 2]
    report = {"seconds": [3.5, 7.0], "ndcg@10": expected}
    curve = minutes_rectools.validation_curve(report, lists, labels)
    assert [seconds for seconds, _ in curve] == [3.5, 7.0]
    assert [value for _, value in curve] == pytest.approx(expected)
    with pytest.raises(DataError, match="differs"):
        minutes_rectools.validation_curve({**report, "ndcg@10": [0.5, 0.6]}, lists, labels)


def test_lines_have_the_form_of_the_table(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The process here finds no label in its first validation and all in its second, and ranks test labels second."""
    calls = []

    def call(python: Path, data: Path, given: Sequence[str]) -> dict[str, Any]:
        assert data.exists()
        options = dict(zip(given[::2], given[1::2], strict=True))
        calls.append(options["--model"])
        with np.load(data, allow_pickle=False) as split:
            labels, tested = split["validation_item"][np.load(options["--asked"])], split["test_item"]
        found = np.full((2, len(labels), 10), -1, np.int64)
        found[1, :, 0] = labels
        ranked = np.full((len(tested), int(options["--top-k"])), -1, np.int64)
        ranked[:, 1] = tested
        np.savez(options["--lists"], validation=found, test=ranked)
        return {"seconds": [1.0, 2.04], "ndcg@10": [0.0, 1.0], "settings": {}, "parameters": 1, "versions": {}}

    monkeypatch.setattr(minutes_rectools, "rectools_python", lambda folder: folder / "bin" / "python")
    monkeypatch.setattr(minutes_rectools, "call_rectools", call)
    assert minutes_rectools.main([*words, "--models", "SASRec"]) == 0
    assert minutes_rectools.main([*words, "--models", "SASRec", "HSTU"]) == 0
    assert calls == ["SASRec", "HSTU"] and "RecTools SASRec, seed 1: done already" in capsys.readouterr().out
    line, other = read_results(tmp_path / "results" / f"{TABLE}.jsonl")
    assert (line["model"], other["model"], line["seed"]) == ("RecTools SASRec", "RecTools HSTU", 1)
    assert line["curve"] == [[1.0, 0.0], [2.04, 1.0]] and line["seconds"] == 2.0
    assert line["metrics"]["ndcg@10"] == pytest.approx(1 / np.log2(3)) and line["metrics"]["hr@200"] == 1
    assert line["command"] == (
        f"python -m scripts.experiments.minutes_rectools {TABLE} --models SASRec --seeds 1 --minutes 10 --threads 1"
    )
    assert "| ml-latest-small | RecTools HSTU | 1 |" in (tmp_path / "results" / f"{TABLE}.md").read_text()


@pytest.mark.parametrize("model", minutes_rectools.MODELS)
def test_the_real_baseline_trains_until_the_time_is_up(words: list[str], tmp_path: Path, model: str) -> None:
    environment = os.environ.get("VISTA_RECTOOLS_VENV")
    if not environment:
        pytest.skip("VISTA_RECTOOLS_VENV names no virtual environment with RecTools")
    words = [*words, "--models", model, "--minutes", "0.1", "--rectools-venv", environment]
    assert minutes_rectools.main(words) == 0
    (line,) = read_results(tmp_path / "results" / f"{TABLE}.jsonl")
    seconds = [at for at, _ in line["curve"]]
    assert len(seconds) > 1 and seconds == sorted(seconds), "one per epoch"
    assert seconds[-2] < 6 and seconds[-1] > 3
    assert line["config"]["settings"]["n_factors"] == 256 and line["config"]["settings"]["batch_size"] == 128
    assert 0 < line["metrics"]["hr@10"] < line["metrics"]["hr@200"] == 1, "all items are in the lists"
