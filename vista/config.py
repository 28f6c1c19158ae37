"""Every configuration of vista: plain dataclasses with defaults and units. YAML only differs from these.

The commands that make logs have theirs in config_data.py.

Hydra never appears below the command line: scripts turn its config into these objects once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vista.choices import (
    Activation,
    Architecture,
    Codec,
    Counting,
    Decay,
    Mixing,
    Normalization,
    OnMissing,
    Precision,
    Search,
    Split,
    Stage,
    StateDtype,
    TargetAttentionKind,
)
from vista.config_checks import check_types, require, require_counts, require_finite
from vista.config_dict import to_dict


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The recommender: stage 1 (Summarizer), stage 2 (TargetAttention), reconstruction and heads."""

    architecture: Architecture = Architecture.vista
    dim: int = 64
    """Model width M of both stages, and of a summary token."""
    num_heads: int = 4
    """Attention heads H; must divide dim."""
    num_seeds: int = 16
    """Summary tokens K a user. 0 turns stage 1 off: the tail alone."""
    num_layers: int = 2
    """Layers of stage 1, or of SASRec and HSTU."""
    num_target_layers: int = 2
    """Layers of stage 2."""
    target_attention: TargetAttentionKind = TargetAttentionKind.pointwise
    mixing: Mixing = Mixing.separable
    conv_width: int = 3
    """Width w of the causal depthwise convolution over neighbouring events at the bottom; 1 turns it off."""
    activation: Activation = Activation.silu
    normalization: Normalization = Normalization.length
    normalization_alpha: float = 1.0
    """normalization=length: the exponent of n; 1 is the mean, 0 the sum."""
    decay: Decay = Decay.none
    decay_horizons: list[float] = field(default_factory=list)
    """One horizon tau a head: days (decay=time) or events (decay=position); 0 means that the head forgets nothing."""
    history_limit: int = 0
    """Newest events that a summary, or a rival at a request, sees at most; 0 means all."""
    search: Search = Search.soft
    """sim: soft, by a learnt product; hard, by category (`data.item_categories`)."""
    search_top_k: int = 100
    """sim, twin: events of the history that a candidate's search finds, and its attention reads."""
    tail_len: int = 32
    """Newest events that stage 2 reads beside the summary."""
    feed_forward_ratio: float = 2.0
    """Hidden width of the gated feed-forward blocks over dim: of stage 1, the decoder and softmax layers of stage 2."""
    dropout: float = 0.2
    """Share of activations dropped in training."""
    temperature: float = 0.05
    """Divides the cosine of the retrieval head."""
    use_action: bool = True
    """The kind of action enters the event embedding, where the log has several."""
    use_rating: bool = True
    """Ratings enter stage 1 only, and only where the log has them."""
    use_time: bool = True
    """Log-bucketed gaps between events, only where the log has times."""
    num_reconstruction_layers: int = 1
    """Layers of the causal decoder of the reconstruction loss."""
    stop_gradient: bool = True
    """Of the reconstruction target; without it embeddings can collapse (there is a test that shows it)."""
    embedding_rows: int = 0
    """Rows, each dim / embedding_hashes wide, of one table that items, actions and gaps share; 0: a row a value."""
    embedding_hashes: int = 2
    """With embedding_rows: hash functions, hence rows end to end, a value; must divide dim."""

    def __post_init__(self) -> None:
        check_types(self, "model.")
        counts = ("dim", "num_heads", "num_layers", "num_target_layers", "conv_width", "tail_len", "search_top_k")
        require_counts(self, "model.", (*counts, "num_reconstruction_layers", "embedding_hashes"))
        require_counts(self, "model.", ("num_seeds", "history_limit", "embedding_rows"), least=0)
        require_finite(self, "model.", ("normalization_alpha",))
        require_finite(self, "model.", ("feed_forward_ratio", "temperature"), positive=True)
        require(
            self.dim % self.num_heads == 0,
            "model.num_heads",
            f"must divide model.dim={self.dim}, got {self.num_heads}; take one of "
            f"{[h for h in range(1, min(self.dim, 64) + 1) if self.dim % h == 0]}",
        )
        require(
            self.embedding_rows == 0 or self.dim % self.embedding_hashes == 0,
            "model.embedding_hashes",
            f"must divide model.dim={self.dim}, got {self.embedding_hashes}; take one of "
            f"{[p for p in range(1, 9) if self.dim % p == 0]}",
        )
        if self.architecture in (Architecture.sasrec, Architecture.hstu, Architecture.din):
            message = f"{self.architecture.value} reads a bounded number of events; set 200"
            require(self.history_limit > 0, "model.history_limit", message)
        require(0 <= self.dropout < 1, "model.dropout", f"must lie in [0, 1), got {self.dropout}")
        if self.decay is not Decay.none:
            require(
                self.mixing is Mixing.separable,
                "model.decay",
                "needs model.mixing=separable; set model.decay=none for bidirectional mixing",
            )
            require(
                len(self.decay_horizons) == self.num_heads and all(h >= 0 for h in self.decay_horizons),
                "model.decay_horizons",
                f"needs one horizon >= 0 a head ({self.num_heads}), got {list(self.decay_horizons)}",
            )


