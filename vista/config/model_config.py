"""Configuration of the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from vista.config.checks import (
    MAX_DAYS,
    Architecture,
    Decay,
    Mixing,
    TableKind,
    TablePrecision,
    TargetAttentionKind,
    check_types,
    choice_of,
    from_dict,
    require,
    require_counts,
    require_finite,
    require_numbers,
    require_share,
)
from vista.errors import shown

MAX_DIM = 2**16 - 1
"""The header of a record holds the shape of a summary as two uint16."""
MAX_COUNTERS = 2**16 - 1
"""A record holds the number of its keys per field as uint16."""
MAX_HASHED_ROWS = 2**31 - 1
"""Codes of categories are int32."""
ITEM, PREVIOUS = "item", "previous"
"""Parts of what counters count: the item of an event or of a candidate, and the item of the event before."""
CALENDAR = {"month": 12, "weekday": 7}
"""Further parts, of the time in UTC, with the number of their values. All others are categories of items."""
ACTION = "action"
"""A part that stands for each action of the log, `action:NAME`, which only counts events with this action."""
MOST_ACTIONS = 16
"""Most actions that `ACTION` may stand for."""
MAX_HORIZONS = 8
"""Most time constants of counters, so that the codes of an item fit into 64 bits."""
MIN_COUNTER_DAYS = 1 / 24
MAX_COUNTER_EVENTS = 1_000_000
MAX_TRANSITIONS = 1000
EMBEDDING_HASHES = 2
"""Hash functions per value of a table that features share (`embedding_rows`)."""
IGNORABLE = ("times", "item_features", "event_features", "request_features", "user_features")
"""Parts of a log that a model can leave out."""
TEMPERATURES = 0.05, 0.3
"""Temperatures without and with counters."""


@dataclass(kw_only=True, slots=True)
class RankingConfig:
    """What every architecture reads: the item table, the event encoder, and the tail. Each has a class of its own."""

    kind: ClassVar[Architecture]
    needs_limit: ClassVar[bool] = False
    """Whether it reads a bounded number of events."""

    architecture: Architecture = Architecture.vista
    """Model: vista, or a baseline that reads the raw history at every request. din, sim, and twin only rank
    candidates. In Python, the class decides, so leave it out."""
    dim: int = 64
    """Model width M of both stages and of a summary token."""
    history_limit: int = 0
    """Maximum number of newest events that a summary covers, or that a baseline reads per request. 0 means no limit;
    sasrec, hstu, fuxi_linear, and din need one."""
    tail_len: int = 32
    """Number of newest events that stage 2 reads in addition to the summary."""
    dropout: float = 0.2
    """Share of activations, in [0, 1), that are dropped in training."""
    ignore: list[str] = field(default_factory=list)
    """What of the log the model leaves out, of times, item_features, event_features, request_features, and
    user_features. Otherwise, event embeddings have the gap to the previous event in logarithmic buckets and the
    features of events. Item vectors have those of items, and labeled tasks read those of requests. Candidates and user
    vectors read those of users, which summaries do not depend on."""
    hashed_features: list[str] = field(default_factory=list)
    """Categories whose values share a fixed number of rows by hashing, each written as name:rows, such as [url:10000].
    Values that did not occur in training then have a row too. In other categories, each value has its own row."""
    embedding_rows: int = 0
    """Number of rows of one hashed table that item IDs, actions, and gaps share. Each row is dim / 2 wide,
    and two hash functions name the rows of a value. 0 uses separate tables with one row per value. Features have tables
    of their own (hashed_features)."""
    table: TableKind = TableKind.plain
    """Where the rows of the item table are in training: in every process (plain), or divided among the ranks of a job
    (torchrec). The exported model is the same."""
    table_precision: TablePrecision = TablePrecision.float32
    """Data type of the item table in training. float16 needs table=torchrec and optim.table_optimizer=rowwise_adagrad.
    The exported table is float32."""

    def __post_init__(self) -> None:
        check_types(self, "model.")
        if self.architecture is Architecture.vista:
            self.architecture = self.kind
        name = self.architecture.value
        own = f"expected {self.kind.value}, got {name}; in Python, use {CONFIGS[self.architecture].__name__}"
        require(self.architecture is self.kind, "model.architecture", own)
        require_counts(self, "model.", ("dim",), most=MAX_DIM)
        require_counts(self, "model.", ("tail_len",), most=4096)
        require_counts(self, "model.", ("history_limit", "embedding_rows"), least=0, most=2**31 - 1)
        require_share(self, "model.", ("dropout",), below_one=True)
        known = f"must name each of {', '.join(IGNORABLE)} at most once, got {shown(self.ignore)}"
        require({*self.ignore} <= {*IGNORABLE} and len({*self.ignore}) == len(self.ignore), "model.ignore", known)
        self.ignore = [part for part in IGNORABLE if part in self.ignore]  # a set, which runs and models compare
        require(
            self.history_limit > 0 or not self.needs_limit,
            "model.history_limit",
            f"{name} reads a bounded number of events; set a limit such as 200",
        )
        if self.embedding_rows:
            require(
                self.dim % EMBEDDING_HASHES == 0,
                "model.dim",
                f"must be a multiple of {EMBEDDING_HASHES} with model.embedding_rows, got {self.dim}",
            )
        self._check_hashed_features()

    def reads(self, part: str) -> bool:
        """Whether it reads a part of IGNORABLE, if the log has it."""
        return part not in self.ignore

    # Answers for code that takes any architecture; those that have the setting override it.

    @property
    def num_transitions(self) -> int:
        """Followers per item that scores of next items read; 0 for none."""
        return 0

    @property
    def space_dim(self) -> int:
        """Dimensions of the item space that pooled vectors lie in; 0 for a model without them."""
        return 0

    @property
    def counter_keys(self) -> list[str] | None:
        """What counters of a user count; none without counters."""
        return []

    @property
    def softmax_temperature(self) -> float:
        """Temperature of the retrieval head."""
        return 1.0

    @property
    def mixing(self) -> Mixing:
        """How tokens mix: a baseline's events only see earlier ones."""
        return Mixing.separable

    @property
    def decay(self) -> Decay:
        """How older events lose weight in summaries."""
        return Decay.none

    @property
    def hashed_rows(self) -> dict[str, int]:
        """Number of rows of each feature of `hashed_features`, by name."""
        parts = [word.rpartition(":") for word in self.hashed_features]
        return {name: int(rows) for name, _, rows in parts}

    def _check_hashed_features(self) -> None:
        names = set()
        for word in self.hashed_features:
            name, colon, rows = str(word).rpartition(":")
            is_count = rows.isascii() and rows.isdigit() and len(rows) <= 10 and 0 < int(rows) <= MAX_HASHED_ROWS
            require(
                bool(colon and name) and is_count and name not in names,
                "model.hashed_features",
                f"must list features once each as name:rows, with 1 to {MAX_HASHED_ROWS:,} rows, such as url:10000, "
                f"got {shown(word)}",
            )
            names.add(name)


