"""What serving computes is what training computed; and neither neighbours nor padding have a say in it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from vista.config.choices import Activation, Decay, Mixing, TargetAttentionKind
from vista.log.histories import Histories
from vista.model import inference
from vista.model.target_attention import Context
from vista.model.vista_model import VistaModel

SHAPES = {
    "separable": {"mixing": Mixing.separable},
    "decay by time": {"decay": Decay.time, "decay_horizons": [0.0, 3.0]},
    "decay by position": {"decay": Decay.position, "decay_horizons": [5.0, 40.0]},
    "bidirectional": {"mixing": Mixing.bidirectional, "num_layers": 3},
    "no summary": {"num_seeds": 0},
    "one layer": {"num_layers": 1, "num_target_layers": 1},
    "no times": {"has_time": False, "conv_width": 1},
    "unified table": {"embedding_rows": 23},
    "another phi": {"activation": Activation.relu},
    "three layers": {"num_target_layers": 3},
    "softmax": {"target_attention": TargetAttentionKind.softmax, "num_target_layers": 3},
    "softmax, no summary": {"target_attention": TargetAttentionKind.softmax, "num_seeds": 0},
    "no phi, bidirectional": {"activation": Activation.identity, "mixing": Mixing.bidirectional, "num_layers": 3},
}
LENGTHS = [0, 1, 2, 23, 7, 0, 12]


def ask(
    model: VistaModel, packed: Histories, tail: inference.PaddedTail, candidates: np.ndarray
) -> tuple[Context, Tensor, Tensor]:
    """Context, user vectors [B, M] and task logits [B, C, tasks] of requests a day after the newest event."""
    context = inference.request_context(model, inference.summarize(model, packed), tail)
    gap = inference.request_gap(model, tail.last_time + 86_400_000, tail)
    users = inference.user_vectors(model, context, gap)
    return context, users, inference.candidate_logits(model, context, gap, torch.from_numpy(candidates))


@pytest.mark.parametrize("shape", SHAPES)
def test_training_at_a_position_is_serving_after_its_events(
    make: SimpleNamespace, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every position of every window: the served summary of its cut, the served tail of what it sees, its time."""
    monkeypatch.setattr("vista.examples.cuts.TIMELESS_SHARE", 0.0)
    model = make.model(seed=3, **SHAPES[shape])
    packed = make.histories([1, 23, 8, 4], 5)
    chunks, shown_at = make.chunks(packed, 5, impressions=30, decay=model.config.decay)
    if model.encoder.gap is None:
        chunks = replace(chunks, gap=chunks.gap * 0, impression_gap=chunks.impression_gap * 0)
    batch = make.batch(chunks, make.plan(model, staleness_share=0.3), 5)
    users, logits = make.outputs(model, batch)
    width, length = batch.label.shape[1], model.config.tail_len
    label_time = np.append(packed.timestamp, 0)
    checked = 0
    for window, cut in enumerate(batch.window_cut.tolist()):
        start, stop = int(batch.cut_start[cut]), int(batch.cut_stop[cut])
        owner = int(np.flatnonzero(packed.offsets == start)[0])
        history = packed.slice(owner)
        tail_end = int(batch.tail_index[window, -1]) + 1 - start if batch.tail_index[window, -1] >= 0 else 0
        questions = [
            (tail_end - width + 1 + column, column, None) for column in range(width) if batch.label[window, column] >= 0
        ]
        known = batch.candidate_mask[window].any(-1)
        questions += [
            (tail_end - width + 1 + int(batch.candidate_position[window, place]), None, place)
            for place in torch.nonzero(known).flatten().tolist()
        ]
        for position, column, place in questions:
            seen = min(position, max(0, length - (tail_end - position)))
            tail = make.tail(model, history.slice(0, position - seen, position))
            summary = inference.summarize(model, history.slice(0, 0, stop - start))
            context = inference.request_context(model, summary, tail)
            if column is not None:
                gap = inference.request_gap(model, label_time[[start + position]], tail)
                served = inference.user_vectors(model, context, gap)[0]
                trained = users[window, column]
            else:
                item = batch.rows[batch.candidate[window, place]]
                which = np.flatnonzero(
                    (chunks.impression_chunk == owner)
                    & (chunks.impression_position == position)
                    & (chunks.impression_item == int(item))
                )
                gaps = {int(chunks.impression_gap[i]): shown_at[i] for i in which}
                gap = inference.request_gap(model, np.array([gaps[int(batch.candidate_gap[window, place])]]), tail)
                served = inference.candidate_logits(model, context, gap, item.view(1, 1))[0, 0]
                trained = logits[window, place]
            torch.testing.assert_close(trained, served, atol=2e-5, rtol=1e-4)
            checked += 1
    assert checked > 40


