"""Scores of the C++ library against those of torch, for every kind of model, and which of the two computes them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import DAY, draw_counter_weights, small_config
from tests.counters.counter_histories import category
from tests.required_program import require_library
from tests.scorer.test_adapters import write_adapter
from tests.scorer.test_scorer_features import DEVICES, READER
from vista.config.checks import ScoringBackend, TargetAttentionKind
from vista.errors import ConfigError
from vista.log.event_log import EventLog
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.scorer import Scorer, Tail
from vista.scorer.native_scoring import NativeScoring
from vista.scorer.request import NOW
from vista.training.log_schema import schema_of
from vista_kernels.cpp_backend.library import LibraryError

LOGITS = 1e-5
"""Absolute and relative: about 80 roundings of 6e-8 each on either side."""
SCORES = LOGITS / 0.05
"""Of scores of `next`, which are cosines divided by the temperature."""
POOLED = {"pooled_dim": 12}
POINTWISE = {"target_attention": TargetAttentionKind.pointwise}
KINDS = {
    "pointwise": POINTWISE | POOLED,
    "softmax of epoch 0": POOLED,
    "counters": POINTWISE | POOLED | {"counter_keys": ["item"], "transitions": 3},
    "counters of a category and pairs, without transitions": {
        "counter_keys": ["item", "brand", "previous*item", "action"]
    },
    "counters of a category and actions": POOLED | {"counter_keys": ["item", "brand", "action", "item*action"]},
    "features, projected per request": POINTWISE | POOLED | {"counter_keys": ["item"]},
    "unified table, projected per request": POOLED | {"embedding_rows": 50, "num_heads": 4},
    "next alone": POINTWISE | POOLED | {"counter_keys": ["item"]},
    "labels alone, whose actions tell them": POINTWISE | POOLED,
}


def made(kind: str, log: EventLog) -> VistaModel:
    """A model of a kind, with random weights everywhere."""
    config = small_config(log, "unused", model__dim=32, model__num_seeds=8, model__tail_len=10)
    config.model.num_counters, table = 10, None
    config.model.counter_keys = []
    schema = schema_of(log, config)
    for name, value in KINDS[kind].items():
        setattr(config.model, name, value)
    if "alone" in kind:
        schema = replace(schema, **({"tasks": []} if "next" in kind else {"has_retrieval": False}))
    if "tell" in kind:
        schema = replace(schema, residual_task="click")
    if "category" in kind or "unified" in kind:
        columns, table = category("brand", np.arange(log.num_items) % 6 - 1)
        schema = replace(schema, item_features=columns)
    if "features" in kind:
        schema = replace(schema, request_features=READER.columns)
    torch.manual_seed(3)
    model = VistaModel(config.model, schema, log.items, config.data).eval()
    model.set_item_features(table)
    if "features" in kind:
        model.request_features = READER
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith(("target_attention", "request_encoder", "features", "task_head")):
                weight.add_(0.1 * torch.randn_like(weight))
        if "epoch 0" in kind:  # the outputs of stage 2 are 0
            model.target_attention.final_norm.weight.zero_()
    draw_counter_weights(model)
    return model


class Both:
    """Two scorers of one store."""

    def __init__(self, kind: str, log: EventLog, folder: Path) -> None:
        require_library()
        model = made(kind, log)
        refresh(model, log, folder / "store")
        write_adapter(model, folder / "de.adapter", np.random.default_rng(5))
        options: dict[str, Any] = {"project_per_request": "projected per request" in kind, "adapter": folder}
        self.options = options
        self.kind = kind
        self.native = Scorer.open(model, folder / "store", backend="native", **options)
        self.torch = Scorer.open(model, folder / "store", backend="torch", **options)
        self.users = [*self.native.store.keys(), 10**9]
        self.items = model.items.ids(np.arange(len(model.items)))
        self.now = int(self.native.store.get_many(self.users).last_event_ts.max()) + DAY

    def compare(self, name: str, *arguments: Any, **options: Any) -> Any:
        """What both return, which must agree; returns that of the library."""
        ours, theirs = (getattr(scorer, name)(*arguments, **options) for scorer in (self.native, self.torch))
        if name == "predict":
            for task, scores in theirs.items():
                np.testing.assert_allclose(ours[task], scores, atol=SCORES if task == "next" else LOGITS)
        elif isinstance(theirs, tuple):
            for mine, yours in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(mine, yours, atol=SCORES)
        else:
            np.testing.assert_allclose(ours, theirs, atol=SCORES)
        return ours


# "counters" has all parts of "pointwise".
@pytest.fixture(
    scope="module",
    params=[pytest.param(kind, marks=pytest.mark.nightly if kind == "pointwise" else ()) for kind in KINDS],
)
def both(
    request: pytest.FixtureRequest, impression_log: EventLog, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Both]:
    opened = Both(request.param, impression_log, tmp_path_factory.mktemp("native"))
    yield opened
    opened.native.close()
    opened.torch.close()


def test_logits_agree(both: Both) -> None:
    if not both.native.model.schema.tasks:
        pytest.skip("has no labeled tasks")
    rows = np.stack([np.random.default_rng(n).permutation(22) for n in range(len(both.users))])
    logits = []
    for scorer in (both.native, both.torch):
        with scorer.in_service() as snapshot:
            request = snapshot.read(both.users, None, both.now, scorer.on_missing, adapter="de")
            logits.append(snapshot.logits(request, rows))
    np.testing.assert_allclose(logits[0], logits[1], atol=LOGITS, rtol=LOGITS)
    assert logits[0].std() > 0.1


@settings(max_examples=4)
@given(data=st.data())
def test_scores_agree(data: st.DataObject, both: Both) -> None:
    """Of any users and lists of candidates, with and without fresh events, times, and features."""
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    chosen = data.draw(st.lists(st.integers(0, len(both.users) - 1), min_size=0, max_size=5), label="users")
    users = [both.users[index] for index in chosen]
    lengths = data.draw(st.lists(st.integers(0, 70), min_size=len(users), max_size=len(users)), label="lengths")
    values = np.append(both.items, 10**6)[rng.integers(0, len(both.items) + 1, sum(lengths))]
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    options: dict[str, Any] = {"now": both.now if rng.random() < 0.8 else None}
    options["adapter"] = "de" if rng.random() < 0.5 else None
    counts = rng.integers(0, 13, len(users))
    if rng.random() < 0.5:
        total = int(counts.sum())
        fresh = both.items[rng.integers(0, len(both.items), total)]
        times = both.now - DAY + np.sort(rng.integers(1, 1000, total))
        options["tail"] = Tail(fresh, times, rng.integers(0, 2, total), np.concatenate([[0], np.cumsum(counts)]))
    ragged, shared = dict(options), dict(options)
    if "features" in both.kind and rng.random() < 0.8:
        device = [[*DEVICES, None][index] for index in rng.integers(0, len(DEVICES) + 1, len(users))]
        ragged["request"] = {"device": device, "hour": (rng.uniform(0, 24, sum(lengths)), offsets)}
        shared["request"] = {"device": device}
    both.compare("predict", users, (values, offsets), **ragged)
    both.compare("predict", users, values[:50], **shared)
    if both.native.model.has_retrieval:
        both.compare("user_vectors", users, **options)
        both.compare("counted_items", users, **options)


def test_one_user_gets_the_bits_of_a_batch(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores from the record in one call of the library are those of a request that Python has read."""
    made, answered = NativeScoring.scores_of_record, []

    def counted(*arguments: Any) -> Any:
        answered.append(made(*arguments))
        return answered[-1]

    monkeypatch.setattr(NativeScoring, "scores_of_record", counted)
    values, hours = np.append(both.items, 10**6), np.linspace(-1, 25, len(both.items) + 1)
    requests = [(None, None)]
    if "features" in both.kind:
        requests += [({"device": "tv", "hour": 3.5},) * 2, ({"hour": hours[None]}, {"hour": np.tile(hours, (2, 1))})]
    for user, (request, of_both) in product(both.users, requests):
        newest = int(both.native.store.get_many([user]).last_event_ts[0])
        for now in (None, NOW, both.now, both.now + 400 * DAY, *([newest, newest + 1] if newest > 0 else [])):
            for adapter in (None, "de"):
                alone = both.native.predict([user], values, now=now, adapter=adapter, request=request)
                source = both.native.answered_from
                together = both.native.predict([user, user], values, now=now, adapter=adapter, request=of_both)
                for task, scores in together.items():
                    np.testing.assert_array_equal(alone[task], scores[:1])
                expected = both.native.answered_from
                assert source is not None and expected is not None and source.known[0] == expected.known[0]
                if now is not NOW:
                    assert (source.now is None) == (expected.now is None)
                    assert source.now is None or expected.now is None or source.now[0] == expected.now[0]
    # Vectors of other tables, and keys that depend on the request, are left to Python; so are users without a record.
    by_record = not any(part in both.kind for part in ("unified", "pairs"))
    assert bool(answered) == by_record and None not in answered


