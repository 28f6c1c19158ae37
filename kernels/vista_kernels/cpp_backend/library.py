"""Loads the library, and checks what is passed to it (`scoring.h`).

Letters: B users, N pairs of a user and a candidate, C candidates that all users share, S summary tokens, L events of
the tail, M model dim, H heads, D head dim, F width of the feed-forward network, M' width of retrieval vectors, V rows
of a table of items, J pooled vectors of r numbers, Z statistics of each item, R newest items with P followers each.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Mapping, Sequence
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista_kernels.cpp_backend.build import LIBRARY

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

_ERRORS = {
    2: (ValueError, "rows: lie outside the table of candidates or items"),
    3: (ValueError, "items, actions, gaps, recent: lie outside their tables"),
    4: (ValueError, "features: entries lie outside their table, or a pair has none"),
    5: (ValueError, "counted: pairs must ascend within the call, and codes lie below 64"),
}


class LibraryError(RuntimeError):
    """The library cannot be used; the message says why."""


class _Layer(ctypes.Structure):
    _fields_ = [
        (name, c_void_p) for name in ("norm", "projections", "bias", "head_norm", "out", "feed_norm", "up", "down")
    ]


class _Network(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("first", "first_bias", "second", "second_bias", "last")),
        *((name, c_int32) for name in ("inputs", "hidden", "outputs")),
    ]


class _Table(ctypes.Structure):
    _fields_ = [("values", c_void_p), ("rows", c_int64), ("width", c_int64)]


class _Plan(ctypes.Structure):
    _fields_ = [
        *(
            (name, c_int32)
            for name in ("bfloat16", "softmax", "dim", "heads", "seeds", "tail", "num_layers", "num_tasks", "feed")
        ),
        *((name, c_int32) for name in ("space", "pooled", "statistics", "extra", "recent", "followers")),
        *((name, c_float) for name in ("norm_eps", "input_scale", "temperature", "gain")),
        ("layers", POINTER(_Layer)),
        *((name, c_void_p) for name in ("summary_norm", "summary_kind", "final_norm", "task_weight", "task_bias")),
        *((name, c_void_p) for name in ("actions", "gaps")),
        *((name, c_int32) for name in ("num_actions", "num_gaps")),
        *((name, c_void_p) for name in ("request", "wide_weight", "wide_bias", "decay", "gate_weight")),
        ("gate_bias", c_float),
        ("code_vectors", c_void_p),
        ("code_columns", c_int32),
        ("candidate_head", _Network),
        ("counted_head", _Network),
    ]


class _Request(ctypes.Structure):
    _fields_ = [
        ("users", c_int64),
        ("summary", c_void_p),
        ("vectors", _Table),
        *((name, c_void_p) for name in ("items", "actions", "gaps", "valid", "events", "added")),
        *((name, c_void_p) for name in ("offsets", "rows")),
        ("shared", c_int32),
        *((name, _Table) for name in ("candidates", "retrieval", "space", "statistics", "rates")),
        *((name, c_void_p) for name in ("pooled", "recent", "follower_items")),
        *((name, _Table) for name in ("follower_weights", "features")),
        ("features_per_user", c_int32),
        *((name, c_void_p) for name in ("feature_first", "entries", "dense")),
        ("feature_rows", c_int64),
        *((name, c_int32) for name in ("num_entries", "num_dense")),
        ("num_counted", c_int64),
        *((name, c_void_p) for name in ("counted", "codes")),
        ("num_counted_next", c_int64),
        *((name, c_void_p) for name in ("counted_next", "codes_next", "event_counts")),
        ("adapter", c_void_p),
        ("probabilities", c_int32),
        *((name, c_void_p) for name in ("logits", "scores", "user_vectors")),
    ]


@cache
def load(path: Path = LIBRARY) -> ctypes.CDLL:
    """Load the library.

    Raises:
        LibraryError: it was not built, was built from other sources, or cannot be loaded on this machine.
    """
    if not path.is_file():
        raise LibraryError(
            "the C++ library was not built; install vista again where there is a C++ compiler, or run "
            "`python -m vista_kernels.cpp_backend.build`"
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise LibraryError(f"the C++ library cannot be loaded ({error})") from error
    names = (
        "vista_layout",
        "vista_new",
        "vista_delete",
        "vista_lanes",
        "vista_bfloat16",
        "vista_score",
        "vista_check_records",
        "vista_answer",
    )
    is_known = all(hasattr(library, name) for name in names)
    if is_known:
        library.vista_layout.restype = c_int64
    if not is_known or library.vista_layout() != ctypes.sizeof(_Plan) << 32 | ctypes.sizeof(_Request):
        raise LibraryError(
            "the C++ library was built from other sources; run `python -m vista_kernels.cpp_backend.build`"
        )
    library.vista_new.restype, library.vista_new.argtypes = c_void_p, [POINTER(_Plan), c_int32]
    library.vista_delete.restype, library.vista_delete.argtypes = None, [c_void_p]
    library.vista_lanes.restype, library.vista_lanes.argtypes = c_int32, [c_void_p]
    library.vista_bfloat16.restype, library.vista_bfloat16.argtypes = c_int32, [c_void_p]
    library.vista_score.restype, library.vista_score.argtypes = c_int32, [c_void_p, POINTER(_Request), c_int32]
    return library


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Weights of a network of two hidden layers with SiLU. All are float32."""

    first: Floats
    """[hidden, inputs]; hidden is a multiple of 16."""
    first_bias: Floats
    second: Floats
    """[hidden, hidden]."""
    second_bias: Floats
    last: Floats
    """[outputs, hidden]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringPlan:
    """The weights of stage 2 and its heads, float32. What a model lacks is None."""

    softmax: bool
    """Softmax layers; otherwise pointwise ones."""
    heads: int
    tail: int
    """L."""
    norm_eps: float
    input_scale: float
    """Of the vectors of events and queries."""
    temperature: float
    layers: Sequence[Mapping[str, Floats]]
    """norm [M], projections [4M, M], bias [H, L+1], head_norm ([D] for softmax layers, else [M]), out [M, M]; softmax
    layers also have feed_norm [M], up [2F, M], and down [M, F]."""
    summary_norm: Floats
    """[M]."""
    summary_kind: Floats
    """[S, M]."""
    final_norm: Floats
    """[M]."""
    task_weight: Floats
    """[tasks, M]."""
    task_bias: Floats
    """[tasks]."""
    actions: Floats | None
    """[actions, M] vectors that are added to events."""
    gaps: Floats | None
    """[gaps, M]."""
    request: Floats
    """[M] query token of the retrieval head."""
    space: int
    """r; 0 without pooled vectors."""
    pooled: int
    """J."""
    statistics: int
    """Z that networks read."""
    gain: float
    """Scale of the unit vectors with which user vectors begin."""
    wide_weight: Floats
    """[M' - M - r + J, M]: linear functions of these M entries are the last entries of user vectors, and the weights of
    the pooled vectors, whose sum lies before them."""
    wide_bias: Floats
    """[M' - M - r + J]."""
    decay: Floats
    """[R] weights of the newest items, the newest first. Their followers' weights are summed: of the newest, and of the
    others. The last two entries of user vectors weigh these sums. No items without them."""
    followers: int
    """P."""
    gate_weight: Floats | None
    """[M]: what the first entries of a user vector add to the scores of all counted items."""
    gate_bias: float
    columns: int
    """Codes of a pair, without that of the number of events; 0 without counters."""
    code_vectors: Floats | None
    """[columns * 64, 5M]: what each code of each column adds to a candidate and its projections."""
    candidate_head: Network | None
    """Codes of a candidate and that of the number of events, J cosines, Z statistics, and rates [tasks], to what they
    add to its logits. Without pooled vectors, it reads the codes alone, and adds to counted candidates alone."""
    counted_head: Network | None
    """Codes of a counted item, score / 5, Z statistics, two sums over followers, J cosines, and number of events to its
    score of the retrieval head."""


@dataclass(frozen=True, slots=True)
class PairFeatureRows:
    """What is added to each pair: rows of a table, and multiples of its last rows."""

    table: Floats
    """[rows, 5M]."""
    per_user: bool
    """All pairs of a user have the same row of `entries`."""
    first: Ints
    """[B] this row, or that of each user's first pair, which those of its other pairs follow."""
    entries: Ints
    """[n, E] rows of the table."""
    dense: Floats
    """[n, X] factors of the last X rows of the table."""


@dataclass(frozen=True, slots=True)
class CountedPairs:
    """The pairs of which a user's counters count something."""

    pairs: Ints
    """[n] pairs from 0 to N - 1, ascending."""
    codes: NDArray[np.uint8]
    """[n, columns + 1]; the last column is the number of events."""


@dataclass(frozen=True, slots=True)
class CountedItems:
    """The pairs whose item a user's counters count, which the retrieval head scores by their counters."""

    pairs: Ints
    """[n] pairs from 0 to N - 1, ascending."""
    codes: NDArray[np.uint8]
    """[n, columns]."""
    event_counts: Floats
    """[B] log(1 + number of events) - 6."""


@dataclass(frozen=True, slots=True)
class EventRows:
    """The tails of B users, right-aligned."""

    valid: NDArray[np.bool_]
    """[B, L]."""
    items: Ints | None
    """[B, L] rows of `vectors`, like the next two of the plan's tables; None if `added` has the whole events."""
    actions: Ints
    gaps: Ints
    vectors: Floats | None
    """[V, at least M] whose first M columns are the vectors of items."""
    added: Floats | None
    """[B, L, M] what is added to them."""


@dataclass(frozen=True, slots=True)
class ItemReads:
    """What heads read of items alongside their vectors; None if nothing reads it."""

    space: Floats | None = None
    """[V, r]."""
    statistics: Floats | None = None
    """[V, Z]."""
    rates: Floats | None = None
    """[V, tasks]."""


@dataclass(frozen=True, slots=True)
class RecentItems:
    """The newest items of B users, and the followers of all items."""

    rows: Ints
    """[B, R] the newest first; 0 pads."""
    items: NDArray[np.int32]
    """[V, P]; 0 pads."""
    weights: Floats
    """[V, P]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringRequest:
    """Requests of B users for N pairs."""

    summary: Floats
    """[B, S, M]."""
    events: EventRows
    offsets: Ints
    """[B + 1]: the pairs of user b are offsets[b] to offsets[b + 1]."""
    rows: Ints | None
    """[N] rows of the tables below, or [C] if `shared`; None for the rows 0, 1, … of each user."""
    shared: bool
    """All users have the same C candidates."""
    candidates: Floats | None = None
    """[V, 5M] vectors and projections in layer 1, or [V, M] vectors."""
    retrieval: Floats | None = None
    """[V, M'] item vectors of the retrieval head."""
    added: Floats | None = None
    """[B, 5M] what users add to candidates, and to the retrieval head's query token, and to their projections."""
    pooled: Floats | None = None
    """[B, J, r]."""
    reads: ItemReads = ItemReads()
    recent: RecentItems | None = None
    features: PairFeatureRows | None = None
    counted: CountedPairs | None = None
    counted_next: CountedItems | None = None
    adapter: Floats | None = None
    """[layers * M] what is added to queries after each layer, [tasks] to logits, and the biases that replace those of
    `candidate_head`; None keeps the plan's."""


@dataclass(frozen=True, slots=True)
class ScoredPairs:
    """What a call computes; None if it was not asked for."""

    logits: Floats | None
    """[N, tasks]; probabilities if these were asked for."""
    scores: Floats | None
    """[N] of the retrieval head."""
    user_vectors: Floats | None
    """[B, M'] of the retrieval head."""


class ScoringModel:
    """A model whose weights are laid out for the library. It is thread-safe, and works after a fork."""

    def __init__(self, plan: ScoringPlan, *, lanes: int = 0, bfloat16: bool = False, library: Path = LIBRARY) -> None:
        """
        Args:
            lanes: floats per vector: 4, 8, or 16; 0 chooses the most that the processor has and that divide D.
            bfloat16: round the factors of products to bfloat16, and add up in float32, where that is faster: with
                vectors of 16 floats on processors with avx512_bf16.

        Raises:
            LibraryError: the library is missing, or has no code for this model on this processor.
            ValueError: a weight has a wrong shape or dtype.
        """
        self._library, self._plan = load(library), plan
        self._kept: dict[int, tuple[Floats, _Table]] = {}
        self.seeds, self.dim = plan.summary_kind.shape
        self.tasks, self.extra = len(plan.task_bias), len(plan.wide_bias) - plan.pooled
        self.width = self.dim + plan.space + self.extra
        """M'."""
        given = self._described(plan)
        given.bfloat16 = bfloat16
        handle = self._library.vista_new(ctypes.byref(given), lanes)
        if not handle:
            size = self.dim // plan.heads
            raise LibraryError(f"the C++ library has no code for heads of {size} values (multiples of 4 have)")
        self._handle = handle
        self.lanes: int = self._library.vista_lanes(handle)
        """Floats per vector."""
        self.in_bfloat16 = bool(self._library.vista_bfloat16(handle))
        """Whether factors of products are rounded to bfloat16."""
        # Not at exit, when a daemon thread may still be scoring.
        weakref.finalize(self, self._library.vista_delete, handle).atexit = False

    def keep(self, *tables: Floats | None) -> None:
        """Check tables that many requests read here, instead of in each request, where each takes 2 to 3 µs."""
        for table in tables:
            if table is not None:
                self._kept[id(table)] = table, _table(table, "table")

    def score(
        self,
        request: ScoringRequest,
        *,
        logits: bool = False,
        scores: bool = False,
        user_vectors: bool = False,
        probabilities: bool = False,
        threads: int = 1,
    ) -> ScoredPairs:
        """Compute what is asked for.

        A pair's values do not depend on the other pairs of the call, bit for bit.

        Args:
            probabilities: give the sigmoid of logits instead.
            threads: at most so many; small calls use one.

        Raises:
            ValueError: an array has a wrong shape, dtype or layout, or an index lies outside its table; the message
                names it.
            MemoryError: there is not enough memory.
        """
        given = self._requested(request, logits=logits, scores=scores)
        given.probabilities = probabilities
        num_pairs, num_users = int(request.offsets[-1]), len(request.summary)
        made = ScoredPairs(
            np.empty((num_pairs, self.tasks), np.float32) if logits else None,
            np.empty(num_pairs, np.float32) if scores else None,
            np.empty((num_users, self.width), np.float32) if user_vectors else None,
        )
        given.logits, given.scores, given.user_vectors = map(_address, (made.logits, made.scores, made.user_vectors))
        status = self._library.vista_score(self._handle, ctypes.byref(given), threads)
        if status in _ERRORS:
            kind, message = _ERRORS[status]
            raise kind(message)
        if status:
            raise MemoryError(f"not enough memory to score {num_users} users")
        return made

    def _described(self, plan: ScoringPlan) -> _Plan:
        dim, heads, columns, tasks = self.dim, plan.heads, plan.columns, self.tasks
        if dim % heads:
            raise ValueError(f"heads: {heads} do not divide {dim}")
        size = dim // heads
        feed = plan.layers[0]["down"].shape[1] if plan.softmax else 0
        shapes = {
            "norm": (dim,),
            "projections": (4 * dim, dim),
            "bias": (heads, plan.tail + 1),
            "head_norm": (size if plan.softmax else dim,),
            "out": (dim, dim),
        }
        if plan.softmax:
            shapes |= {"feed_norm": (dim,), "up": (2 * feed, dim), "down": (dim, feed)}
        layers = [
            _Layer(**{name: _pointer(layer[name], f"layers[{i}].{name}", shape) for name, shape in shapes.items()})
            for i, layer in enumerate(plan.layers)
        ]
        num_sums = 2 if len(plan.decay) else 0
        of_candidates = plan.pooled + plan.statistics + tasks if plan.pooled else 0
        return _Plan(
            softmax=plan.softmax,
            dim=dim,
            heads=heads,
            seeds=self.seeds,
            tail=plan.tail,
            num_layers=len(layers),
            num_tasks=tasks,
            feed=feed,
            space=plan.space,
            pooled=plan.pooled,
            statistics=plan.statistics,
            extra=self.extra,
            recent=len(plan.decay),
            followers=plan.followers,
            norm_eps=plan.norm_eps,
            input_scale=plan.input_scale,
            temperature=plan.temperature,
            gain=plan.gain,
            layers=(_Layer * len(layers))(*layers),
            summary_norm=_pointer(plan.summary_norm, "summary_norm", (dim,)),
            summary_kind=_pointer(plan.summary_kind, "summary_kind", (self.seeds, dim)),
            final_norm=_pointer(plan.final_norm, "final_norm", (dim,)),
            task_weight=_pointer(plan.task_weight, "task_weight", (tasks, dim)),
            task_bias=_pointer(plan.task_bias, "task_bias", (tasks,)),
            actions=_pointer(plan.actions, "actions", (None, dim)),
            gaps=_pointer(plan.gaps, "gaps", (None, dim)),
            num_actions=0 if plan.actions is None else len(plan.actions),
            num_gaps=0 if plan.gaps is None else len(plan.gaps),
            request=_pointer(plan.request, "request", (dim,)),
            wide_weight=_pointer(plan.wide_weight, "wide_weight", (self.extra + plan.pooled, dim)),
            wide_bias=_pointer(plan.wide_bias, "wide_bias", (self.extra + plan.pooled,)),
            decay=_pointer(plan.decay, "decay", (None,)),
            gate_weight=_pointer(plan.gate_weight, "gate_weight", (dim,)),
            gate_bias=plan.gate_bias,
            code_vectors=_pointer(plan.code_vectors, "code_vectors", (64 * columns, 5 * dim)),
            code_columns=columns,
            candidate_head=_network(
                plan.candidate_head, "candidate_head", (columns + 1 if columns else 0) + of_candidates, tasks
            ),
            counted_head=_network(
                plan.counted_head, "counted_head", columns + 2 + plan.statistics + num_sums + plan.pooled, 1
            ),
        )

    def _requested(self, request: ScoringRequest, *, logits: bool, scores: bool) -> _Request:
        plan, dim, num_users = self._plan, self.dim, len(request.summary)
        events, offsets = request.events, request.offsets
        given = _Request(users=num_users)
        given.summary = _pointer(request.summary, "summary", (num_users, self.seeds, dim))
        tail = num_users, plan.tail
        given.valid = _pointer(events.valid, "valid", tail, np.bool_)
        given.events = _pointer(events.added, "events", (*tail, dim))
        if events.items is not None:
            given.vectors = self._table(events.vectors, "vectors")
            if events.vectors is None or given.vectors.width < dim:
                raise ValueError(f"vectors: must have at least {dim} columns")
            given.items = _pointer(events.items, "items", tail, np.int64)
            given.actions = _pointer(events.actions, "actions", tail, np.int64)
            given.gaps = _pointer(events.gaps, "gaps", tail, np.int64)
        elif events.added is None:
            raise ValueError("events: neither items nor vectors are given")
        given.added = _pointer(request.added, "added", (num_users, 5 * dim))
        of_head = 0 if plan.candidate_head is None else 2 * len(plan.candidate_head.first)
        given.adapter = _pointer(request.adapter, "adapter", (len(plan.layers) * dim + self.tasks + of_head,))
        given.offsets = _pointer(offsets, "offsets", (num_users + 1,), np.int64)
        lengths = offsets[1:] - offsets[:-1]
        if offsets[0] != 0 or np.count_nonzero(lengths < 0):
            raise ValueError("offsets: must rise from 0")
        given.shared = request.shared
        if request.rows is not None:
            count: int | None = int(offsets[-1])
            if request.shared:
                count = int(lengths[0]) if num_users else None
                if np.count_nonzero(lengths != count):
                    raise ValueError("offsets: users who share candidates must have the same number of them")
            given.rows = _pointer(request.rows, "rows", (count,), np.int64)
        if logits:
            given.candidates = self._table(request.candidates, "candidates")
            if not self.tasks or given.candidates.width not in (dim, 5 * dim):
                raise ValueError(f"candidates: must have {dim} or {5 * dim} columns, and the model tasks")
        if scores:
            given.retrieval = self._table(request.retrieval, "retrieval", self.width)
        if plan.pooled:
            if request.pooled is None:
                raise ValueError("pooled: is missing")
            given.pooled = _pointer(request.pooled, "pooled", (num_users, plan.pooled, plan.space))
        # What pairs read: in logits of models with pooled vectors, and in scores of counted items.
        of_logits, of_counted = logits and plan.pooled > 0, scores and request.counted_next is not None
        if plan.pooled and (of_logits or of_counted):
            given.space = self._table(request.reads.space, "reads.space", plan.space)
        if of_logits or of_counted:
            given.statistics = self._table(request.reads.statistics, "reads.statistics", plan.statistics)
        if of_logits:
            given.rates = self._table(request.reads.rates, "reads.rates", self.tasks)
        if scores and len(plan.decay):
            if (recent := request.recent) is None:
                raise ValueError("recent: is missing")
            given.recent = _pointer(recent.rows, "recent.rows", (num_users, len(plan.decay)), np.int64)
            given.follower_weights = self._table(recent.weights, "recent.weights", plan.followers)
            given.follower_items = _pointer(recent.items, "recent.items", recent.weights.shape, np.int32)
        if logits and request.features is not None:
            self._give_features(given, request.features, num_users)
        if logits and (counted := request.counted) is not None:
            if plan.candidate_head is None or plan.code_vectors is None:
                raise ValueError("counted: the model's tasks read no counters")
            given.num_counted = count = len(counted.pairs)
            given.counted = _pointer(counted.pairs, "counted.pairs", (count,), np.int64)
            given.codes = _pointer(counted.codes, "counted.codes", (count, plan.columns + 1), np.uint8)
        if scores and (items := request.counted_next) is not None:
            if plan.counted_head is None or plan.gate_weight is None:
                raise ValueError("counted_next: the model's retrieval head reads no counters")
            given.num_counted_next = count = len(items.pairs)
            given.counted_next = _pointer(items.pairs, "counted_next.pairs", (count,), np.int64)
            given.codes_next = _pointer(items.codes, "counted_next.codes", (count, plan.columns), np.uint8)
            given.event_counts = _pointer(items.event_counts, "counted_next.event_counts", (num_users,))
        return given

    def _give_features(self, given: _Request, pairs: PairFeatureRows, num_users: int) -> None:
        given.features = self._table(pairs.table, "features")
        count, given.num_entries = pairs.entries.shape
        given.feature_rows, given.num_dense = count, pairs.dense.shape[1]
        given.features_per_user = pairs.per_user
        if given.features.width != 5 * self.dim or given.num_dense > given.features.rows:
            raise ValueError(f"features: must have {5 * self.dim} columns, and a row for each factor")
        given.feature_first = _pointer(pairs.first, "features.first", (num_users,), np.int64)
        given.entries = _pointer(pairs.entries, "features.entries", (count, None), np.int64)
        given.dense = _pointer(pairs.dense, "features.dense", (count, None))

    def _table(self, table: Floats | None, name: str, width: int | None = None) -> _Table:
        if (kept := self._kept.get(id(table))) is not None and width in (None, kept[1].width):
            return kept[1]
        return _table(table, name, width)


def _address(array: NDArray[Any] | None) -> int | None:
    return None if array is None else array.__array_interface__["data"][0]


def _pointer(
    array: NDArray[Any] | None, name: str, shape: tuple[int | None, ...], dtype: Any = np.float32
) -> int | None:
    """The address of an array, which must outlive its use; None stays None.

    Args:
        shape: None stands for any size.

    Raises:
        ValueError: it has another shape or dtype, or is not contiguous.
    """
    if array is None:
        return None
    fits = array.shape == shape or (
        len(array.shape) == len(shape)
        and all(want is None or have == want for have, want in zip(array.shape, shape, strict=True))
    )
    if not fits or array.dtype != dtype or not array.flags.c_contiguous:
        wanted = tuple("*" if want is None else want for want in shape)
        raise ValueError(
            f"{name}: must be a contiguous {np.dtype(dtype)} array of shape {wanted}, got {array.dtype} of shape "
            f"{array.shape}"
        )
    return _address(array)


def _table(array: Floats | None, name: str, width: int | None = None) -> _Table:
    if array is None:
        raise ValueError(f"{name}: is missing")
    return _Table(_pointer(array, name, (None, width)), *array.shape)


def _network(network: Network | None, name: str, inputs: int, outputs: int) -> _Network:
    if network is None:
        return _Network()
    hidden = len(network.first)
    if hidden % 16:
        raise ValueError(f"{name}: the hidden width must be a multiple of 16, got {hidden}")
    shapes = {
        "first": (hidden, inputs),
        "first_bias": (hidden,),
        "second": (hidden, hidden),
        "second_bias": (hidden,),
        "last": (outputs, hidden),
    }
    pointers = {part: _pointer(getattr(network, part), f"{name}.{part}", shape) for part, shape in shapes.items()}
    return _Network(**pointers, inputs=inputs, hidden=hidden, outputs=outputs)
