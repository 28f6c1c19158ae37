"""What refresh, scorer and validation compute with a trained model: no gradients, packed histories, NumPy inputs.

Letters: B users, T packed events, S seeds, L tail length, C candidates, M model dim, M' width of retrieval vectors,
V items of the vocabulary, E counted items of all users together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vista.arrays import Float32s, Int
from vista.config.checks import Mixing
from vista.counters.keys import UserCounters
from vista.examples.transitions import TransitionTable, of_candidates, transition_sums
from vista.log.event_log import EventLog
from vista.log.features import row_features
from vista.log.histories import Histories, RowFeatures, token_groups
from vista.model.features import EncodedRows, RowFeatureReader
from vista.model.history_states import default_slice_len, embed, history_states, reach
from vista.model.ranking_model import RankingModel
from vista.model.serving_model import UNKNOWN_ITEM, PaddedTail, gap_buckets, newest_first
from vista.model.summarizer import Summarizer
from vista.model.target_attention import TargetContext
from vista.model.vista_model import VistaModel

ROW_TILE = 8
"""Matrix products give a row the same bits regardless of the other rows, if the number of rows is a multiple of this.
Remaining rows take another path, which adds in another order (MKL on AVX2: up to 3 rows, or 11 with two threads)."""


def newest(histories: Histories, limit: int) -> Histories:
    """At most the newest `limit` events of each history; 0 takes all."""
    if limit == 0 or histories.num_events == 0 or int(histories.lengths.max()) <= limit:
        return histories
    return histories.select(np.maximum(histories.lengths - limit, 0), histories.lengths)


@torch.inference_mode()
def summarize(model: VistaModel, histories: Histories, slice_len: int | None = None) -> Tensor:
    """Summaries of packed histories.

    Args:
        model: in eval mode.
        histories: whole ones, with items as model rows (`VistaModel.item_rows`).
        slice_len: events per pass, which bounds the memory; None takes `default_slice_len`.

    Returns:
        float32 [B, S, M]; for an empty history, what the seeds alone give.
    """
    histories = newest(histories, model.stage1.history_limit)
    if model.summarizer is None:
        return torch.zeros(histories.num_users, 0, model.config.dim, device=model.device)
    if model.stage1.mixing is Mixing.separable:
        state = history_states(model, histories, slice_len)
        return model.summarizer.read(state.z, state.n).float()
    slice_len = default_slice_len(model) if slice_len is None else slice_len
    groups = token_groups(histories.lengths, slice_len)
    parts = [
        _summarize_set(model, model.summarizer, histories.select_users(g.start, g.stop), slice_len) for g in groups
    ]
    return torch.cat([torch.empty(0, model.config.num_seeds, model.config.dim, device=model.device), *parts])


# Sums of the vectors that the item space has of events (`vista.examples.item_spaces`). A record holds the mean over all
# of its events as a row after those of the summary, with zeros behind its r numbers. Letters: N users, r dimensions.

EVENTS_AT_ONCE = 1 << 16
"""Events whose vectors are held at once while they are added up."""


@torch.inference_mode()
def pooled_sums(model: VistaModel, item: NDArray[Any], action: NDArray[Any], offsets: Int) -> NDArray[np.float64]:
    """Sums of the vectors of packed events, float64 [N, r]; r is 0 for a model without pooled vectors.

    They are exact, so they have the same bits whichever events are added first.

    Args:
        item: int [T] model rows, as histories have them.
        action: int [T] codes.
        offsets: int64 [N + 1].
    """
    sums = torch.zeros(len(offsets) - 1, model.config.space_dim, dtype=torch.float64, device=model.device)
    if model.config.space_dim:
        owner, row = np.repeat(np.arange(len(sums)), np.diff(offsets)), item.astype(np.int64)
        for first in range(0, len(row), EVENTS_AT_ONCE):
            part = slice(first, first + EVENTS_AT_ONCE)
            index = torch.from_numpy(row[part]).to(model.device)
            vectors = model.item_space[index]
            if (weights := model.item_space_weights) is not None:
                own = torch.from_numpy(action[part].astype(np.int64)).to(model.device)
                vectors = vectors * weights[index, own, None]
            sums.index_add_(0, torch.from_numpy(owner[part]).to(model.device), vectors.double())
    return sums.cpu().numpy()


def pooled_rows(model: VistaModel, sums: NDArray[np.float64], event_count: Int) -> NDArray[np.float32]:
    """What records hold of sums over all their events, float32 [N, 1, M], or [N, 0, M] for a model without them.

    Args:
        sums: [N, r] from `pooled_sums`.
        event_count: int64 [N].
    """
    width = model.config.space_dim
    rows = np.zeros((len(sums), int(width > 0), model.config.dim), np.float32)
    rows[:, :, :width] = (sums / np.maximum(event_count, 1)[:, None])[:, None]
    return rows


def _summarize_set(model: VistaModel, summarizer: Summarizer, histories: Histories, slice_len: int) -> Tensor:
    """Bidirectional summaries of some histories, or of one that is longer than a slice."""
    if histories.num_events <= slice_len:
        events, position, _ = embed(model, histories)
        offsets = torch.from_numpy(histories.offsets).to(model.device)
        return summarizer.summarize_set(summarizer.tokens(events, position), offsets).float()
    seeds = summarizer.seeds
    tokens = seeds.new_empty(histories.num_events, model.config.dim)
    for start in range(0, len(tokens), slice_len):
        stop, context = min(start + slice_len, len(tokens)), min(start, reach(model))
        events, position, _ = embed(model, histories.slice(0, start - context, stop))
        tokens[start:stop] = summarizer.tokens(events, position)[context:]
    return summarizer.summarize_long(tokens, slice_len).float()


@torch.inference_mode()
def request_context(
    model: VistaModel,
    summary: Tensor | Float32s,
    tail: PaddedTail,
    masks: list[Tensor] | None = None,
    users: EncodedRows | None = None,
) -> TargetContext:
    """Keys and values that all candidates of a request share.

    Args:
        summary: [B, S, M].
        tail: of the B users.
        masks: of `TargetAttention.request_masks`; None computes them.
        users: features of the B users; None if all are missing.
    """
    device = model.device
    vectors = model.item_vectors(torch.from_numpy(tail.item).to(device))
    action, gap = torch.from_numpy(tail.action).to(device), torch.from_numpy(tail.gap).to(device)
    events = model.encoder(vectors, action, gap, features=tail.features)
    stage = model.target_attention
    context = stage.encode_request(
        torch.as_tensor(summary, device=device), events, torch.from_numpy(tail.valid).to(device), masks
    )
    return replace(context, user=user_feature_vectors(model, users, len(summary)))


def request_bucket(model: VistaModel, now: Int | None, tail: PaddedTail) -> Tensor | None:
    """`gap_buckets` as int64 [B, 1] on the model's device."""
    bucket = gap_buckets(model, now, tail)
    return None if bucket is None else torch.from_numpy(bucket[:, None]).to(model.device)