def test_whole_catalogs_agree(both: Both) -> None:
    if not both.native.model.has_retrieval:
        pytest.skip("has no retrieval head")
    count = len(both.items)
    ours, theirs = (s.rank(both.users[0], top_k=count, now=both.now) for s in (both.native, both.torch))
    assert ours.num_scored == theirs.num_scored == count
    order = np.argsort(ours.items), np.argsort(theirs.items)
    np.testing.assert_allclose(ours.scores[order[0]], theirs.scores[order[1]], atol=SCORES)
    both.compare("catalog_scores", both.users, now=both.now, adapter="de")
    # More pairs than are looked up in the counters at once.
    many = np.resize(both.items, 140_000)
    whole = both.native.predict(both.users[:2], both.items, now=both.now)
    for task, scores in both.native.predict(both.users[:2], many, now=both.now).items():
        np.testing.assert_array_equal(
            scores, np.resize(whole[task][:, :count], (2, count))[:, np.arange(140_000) % count]
        )


def test_threads_that_share_a_scorer_get_the_bits_of_one(both: Both) -> None:
    def asked(user: Any) -> dict[str, Any]:
        return both.native.predict([user], both.items, now=both.now)

    alone, users = list(map(asked, both.users)), both.users * 3
    with ThreadPoolExecutor(2) as pool:
        for index, scores in enumerate(pool.map(asked, users)):
            for task, expected in alone[index % len(alone)].items():
                np.testing.assert_array_equal(scores[task], expected)