@dataclass(kw_only=True, slots=True)
class DinConfig(RankingConfig):
    """DIN: attention of a candidate over the newest events before it."""

    kind: ClassVar[Architecture] = Architecture.din
    needs_limit: ClassVar[bool] = True


@dataclass(kw_only=True, slots=True)
class AttentionConfig(RankingConfig):
    """An architecture whose attention has heads."""

    num_heads: int = 4
    """Number of attention heads. It must divide dim."""

    def __post_init__(self) -> None:
        RankingConfig.__post_init__(self)  # super() does not work in a dataclass with slots
        require_counts(self, "model.", ("num_heads",), most=self.dim)
        divisors = [number for number in range(1, min(self.dim, 64) + 1) if self.dim % number == 0]
        require(
            self.dim % self.num_heads == 0,
            "model.num_heads",
            f"must divide model.dim={self.dim}, got {self.num_heads}; use one of {divisors}",
        )


@dataclass(kw_only=True, slots=True)
class SimConfig(AttentionConfig):
    """SIM: attention over the events that a search finds in the whole history."""

    kind: ClassVar[Architecture] = Architecture.sim

    search_category: str | None = None
    """Name of a category among the log's item features: a hard search finds the newest events whose items have the
    candidate's value of it. null: a soft search by a learned inner product."""