def request_gap(model: VistaModel, now: Int | None, tail: PaddedTail) -> Tensor | None:
    """[B, 1, M] embeddings of `request_bucket`, which user vectors read."""
    return model.encoder.gap_vectors(request_bucket(model, now, tail))


def request_vectors(
    model: VistaModel, now: Int | None, tail: PaddedTail, features: EncodedRows | None = None
) -> Tensor | None:
    """[B, 1, M] vectors of requests, which candidates read; None if the model reads nothing of requests.

    Args:
        now: as in `request_bucket`.
        features: of the B requests; None if all are missing.
    """
    rows = request_rows(model, features, len(tail.last_time))
    return model.request_vectors(request_bucket(model, now, tail), rows)


def request_rows(model: RankingModel, features: EncodedRows | None, num_requests: int) -> EncodedRows | None:
    """Features [B, 1] of B requests, or [B, C] of their candidates; None for a model that reads none.

    Args:
        features: [B] or [B, C]; None if all are missing.
        num_requests: B.
    """
    if model.request_encoder is None:
        return None
    rows = _given_or_missing(features, model.request_features, num_requests)
    return rows if rows.entry.ndim == 3 else rows.apply(lambda part: part[:, None])


def _given_or_missing(given: EncodedRows | None, reader: RowFeatureReader | None, num_rows: int) -> EncodedRows:
    if given is not None:
        return given
    assert reader is not None
    return reader.missing(num_rows)


