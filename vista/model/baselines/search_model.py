"""Two-stage baselines: a search over the whole history names K events, and attention reads them: SIM and TWIN.

Letters: n histories of a tile, L events, C queries per history, R distinct items of a tile, N queries, K found events,
H heads, D head dim, M model dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vista.model.baselines.candidate_model import CandidateModel
from vista.model.baselines.event_queries import EventQueries
from vista.model.baselines.found_events import FoundEvents
from vista.model.baselines.packed_events import PackedEvents
from vista.model.baselines.padded_tiles import PaddedTile, tiles
from vista.model.layers import split_heads


class SearchModel(CandidateModel):
    """The search. An architecture adds what it scores by, and the attention."""

    scores_at_once: int = 1 << 22
    """Scores of a search that are held at once (those of one query always are)."""

    def search_query(self, query: Tensor) -> Tensor:
        """[..., M] queries -> [..., M], whose products with keys are scores."""
        raise NotImplementedError

    def search_key(self, items: Tensor) -> Tensor:
        """[..., M] vectors of items -> [..., M]."""
        raise NotImplementedError

    def search_bias(self, action: Tensor, age_ms: Tensor) -> Tensor | None:
        """Added to scores [n, C, L], of action int64 [n, 1, L] and age int64 [n, C, L]; None adds nothing."""
        return None

    def find(self, events: PackedEvents, queries: EventQueries) -> FoundEvents:
        """The events that `search` names, a tile of histories at a time."""
        longest = int(events.offsets.diff().max())
        index = queries.seen.new_zeros(len(queries.seen), self.most_found(longest))
        valid = torch.zeros_like(index, dtype=torch.bool)
        for tile in tiles(events.offsets.cpu().numpy(), index.device, self.tile_tokens):
            entries = tile.entries(queries.history)
            if entries is None or tile.index.shape[1] == 0:
                continue
            row, real = entries
            local, visible = self.search(events, tile, queries, row)
            visible &= torch.arange(local.shape[2], device=row.device) < self.num_found(queries.seen[row])[..., None]
            packed = tile.index[:, None].expand(-1, row.shape[1], -1).gather(2, local)
            index[row[real], : local.shape[2]] = torch.where(visible, packed, 0)[real]
            valid[row[real], : local.shape[2]] = visible[real]
        return FoundEvents(index, valid)

    @torch.no_grad()
    def search(
        self, events: PackedEvents, tile: PaddedTile, queries: EventQueries, row: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The events with the highest scores, the highest first; `find` uses as many of them as each query may.

        Args:
            row: int64 [n, C] queries of each of the tile's histories.

        Returns:
            (places int64 [n, C, k] in the tile's histories, bool [n, C, k]: False for events that the query must not
            see). k is `most_found` in a history of the tile's length.
        """
        n, length = tile.index.shape
        count = self.most_found(length)
        # The first part of a score depends on the item only, so events of one item share it, bit for bit.
        distinct, place = torch.unique(events.item[tile.index], return_inverse=True)
        newest_clock, places, visible = events.newest_clock(queries), [], []
        # Under autocast, training would pick events by bfloat16 scores and serving by float32 scores.
        with torch.autocast(row.device.type, enabled=False):
            key = self.search_key(events.table[distinct] * self.scale)
            for part in torch.split(row, max(1, self.scores_at_once // (n * max(length, len(distinct)))), 1):
                hidden = self.hidden(queries.seen[part], length)
                score = (self.search_query(queries.vectors[part]) @ key.t()).gather(2, place[:, None].expand_as(hidden))
                age = newest_clock[part][..., None] - events.clock[tile.index][:, None]
                bias = self.search_bias(events.action[tile.index][:, None], age)
                score = (score if bias is None else score + bias).masked_fill(hidden, -torch.inf)
                places.append(newest_of_highest(score, count))
                visible.append(~hidden.gather(2, places[-1]))
        return torch.cat(places, 1), torch.cat(visible, 1)

    def num_found(self, seen: Tensor) -> Tensor:
        """int64 of the shape of `seen`: events that the search finds at most among so many."""
        readable = seen.clamp(max=self.config.history_limit) if self.config.history_limit else seen
        return (readable.double() * self.config.search_share).round().long().clamp(min=self.config.search_top_k)

    def most_found(self, length: int) -> int:
        """Most events that the search finds in a history of this length."""
        return min(int(self.num_found(torch.tensor(length))), length)

    def hidden(self, seen: Tensor, length: int) -> Tensor:
        """bool [n, C, L]: events after the first `seen` int64 [n, C], or before the newest `history_limit` of these."""
        step, seen = torch.arange(length, device=seen.device), seen[..., None]
        late = step >= seen
        return late | (step < seen - self.config.history_limit) if self.config.history_limit else late


def newest_of_highest(score: Tensor, count: int) -> Tensor:
    """int64 [..., count]: places of the highest scores [..., L], in float32; of equal scores the last ones."""
    bits = score.float().view(torch.int32)
    # As integers, positive floats have their own order, and negative ones the reverse.
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    unequal = (ordered << 32) | torch.arange(score.shape[-1], device=score.device)
    return unequal.topk(count).indices


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, valid: Tensor, num_heads: int) -> Tensor:
    """Multi-head target attention [N, M]; 0 if a query found no events.

    Args:
        query: [N, M]; key, value: [N, K, M]; bias: [N, K, H], added to the scores; valid: bool [N, K].
    """
    query, key, value = (split_heads(each, num_heads) for each in (query, key, value))
    score = torch.einsum("nhd,nkhd->nkh", query, key) * query.shape[-1] ** -0.5
    score = (score if bias is None else score + bias).masked_fill(~valid[..., None], torch.finfo(score.dtype).min)
    weight = torch.softmax(score, 1) * valid[..., None]
    return torch.einsum("nkh,nkhd->nhd", weight.to(value.dtype), value).flatten(1)