@dataclass(kw_only=True, slots=True)
class TwinConfig(AttentionConfig):
    """TWIN: as SIM, with a search that scores events as the attention does."""

    kind: ClassVar[Architecture] = Architecture.twin


@dataclass(kw_only=True, slots=True)
class NextItemConfig(AttentionConfig):
    """An architecture that ranks next items."""

    num_layers: int = 2
    """Number of layers of stage 1, or of SASRec, HSTU, and FuXi-Linear."""
    temperature: float | None = None
    """Temperature by which the retrieval head divides its cosines. null: 0.05, or 0.3 with counters, unless vista
    trains next items without windows where users never return to items."""
    counter_keys: list[str] | None = None
    """What counters count, such as [item, brand, brand*month, previous*item]. They count how often and how recently the
    user had each item, and items of the same brand, overall and in the same month of any year. previous*item counts
    each item right after the same item. The first key is item. The parts of the others are item, previous, month,
    weekday (both in UTC), and features of items, which must be categories with at most one value per item. brand*action
    counts the events of each action apart, and brand*action:click those of one action. If actions tell the answers,
    such as right and wrong, that is how often the user was right. The store holds the highest counts with each summary.
    Items that a user had before are scored by their counters. Other items are scored by how popular they are and how
    many users discover them, too, by a learned amount per user. Labeled tasks read the counters of every candidate. []
    is a model without counters. null: [item]. Where users never return to items (`data.exclude_seen` is true), only
    vista counts, and not if it trains next items and labels. Where labels are trained, also up to two categories of
    items. Where these alone are trained, in a log of 2 to 16 actions, also actions, the categories by action, and, if
    users return to items, the items by action. Over a base (`base`), null takes this and the settings that follow from
    it from the base."""
    num_counters: int = 64
    """Number of counted values stored per user for each of counter_keys: those with the highest counts."""
    counter_days: list[float] = field(default_factory=lambda: [7.0, 30.0])
    """With counters, time constants, in days, of sums that decay over time. Ignored if the log has no times."""
    counter_events: list[float] = field(default_factory=lambda: [32.0, 200.0])
    """With counters, time constants, in events, of sums that decay with each newer event."""
    counted_dropout: float = 0.5
    """With counters, share of training questions, in [0, 1), in which counted items are scored without their cosine to
    the user vector. So training does not rely on cosines that were fitted to the same labels."""
    transitions: int = 50
    """With counters, number of followers per item that the model knows: the items that most often came right after it.
    Scores read sums over the followers of the user's newest events. An item takes 8 bytes per follower. 0 leaves them
    out."""

    def __post_init__(self) -> None:
        AttentionConfig.__post_init__(self)
        require_counts(self, "model.", ("num_layers",), most=64)
        require_finite(self, "model.", ("temperature",), positive=True)
        require_share(self, "model.", ("counted_dropout",), below_one=True)
        require_counts(self, "model.", ("transitions",), least=0, most=MAX_TRANSITIONS)
        if self.counter_keys:
            self._check_counters()

    @property
    def num_transitions(self) -> int:
        return self.transitions if self.counter_keys else 0

    @property
    def softmax_temperature(self) -> float:
        """`temperature`, with null resolved as far as the model alone decides (`vista.training.run_plan`)."""
        if self.temperature is not None:
            return self.temperature
        return TEMPERATURES[1] if self.counter_keys else TEMPERATURES[0]

    def _check_counters(self) -> None:
        names, key = self.counter_keys or [], "model.counter_keys"
        is_valid = names[0] == ITEM and len({*names}) == len(names)
        require(is_valid, key, f"must be distinct and begin with {ITEM}, got {names}")
        for name in names:
            parts = parts_of(name)
            require(all(parts) and len({*parts}) == len(parts), key, f"{name!r} must have distinct parts, such as a*b")
            actions = [part for part in parts if is_action(part)]
            require(len(actions) <= 1, key, f"{name!r} must have at most one action")
            of_candidate = {*parts} - {PREVIOUS, *CALENDAR}  # counts per action tell rates, also of all candidates
            require(bool(of_candidate), key, f"{name!r} is the same for all candidates; add {ITEM} or a category")
            need = {"item_features": of_candidate - {ITEM, *actions}, "times": CALENDAR.keys() & parts}
            for part, needed in need.items():
                require(not needed or self.reads(part), key, f"{name!r} needs {part}, which model.ignore leaves out")
        require_counts(self, "model.", ("num_counters",), most=MAX_COUNTERS)
        require_numbers(self, "model.", "counter_days", MIN_COUNTER_DAYS, MAX_DAYS)
        require_numbers(self, "model.", "counter_events", 1, MAX_COUNTER_EVENTS)
        require(
            len(self.counter_days) + len(self.counter_events) <= MAX_HORIZONS,
            "model.counter_days",
            f"with counter_events at most {MAX_HORIZONS} time constants, got {self.counter_days} and "
            f"{self.counter_events}",
        )