FIRST_DEFAULTS = {"target_attention": TargetAttentionKind.softmax.value}
"""Of ModelConfig's keys, where that is not today's default: what files mean that are older than the key
(`first_defaults` has all keys)."""
STAGE_2 = ("target_attention", "num_target_layers")
"""Keys of ModelConfig that are left out where runs of rivals are compared: young ones, which rivals do not read."""
PLACES = ("path", "item_categories")
"""Keys of DataConfig that say where something lies: they may change, and belong into no table."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Which log is read, how it is split, and how batches are cut from it."""

    path: str = "data/log"
    """Folder of the EventLog."""
    split: Split = Split.leave_last_out
    validation_from: str | None = None
    """split=time: ISO date or time (UTC), or integer milliseconds; labels from here on are not trained on."""
    test_from: str | None = None
    """split=time: labels from here on are test labels."""
    exclude_seen: bool = True
    """Whether validation and evaluation leave items of the visible history out of a ranking (but never the label):
    false where users come back to items."""
    item_categories: str | None = None
    """model.search=hard: Parquet or CSV file with a column `item` of ids and one of categories; read when training
    starts, and kept in the model."""
    category_column: str = "category"
    """Its column of categories."""
    chunk_len: int = 16384
    """Longest stretch of one history in one training batch, in events; longer ones are cut into several."""
    tokens_per_batch: int = 8192
    """Events a batch holds at most (a single longer chunk makes a batch of its own)."""
    label_spacing: int = 32
    """W: label positions that share one summary and one tail, hence the spacing of cuts. They see tail_len - W + 1 to
    tail_len events of the tail. Larger is faster."""
    windows_per_chunk: int = 0
    """Windows of W label positions drawn from a chunk a pass; 0 means all, so every event is a label once."""
    num_cuts: int = 2
    """Cuts a chunk a pass in bidirectional mixing (separable mixing has one every W events)."""
    staleness_events: float = 32.0
    """Mean extra age of a summary, in events, of the stale part of the windows: exponential, and then rounded up to
    whole windows of label_spacing."""
    staleness_share: float = 0.25
    """Share of the windows that read an older summary than their own. For separable mixing: in bidirectional mixing a
    window reads the newest of the chunk's few cuts, which is stale by itself."""
    unknown_share: float = 0.0
    """Share of the events whose item training shows as the unknown one: in histories, neither as a label nor as what is
    to be reconstructed. It keeps models from learning histories by heart, where passes are many. For vista, sasrec and
    hstu; refused by the others."""
    num_negatives: int = 1024
    """Negatives of the sampled softmax, shared by a batch."""
    negative_power: float = 0.0
    """Negatives are drawn in proportion to frequency ** power; 0 is uniform."""
    frequencies: Counting = Counting.exact
    """What negative_power and optim.logq_strength know of frequencies: exact counts, or a sketch of bounded size."""
    reconstruction_len: int = 64
    """Events of the window that the decoder reconstructs before a sampled cut."""

    def __post_init__(self) -> None:
        check_types(self, "data.")
        counts = ("chunk_len", "tokens_per_batch", "label_spacing", "num_cuts", "num_negatives", "reconstruction_len")
        require_counts(self, "data.", counts)
        require_counts(self, "data.", ("windows_per_chunk",), least=0)
        require_finite(self, "data.", ("staleness_events", "negative_power"))
        share = self.staleness_share
        require(0 <= share <= 1, "data.staleness_share", f"must lie in [0, 1], got {share}")
        share = self.unknown_share
        require(0 <= share < 1, "data.unknown_share", f"must lie in [0, 1), got {share}")
        in_time = self.split is Split.time
        message = (
            "is needed with data.split=time"
            if in_time
            else "is read with data.split=time alone; set that too, or this to null"
        )
        for key in ("validation_from", "test_from"):
            require((getattr(self, key) is not None) == in_time, f"data.{key}", message)


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW for the network, SparseAdam for the item table, losses and schedule."""

    learning_rate: float = 2e-3
    """Peak, reached after the warm-up; cosine decay from there."""
    weight_decay: float = 0.01
    """Decoupled, as in AdamW; not of the item table."""
    warmup_steps: int = 100
    """Steps of linear rise to the peak."""
    gradient_clip: float = 1.0
    """Largest global norm."""
    epochs: int = 10
    """Passes over the training histories."""
    next_weight: float = 1.0
    """lambda_next: sampled softmax over next items."""
    logq_strength: float = 1.0
    """Share of the log popularity that scores may learn: 1 is the plain softmax, 0 takes all of it out of them."""
    task_weight: float = 1.0
    """Weight of each task's binary cross-entropy, where the log has impressions."""
    tasks: list[str] = field(default_factory=list)
    """Labelled tasks that are trained, by their names in the log; empty means all."""
    reconstruction_weight: float = 0.1
    """lambda_rec."""
    patience: int = 0
    """Validations without improvement before training stops; 0 never stops early."""
    validate_every: int = 1
    """Epochs between validations, of which the last epoch always has one; 0 never validates."""
    validation_users: int = 2000
    """Users a validation ranks at most (the same every time; 0: all), and four times as many impressions."""

    def __post_init__(self) -> None:
        check_types(self, "optim.")
        require_finite(self, "optim.", ("learning_rate", "gradient_clip"), positive=True)
        require_finite(self, "optim.", ("weight_decay", "next_weight", "task_weight", "reconstruction_weight"))
        counts = ("epochs", "warmup_steps", "patience", "validate_every", "validation_users")
        require_counts(self, "optim.", counts, least=0)
        require(self.task_weight > 0 or not self.tasks, "optim.tasks", "needs optim.task_weight above 0; set it to 1")
        require(0 <= self.logq_strength <= 1, "optim.logq_strength", f"must lie in [0, 1], got {self.logq_strength}")


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """One training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    stage: Stage = Stage.joint
    base: str | None = None
    """stage=downstream: folder of the exported model whose item table, event encoder and stage 1 stay as they are."""
    store: str | None = None
    """stage=downstream: folder of the base's store; labels begin at the `until` that it was refreshed with."""
    authentication_key_file: str | None = None
    """Key of the store's records, 32 bytes or 64 hex digits; null takes VISTA_AUTHENTICATION_KEY, or none."""
    run_dir: str = "runs/vista"
    """Receives config.yaml, train.log, metrics.jsonl, checkpoints/ and best/ (the export)."""
    seed: int = 1
    """Of initial weights, order, cuts, negatives and dropout."""
    device: str = "auto"
    """auto | cpu | cuda | cuda:N."""
    precision: Precision = Precision.auto
    num_threads: int = 0
    """CPU threads; 0 leaves torch's own choice."""
    checkpoint_every: int = 200
    """Steps between checkpoints; one is written after each epoch too."""
    resume: bool = True
    """Go on from the newest checkpoint of run_dir if there is one."""
    tensorboard: bool = False
    """Also write TensorBoard events (extra `tensorboard`)."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        check_types(self)
        require_counts(self, "", ("checkpoint_every",))
        require_counts(self, "", ("seed", "num_threads"), least=0)
        spacing, tail_len = self.data.label_spacing, self.model.tail_len
        message = f"must be at most model.tail_len={tail_len}, or some labels would see no tail; got {spacing}"
        require(spacing <= tail_len, "data.label_spacing", message)
        hard = self.model.search is Search.hard
        message = "is SIM's; set model.architecture=sim"
        require(not hard or self.model.architecture is Architecture.sim, "model.search", message)
        message = "is needed with model.search=hard" if hard else "is for model.search=hard; leave it out"
        require((self.data.item_categories is not None) == hard, "data.item_categories", message)
        message = "is read by architectures that rank next items; leave it out"
        require(self.data.unknown_share == 0 or not self.model.architecture.ranks_only, "data.unknown_share", message)
        unread = self.data.negative_power == 0 and self.optim.logq_strength == 1
        message = "nothing here reads frequencies; set data.negative_power above 0, or optim.logq_strength below 1"
        require(self.data.frequencies is Counting.exact or not unread, "data.frequencies", message)
        downstream = self.stage is Stage.downstream
        for key in ("base", "store"):
            message = "is needed with stage=downstream" if downstream else "is for stage=downstream; leave it out"
            require((getattr(self, key) is not None) == downstream, key, message)
        if downstream:
            vista, time = self.model.architecture is Architecture.vista, self.data.split is Split.time
            require(vista, "model.architecture", "stage=downstream needs vista: a rival has no summaries")
            message = "stage=downstream needs time: labels lie between the store's `until` and data.validation_from"
            require(time, "data.split", message)

    @property
    def trains_next(self) -> bool:
        """Whether the next item is trained: by the retrieval head, where the architecture has one."""
        return self.optim.next_weight > 0 and not self.model.architecture.ranks_only


def without_places(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Groups model, data and optim of `to_dict(TrainConfig)`, less PLACES: what a run depends on wherever it lies."""
    groups = ("model", "data", "optim")
    return {group: {k: v for k, v in values[group].items() if k not in PLACES} for group in groups if group in values}


