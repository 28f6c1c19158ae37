"""Stage 2 and its heads in float64, written from the formulas of `vista.model.target_attention`, and random models.

Letters as in `vista_kernels.cpp_backend.library`; N tokens of the context, Q queries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista_kernels.cpp_backend.library import (
    CountedItems,
    CountedPairs,
    EventRows,
    ItemReads,
    Network,
    PairFeatureRows,
    RecentItems,
    ScoringPlan,
    ScoringRequest,
)

Array = NDArray[Any]
NUM_ITEMS, NUM_ACTIONS, NUM_GAPS, NUM_FOLLOWERS = 40, 3, 5, 6


def drawn_plan(
    rng: np.random.Generator,
    *,
    softmax: bool,
    heads: int,
    head_dim: int,
    seeds: int,
    tail: int,
    num_layers: int,
    tasks: int,
    columns: int,
    space: int,
    recent: int,
) -> ScoringPlan:
    """A model with random weights; `columns` of counters, dimensions of the item `space`, and `recent` items whose
    followers are summed: 0 without each of them."""
    dim, pooled, statistics = heads * head_dim, 2 if space else 0, 3 if columns or space else 0
    feed, num_sums = 2 * dim, 2 if recent else 0
    extra = (3 if columns else 0) + num_sums
    num_codes, of_items = columns + 1 if columns else 0, pooled + statistics + tasks if space else 0

    def draw(*shape: int, scale: float = 1.0) -> Any:
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    def matrix(*shape: int) -> Any:
        return draw(*shape, scale=shape[-1] ** -0.5)

    def layer() -> dict[str, Any]:
        head_norm = 1 + draw(head_dim if softmax else dim, scale=0.1)
        weights = {"norm": 1 + draw(dim, scale=0.1), "projections": matrix(4 * dim, dim)}
        weights |= {"bias": draw(heads, tail + 1), "head_norm": head_norm, "out": matrix(dim, dim)}
        if softmax:
            weights |= {"feed_norm": 1 + draw(dim, scale=0.1), "up": matrix(2 * feed, dim), "down": matrix(dim, feed)}
        return weights

    def network(inputs: int, outputs: int) -> Network:
        parts = {"first": matrix(16, inputs), "first_bias": draw(16), "second": matrix(16, 16)}
        return Network(**parts, second_bias=draw(16), last=matrix(outputs, 16))

    return ScoringPlan(
        softmax=softmax,
        heads=heads,
        tail=tail,
        norm_eps=1e-5,
        input_scale=1.0 if softmax else dim**0.5,
        temperature=0.2,
        layers=[layer() for _ in range(num_layers)],
        summary_norm=1 + draw(dim, scale=0.1),
        summary_kind=draw(seeds, dim, scale=0.1),
        final_norm=1 + draw(dim, scale=0.1),
        task_weight=matrix(tasks, dim),
        task_bias=draw(tasks),
        actions=draw(NUM_ACTIONS, dim, scale=0.1) if tail % 2 else None,
        gaps=draw(NUM_GAPS, dim, scale=0.1) if tail % 3 else None,
        request=draw(dim, scale=0.1),
        space=space,
        pooled=pooled,
        statistics=statistics,
        gain=0.7,
        wide_weight=draw(extra + pooled, dim, scale=0.1),
        wide_bias=draw(extra + pooled, scale=0.1),
        decay=(0.7 ** np.arange(recent)).astype(np.float32),
        followers=NUM_FOLLOWERS,
        gate_weight=draw(dim) if columns else None,
        gate_bias=0.5 if columns else 0.0,
        columns=columns,
        code_vectors=draw(64 * columns, 5 * dim, scale=0.05) if columns and tasks else None,
        candidate_head=network(num_codes + of_items, tasks) if tasks and (columns or space) else None,
        counted_head=network(columns + 2 + statistics + num_sums + pooled, 1) if columns else None,
    )


def drawn_request(
    rng: np.random.Generator,
    plan: ScoringPlan,
    *,
    lengths: list[int],
    num_events: list[int],
    shared: bool,
    catalog: bool,
    projected: bool,
    features: bool,
    whole_events: bool,
) -> ScoringRequest:
    """A request of users with `num_events` events each; what padding says is NaN or an index of another event.

    Args:
        lengths: candidates of each user; of the first one for all, if they are shared.
        catalog: the candidates are the first rows of all tables.
        projected: the table of candidates has their projections.
    """
    seeds, dim = plan.summary_kind.shape
    num_users = len(lengths)
    lengths = [lengths[0]] * num_users if shared else lengths
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    num_pairs, columns, tasks = int(offsets[-1]), plan.columns, len(plan.task_bias)

    def draw(*shape: int, scale: float = 1.0) -> Any:
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    valid = np.arange(plan.tail) >= plan.tail - np.array(num_events)[:, None]
    added = draw(num_users, plan.tail, dim, scale=0.1)
    added[~valid] = np.nan
    shape = valid.shape
    vectors = draw(NUM_ITEMS, 5 * dim if projected else dim, scale=1.0 if plan.softmax else dim**-0.5)
    events = EventRows(
        valid,
        None if whole_events else rng.integers(0, NUM_ITEMS, shape),
        rng.integers(0, NUM_ACTIONS, shape),
        rng.integers(0, NUM_GAPS, shape),
        vectors,
        added if whole_events or rng.random() < 0.5 else None,
    )
    rows = rng.integers(0, NUM_ITEMS, lengths[0] if shared else num_pairs)
    pair_features = counted = counted_next = None
    if features:
        count = num_pairs + 2
        pair_features = PairFeatureRows(
            draw(9, 5 * dim, scale=0.1),
            bool(rng.integers(2)),
            offsets[:-1] + 1,
            rng.integers(0, 9, (count, 2)),
            draw(count, 3),
        )
    if columns:
        pairs = np.flatnonzero(rng.random(num_pairs) < 0.4)
        codes = rng.integers(0, 64, (len(pairs), columns + 1)).astype(np.uint8)
        counted = CountedPairs(pairs, codes)
        some = np.flatnonzero(rng.random(num_pairs) < 0.4)
        codes = rng.integers(0, 64, (len(some), columns)).astype(np.uint8)
        counted_next = CountedItems(some, codes, draw(num_users))
    recent = None
    if len(plan.decay):
        # Few items, so that some follow several of the newest; half of the rows are padded.
        followers = rng.integers(0, 12, (NUM_ITEMS, NUM_FOLLOWERS)).astype(np.int32)
        newest = rng.integers(0, NUM_ITEMS, (num_users, len(plan.decay))) * (rng.random((num_users, 1)) < 0.8)
        recent = RecentItems(newest, followers, np.abs(draw(NUM_ITEMS, NUM_FOLLOWERS)))
    width = dim + plan.space + len(plan.wide_bias) - plan.pooled
    of_head = 2 * len(plan.candidate_head.first) if plan.candidate_head else 0
    return ScoringRequest(
        summary=draw(num_users, seeds, dim),
        events=events,
        offsets=offsets,
        rows=None if catalog else rows,
        shared=shared,
        candidates=vectors if tasks else None,
        retrieval=draw(NUM_ITEMS, width, scale=dim**-0.5),
        added=draw(num_users, 5 * dim, scale=0.1) if rng.random() < 0.7 else None,
        pooled=draw(num_users, 2, plan.space, scale=plan.space**-0.5) if plan.space else None,
        reads=ItemReads(
            draw(NUM_ITEMS, plan.space, scale=plan.space**-0.5) if plan.space else None,
            draw(NUM_ITEMS, plan.statistics),
            draw(NUM_ITEMS, tasks),
        ),
        recent=recent,
        features=pair_features if tasks else None,
        counted=counted if tasks else None,
        counted_next=counted_next,
        adapter=draw(len(plan.layers) * dim + tasks + of_head) if rng.random() < 0.5 else None,
    )


def oracle(plan: ScoringPlan, request: ScoringRequest) -> tuple[Array, Array, Array]:
    """Logits [N, tasks], scores [N], and user vectors [B, M'] in float64."""
    dim = plan.summary_kind.shape[1]
    logits, scores, users = [], [], []
    for user in range(len(request.summary)):
        first, stop = request.offsets[user : user + 2].tolist()
        rows = np.arange(stop - first)
        if request.rows is not None:
            rows = request.rows if request.shared else request.rows[first:stop]
        context = Context(plan, request, user)
        token = plan.request.astype(np.float64) + (context.tail[-1] if context.valid[-1] else 0)
        own = project(plan, 0, token[None])
        both = np.concatenate([token[None], own], 1)
        if request.added is not None:
            both = both + request.added[user]
        output = context.query(both[:, :dim], both[:, dim:])[0]
        length = np.linalg.norm(output)
        unit = plan.gain * output / (length or 1.0)  # 0 stays 0
        weights = plan.wide_weight @ unit + plan.wide_bias
        others, of_pooled = np.split(weights, [len(weights) - plan.pooled])
        cosines = np.zeros((len(rows), 0))
        vector = np.concatenate([unit, others])
        if request.pooled is not None:
            pooled = request.pooled[user].astype(np.float64)
            vector = np.concatenate([unit, of_pooled @ pooled, others])
            cosines = request.reads.space[rows].astype(np.float64) @ pooled.T
        users.append(vector)
        score = request.retrieval[rows].astype(np.float64) @ vector / plan.temperature
        sums = np.zeros((len(rows), 0))
        if (recent := request.recent) is not None:
            sums = np.stack([sums_over_followers(plan, recent, user, row) for row in rows.tolist()] or [np.zeros(2)])
            sums = sums[: len(rows)]
            score = score + sums @ vector[-2:]
        if (items := request.counted_next) is not None:
            mine = np.flatnonzero((items.pairs >= first) & (items.pairs < stop))
            place = items.pairs[mine] - first
            inputs = np.column_stack(
                [
                    items.codes[mine] / 8 - 2,
                    score[place] / 5,
                    request.reads.statistics[rows[place]],
                    sums[place],
                    cosines[place],
                    np.full(len(mine), items.event_counts[user]),
                ]
            )
            score[place] = network(plan.counted_head, inputs)[:, 0] + unit @ plan.gate_weight + plan.gate_bias
        scores.append(score)
        if request.candidates is None:
            continue
        both = request.candidates[rows].astype(np.float64)
        if both.shape[1] == dim:
            both = np.concatenate([both, project(plan, 0, both)], 1)
        if request.added is not None:
            both = both + request.added[user]
        if (of_pairs := request.features) is not None:
            at = of_pairs.first[user] + np.arange(len(rows)) * (not of_pairs.per_user)
            both = both + of_pairs.table[of_pairs.entries[at]].astype(np.float64).sum(1)
            both = both + of_pairs.dense[at] @ of_pairs.table[-of_pairs.dense.shape[1] :].astype(np.float64)
        more = np.zeros((len(rows), len(plan.task_bias)))
        if (counted := request.counted) is not None:
            mine = np.flatnonzero((counted.pairs >= first) & (counted.pairs < stop))
            place, codes = counted.pairs[mine] - first, counted.codes[mine].astype(np.int64)
            index = codes[:, :-1] + 64 * np.arange(codes.shape[1] - 1)
            both[place] += plan.code_vectors[index].astype(np.float64).sum(1)
            if not plan.pooled:
                more[place] = network(context.head, codes / 8 - 2)
        if plan.pooled:
            codes = np.zeros((len(rows), plan.columns + 1 if plan.columns else 0))
            if counted is not None:
                codes[place] = counted.codes[mine]
            of_items = cosines, request.reads.statistics[rows], request.reads.rates[rows]
            more = network(context.head, np.column_stack([codes / 8 - 2, *of_items]))
        more = more + context.adapter[dim * len(plan.layers) :]
        logits.append(context.query(both[:, :dim], both[:, dim:]) @ plan.task_weight.T + plan.task_bias + more)
    empty = np.zeros((0, len(plan.task_bias)))
    return np.concatenate([empty, *logits]), np.concatenate([np.zeros(0), *scores]), np.stack(users)


def sums_over_followers(plan: ScoringPlan, recent: RecentItems, user: int, row: int) -> Array:
    """The two sums of an item: as a follower of the newest item, and of those before it."""
    sums = np.zeros(2)
    for back, item in enumerate(recent.rows[user].tolist()):
        is_follower = (recent.items[item] == row) & (row != 0)
        sums[int(back > 0)] += float(plan.decay[back]) * recent.weights[item][is_follower].astype(np.float64).sum()
    return sums


class Context:
    """Keys and values of one user's summary and tail."""

    def __init__(self, plan: ScoringPlan, request: ScoringRequest, user: int) -> None:
        seeds, dim = plan.summary_kind.shape
        events = request.events
        self.plan, self.valid = plan, events.valid[user]
        sizes, head = [dim * len(plan.layers), len(plan.task_bias)], plan.candidate_head
        self.adapter, self.head = np.zeros(sum(sizes)), head
        if request.adapter is not None:
            self.adapter, biases = np.split(request.adapter.astype(np.float64), [sum(sizes)])
            if head is not None:
                first, second = np.split(biases, 2)
                self.head = dataclasses.replace(head, first_bias=first, second_bias=second)
        tail = np.zeros((plan.tail, dim))
        if events.items is not None:
            tail = events.vectors[events.items[user], :dim].astype(np.float64)
            if plan.actions is not None:
                tail = tail + plan.actions[events.actions[user]]
            if plan.gaps is not None:
                tail = tail + plan.gaps[events.gaps[user]]
        if events.added is not None:
            tail = tail + events.added[user]
        self.tail = np.where(self.valid[:, None], tail, 0.0)
        summary = normalize(request.summary[user].astype(np.float64), plan.summary_norm) + plan.summary_kind
        x = np.concatenate([summary, self.tail * plan.input_scale])
        self.keys, self.values = [], []
        token = np.arange(len(x))
        distance = token[:, None] - token
        seen = (token < seeds) | ((token[:, None] >= seeds) & (distance >= 0))
        seen &= np.concatenate([np.ones(seeds, bool), self.valid]) | ((distance == 0) & (token >= seeds))
        for index, layer in enumerate(plan.layers):
            query, gate, key, value = parts(plan, project(plan, index, x))
            self.keys.append(key)
            self.values.append(value)
            bias = layer["bias"][:, np.clip(distance, 0, plan.tail)]
            bias = np.where((token[:, None] >= seeds) & (token >= seeds), bias, 0.0)
            heads = attend(plan, query, key, value, np.where(seen, bias, -np.inf), None)
            x = mix(plan, layer, x, heads, gate)

    def query(self, x: Array, projections: Array) -> Array:
        """Normalized outputs [Q, M] of queries with their projections in layer 1."""
        plan, seeds = self.plan, len(self.plan.summary_kind)
        x = x * plan.input_scale
        for index, layer in enumerate(plan.layers):
            query, gate, key, value = parts(plan, projections if index == 0 else project(plan, index, x))
            bias = np.concatenate([np.zeros((plan.heads, seeds)), layer["bias"][:, :0:-1]], 1)
            hidden = np.concatenate([np.zeros(seeds, bool), ~self.valid])
            bias = np.where(hidden, -np.inf, bias)[:, None]
            own = (query * key).sum(-1) * scale_of(plan) + layer["bias"][:, :1]
            heads = attend(plan, query, self.keys[index], self.values[index], bias, (own, value))
            x = mix(plan, layer, x, heads, gate) + self.adapter[index * x.shape[1] :][: x.shape[1]]
        return normalize(x, plan.final_norm)


def attend(plan: ScoringPlan, query: Array, key: Array, value: Array, bias: Array, own: Any) -> Array:
    """[H, Q, D]; bias is -inf where a token is hidden; `own` is the score [H, Q] and value of each query itself."""
    scores = query @ key.transpose(0, 2, 1) * scale_of(plan) + bias
    if own is not None:
        scores = np.concatenate([scores, own[0][..., None]], 2)
    if plan.softmax:
        with np.errstate(invalid="ignore"):
            weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights = weights / weights.sum(-1, keepdims=True)
    else:
        weights = np.where(np.isneginf(scores), 0.0, silu(np.where(np.isneginf(scores), 0.0, scores)))
    if own is None:
        return weights @ value
    return weights[..., :-1] @ value + weights[..., -1:] * own[1]


def mix(plan: ScoringPlan, layer: Mapping[str, Array], x: Array, heads: Array, gate: Array) -> Array:
    if not plan.softmax:
        flat = heads.transpose(1, 0, 2).reshape(x.shape)
        return x + (normalize(flat, layer["head_norm"]) * gate) @ layer["out"].astype(np.float64).T
    normed = normalize(heads, layer["head_norm"]).transpose(1, 0, 2).reshape(x.shape)
    x = x + (normed / (1 + np.exp(-gate))) @ layer["out"].astype(np.float64).T
    up = normalize(x, layer["feed_norm"]) @ layer["up"].astype(np.float64).T
    opened, value = np.split(up, 2, 1)
    return x + (silu(opened) * value) @ layer["down"].astype(np.float64).T


def project(plan: ScoringPlan, index: int, x: Array) -> Array:
    return normalize(x, plan.layers[index]["norm"]) @ plan.layers[index]["projections"].astype(np.float64).T


def parts(plan: ScoringPlan, projections: Array) -> tuple[Array, Array, Array, Array]:
    query, gate, key, value = np.split(projections if plan.softmax else silu(projections), 4, 1)
    return split(plan, query), gate, split(plan, key), split(plan, value)


def split(plan: ScoringPlan, x: Array) -> Array:
    return x.reshape(len(x), plan.heads, x.shape[1] // plan.heads).transpose(1, 0, 2)


def scale_of(plan: ScoringPlan) -> float:
    return float((plan.summary_kind.shape[1] / plan.heads) ** -0.5) if plan.softmax else 1.0


def normalize(x: Array, weight: Array, eps: float = 1e-5) -> Array:
    centered = x - x.mean(-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + eps) * weight


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def network(net: Network, inputs: Array) -> Array:
    hidden = silu(inputs @ net.first.T.astype(np.float64) + net.first_bias)
    return silu(hidden @ net.second.T.astype(np.float64) + net.second_bias) @ net.last.T.astype(np.float64)
