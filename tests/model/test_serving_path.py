"""Serving computes what training computed.

Training scores many positions of a history in one pass: a `Batch` holds windows, and each window reads the summary of
a cut and a tail of events. Serving scores one request: it reads the user's summary, pads the newest events to a tail,
and asks for the retrieval head's user vector or for logits of candidates. The tests show that

- both give the same numbers for the same events, at every position of a batch;
- a user's results do not depend on the other users or impressions of a batch, on padding, or on the other candidates;
- the parts of a request see what they may see: queries the first events of the tail, the summary not the tail, and a
  summary the newest `history_limit` events;
- a tail holds the newest events, and a model made for shorter tails equals one whose longer tail is cut.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from vista.config.checks import Decay, Mixing, TargetAttentionKind
from vista.examples.batch import Batch
from vista.log.histories import Histories
from vista.model import inference
from vista.model.features import EncodedRows
from vista.model.serving_model import PaddedTail, pad_tail
from vista.model.target_attention import TargetContext
from vista.model.vista_model import VistaModel

DAY = 86_400_000
SHAPES = {
    "separable": {"mixing": Mixing.separable},
    "decay by time": {"decay": Decay.time, "decay_horizons": [0.0, 3.0]},
    "decay by position": {"decay": Decay.position, "decay_horizons": [5.0, 40.0]},
    "bidirectional": {"mixing": Mixing.bidirectional, "num_layers": 3},
    "no summary": {"num_seeds": 0},
    "one layer": {"num_layers": 1, "num_target_layers": 1},
    "no times": {"has_time": False, "conv_width": 1},
    "request features": {"request_features": True},
    "unified table": {"embedding_rows": 23},
    "softmax": {"target_attention": TargetAttentionKind.softmax, "num_target_layers": 3},
    "event features": {"num_tail_features": 2},
    "event features, one in the tail": {"num_tail_features": 1, "decay": Decay.time, "decay_horizons": [0.0, 3.0]},
    "user features": {"user_features": True},
}
CLOSE_TO_OTHERS = ["decay by position", "one layer", "event features"]
"""Shapes whose code the others run, too, in the slowest test."""
SOME_SHAPES = ["separable", "bidirectional", "no summary", "softmax", "event features", "user features"]
LENGTHS = [0, 1, 2, 23, 7, 0, 12]
"""Events per user: empty histories, some shorter than the tail, some longer."""


@dataclass(frozen=True)
class Answers:
    """What serving gives for B requests."""

    context: TargetContext
    users: Tensor
    """[B, M]."""
    logits: Tensor
    """[B, C, num_tasks]."""


def serve(
    model: VistaModel,
    packed: Histories,
    tail: PaddedTail,
    candidates: np.ndarray,
    features: EncodedRows | None = None,
    own: EncodedRows | None = None,
) -> Answers:
    """Requests of the users of `packed`, one day after the tail's newest event, for candidates [B, C]. `features`: of
    the requests; own: of the users."""
    context = inference.request_context(model, inference.summarize(model, packed), tail, users=own)
    now = tail.last_time + DAY
    users = inference.user_vectors(model, context, inference.request_gap(model, now, tail))
    asked = inference.request_vectors(model, now, tail, features)
    return Answers(context, users, inference.candidate_logits(model, context, asked, torch.from_numpy(candidates)))


def served_context(
    make: SimpleNamespace, model: VistaModel, packed: Histories, batch: Batch, window: int, owner: int, position: int
) -> tuple[TargetContext, PaddedTail]:
    """What a request reads that sees what a position of a training window sees. It reads the summary of the events that
    the window's cut covers, and as its tail the events of the window's tail that come before the position."""
    history, start = packed.slice(owner), packed.offsets[owner]
    cut = batch.windows.cut[window]
    covered = int(batch.cuts.stop[cut] - batch.cuts.start[cut])
    in_tail = batch.windows.tail_index[window].numpy()
    visible = int(((in_tail >= 0) & (in_tail < start + position)).sum())
    tail = make.tail(model, history.slice(0, position - visible, position))
    summary = inference.summarize(model, history.slice(0, 0, covered))
    own = make.users(packed).select(np.array([owner]))
    return inference.request_context(model, summary, tail, users=own), tail


@pytest.mark.parametrize(
    "shape", [pytest.param(each, marks=pytest.mark.nightly if each in CLOSE_TO_OTHERS else ()) for each in SHAPES]
)
def test_training_at_a_position_is_serving_after_its_events(make: SimpleNamespace, shape: str) -> None:
    """Every next item, impression, and anchor of a batch, each compared with a request of its own."""
    model = make.model(seed=3, **SHAPES[shape])
    packed = make.histories([1, 23, 8, 4], 5)
    chunks, shown_at = make.chunks(packed, 5, impressions=12, decay=model.config.decay, requests=True)
    if model.encoder.gap is None:
        shown = replace(chunks.impressions, gap=chunks.impressions.gap * 0)
        chunks = replace(chunks, gap=chunks.gap * 0, impressions=shown)
    anchors = make.anchor_plan(by_time=True, use_time=model.encoder.gap is not None)
    plan = make.plan(model, staleness_share=0.3, timeless_share=0.0, anchors=anchors)
    batch = make.batch(chunks, plan, 5)
    trained_users, trained_logits = make.outputs(model, batch)
    next_items, impressions = make.predictions(chunks, plan, 5)

    def close(trained: Tensor, served: Tensor) -> None:
        # Float32 sums over at most 23 events, in another order; vectors are of length 1, and logits are below 10.
        torch.testing.assert_close(trained, served, atol=2e-5, rtol=1e-4)

    labeled = np.argwhere(next_items.position >= 0)
    for window, column in labeled:
        owner, position = next_items.chunk[window, column], next_items.position[window, column]
        context, tail = served_context(make, model, packed, batch, window, owner, position)
        label_time = packed.timestamp[next_items.number[window, column]]
        gap = inference.request_gap(model, np.array([label_time]), tail)
        close(trained_users[window, column], inference.user_vectors(model, context, gap)[0])

    impressed = np.argwhere(impressions.position >= 0)
    for window, place in impressed:
        owner, position = impressions.chunk[window, place], impressions.position[window, place]
        context, tail = served_context(make, model, packed, batch, window, owner, position)
        number = impressions.number[window, place]
        features = chunks.impressions.features.select([number])
        asked = inference.request_vectors(model, shown_at[[number]], tail, features)
        candidate = torch.from_numpy(chunks.impressions.item[[[number]]])
        close(trained_logits[window, place], inference.candidate_logits(model, context, asked, candidate)[0, 0])
    assert len(labeled) == packed.num_events and len(impressed) == 12

    asked, predicted = make.anchor_users(model, batch), make.anchor_predictions(chunks, plan, 5)
    for row, (owner, position) in enumerate(zip(predicted.chunk, predicted.position, strict=True)):
        window, bucket = int(batch.anchors.window[row]), int(batch.anchors.gap[row])
        context, tail = served_context(make, model, packed, batch, window, owner, position)
        now = None if bucket == 0 else tail.last_time + 1000 * (2 ** (bucket - 1) - 1)
        gap = inference.request_gap(model, now, tail)
        close(asked[row], inference.user_vectors(model, context, gap)[0])
    assert len(asked) == 1 + 3 * 3


@pytest.mark.parametrize("shape", SOME_SHAPES)
def test_a_batch_equals_users_one_at_a_time(make: SimpleNamespace, shape: str) -> None:
    model = make.model(seed=4, **SHAPES[shape])
    packed = make.histories(LENGTHS, 6)
    candidates = np.random.default_rng(0).integers(0, make.num_items + 1, (len(LENGTHS), 6))
    features, users = make.requests(len(LENGTHS)), make.users(packed)
    together = serve(model, packed, make.tail(model, packed), candidates, features, users)
    for row in range(len(LENGTHS)):
        own, some = packed.select_users(row, row + 1), slice(row, row + 1)
        alone = serve(model, own, make.tail(model, own), candidates[some], features.select(some), users.select(some))
        torch.testing.assert_close(together.users[row], alone.users[0], atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(together.logits[row], alone.logits[0], atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", ["separable", "bidirectional", "softmax"])
def test_values_in_padding_change_no_bit(make: SimpleNamespace, shape: str) -> None:
    model = make.model(seed=6, **SHAPES[shape])
    packed = make.histories(LENGTHS, 8)
    candidates = np.ones((len(LENGTHS), 2), np.int64)
    tail = make.tail(model, packed)
    junk = replace(
        tail,
        item=np.where(tail.valid, tail.item, 17),
        action=np.where(tail.valid, tail.action, 2),
        gap=np.where(tail.valid, tail.gap, 9),
    )
    assert (junk.item != tail.item).any()
    clean, padded = serve(model, packed, tail, candidates), serve(model, packed, junk, candidates)
    assert torch.equal(clean.users, padded.users) and torch.equal(clean.logits, padded.logits)


@pytest.mark.parametrize("shape", ["separable", "bidirectional", "softmax"])
def test_candidates_do_not_see_one_another(make: SimpleNamespace, shape: str) -> None:
    model = make.model(seed=8, **SHAPES[shape])
    packed = make.histories(LENGTHS, 10)
    tail = make.tail(model, packed)
    rng = np.random.default_rng(1)
    candidates = rng.integers(0, make.num_items + 1, (len(LENGTHS), 30))
    answers = serve(model, packed, tail, candidates)
    asked = inference.request_vectors(model, tail.last_time + DAY, tail)

    def logits(candidates: np.ndarray) -> Tensor:
        return inference.candidate_logits(model, answers.context, asked, torch.from_numpy(candidates))

    order = rng.permutation(30)
    torch.testing.assert_close(logits(candidates[:, order]), answers.logits[:, order], atol=2e-6, rtol=1e-5)
    for count in (1, 7):
        few = logits(candidates[:, :count])
        torch.testing.assert_close(few, answers.logits[:, :count], atol=2e-6, rtol=1e-5)
    # Among as many other candidates the result is the same, bit for bit.
    others = candidates.copy()
    others[:, 1:] = rng.integers(0, make.num_items + 1, (len(LENGTHS), 29))
    assert torch.equal(logits(others)[:, 0], answers.logits[:, 0].contiguous())


@pytest.mark.parametrize("seen", [0, 1, 3])
def test_queries_see_the_summary_and_only_the_first_columns_of_the_tail(make: SimpleNamespace, seen: int) -> None:
    """User vectors and candidates alike."""
    model = make.model(seed=9)
    packed = make.histories([9, 2], 11)
    summary, tail = inference.summarize(model, packed), make.tail(model, packed)
    beyond = np.arange(model.config.tail_len) >= seen
    changed = replace(tail, item=np.where(beyond, tail.item % make.num_items + 1, tail.item))
    before, after = (inference.request_context(model, summary, each) for each in (tail, changed))
    other_summary = inference.request_context(model, summary + torch.randn(2, 3, 16), tail)
    columns = torch.tensor([seen])
    vectors = model.item_table[torch.tensor([[3], [4]])]
    with torch.inference_mode():
        for query in (
            lambda context, columns: model.user_outputs(None, columns, context),
            lambda context, columns: model.candidate_logits(vectors, None, columns, context),
        ):
            assert torch.equal(query(before, columns), query(after, columns))
            assert not torch.equal(query(before, columns + 1), query(after, columns + 1))
            assert not torch.allclose(query(before, columns), query(other_summary, columns), atol=1e-3)


def test_a_summary_covers_the_newest_history_limit_events(make: SimpleNamespace) -> None:
    model = make.model(seed=11, history_limit=6)
    packed = make.histories([10, 3, 6], 13)
    newest = packed.select(np.maximum(packed.lengths - 6, 0), packed.lengths)
    assert torch.equal(inference.summarize(model, packed), inference.summarize(model, newest))
    unlimited = make.model(seed=11)
    assert not torch.allclose(inference.summarize(model, packed)[0], inference.summarize(unlimited, packed)[0])


def test_padded_tails_hold_the_newest_events_and_the_gaps_between_them(make: SimpleNamespace) -> None:
    model = make.model(tail_len=3)
    time = np.array([0, 1000, 7000, 7000, 5, 9_000])
    tail = pad_tail(model, np.arange(1, 7), time, np.array([0, 1, 2, 0, 1, 2]), np.array([0, 4, 4, 6]))
    np.testing.assert_array_equal(tail.item, [[2, 3, 4], [0, 0, 0], [0, 5, 6]])
    np.testing.assert_array_equal(tail.action, [[1, 2, 0], [0, 0, 0], [0, 1, 2]])
    # 6 s, 0 s and 8.995 s: 1 + floor(log2(1 + s)); the first event's gap is unknown.
    np.testing.assert_array_equal(tail.gap, [[0, 3, 1], [0, 0, 0], [0, 0, 4]])
    np.testing.assert_array_equal(tail.valid, [[1, 1, 1], [0, 0, 0], [0, 1, 1]])
    np.testing.assert_array_equal(tail.last_time[[0, 2]], [7000, 9000])


def test_padded_tails_of_empty_histories_hold_nothing(make: SimpleNamespace) -> None:
    model = make.model(tail_len=3)
    tail = pad_tail(model, np.zeros(0), np.zeros(0, np.int64), np.zeros(0), np.zeros(3, np.int64))
    assert not tail.valid.any() and tail.item.shape == (2, 3)


def test_request_gaps_count_from_the_newest_event_of_the_tail(make: SimpleNamespace) -> None:
    model = make.model(tail_len=3)
    time = np.array([7000, 9000])
    tail = pad_tail(model, np.arange(1, 3), time, np.zeros(2, np.int64), np.array([0, 1, 1, 2]))
    assert model.encoder.gap is not None
    by_bucket = model.encoder.gap.weight
    without_time = inference.request_gap(model, None, tail)
    at_8_s = inference.request_gap(model, np.array([8000, 8000, 8000]), tail)
    assert without_time is not None and at_8_s is not None
    assert torch.equal(without_time[:, 0], by_bucket[[0, 0, 0]])
    # 1 s after the newest event; an empty tail; a request before the newest event counts as 0 s after it.
    assert torch.equal(at_8_s[:, 0], by_bucket[[2, 0, 1]])


@pytest.mark.parametrize("shape", ["separable", "no summary", "no times", "softmax"])
def test_a_model_with_a_shorter_tail_equals_one_whose_tail_is_cut(make: SimpleNamespace, shape: str) -> None:
    model = make.model(seed=4, **SHAPES[shape])
    packed = make.histories(LENGTHS, 6)
    candidates = np.random.default_rng(0).integers(0, 40, (len(LENGTHS), 5))
    for length in (1, 3, model.config.tail_len):
        shorter = model.with_tail(length)
        tail = make.tail(shorter, packed)
        padding = ((0, 0), (model.config.tail_len - length, 0))
        names = ("item", "action", "gap", "valid")
        padded = replace(tail, **{name: np.pad(getattr(tail, name), padding) for name in names})
        answers, expected = serve(shorter, packed, tail, candidates), serve(model, packed, padded, candidates)
        torch.testing.assert_close(answers.users, expected.users, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(answers.logits, expected.logits, atol=1e-5, rtol=1e-5)
        assert shorter.summarizer_id() == model.summarizer_id()


def test_a_tail_longer_than_trained_or_empty_is_refused(make: SimpleNamespace) -> None:
    model = make.model()
    for length in (0, model.config.tail_len + 1):
        with pytest.raises(ValueError, match=r"must lie in 1 … \d+, the trained length"):
            model.with_tail(length)


def test_features_of_requests_change_logits_and_not_user_vectors(make: SimpleNamespace) -> None:
    """Requests that bring no features have the vector of missing ones, which training learns."""
    model = make.model(seed=15, request_features=True)
    packed = make.histories([9, 2, 4], 16)
    tail, candidates = make.tail(model, packed), np.array([[3, 4], [5, 6], [7, 8]])
    bare = serve(model, packed, tail, candidates)
    missing = serve(model, packed, tail, candidates, model.request_features.missing(3))
    asked = serve(model, packed, tail, candidates, make.requests(3))
    assert torch.equal(bare.logits, missing.logits)
    assert torch.equal(bare.users, asked.users)
    # The first request that is drawn has no features.
    assert ((bare.logits - asked.logits).abs().amax((1, 2)) > 1e-3).tolist() == [False, True, True]


def test_a_share_of_the_windows_trains_requests_without_features(make: SimpleNamespace) -> None:
    model = make.model(seed=16, request_features=True)
    chunks, _ = make.chunks(make.histories([60, 60, 60], 17), 17, impressions=200, requests=True)
    bare = make.batch(chunks, make.plan(model, featureless_share=0.5)).impressions
    full = make.batch(chunks, make.plan(model)).impressions
    is_missing = (bare.features.entry == torch.from_numpy(chunks.impressions.features.entry[-1])).all(-1)
    is_shown = full.mask.any(-1)
    by_window = (is_missing & is_shown).sum(1) / is_shown.sum(1).clamp(min=1)
    assert 0.3 < (by_window == 1).float().mean() < 0.7
    kept = ~is_missing & is_shown
    assert all(
        torch.equal(getattr(bare.features, part)[kept], getattr(full.features, part)[kept])
        for part in ("entry", "dense")
    )
    assert torch.equal(bare.gap, full.gap) and torch.equal(bare.item, full.item)