def user_feature_vectors(model: RankingModel, users: EncodedRows | None, num_users: int) -> Tensor | None:
    """[B, user_parts * M] vectors of the features of B users; None for a model that reads none.

    Their bits do not depend on the other users (`ROW_TILE`).

    Args:
        users: None if all are missing.
        num_users: B.
    """
    if model.user_encoder is None:
        return None
    rows = _given_or_missing(users, model.user_features, num_users).apply(_whole_tiles)
    vectors: Tensor = model.user_encoder(rows)
    return vectors[:num_users]


@torch.inference_mode()
def user_vectors(
    model: VistaModel,
    context: TargetContext,
    gap: Tensor | None,
    pooled: Tensor | None = None,
    biases: list[Tensor] | None = None,
) -> Tensor:
    """User vectors [B, M'] of the retrieval head. Their bits do not depend on the other users (`ROW_TILE`).

    Args:
        gap: [B, 1, M] from `request_gap`.
        pooled: float32 [B, J, r] from `pooled_vectors`; None for a model without.
        biases: `TargetAttention.query_biases` of queries that see the whole tail; None computes them.
    """
    stage, seen = model.target_attention, torch.full((1,), model.config.tail_len, device=model.device)
    # All rows of a tile are equal.
    x = model.request_tokens(seen.expand(ROW_TILE), context)
    tokens = stage.with_request(x, stage.layers[0].project(x), None if gap is None else gap.expand(-1, ROW_TILE, -1))
    outputs = stage.query(*tokens, None, seen, context, biases)
    return model.retrieval_users(outputs, None if pooled is None else pooled.unsqueeze(1))[:, 0]


@torch.inference_mode()
def item_vectors(model: RankingModel) -> Tensor:
    """Vectors [V, M'] of the vocabulary's items (`RankingModel.retrieval_items`), in the order of its rows (without the
    unknown item)."""
    rows = torch.arange(UNKNOWN_ITEM + 1, len(model.items) + 1, device=model.device)
    return model.retrieval_items(model.item_vectors(rows), rows)