def test_a_missing_library_is_named(
    impression_log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = made("pointwise", impression_log)
    refresh(model, impression_log, tmp_path / "store")

    def missing(*_: Any, **__: Any) -> Any:
        raise LibraryError("the C++ library was not built")

    monkeypatch.setattr("vista.scorer.native_scoring.ScoringModel", missing)
    with caplog.at_level(logging.INFO), Scorer.open(model, tmp_path / "store") as scorer:
        assert scorer.backend == "torch: the C++ library was not built"
    assert caplog.messages.count(
        "scores are computed by torch, which takes 2 to 7 times as long on a CPU: the C++ library was not built"
    )
    with pytest.raises(ConfigError, match="backend=native: the C\\+\\+ library was not built; or use backend=torch"):
        Scorer.open(model, tmp_path / "store", backend="native")
    with pytest.raises(ValueError, match="backend: 'fast' is not one of"):
        Scorer.open(model, tmp_path / "store", backend="fast")


def test_products_in_bfloat16_give_near_scores(both: Both) -> None:
    """Where the processor has them; elsewhere the same scores."""
    options: dict[str, Any] = {"precision": "bfloat16", "backend": "native", **both.options}
    with Scorer.open(both.native.model, both.native.store.path, **options) as scorer:
        assert scorer.backend.startswith(both.native.backend.removesuffix("float32"))
        exact = scorer.backend == both.native.backend
        ours, theirs = (s.predict(both.users, both.items, now=both.now) for s in (scorer, both.native))
    for task, scores in theirs.items():
        atol = 0.0 if exact else 0.5 if task == "next" else 0.02  # as docs/design/models.md promises
        np.testing.assert_allclose(ours[task], scores, atol=atol, rtol=0)


def test_models_that_it_cannot_score_are_left_to_torch(impression_log: EventLog, tmp_path: Path) -> None:
    require_library()
    model = made("pointwise", impression_log)
    refresh(model, impression_log, tmp_path / "store")
    with Scorer.open(model, tmp_path / "store") as scorer:
        assert scorer.backend.startswith("native, vectors of ")
    config = replace(model.config, dim=28, num_heads=14)
    odd = VistaModel(config, model.schema, model.items, model.data).eval()
    refresh(odd, impression_log, tmp_path / "odd")
    with Scorer.open(odd, tmp_path / "odd", backend=ScoringBackend.auto) as scorer:
        assert "no code for heads of 2 values" in scorer.backend
        assert np.isfinite(scorer.score([1], [1])).all()
