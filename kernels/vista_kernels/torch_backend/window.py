"""Cuts a packed batch into windows that fit the cache, and windows into tiles.

A *window* is a run of neighboring segments whose tokens fit the cache. A segment too long for that is cut into windows
of its own. Inside a window, segments of similar length make a tile [n, L]: a view where they are equally long, and a
padded gather otherwise. Python loops over windows and tiles, never over the users of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from vista_kernels.segments import IntArray, Segments
from vista_kernels.torch_backend.tile import Tile
from vista_kernels.torch_backend.workspace import scratch

WINDOW_ELEMENTS = 1 << 19
"""Numbers that one tensor of a window holds: 2 MB in float32."""
PADDING_LIMIT = 1.25
"""Padding enlarges a window by at most this factor, unless the lengths within one class already do."""
# 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, ...: a tile is at most half as long again as its shortest segment.
_LENGTH_CLASSES = np.unique(np.concatenate([2 ** np.arange(40), 3 * 2 ** np.arange(39)]).astype(np.int64))
BoolArray = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


@dataclass(frozen=True, slots=True)
class Window:
    """A run of tokens [start, stop) and the tiles that cover it."""

    start: int
    stop: int
    tiles: tuple[Tile, ...]
    padded: int
    """Rows of the padded buffer."""
    rows: slice
    """The run of segments from its first to its last. Empty ones among them are in no tile."""
    inverse: Tensor | None = None
    """[stop - start] row of the padded buffer that holds each token; None where they are the same.

    A token in no segment reads row 0, so a caller that leaves gaps between segments writes those tokens afterwards.
    """
    row_inverse: Tensor | None = None
    """Row of the buffer of states that holds each of `rows` (0 for empty ones); None where they are the same."""
    is_first: bool = True
    """No earlier window holds a part of its segments."""

    def buffer(self, slot: str, out: Tensor) -> Tensor:
        """Return the buffer [padded, ...] that the tiles write: a part of `out` where possible, else in the slot."""
        if self.inverse is None:
            return out[self.start : self.stop]
        return scratch(slot, (self.padded, *out.shape[1:]), out.dtype, out.device)

    def store(self, out: Tensor, buffer: Tensor) -> None:
        """Copy the padded buffer to the window's tokens of `out`, unless it is a part of `out`."""
        if self.inverse is not None:
            torch.index_select(buffer, 0, self.inverse, out=out[self.start : self.stop])

    def states(self, slot: str, z: Tensor) -> Tensor:
        """Return the buffer of states that the tiles write: a part of z [B, ...] where possible, else in the slot."""
        if self.row_inverse is None:
            return z[self.rows]
        return scratch(slot, (sum(tile.num for tile in self.tiles), *z.shape[1:]), z.dtype, z.device)

    def store_states(self, z: Tensor, buffer: Tensor) -> None:
        """Copy the buffer of states to z, unless it is a part of z; empty segments stay undefined."""
        if self.row_inverse is not None:
            torch.index_select(buffer, 0, self.row_inverse, out=z[self.rows])


def plan_windows(
    segments: Segments,
    *,
    token_elements: int,
    state_elements: int,
    device: torch.device,
    descending: bool = False,
    window_elements: int = WINDOW_ELEMENTS,
) -> Iterator[Window]:
    """Yield the windows that cover the segments' tokens, in order. Empty segments are in none.

    Windows are made when they are needed, so that the index tensors of only one exist at a time.

    Args:
        segments: [B] segments.
        token_elements: numbers per token (H * D), which bounds the tokens of a window.
        state_elements: numbers per segment's state (H * D * E), which bounds the segments of a window.
        device: where the index tensors lie.
        descending: the last window first.
        window_elements: numbers that one tensor of a window holds.
    """
    max_tokens = max_window_tokens(token_elements, window_elements)
    max_rows = max_segments(state_elements, window_elements)
    filled = np.flatnonzero(segments.lengths)
    segments = segments[filled]
    starts, stops = segments.starts, segments.starts + segments.lengths
    long = is_long(segments.lengths, token_elements, window_elements)
    next_long = np.append(np.flatnonzero(long), len(filled))
    windows: list[Callable[[], Window]] = []
    first = 0
    while first < len(filled):
        if long[first]:
            begin, end, row = int(starts[first]), int(stops[first]), int(filled[first])
            windows += [
                partial(_long_window, start, min(start + max_tokens, end), row, is_first=start == begin)
                for start in range(begin, end, max_tokens)
            ]
            first += 1
            continue
        last = int(np.searchsorted(stops, starts[first] + max_tokens, side="right"))
        last = max(min(last, first + max_rows, int(next_long[np.searchsorted(next_long, first)])), first + 1)
        part = slice(first, last)
        windows.append(partial(_pack_window, segments[part], filled[part], device))
        first = last
    for make in reversed(windows) if descending else windows:
        yield make()


def plan_state_windows(segments: Segments, z: Tensor, window_elements: int) -> Iterator[Window]:
    """Yield the windows of segments whose states are z [B, H, D, E] and whose tokens are [T, H, D] and [T, H, E]."""
    heads, width, value_width = z.shape[1:]
    return plan_windows(
        segments,
        token_elements=heads * max(width, value_width),
        state_elements=heads * width * value_width,
        device=z.device,
        window_elements=window_elements,
    )


def is_long(lengths: IntArray, token_elements: int, window_elements: int) -> BoolArray:
    """Return for each segment whether `plan_windows` gives it windows of its own."""
    return lengths > max_window_tokens(token_elements, window_elements) // 4