@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_equals_users_one_at_a_time(make: SimpleNamespace, shape: str) -> None:
    model = make.model(seed=4, **SHAPES[shape])
    packed = make.histories(LENGTHS, 6)
    candidates = np.random.default_rng(0).integers(0, make.num_items + 1, (len(LENGTHS), 6))
    _, users, logits = ask(model, packed, make.tail(model, packed), candidates)
    for row in range(len(LENGTHS)):
        alone = packed.select_users(row, row + 1)
        _, user, logit = ask(model, alone, make.tail(model, alone), candidates[row : row + 1])
        torch.testing.assert_close(users[row], user[0], atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(logits[row], logit[0], atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", ["separable", "bidirectional", "no summary", "softmax"])
def test_a_training_batch_equals_its_chunks_one_at_a_time(
    make: SimpleNamespace, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With W = 1 and no staleness nothing is drawn, so a chunk is cut the same way alone and in company."""
    monkeypatch.setattr("vista.examples.cuts.TIMELESS_SHARE", 0.0)
    model = make.model(seed=5, **SHAPES[shape])
    packed = make.histories([0, 9, 3, 14], 7)
    cut = make.plan(model, label_spacing=1, num_cuts=500)
    together, _ = make.outputs(model, make.batch(make.chunks(packed, 7)[0], cut))
    begin = 0
    for row, length in enumerate(packed.lengths.tolist()):
        alone, _ = make.outputs(model, make.batch(make.chunks(packed.select_users(row, row + 1), 7)[0], cut))
        assert len(alone) == length
        torch.testing.assert_close(together[begin : begin + length], alone, atol=2e-6, rtol=1e-5)
        begin += length
    assert begin == len(together)


@pytest.mark.parametrize("shape", ["separable", "bidirectional", "softmax"])
def test_what_lies_in_padding_changes_no_bit(make: SimpleNamespace, shape: str) -> None:
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
    one, other = ask(model, packed, tail, candidates), ask(model, packed, junk, candidates)
    assert torch.equal(one[1], other[1]) and torch.equal(one[2], other[2])


def test_the_width_of_impressions_changes_nothing(make: SimpleNamespace) -> None:
    """Windows are padded to the fullest one; another user's many impressions are not this user's business."""
    model = make.model(seed=7)
    packed = make.histories([12, 12], 9)
    chunks, _ = make.chunks(packed, 9, impressions=14)
    _, logits = make.outputs(model, make.batch(chunks, make.plan(model)))
    crowd = np.searchsorted(chunks.impression_chunk, 1) + np.zeros(30, np.int64)

    def crowded(values: np.ndarray) -> np.ndarray:
        return np.insert(values, crowd, values[crowd[0]], axis=0)

    names = ("chunk", "position", "item", "gap", "label", "mask")
    wide = replace(chunks, **{f"impression_{n}": crowded(getattr(chunks, f"impression_{n}")) for n in names})
    batch = make.batch(wide, make.plan(model))
    _, wider = make.outputs(model, batch)
    assert wider.shape[1] > logits.shape[1] + 20
    first = packed.lengths[0] // 4  # whole windows of the first user
    torch.testing.assert_close(wider[:first, : logits.shape[1]], logits[:first], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", ["separable", "bidirectional", "no summary", "softmax"])
def test_candidates_do_not_see_one_another(make: SimpleNamespace, shape: str) -> None:
    model = make.model(seed=8, **SHAPES[shape])
    packed = make.histories(LENGTHS, 10)
    tail = make.tail(model, packed)
    rng = np.random.default_rng(1)
    candidates = rng.integers(0, make.num_items + 1, (len(LENGTHS), 30))
    context, _, logits = ask(model, packed, tail, candidates)
    gap = inference.request_gap(model, tail.last_time + 86_400_000, tail)
    order = rng.permutation(30)
    shuffled = inference.candidate_logits(model, context, gap, torch.from_numpy(candidates[:, order]))
    torch.testing.assert_close(shuffled, logits[:, order], atol=2e-6, rtol=1e-5)
    for count in (1, 7):
        few = inference.candidate_logits(model, context, gap, torch.from_numpy(candidates[:, :count]))
        torch.testing.assert_close(few, logits[:, :count], atol=2e-6, rtol=1e-5)
    # In a list of another make-up, bit for bit.
    others = candidates.copy()
    others[:, 1:] = rng.integers(0, make.num_items + 1, (len(LENGTHS), 29))
    assert torch.equal(
        inference.candidate_logits(model, context, gap, torch.from_numpy(others))[:, 0], logits[:, 0].contiguous()
    )


@pytest.mark.parametrize("seen", [0, 1, 3])
def test_queries_see_the_first_columns_of_the_tail_alone(make: SimpleNamespace, seen: int) -> None:
    """Requests are masked like candidates: both see the summary, `seen` tail columns and themselves."""
    model = make.model(seed=9)
    packed = make.histories([9, 2], 11)
    summary, tail = inference.summarize(model, packed), make.tail(model, packed)
    beyond = np.arange(model.config.tail_len) >= seen
    changed = replace(tail, item=np.where(beyond, tail.item % make.num_items + 1, tail.item))
    columns = torch.tensor([seen])
    vectors = model.item_table[torch.tensor([[3], [4]])]
    before, after = (inference.request_context(model, summary, t) for t in (tail, changed))
    with torch.inference_mode():
        for query in (
            lambda context, columns: model.user_vectors(None, columns, context),
            lambda context, columns: model.candidate_logits(vectors, None, columns, context),
        ):
            assert torch.equal(query(before, columns), query(after, columns))
            assert not torch.equal(query(before, columns + 1), query(after, columns + 1))
            other = inference.request_context(model, summary + 1.0 * torch.randn(2, 3, 16), tail)
            assert not torch.allclose(query(before, columns), query(other, columns), atol=1e-3)


def test_summary_tokens_do_not_see_the_tail(make: SimpleNamespace) -> None:
    model = make.model(seed=10)
    packed = make.histories([9], 12)
    summary, tail = inference.summarize(model, packed), make.tail(model, packed)
    changed = replace(tail, item=tail.item % make.num_items + 1)
    one, other = (inference.request_context(model, summary, t) for t in (tail, changed))
    for before, after in zip(one.keys, other.keys, strict=True):
        assert torch.equal(before[:, :, :3], after[:, :, :3])
        assert not torch.equal(before[:, :, 3:], after[:, :, 3:])


def test_only_the_newest_history_limit_events_are_summarized(make: SimpleNamespace) -> None:
    model = make.model(seed=11, history_limit=6)
    packed = make.histories([10, 3, 6], 13)
    newest = packed.select(np.maximum(packed.lengths - 6, 0), packed.lengths)
    assert torch.equal(inference.summarize(model, packed), inference.summarize(model, newest))
    unlimited = make.model(seed=11)
    assert not torch.allclose(inference.summarize(model, packed)[0], inference.summarize(unlimited, packed)[0])


def test_padded_tails_hold_the_newest_events_and_the_gaps_between_them(make: SimpleNamespace) -> None:
    model = make.model(tail_len=3)
    time = np.array([0, 1000, 7000, 7000, 5, 9_000])
    tail = inference.pad_tail(model, np.arange(1, 7), time, np.array([0, 1, 2, 0, 1, 2]), np.array([0, 4, 4, 6]))
    np.testing.assert_array_equal(tail.item, [[2, 3, 4], [0, 0, 0], [0, 5, 6]])
    np.testing.assert_array_equal(tail.action, [[1, 2, 0], [0, 0, 0], [0, 1, 2]])
    # 6 s, 0 s and 8.995 s: 1 + floor(log2(1 + s)); the first event's gap is unknown.
    np.testing.assert_array_equal(tail.gap, [[0, 3, 1], [0, 0, 0], [0, 0, 4]])
    np.testing.assert_array_equal(tail.valid, [[1, 1, 1], [0, 0, 0], [0, 1, 1]])
    np.testing.assert_array_equal(tail.last_time[[0, 2]], [7000, 9000])
    empty = inference.pad_tail(model, np.zeros(0), np.zeros(0, np.int64), np.zeros(0), np.zeros(3, np.int64))
    assert not empty.valid.any() and empty.item.shape == (2, 3)
    assert model.encoder.gap is not None
    unknown = inference.request_gap(model, None, tail)
    asked = inference.request_gap(model, np.array([8000, 8000, 8000]), tail)
    assert unknown is not None and asked is not None
    rows = model.encoder.gap.weight
    assert torch.equal(unknown[:, 0], rows[[0, 0, 0]])
    assert torch.equal(asked[:, 0], rows[[2, 0, 1]]), "1 s; no tail; a request before the newest event counts as 0 s"


@pytest.mark.parametrize("shape", ["separable", "no summary", "no times", "softmax"])
def test_a_shorter_tail_is_what_is_left_of_the_longer(make: SimpleNamespace, shape: str) -> None:
    model = make.model(seed=4, **SHAPES[shape])
    packed = make.histories(LENGTHS, 6)
    candidates = np.random.default_rng(0).integers(0, 40, (len(LENGTHS), 5))
    for length in (1, 3, model.config.tail_len):
        shorter = model.with_tail(length)
        tail = make.tail(shorter, packed)
        columns = ((0, 0), (model.config.tail_len - length, 0))
        padded = replace(
            tail, **{name: np.pad(getattr(tail, name), columns) for name in ("item", "action", "gap", "valid")}
        )
        _, users, logits = ask(shorter, packed, tail, candidates)
        _, expected_users, expected_logits = ask(model, packed, padded, candidates)
        torch.testing.assert_close(users, expected_users, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(logits, expected_logits, atol=1e-5, rtol=1e-5)
        assert shorter.summarizer_id() == model.summarizer_id()
    for length in (0, model.config.tail_len + 1):
        with pytest.raises(ValueError, match=r"must lie in 1 … \d+, which was trained"):
            model.with_tail(length)