def first_defaults() -> dict[str, dict[str, Any]]:
    """Groups data, model and optim as runs and results mean them that were made before one of their keys was."""
    values = to_dict(TrainConfig())
    return {"data": values["data"], "model": values["model"] | FIRST_DEFAULTS, "optim": values["optim"]}


@dataclass(kw_only=True, slots=True)
class RefreshConfig:
    """One batch refresh: every user's summary into a new generation of the store."""

    data: str = "data/log"
    """Folder of the EventLog."""
    model: str = "runs/vista/best"
    """Folder of the exported model."""
    store: str = "stores/vista"
    """Folder of the summary store."""
    authentication_key_file: str | None = None
    """Key of the store's records, 32 bytes or 64 hex digits; null takes VISTA_AUTHENTICATION_KEY, or none."""
    shared_with_group: bool = False
    """Let the group of the store's folder read it (folders 2750, files 0640), instead of this account alone."""
    incremental: bool = False
    """Only users with new events, into the served generation; what the store is stays as its full refresh made it."""
    until: str | None = None
    """Events that summaries may see: null (all), leave-last-out, leave-last-N-out, an ISO time (UTC), or ms; a time
    can be followed by -less-N, which hides the newest N of each user's events before it."""
    codec: Codec = Codec.int8
    state: StateDtype = StateDtype.float32
    """How states are kept beside the summaries, for incremental refreshes: float32, float16 or none."""
    shard: str | None = None
    """i/n: only the users of part i of n, into <store>/part-i-of-n, so that several machines refresh one store."""
    tokens_per_batch: int = 65536
    """Events read and summarized together (a longer life by itself)."""
    users_per_batch: int = 512
    """Users of one write transaction."""
    precision: Precision = Precision.float32
    """Of matrix products: bfloat16 is faster where the device multiplies it, and moves summaries by some 0.3 %."""
    device: str = "auto"
    num_threads: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        check_types(self)
        require_counts(self, "", ("tokens_per_batch", "users_per_batch"))
        require_counts(self, "", ("num_threads",), least=0)
        if self.incremental:
            usual = {"until": None, "codec": Codec.int8, "state": StateDtype.float32, "precision": Precision.float32}
            for key, value in {**usual, "shared_with_group": False}.items():
                message = "is what the store's full refresh made it; leave it out with incremental=true"
                require(getattr(self, key) == value, key, message)


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """Quality as served: summaries read from the store, scores made by the scorer."""

    data: str = "data/log"
    model: str = "runs/vista/best"
    store: str = "stores/vista"
    """Folder of the summary store; a rival reads the raw history and has none."""
    authentication_key_file: str | None = None
    """Key of the store's records, 32 bytes or 64 hex digits; null takes VISTA_AUTHENTICATION_KEY, or none."""
    split: str = "test"
    """test or validation, of the model's own data split."""
    exclude_seen: bool | None = None
    """Leave items of the visible history out of the ranking, but never the label; null: as `data.exclude_seen` of the
    model's training says."""
    top_k: list[int] = field(default_factory=lambda: [10, 50, 200])
    """Cut-offs k of HR@k and NDCG@k; the first is also the length of the popularity report's lists."""
    popularity: bool = False
    """Also report how far the retrieval head's lists follow training popularity."""
    staleness: int = 0
    """Newest events of each user that the store's summaries lack, of those that the split lets them see; the tail is up
    to date all the same. Refresh with until=leave-last-N-out, N = 1 + staleness (validation: 2 + staleness), or of a
    split in time with until=TIME-less-N, N = staleness."""
    memory: bool = False
    """Also report what the stored summaries remember of a user's events, by their age (some seconds)."""
    users_per_batch: int = 512
    """Users ranked in one pass."""
    table: str = "adhoc"
    """Results are appended to <results_dir>/<table>.jsonl."""
    results_dir: str | None = None
    """Null prints only."""
    model_name: str = ""
    """Name of the row; by default the run's folder."""
    seed: int | None = None
    """Seed of the run, for the row; null takes it from the run's config.yaml."""
    device: str = "auto"
    num_threads: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        check_types(self)
        require_counts(self, "", ("users_per_batch",))
        require_counts(self, "", ("num_threads", "staleness"), least=0)
        require(min(self.top_k, default=0) >= 1, "top_k", f"needs numbers of at least 1, got {list(self.top_k)}")
        require(self.split in ("test", "validation"), "split", f"write test or validation, got {self.split}")


@dataclass(kw_only=True, slots=True)
class ScoreConfig:
    """Scores or ranking of one or several users, from the command line."""

    model: str = "runs/vista/best"
    store: str = "stores/vista"
    authentication_key_file: str | None = None
    """Key of the store's records, 32 bytes or 64 hex digits; null takes VISTA_AUTHENTICATION_KEY, or none."""
    users: list[str] = field(default_factory=list)
    """User ids; at least one."""
    candidates: list[str] = field(default_factory=list)
    """Item ids; empty ranks the whole catalogue."""
    top_k: int = 10
    """Items to list a user, where no candidates are given."""
    now: str | None = None
    """Time of the request, an ISO date or time (UTC) or ms; null leaves it unknown."""
    on_missing: OnMissing = OnMissing.empty
    device: str = "auto"
    num_threads: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        require_counts(self, "", ("top_k",))
        require_counts(self, "", ("num_threads",), least=0)