def max_window_tokens(token_elements: int, window_elements: int) -> int:
    """Return the number of tokens in each window."""
    return max(256, window_elements // max(token_elements, 1))


def max_segments(state_elements: int, window_elements: int) -> int:
    """Return of how many segments a window holds the states."""
    return max(16, 2 * window_elements // max(state_elements, 1))


def _long_window(start: int, stop: int, row: int, *, is_first: bool) -> Window:
    """Return a window of the tokens [start, stop) of one segment."""
    rows = slice(row, row + 1)
    return Window(start, stop, (Tile(1, stop - start, rows, start, 0),), stop - start, rows, is_first=is_first)


def pack_tile(segments: Segments, rows: IntArray, device: torch.device) -> Tile:
    """Return the segments `rows` (rising, none empty) as one tile: a view where they are equal and lie end to end."""
    segments = segments[rows]
    return _view(segments, rows, device) or _padded_tile(segments, rows, 0, 0, device)[0]


def _pack_window(segments: Segments, rows: IntArray, device: torch.device) -> Window:
    """Return one window of the given segments (none empty): a view, one padded tile, or one tile per length class."""
    first, last = int(segments.starts[0]), int(segments.starts[-1] + segments.lengths[-1])
    num = len(segments)
    covered = slice(int(rows[0]), int(rows[-1]) + 1)
    row_inverse: IntArray = np.zeros(covered.stop - covered.start, dtype=np.int64)
    view = _view(segments, rows, device)
    if view is not None:
        row_inverse[rows - covered.start] = np.arange(num)
        gathered = None if len(row_inverse) == num else torch.from_numpy(row_inverse).to(device)
        return Window(first, last, (view,), last - first, covered, row_inverse=gathered)
    tiles: list[Tile] = []
    padded = states = 0
    inverse: IntArray = np.zeros(last - first, dtype=np.int64)
    for group in _group_by_length(segments.lengths):
        tile, tokens, valid = _padded_tile(segments[group], rows[group], padded, states, device)
        inverse[tokens[valid] - first] = padded + np.flatnonzero(valid)
        row_inverse[rows[group] - covered.start] = states + np.arange(len(group))
        padded += tile.num * tile.length
        states += tile.num
        tiles.append(tile)
    gathered = None if len(tiles) == 1 and len(row_inverse) == num else torch.from_numpy(row_inverse).to(device)
    return Window(
        first, last, tuple(tiles), padded, covered, torch.from_numpy(inverse).to(device), row_inverse=gathered
    )


def _group_by_length(lengths: IntArray) -> list[IntArray]:
    """Group segments of similar length, in as few groups as keep padding within PADDING_LIMIT."""
    ordered, total = np.sort(lengths), int(lengths.sum())
    if len(lengths) * int(ordered[-1]) <= PADDING_LIMIT * total:
        return [np.arange(len(lengths))]
    ends = np.searchsorted(ordered, _LENGTH_CLASSES[: np.searchsorted(_LENGTH_CLASSES, ordered[-1]) + 1], side="right")
    ends = np.unique(ends[ends > 0])
    counts: list[int] = np.diff(ends, prepend=0).tolist()
    tops: list[int] = ordered[ends - 1].tolist()
    spare = PADDING_LIMIT * total - sum(n * top for n, top in zip(counts, tops, strict=True))
    while len(tops) > 1:
        costs = [n * (above - top) for n, (top, above) in zip(counts[:-1], pairwise(tops), strict=True)]
        cheapest = min(range(len(costs)), key=costs.__getitem__)
        if costs[cheapest] > spare:
            break
        spare -= costs[cheapest]
        counts[cheapest + 1] += counts[cheapest]
        del counts[cheapest], tops[cheapest]
    groups = np.searchsorted(tops, lengths)
    return [np.flatnonzero(groups == g) for g in range(len(tops))]


def _view(segments: Segments, rows: IntArray, device: torch.device) -> Tile | None:
    """Return the segments as a tile without a gather, where they are equally long and lie end to end."""
    starts, lengths = segments.starts, segments.lengths
    first, longest, num = int(starts[0]), int(lengths.max()), len(starts)
    if num * longest == int(starts[-1] + lengths[-1]) - first == int(lengths.sum()):
        return Tile(num, longest, _compact(rows, device), first, 0)
    return None


def _padded_tile(
    segments: Segments, rows: IntArray, place: int, state_place: int, device: torch.device
) -> tuple[Tile, IntArray, BoolArray]:
    """Return a padded tile, the token at each of its places, and whether the place is not padding."""
    starts, lengths = segments.starts, segments.lengths
    length = int(lengths.max())
    steps = np.arange(length)
    tokens = (starts[:, None] + np.minimum(steps, lengths[:, None] - 1)).ravel()
    valid = (steps < lengths[:, None]).ravel()
    mask = None if bool(valid.all()) else torch.from_numpy(valid.reshape(-1, length)).to(device)
    index = torch.from_numpy(tokens).to(device)
    tile = Tile(len(starts), length, _compact(rows, device), int(starts[0]), place, state_place, index, mask)
    return tile, tokens, valid


def _compact(rows: IntArray, device: torch.device) -> slice | Tensor:
    first, last = int(rows[0]), int(rows[-1]) + 1
    return slice(first, last) if last - first == len(rows) else torch.from_numpy(rows).to(device)