@torch.inference_mode()
def catalog_scores(
    model: RankingModel,
    users: Tensor,
    items: Tensor,
    counters: UserCounters | None = None,
    tail: Int | None = None,
    pooled: Tensor | None = None,
) -> Tensor:
    """Scores [B, V] that rank all items for each user: logits of the softmax that training fits.

    Args:
        model: in eval mode.
        users: [B, M'] from `user_vectors`.
        items: [V, M'] from `item_vectors`.
        counters: of the B users as of their requests; None without counters.
        tail: int64 [B, L] model rows of the newest events, right-aligned; 0 pads. None for a model without transitions.
        pooled: as in `user_vectors`.
    """
    scores = users @ items.t() / model.temperature
    if counters is not None:
        transitions = None if tail is None else UserTransitions.of(model, tail)
        if transitions is not None:
            rows, step = range(UNKNOWN_ITEM + 1, UNKNOWN_ITEM + 1 + len(items)), max(1, MOST_PAIRS // (1 + len(items)))
            for part in (slice(low, low + step) for low in range(0, len(users), step)):  # sums take more than scores
                scores[part] += transition_scores(users[part], transitions.select(part).sums(rows))
        user, row = (torch.from_numpy(part).to(scores.device) for part in (counters.codes.owner, counters.codes.key))
        counted = counted_scores(model, users, items, counters, transitions, pooled)
        scores[user, row - UNKNOWN_ITEM - 1] = counted.to(scores.dtype)
    return scores


MOST_ROWS, MOST_PAIRS = 200_000, 1 << 21
"""Most items, and most pairs of a user and an item, whose sums are all made at once. Candidates are then looked up in a
few µs."""


@dataclass(frozen=True, slots=True)
class UserTransitions:
    """The transitions that a model knows, and those that the scores of B users read."""

    table: TransitionTable
    recent: Tensor
    """int64 [B, J] the users' newest items; 0 pads."""
    whole: Tensor | None
    """[B, K, 1 + V] sums of all rows, where that takes less time than a search for the candidates; else None."""

    @classmethod
    def of(cls, model: RankingModel, tail: Int) -> UserTransitions | None:
        """Those of requests; None for a model that reads no transitions. `tail`: as of `catalog_scores`."""
        if (table := model.transitions) is None:
            return None
        recent, num_rows = torch.from_numpy(newest_first(tail)).to(model.device), len(table.item)
        is_small = num_rows <= MOST_ROWS and len(tail) * num_rows <= MOST_PAIRS
        return cls(table, recent, transition_sums(table, recent, range(num_rows)) if is_small else None)

    def sums(self, wanted: Tensor | range) -> Tensor:
        """`transition_sums` float32 [B, K, C] of candidates [C] or [B, C], or of a range of rows."""
        if self.whole is None:
            return transition_sums(self.table, self.recent, wanted)
        if isinstance(wanted, range):
            return self.whole[:, :, wanted.start : wanted.stop]
        return of_candidates(self.whole, wanted.to(self.whole.device))

    def sums_of_counted(self, counters: UserCounters) -> Tensor:
        """float32 [E, K] of the users' counted items, in the order of the counters."""
        wanted = torch.from_numpy(counters.codes.padded()[0]).to(self.recent.device)
        return self.sums(wanted.clamp(min=0)).transpose(1, 2)[wanted >= 0]

    def select(self, users: slice) -> UserTransitions:
        """Those of some users."""
        whole = None if self.whole is None else self.whole[users]
        return UserTransitions(self.table, self.recent[users], whole)


def transition_scores(users: Tensor, sums: Tensor) -> Tensor:
    """What sums over transitions add to the scores of items that are not counted, float32 [B, C].

    Element by element, so that the bits do not depend on other users and items.

    Args:
        users: [B, M'] from `user_vectors`; the last K entries weigh the sums.
        sums: [B, K, C] from `transition_sums`.
    """
    weight = users[:, users.shape[1] - sums.shape[1] :]
    parts = [weight[:, k, None] * sums[:, k] for k in range(sums.shape[1])]
    return sum(parts[1:], parts[0])


@torch.inference_mode()
def counted_scores(
    model: RankingModel,
    users: Tensor,
    items: Tensor,
    counters: UserCounters,
    transitions: UserTransitions | None = None,
    pooled: Tensor | None = None,
) -> Tensor:
    """Scores of all counted items, float32 [E], in the order of `counters.codes`.

    Their bits do not depend on the other users, if the machine computes rows of a matrix product independently.

    Args:
        model: in eval mode, with counters.
        users: [B, M'] from `user_vectors`.
        items: [V, M'] from `item_vectors`.
        counters: of the B users as of their requests; E keys.
        transitions: of the B users; None for a model without.
        pooled: as in `user_vectors`.
    """
    assert model.counted is not None
    key, owner, codes = (
        torch.from_numpy(_whole_tiles(part)).to(items.device)
        for part in (counters.codes.key, counters.codes.owner, counters.of_counted_items())
    )
    vectors = items.index_select(0, (key - UNKNOWN_ITEM - 1).clamp_(min=0))
    num_events = torch.from_numpy(counters.num_events).to(items.device).index_select(0, owner)
    # In float64, because in float32 the last bit depends on where the row lies in memory.
    product = vectors.double().mul_(users.double().index_select(0, owner)).sum(-1)
    score = (product / model.temperature).float()
    statistics, unit = model.item_statistics.index_select(0, key), users[:, : model.config.dim]
    if transitions is not None:
        sums = transitions.sums_of_counted(counters)
        sums = F.pad(sums, (0, 0, 0, len(key) - len(sums)))
        score = score + transition_scores(users.index_select(0, owner), sums.unsqueeze(2))[:, 0]
        statistics = torch.cat([statistics, sums], 1)
    if pooled is not None:
        cosines = pooled_cosines(pooled.index_select(0, owner), model.item_space.index_select(0, key))
        statistics = torch.cat([statistics, cosines], 1)
    logit = model.counted.from_counters(codes.unsqueeze(1), score.unsqueeze(1), statistics.unsqueeze(1), num_events)
    return (logit[:, 0] + model.counted.from_user(unit).index_select(0, owner))[: len(counters.codes.key)]


def pooled_cosines(pooled: Tensor, items: Tensor) -> Tensor:
    """Cosines float32 [..., J] of pooled vectors [..., J, r] with vectors [..., r] of the item space, one pair a row.
    In float64, so that the bits do not depend on the other rows."""
    return (pooled.double() * items.double().unsqueeze(-2)).sum(-1).float()


def counter_logits(model: VistaModel, codes: NDArray[np.uint8]) -> Tensor:
    """Terms that counters uint8 [n, G * F + 1] of candidates add to their logits, float32 [n, num_tasks], by row. Of a
    model without pooled vectors, whose head reads nothing else."""
    assert model.candidate_head is not None
    rows = torch.from_numpy(_whole_tiles(codes)).to(model.device)
    logits: Tensor = model.candidate_head.logits(rows)[: len(codes)]
    return logits


def _whole_tiles(values: NDArray[Any]) -> NDArray[Any]:
    """Values [E, ...], padded with zeros to whole tiles."""
    missing = -len(values) % ROW_TILE
    if not missing:
        return values
    padded = np.zeros((len(values) + missing, *values.shape[1:]), values.dtype)
    padded[: len(values)] = values
    return padded


@torch.inference_mode()
def candidate_logits(
    model: VistaModel,
    context: TargetContext,
    request: Tensor | None,
    candidates: Tensor,
    codes: Tensor | None = None,
    inputs: Tensor | None = None,
) -> Tensor:
    """Task logits [B, C, num_tasks] of candidates int64 [B, C] (model rows).

    Args:
        request: [B, 1, M] from `request_vectors`.
        codes, inputs: as in `VistaModel.candidate_logits`.
    """
    seen = torch.full((1,), model.config.tail_len, device=model.device)
    request = None if request is None else request.expand(-1, candidates.shape[1], -1)
    vectors = model.item_vectors(candidates)
    return model.candidate_logits(vectors, request, seen, context, codes=codes, inputs=inputs)


class LogUsers:
    """All users of a log, with the codes of a model."""

    def __init__(self, reader: RowFeatureReader | None, log: EventLog) -> None:
        """
        Args:
            reader: of the model; None if it reads no features of users.
        """
        self._reader = reader
        self._rows = RowFeatures({})
        """Of all users, and of an unknown one in the last row."""
        if reader is not None:
            rows, values = row_features(log.user_features)
            known = reader.recoder(values)(rows, log.num_users).columns
            missing = RowFeatures.missing(reader.values, 1).columns
            self._rows = RowFeatures({name: np.concatenate([known[name], missing[name]]) for name in known})

    def features(self, users: Int) -> RowFeatures:
        """Features of users int64 [B] (rows of the log, or -1 for an unknown user); no columns for a model that reads
        none."""
        return self._rows.select(users)

    def encoded(self, users: Int) -> EncodedRows | None:
        """What the model's encoder reads of users, as in `features`; None for a model that reads none."""
        return None if self._reader is None else self._reader.encode(self._rows.select(users), len(users))

    def encoded_with_unknown(self, users: Int) -> EncodedRows | None:
        """`encoded` with a last row for an unknown user, which training reads."""
        return self.encoded(np.append(users, -1))