@dataclass(kw_only=True, slots=True)
class SasrecConfig(NextItemConfig):
    """SASRec over the newest events."""

    kind: ClassVar[Architecture] = Architecture.sasrec
    needs_limit: ClassVar[bool] = True


@dataclass(kw_only=True, slots=True)
class HstuConfig(NextItemConfig):
    """HSTU over the newest events."""

    kind: ClassVar[Architecture] = Architecture.hstu
    needs_limit: ClassVar[bool] = True


@dataclass(kw_only=True, slots=True)
class FuxiLinearConfig(NextItemConfig):
    """FuXi-Linear over the newest events."""

    kind: ClassVar[Architecture] = Architecture.fuxi_linear
    needs_limit: ClassVar[bool] = True

    def __post_init__(self) -> None:
        NextItemConfig.__post_init__(self)
        require(  # the temporal channel has two heads per head of the model
            self.dim % (2 * self.num_heads) == 0,
            "model.num_heads",
            f"fuxi_linear needs model.dim={self.dim} to be a multiple of twice this, got {self.num_heads}",
        )


@dataclass(kw_only=True, slots=True)
class ModelConfig(NextItemConfig):
    """VISTA: stage 1 (Summarizer), stage 2 (TargetAttention), reconstruction decoder, and heads."""

    kind: ClassVar[Architecture] = Architecture.vista

    num_seeds: int = 16
    """Number of summary tokens K per user. With 0, only the tail is read."""
    num_target_layers: int = 2
    """Number of layers of stage 2."""
    target_attention: TargetAttentionKind = TargetAttentionKind.pointwise
    """Layers of stage 2: softmax attention with a feed-forward network (the paper), or pointwise attention without one
    (HSTU)."""
    mixing: Mixing = Mixing.separable
    """How the tokens of stage 1 mix. separable: only history tokens write and only seeds read, so states can be updated
    incrementally. bidirectional: all tokens write and read at every layer (the paper)."""
    conv_width: int = 3
    """Width, in events, of the causal depthwise convolution below the layers of stage 1. 1 disables it."""
    decay: Decay = Decay.none
    """How older events lose weight in separable mixing: not at all (none), by time, or by position, which is the number
    of newer events."""
    decay_horizons: list[float] = field(default_factory=list)
    """One decay horizon tau per head, in days for decay=time or in events for decay=position. With 0, a head does not
    decay."""
    pooled_dim: int = 32
    """Number of dimensions of the item space, but at most dim. Training fits a fixed vector per item to which items
    are near each other in histories. Scores read the cosines of a candidate with the sums of these vectors over all of
    a user's events, and over the newest 32 of the tail. The store holds the first sum with each summary. Where labels
    alone are trained, and actions tell them, vectors are fitted to labels, and events weigh their label minus the
    item's rate. 0 leaves them out."""
    tail_features: list[str] | None = None
    """With features of events: those that stage 2 reads too. The store holds them for each event of a tail. null: all.
    Over a base (`base`), null takes those of the base."""

    def __post_init__(self) -> None:
        NextItemConfig.__post_init__(self)
        require_counts(self, "model.", ("num_seeds",), least=0, most=MAX_DIM)
        require_counts(self, "model.", ("pooled_dim",), least=0, most=MAX_DIM)
        require_counts(self, "model.", ("num_target_layers",), most=64)
        require_counts(self, "model.", ("conv_width",), most=1024)
        features = self.tail_features or []
        require(len({*features}) == len(features), "model.tail_features", f"names a column twice, got {features}")
        if self.decay is not Decay.none:
            self._check_decay()
        require(
            self.num_rows <= MAX_DIM,
            "model.num_seeds",
            f"a record would hold {self.num_rows} rows, but at most {MAX_DIM} are allowed; use fewer summary tokens",
        )

    @property
    def space_dim(self) -> int:
        return min(self.pooled_dim, self.dim)

    @property
    def num_rows(self) -> int:
        """Rows of width dim of a record: the summary tokens, and that of pooled vectors."""
        return self.num_seeds + (self.space_dim > 0)

    def _check_decay(self) -> None:
        require(
            self.mixing is Mixing.separable,
            "model.decay",
            "needs model.mixing=separable; set model.decay=none for bidirectional mixing",
        )
        require(
            len(self.decay_horizons) == self.num_heads and all(horizon >= 0 for horizon in self.decay_horizons),
            "model.decay_horizons",
            f"needs one horizon >= 0 per head ({self.num_heads}), got {list(self.decay_horizons)}",
        )


