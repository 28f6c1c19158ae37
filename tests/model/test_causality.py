"""No leakage, measured on outputs: the label and everything after it change no bit of a prediction."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vista.config.checks import Decay, Mixing, TargetAttentionKind
from vista.examples.batch import Batch, Chunks
from vista.log.histories import Histories, RowFeatures

YEAR = 365 * 86_400_000
SHAPES = {
    "separable": {"mixing": Mixing.separable},
    "separable, decay": {"mixing": Mixing.separable, "decay": Decay.time, "decay_horizons": [0.0, 2.0]},
    "bidirectional": {"mixing": Mixing.bidirectional},
    "no summary": {"num_seeds": 0},
    "event features": {"num_tail_features": 1},
    "softmax": {"target_attention": TargetAttentionKind.softmax},
}


def with_another_future(packed: Histories, label: int, owner: int, num_items: int, *, same_time: bool) -> Histories:
    """Other items, actions, ratings and times for the packed event `label` and all later ones of its history. The time
    of the label is also the time of the request, which the model may know: `same_time` keeps it."""
    later = slice(label, packed.offsets[owner + 1])
    item, action = packed.item.copy(), packed.action.copy()
    rating, time = np.array(packed.rating), packed.timestamp.copy()
    item[later] = item[later] % num_items + 1
    action[later] = (action[later] + 1) % 3
    rating[later] = 6 - rating[later]
    moved = slice(label + same_time, packed.offsets[owner + 1])
    time[moved] += np.cumsum(np.full(len(time[moved]), YEAR))  # so every gap from here on changes
    device, hour = (column.copy() for column in packed.features.columns.values())
    device[later], hour[later] = 1 - device[later], np.nan_to_num(hour[later]) + 7
    features = RowFeatures({"device": device, "hour": hour})
    return Histories(item, time, action, rating, packed.offsets, features)


def with_other_impressions(chunks: Chunks, label: int, owner: int, num_items: int) -> Chunks:
    """Other items and times for the impressions of user `owner` that come after the packed event `label`."""
    shown = chunks.impressions
    later = (chunks.user[shown.chunk] == owner) & (chunks.offsets[shown.chunk] + shown.position > label)
    item, gap = np.where(later, shown.item % num_items + 1, shown.item), np.where(later, shown.gap + 1, shown.gap)
    return replace(chunks, impressions=replace(shown, item=item, gap=gap))


OF_ITEMS = {"counter_keys": ["item"], "num_counters": 3, "num_seeds": 0}
COUNTERS = {
    "counters": OF_ITEMS,
    "counters of products": OF_ITEMS
    | {"counter_keys": ["item", "brand", "brand*month", "previous*item", "brand*action", "action"]},
}


def counted(batch: Batch) -> list[dict[int, bytes]]:
    """Codes of the counted items of each anchor, by model row; empty without counters."""
    assert batch.anchors is not None
    rows, slots = batch.rows.tolist(), batch.anchors.counters
    if slots is None:
        return [{}] * len(batch.anchors.window)
    return [
        {rows[item]: codes.numpy().tobytes() for item, codes in zip(items.tolist(), own, strict=True) if item >= 0}
        for items, own in zip(slots.item, slots.codes, strict=True)
    ]


@pytest.mark.parametrize("shape", [*SHAPES, *COUNTERS])
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_the_future_changes_no_bit_of_a_prediction(make: SimpleNamespace, shape: str, data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 10_000))
    lengths = data.draw(st.lists(st.integers(0, 25), min_size=1, max_size=4).filter(any))
    model = make.model(seed=1, tail_len=data.draw(st.integers(1, 6)), **(SHAPES | COUNTERS)[shape])
    chunk_len = data.draw(st.sampled_from([5, 100]))  # anchors ask beyond their chunks
    anchors = make.anchor_plan(timeless_share=0.2)
    plan = make.plan(model, staleness_share=data.draw(st.sampled_from([0.0, 0.5])), anchors=anchors)
    packed = make.histories(lengths, seed)
    label, same_time = data.draw(st.integers(0, packed.num_events - 1)), data.draw(st.booleans())
    owner = int(np.searchsorted(packed.offsets, label, side="right")) - 1

    changed = with_another_future(packed, label, owner, make.num_items, same_time=same_time)
    options = {"impressions": 10, "decay": model.config.decay, "chunk_len": chunk_len, "keys": model.item_keys}
    chunks, other = (make.chunks(each, seed, **options)[0] for each in (packed, changed))
    other = with_other_impressions(other, label, owner, make.num_items)
    cuts = make.batch(chunks, plan, seed), make.batch(other, plan, seed)
    before, after = ((*make.outputs(model, cut), make.anchor_users(model, cut)) for cut in cuts)

    predictions = (*make.predictions(chunks, plan, seed), make.anchor_predictions(chunks, plan, seed))
    last_user = label if same_time else label - 1
    for one, two, predicted, last in zip(before, after, predictions, (last_user, label, last_user), strict=True):
        event = chunks.offsets[predicted.chunk] + predicted.position
        earlier = (chunks.user[predicted.chunk] != owner) | (event <= last)
        untouched = torch.from_numpy((predicted.position >= 0) & earlier)
        assert torch.equal(one[untouched], two[untouched])
    for place, (one, two) in enumerate(zip(*map(counted, cuts), strict=True)):
        assert one == two or not untouched[place]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_past_does_change_predictions(make: SimpleNamespace, shape: str) -> None:
    """So the test above can fail: one position later, the tail and the summary show the changed event."""
    model = make.model(seed=1, tail_len=3, **{"num_tail_features": 2} | SHAPES[shape])
    plan = make.plan(model, label_spacing=2, num_cuts=300, timeless_share=0.0, anchors=make.anchor_plan(spacing=1))
    packed = make.histories([30], 4)

    def outputs(packed: Histories) -> tuple[Chunks, tuple[torch.Tensor, ...]]:
        chunks = make.chunks(packed, 4, impressions=60, decay=model.config.decay)[0]
        cut = make.batch(chunks, plan, 4)
        return chunks, (*make.outputs(model, cut), make.anchor_users(model, cut))

    chunks, before = outputs(packed)
    next_items, impressions = make.predictions(chunks, plan, 4)
    predictions = (next_items, impressions, make.anchor_predictions(chunks, plan, 4))
    for field in ("item", "time", "device", "hour"):
        item, time = packed.item.copy(), packed.timestamp.copy()
        features = {name: column.copy() for name, column in packed.features.columns.items()}
        if field == "item":
            item[9] = item[9] % make.num_items + 1
        elif field == "time":
            time[9:] += YEAR
        else:
            features[field][9] = 1 if features[field][9] == 0 else 0
        _, after = outputs(replace(packed, item=item, timestamp=time, features=RowFeatures(features)))
        # The tail's first event has no gap, so without a summary a changed time is visible for one position less.
        reach = 30 if model.config.num_seeds else 10 if field == "time" else 11
        for one, two, predicted in zip(before, after, predictions, strict=True):
            seen = torch.from_numpy((predicted.position > 9) & (predicted.position <= reach))
            moved = (one != two).any(-1)
            assert seen.any() and moved[seen].all(), field
            # The time of event 9 is also that of the request for it as the next item, or as the first of a window.
            last = 8 if field == "time" and predicted is not impressions else 9
            unmoved = torch.from_numpy((predicted.position >= 0) & (predicted.position <= last))
            assert not moved[unmoved].any(), field