def parts_of(key: str) -> list[str]:
    """The parts of one of `counter_keys`."""
    return key.split("*")


def is_action(part: str) -> bool:
    """Whether a part of a key is `ACTION` or one of the actions that it stands for."""
    return part == ACTION or part.startswith(f"{ACTION}:")


def is_category(part: str) -> bool:
    """Whether a part of a key is a category of items."""
    return part not in (ITEM, PREVIOUS, *CALENDAR) and not is_action(part)


def counted_categories(keys: Iterable[str]) -> list[str]:
    """The categories of items that are parts of `counter_keys`, once each."""
    return list(dict.fromkeys(part for key in keys for part in parts_of(key) if is_category(part)))


def counted_fields(keys: Iterable[str], actions: Iterable[str]) -> tuple[str, ...]:
    """What counters count for `counter_keys` and the actions of a log: keys with `ACTION` once for each of them."""
    fields = [
        "*".join(f"{ACTION}:{action}" if part == ACTION else part for part in parts_of(key))
        for key in keys
        for action in (actions if ACTION in parts_of(key) else ("",))
    ]
    return tuple(dict.fromkeys(fields))


CONFIGS: dict[Architecture, type[RankingConfig]] = {
    config.kind: config
    for config in (ModelConfig, SasrecConfig, HstuConfig, FuxiLinearConfig, DinConfig, SimConfig, TwinConfig)
}
"""The configuration of each architecture."""


def readers_of(key: str) -> list[Architecture]:
    """The architectures that read a key, such as "num_seeds"."""
    return [each for each, config in CONFIGS.items() if any(one.name == key for one in fields(config))]


def model_config_of(values: dict[str, Any]) -> RankingConfig:
    """The configuration of a saved model: the inverse of `to_dict`. Raises ConfigError if a key is missing or unknown,
    or a value is not allowed."""
    kind = values.get("architecture") if isinstance(values, dict) else None
    return from_dict(CONFIGS[choice_of(Architecture, kind, "model.architecture")], values)
