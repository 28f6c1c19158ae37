"""Configuration of `vista train`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vista.config.checks import (
    MAX_DAYS,
    Architecture,
    AskedBaselines,
    Checked,
    InitFreeze,
    Keyed,
    OnlinePolicy,
    Precision,
    RunOrder,
    RunsOn,
    Seeded,
    Split,
    TableKind,
    TableOptimizer,
    TablePrecision,
    Target,
    Threads,
    TrackerKind,
    UsesLog,
    UsesModel,
    UsesStore,
    VerifiesLog,
    WritesJson,
    check_types,
    require,
    require_counts,
    require_finite,
    require_only_with,
    require_share,
)
from vista.config.model_config import ModelConfig, RankingConfig
from vista.errors import shown

# Configuration of the data: the log, its split, and how batches are made.

PLACES = ("path",)
"""Keys of DataConfig that may change between runs and are left out of result tables."""
MAX_HORIZON_EVENTS = 2**16


DEFAULT_SHARE = 0.1
"""Of the events of each user that are validation labels, and test labels, with split=share."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Which log is read, how it is split, and how batches are made from it."""

    path: str = "data/log"
    """Folder of the EventLog; on the command line, `data=...` for short."""
    split: Split = Split.leave_last_out
    """Which labels are test labels. leave-last-out: each user's last event, with the one before for validation. time:
    all from a given time on. share: the last share of each user's events, with the share before it for validation."""
    validation_from: str | None = None
    """With split=time: labels from this time on are not used for training. ISO date or time (UTC), or integer
    milliseconds. The same time as test_from trains on all events before the test labels. null with any other split."""
    test_from: str | None = None
    """With split=time: labels from this time on are test labels. ISO date or time (UTC), or integer milliseconds. null
    with any other split."""
    gap_minutes: float = 0.0
    """With split=time: number of minutes before the validation labels, and before the test labels, whose events are
    left out. They are not labels, and no model or summary sees them. With impressions, it needs
    optim.task_weight=0."""
    refresh_days: float = 0.0
    """With split=time, for impressions: number of days between two refreshes of the store. Each impression is then
    validated with the summaries of the last refresh before it, and so are those of `vista report`. The first refresh is
    just before the labels. Each refresh costs one pass over the histories per validation. 0 means a single refresh."""
    validation_share: float | None = None
    """With split=share: share of each user's events, in [0, 1), that are validation labels. They come just before the
    test labels. 0 trains on all events before the test labels. null takes 0.1 with split=share, and is the only value
    with any other split."""
    test_share: float | None = None
    """With split=share: share of each user's events, in (0, 1), that are test labels: the newest ones, rounded up to
    whole events. null takes 0.1 with split=share, and is the only value with any other split."""
    exclude_seen: bool | None = None
    """Whether validation and evaluation exclude items of the visible history from rankings (never the label). null
    follows the log: false if at least 1 % of the training events repeat an item that the user had before."""
    min_item_events: int = 0
    """Number of training events that an item needs to have a row of its own in the model. Other items are unknown to
    the model, both in training and in serving. With init_from, the items of the earlier model keep their rows. 0 gives
    all items of the log a row. Must be 0 with `base`, whose items are kept."""
    chunk_len: int = 16384
    """Maximum length, in events, of a stretch of one history in a training batch. Longer histories are cut into several
    chunks."""
    tokens_per_batch: int | None = None
    """Maximum number of events in a batch. A longer chunk is a batch by itself. null: the power of two from
    512 to 8,192 that makes about 400 batches per epoch, or 200 with counters if windows or labels alone are trained."""
    label_spacing: int = 32
    """Window length W: the number of label positions that share one summary and one tail. These positions see between
    tail_len - W + 1 and tail_len events of the tail. Larger is faster."""
    windows_per_chunk: int = 0
    """Number of windows of label_spacing positions that are drawn from each chunk per epoch. Those with questions
    (anchor_spacing) are added. 0 uses all windows, so every event is a label once per epoch; with counters, only
    windows with questions are used, unless users never return to items."""
    staleness_events: float = 32.0
    """Mean extra age, in events, of the summaries that stale windows read. It is drawn from an exponential distribution
    and rounded up to whole windows."""
    staleness_share: float = 0.25
    """Share of windows, in [0, 1], that read an older summary than their own. Applies to separable mixing; in
    bidirectional mixing a window reads the newest of its chunk's few cuts, which is stale anyway."""
    unknown_share: float = 0.0
    """Share of history events, in [0, 1), whose item is shown as unknown in training; labels and reconstruction targets
    are not affected. It reduces overfitting over many epochs. Applies to vista, sasrec, hstu, and fuxi_linear; must
    be 0 for the others."""
    horizon_events: int = 50
    """With optim.window_weight above 0: number of events after a question whose items are its labels."""
    horizon_days: float = 0.0
    """With optim.window_weight above 0: number of days after a question; only items of events within it are labels, and
    of these events only the first horizon_events. 0 means no limit in time."""
    anchor_spacing: int = 16
    """With optim.window_weight above 0 or counters: number of label positions per question. A chunk has one
    question per this many positions, rounded up. With split=time they are uniform in time, otherwise in position."""
    num_negatives: int | None = None
    """Number of negatives of the sampled softmax, shared by all labels of a batch. null: all items of the log, which is
    the exact softmax, but at most 4,096."""

    def __post_init__(self) -> None:
        check_types(self, "data.")
        counts = ("chunk_len", "tokens_per_batch", "label_spacing", "num_negatives", "anchor_spacing")
        require_counts(self, "data.", counts)
        require_counts(self, "data.", ("windows_per_chunk", "min_item_events"), least=0)
        require_counts(self, "data.", ("horizon_events",), most=MAX_HORIZON_EVENTS)
        require_finite(self, "data.", ("staleness_events",))
        require_finite(self, "data.", ("horizon_days", "refresh_days"), most=MAX_DAYS)
        require_finite(self, "data.", ("gap_minutes",), most=MAX_DAYS * 24 * 60)
        is_timed = self.split is Split.time
        for key in ("gap_minutes", "refresh_days"):
            require(is_timed or not getattr(self, key), f"data.{key}", "only applies with data.split=time; set that")
        require_share(self, "data.", ("staleness_share",))
        require_share(self, "data.", ("unknown_share",), below_one=True)
        for key in ("validation_from", "test_from"):
            require_only_with(getattr(self, key) is not None, is_timed, f"data.{key}", "data.split=time")
        self._check_shares()

    def _check_shares(self) -> None:
        total = 0.0
        for key, may_be_zero in (("validation_share", True), ("test_share", False)):
            if self.split is Split.share and getattr(self, key) is None:
                setattr(self, key, DEFAULT_SHARE)
            share = getattr(self, key)
            require_only_with(share is not None, self.split is Split.share, f"data.{key}", "data.split=share")
            if share is not None:
                good = 0 < share < 1 or (may_be_zero and share == 0)
                interval = "[0, 1)" if may_be_zero else "(0, 1)"
                require(good, f"data.{key}", f"must lie in {interval}, got {shown(share)}")
                total += share
        require(
            total < 1, "data.test_share", f"must leave events to train on, but both shares sum to {total:g}; lower one"
        )


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW for the network, the optimizer of the item table, the losses, and when training ends."""

    learning_rate: float = 2e-3
    """Learning rate after the warm-up. It stays constant. Validation and export use the average of the weights over
    about the last ninth of all steps, so training can end after any epoch."""
    table_rate: float | None = None
    """Learning rate of the item table, as a multiple of the network's. 0 keeps the table as it is before training.
    null: 0.1 if only labels of impressions are trained, items have fewer than 50 training events on average, and their
    vectors start from the item space; else 1."""
    table_optimizer: TableOptimizer = TableOptimizer.adam
    """Optimizer of the item table. rowwise_adagrad takes less memory, and needs model.table=torchrec."""
    warmup_steps: int | None = None
    """Number of steps over which the learning rate rises linearly. null: a quarter of an epoch, but at most 100."""
    epochs: int | None = None
    """Maximum number of epochs, which are passes over the training histories. null: enough for about 10,000 steps, but
    at most 30 epochs; with optim.minutes, no limit. optim.patience usually ends training earlier."""
    minutes: float | None = None
    """Maximum number of minutes that training takes, validation included. null: no time limit."""
    next_weight: float | None = None
    """Weight of the sampled softmax over next items. 0 turns off next-item training and validates on windows instead.
    null: 0 if the model has counters, windows are trained, and data.split is time or share; else 1."""
    window_weight: float | None = None
    """Weight of the softmax over the items of the window that follows a question (`data.horizon_events`). 0 does not
    train windows. null: 1 with counters if users return to items (`data.exclude_seen` is false), else 0."""
    logq_strength: float = 1.0
    """How much of the items' log popularity the next-item scores learn, in [0, 1]. 1 is the plain softmax; 0 removes
    popularity from the scores."""
    reward: str | None = None
    """What an event earned: rating, a number among the features of events, or an action, whose events earn 1 and all
    others 0. Next-item and window losses weight each label by exp(advantage / reward_temperature), where the advantage
    is the reward less the user's mean in training, in standard deviations. null weights all labels equally."""
    reward_temperature: float = 1.0
    """With reward: the lower, the more the rewards decide."""
    task_weight: float = 1.0
    """Weight of each task's binary cross-entropy, if the log has impressions. 0 trains no task."""
    tasks: list[str] = field(default_factory=list)
    """Names of the tasks to train, as in the log. Empty means all."""
    examined_tasks: list[str] = field(default_factory=list)
    """Tasks such as click whose labels need the user to look at the item, so that they are corrected for position bias.
    Impressions have the numbers `propensity`, the probability that the user looked, or `position`, the place in the
    list from 1, by which it is estimated. Serving predicts labels of items that are looked at."""
    reconstruction_weight: float = 0.0
    """Weight of the reconstruction loss of the paper: a decoder predicts events of a history from its summary. It takes
    a fifth of a step, and did not raise quality on any log where it was measured. 0 trains no decoder."""
    patience: int = 3
    """Number of validations in a row without improvement that end training. Improvement is measured against the best
    earlier epoch, not counting epoch 0. 0 never stops early."""
    validate_every: int = 1
    """Number of epochs between validations; the last epoch always has one. 0 never validates."""
    validation_users: int = 2000
    """Maximum number of users that a validation ranks, the same users every time; impressions are limited to four times
    as many. 0 means no limit."""

    def __post_init__(self) -> None:
        check_types(self, "optim.")
        require_finite(self, "optim.", ("learning_rate", "minutes", "reward_temperature"), positive=True)
        weights = ("next_weight", "window_weight", "task_weight", "reconstruction_weight")
        require_finite(self, "optim.", ("table_rate", *weights))
        counts = ("epochs", "warmup_steps", "patience", "validate_every", "validation_users")
        require_counts(self, "optim.", counts, least=0)
        require(self.task_weight > 0 or not self.tasks, "optim.tasks", "needs optim.task_weight above 0; set that to 1")
        require_share(self, "optim.", ("logq_strength",))


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """The tracker that gets the metrics, settings, model card, and plots of a run, in addition to its own folder."""

    kind: TrackerKind = TrackerKind.none
    """none, or a tracker. Each tracker needs the extra with its name."""
    server: str | None = None
    """With kind=mlflow: URL of a server, such as http://host:5000, or of a database, such as sqlite:///runs/mlflow.db.
    With kind=wandb: URL of your own server. null uses the tracker's own settings, such as the environment variable
    MLFLOW_TRACKING_URI."""
    project: str = "vista"
    """Experiment of MLflow, or project of Weights & Biases."""

    def __post_init__(self) -> None:
        check_types(self, "tracking.")
        has_server = self.kind in (TrackerKind.mlflow, TrackerKind.wandb)
        require(
            has_server or self.server is None,
            "tracking.server",
            "only applies with tracking=mlflow and tracking=wandb; set one of them, or leave this out",
        )
        require(bool(self.project.strip()), "tracking.project", "is empty; give the project a name")


@dataclass(kw_only=True, slots=True)
class TrainConfig(VerifiesLog, RunsOn, Keyed, Seeded):
    """A training run."""

    model: RankingConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    base: str | None = None
    """Folder of an exported model whose item table, event encoder, and stage 1 are used unchanged. Only stage 2 and the
    heads are trained, over the summaries of `store`. null trains everything."""
    store: str | None = None
    """With base: folder of its store. Training labels begin at the `until` of its refresh."""
    init_from: str | None = None
    """Folder of an exported model to start from, such as runs/yesterday/best. Items, features, actions, and tasks are
    matched by name. The optimizers start without the moments of that run. null draws new weights."""
    init_freeze: InitFreeze | None = None
    """With init_from: train everything (none), or keep what summaries depend on (summarizer), so that stores stay
    valid. null is summarizer with optim.reward, else none."""
    run_dir: str = "runs/vista"
    """Folder for config.yaml, run.json, train.log, metrics.jsonl, checkpoints/, and best/ (the exported model)."""
    precision: Precision = Precision.auto
    """Data type of matrix products: float32 or bfloat16. auto uses bfloat16 where the device multiplies it fast."""
    checkpoint_every: int = 200
    """Number of steps between checkpoints. A checkpoint is also written after each epoch."""
    resume: bool = True
    """Resume from the newest checkpoint in run_dir, if there is one."""

    def __post_init__(self) -> None:
        RunsOn.__post_init__(self)  # super() does not work in a dataclass with slots
        require_counts(self, "", ("checkpoint_every",))
        self._check_data()
        self._check_stage()
        self._check_init()
        self._check_table()

    def _check_data(self) -> None:
        spacing, tail_len = self.data.label_spacing, self.model.tail_len
        require(
            spacing <= tail_len,
            "data.label_spacing",
            f"must be at most model.tail_len={tail_len}, or some labels would have no tail; got {spacing}",
        )
        require(
            self.data.unknown_share == 0 or not self.model.architecture.ranks_only,
            "data.unknown_share",
            "only applies to architectures that rank next items; leave it out",
        )

    def _check_stage(self) -> None:
        downstream = self.base is not None
        require_only_with(self.store is not None, downstream, "store", "base")
        require(
            not downstream or self.model.architecture is Architecture.vista,
            "model.architecture",
            "training over a base needs vista, because a baseline has no summaries",
        )
        require(
            not downstream or self.data.split is Split.time,
            "data.split",
            "training over a base needs time, because labels lie between the store's `until` and data.validation_from",
        )
        require(
            not downstream or not self.data.min_item_events,
            "data.min_item_events",
            "the items are those of the base; leave it out",
        )

    def _check_init(self) -> None:
        warm = self.init_from is not None
        if self.init_freeze is None:
            self.init_freeze = InitFreeze.summarizer if warm and self.optim.reward else InitFreeze.none
        freezes = self.init_freeze is InitFreeze.summarizer
        require(
            self.optim.reward is None or self.model.architecture is Architecture.vista,
            "optim.reward",
            "needs model.architecture=vista; set that, or leave this out",
        )
        require(
            self.optim.reward is None or self.optim.next_weight != 0 or self.optim.window_weight != 0,
            "optim.reward",
            "weights the labels of next items and windows, of which none are trained; set optim.next_weight or "
            "optim.window_weight, or leave this out",
        )
        require(not warm or self.base is None, "init_from", "training starts from `base`; leave out one of the two")
        require(not freezes or warm, "init_freeze", "only applies with init_from; set that, or leave this out")
        require(
            not freezes or self.model.architecture is Architecture.vista,
            "init_freeze",
            "a baseline has no summarizer; set init_freeze=none, or model.architecture=vista",
        )
        require(
            not freezes or not self.model.embedding_rows,
            "init_freeze",
            "items share the rows of a hashed table, so new ones cannot train while it is frozen; set "
            "init_freeze=none, or train only stage 2 with `base`",
        )

    def _check_table(self) -> None:
        sharded = self.model.table is TableKind.torchrec
        by_row = self.optim.table_optimizer is TableOptimizer.rowwise_adagrad
        require(
            not by_row or sharded,
            "optim.table_optimizer",
            "rowwise_adagrad needs model.table=torchrec; set that, or optim.table_optimizer=adam",
        )
        require(
            self.model.table_precision is TablePrecision.float32 or by_row,
            "model.table_precision",
            "float16 needs row-wise Adagrad, because Adam keeps its moments in the precision of the table; set "
            "optim.table_optimizer=rowwise_adagrad, or model.table_precision=float32",
        )
        start = "model.table=torchrec can only train a table from scratch; set model.table=plain"
        for key in ("base", "init_from"):
            require(not sharded or getattr(self, key) is None, key, f"{start}, or leave this out")

    @property
    def ranks_items(self) -> bool:
        """Whether items are predicted: the next one, or those of the window that follows."""
        return (self.next_weight > 0 or self.trains_window) and not self.model.architecture.ranks_only

    @property
    def trains_decoder(self) -> bool:
        """Whether summaries are trained to be decoded."""
        has_summary = isinstance(self.model, ModelConfig) and self.model.num_seeds > 0
        return has_summary and self.base is None and self.optim.reconstruction_weight > 0

    @property
    def trains_window(self) -> bool:
        """Whether the items of the window that follows are predicted."""
        return self.window_weight > 0 and not self.model.architecture.ranks_only

    @property
    def learns_alone(self) -> bool:
        """Whether attention learns next items without counters, although scores read these: by vista, where users never
        return to items."""
        counts = (
            bool(self.model.counter_keys and self.data.exclude_seen) and self.model.architecture is Architecture.vista
        )
        return counts and self.next_weight > 0 and not self.trains_window

    @property
    def next_weight(self) -> float:
        """`optim.next_weight`, with null resolved: what validation can ask decides."""
        weight = self.optim.next_weight
        only_windows = self.model.counter_keys and self.trains_window and self.data.split is not Split.leave_last_out
        return float(not only_windows) if weight is None else weight

    @property
    def window_weight(self) -> float:
        """`optim.window_weight`, with null resolved."""
        weight, counts = self.optim.window_weight, bool(self.model.counter_keys)
        return float(counts and not self.data.exclude_seen) if weight is None else weight


@dataclass(kw_only=True, slots=True)
class AdaptConfig(VerifiesLog, RunsOn, Keyed, Seeded, UsesStore, UsesLog):
    """An adapter of a model for another surface, country, or task: a file of kilobytes that `vista serve` loads."""

    base: str = "runs/vista/best"
    """Folder of the exported model that the adapter belongs to."""
    out: str = "adapters/vista.adapter"
    """File to write. `vista serve` and `Scorer.open` take one such file, or a folder of files NAME.adapter, from which
    each request chooses one by NAME."""
    validation_from: str | None = None
    """End of the training labels, which begin at the `until` of the store's refresh. Later labels choose the best
    epoch. ISO date or time (UTC), or integer milliseconds. null takes that of the base."""
    test_from: str | None = None
    """End of the validation labels. Later labels are not read. Written as `validation_from`; null takes that of the
    base."""
    ranks_items: bool = False
    """Train the ranking of next items too, if the base has labeled tasks. A base without tasks always trains it."""
    examined_tasks: list[str] = field(default_factory=list)
    """Tasks whose labels are corrected for position bias, as `optim.examined_tasks` does in `vista train`."""
    learning_rate: float = 1e-2
    """Learning rate of Adam. It stays constant, and the average of the newest values is written."""
    epochs: int = 30
    """Maximum number of epochs. Three validations in a row without improvement end the training."""

    def __post_init__(self) -> None:
        RunsOn.__post_init__(self)
        require_finite(self, "", ("learning_rate",), positive=True)
        require_counts(self, "", ("epochs",))


def without_places(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Groups model, data, and optim of `to_dict(TrainConfig)` without PLACES: what a result depends on."""
    groups = ("model", "data", "optim")
    return {group: {k: v for k, v in values[group].items() if k not in PLACES} for group in groups if group in values}


# Configuration of `vista sweep`.


@dataclass(kw_only=True, slots=True)
class SweepConfig:
    """Training runs over several seeds and settings."""

    train: list[str] = field(default_factory=list)
    """Settings of `vista train`. At least one of them must have several values. On the command line, write them without
    this key, such as seed=1,2,3: every argument whose key is not listed here is a setting of `vista train`."""
    train_file: str | None = None
    """YAML file with settings of `vista train`. Settings in `train` override it."""
    folder: str = "runs/sweep"
    """Folder for the run folders, one per setting and seed, and for results.md."""
    trials: int | None = None
    """Number of settings to train, which a sampler (extra `optuna`) chooses based on the validation metrics of earlier
    ones, from values and from intervals such as tag(log,interval(1e-4,1e-2)). null trains every combination of the
    values."""

    def __post_init__(self) -> None:
        check_types(self)
        require_counts(self, "", ("trials",), most=10_000)


# Configurations of `vista evaluate`, `report`, `compare`, and `runs`.

MAX_TOP_K = 2**20


@dataclass(kw_only=True)
class AsksLabels(VerifiesLog, Keyed, Threads):
    """What is predicted for each user."""

    __slots__ = ()
    split: str = "test"
    """Labels that are evaluated: test or validation, according to the data split of the model's training."""
    target: Target = Target.next
    """What is asked about each user. next: the very next event and the impressions. window: the distinct items of the
    events that follow, separately for items that the user had before (returns) and for new ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.split in ("test", "validation"), "split", f"must be test or validation, got {self.split}")


@dataclass(kw_only=True, slots=True)
class EvaluateConfig(RunsOn, AsksLabels, UsesStore, UsesModel, UsesLog):
    """Evaluation of quality as served: summaries come from the store, scores from the scorer.

    A baseline reads the raw history, and no store.
    """

    horizon_events: list[int] = field(default_factory=lambda: [50, 200])
    """With target=window: lengths of the windows, in events."""
    horizon_days: float = 0.0
    """With target=window: length of the window, in days. It replaces horizon_events; 0 uses these."""
    min_seen: int = 50
    """With target=window: least number of events before the question. Users with fewer are not asked."""
    min_after: int = 20
    """With target=window: least number of events after the question, in the window or beyond it. Users with fewer are
    not asked."""
    top_k: list[int] = field(default_factory=lambda: [10, 50, 200])
    """Cutoffs k of the metrics, in items. The first is also the list length of the popularity report."""
    popularity: bool = False
    """Also report how closely the retrieval head's lists follow training popularity."""
    baselines: AskedBaselines = AskedBaselines.none
    """Baselines to measure too, on the same users, in a table that says whether the model is ahead. counting takes
    seconds for a million events: popularity, own frequency, transitions, item neighbors, and with features of items,
    content neighbors. For labels of impressions: item rates, counters, and pooled vectors. trained adds those that
    learn, which takes minutes: EASE, TIFU-KNN, pooled factors, pooled vectors, and boosted trees. For labels: item and
    user rates, and trees on earlier labels, without and with pooled vectors. It needs the extra `baselines`."""
    staleness: int = 0
    """Number of each user's newest visible events that the store's summaries lack; the tail has them. Refresh with
    until=leave-last-N-out, where N is 1 + staleness (validation: 2 + staleness), or for another split with
    until=TIME-less-N or until=leave-last-P-percent-out-less-N, where N is staleness. 0 evaluates up-to-date
    summaries."""
    adapter: str | None = None
    """File of `vista adapt` to evaluate the model with, on the split of the adapter's training. null evaluates the
    model as it is."""
    out: str | None = None
    """JSON file for the metrics. An existing file is replaced. The metrics of each user are written to <out>.npz, which
    `vista compare` reads, and those of each baseline to <out>.<name>.npz. Those of labels of impressions go to
    <out>.labels.npz and <out>.labels.<name>.npz. null only prints the metrics."""

    def __post_init__(self) -> None:
        AsksLabels.__post_init__(self)
        require_counts(self, "", ("min_seen", "min_after"))
        require_counts(self, "", ("staleness",), least=0)
        require_finite(self, "", ("horizon_days",), most=MAX_DAYS)
        for key, most in (("top_k", MAX_TOP_K), ("horizon_events", MAX_HORIZON_EVENTS)):
            values = getattr(self, key)
            require(
                min(values, default=0) >= 1 and max(values) <= most,
                key,
                f"needs one or more numbers from 1 to {most}, got {shown(values)}",
            )
        is_window = self.target is Target.window
        require(
            not (is_window and self.popularity),
            "popularity",
            "only applies with target=next; set that, or leave it out",
        )


@dataclass(kw_only=True, slots=True)
class ReportConfig(AsksLabels):
    """A report about a training run, as one self-contained HTML file."""

    run: str = "runs/vista"
    """Folder of the run: the `run_dir` of its training."""
    others: list[str] = field(default_factory=list)
    """Folders of other runs to compare with this one, on the same cases. They need the same data split."""
    data: str | None = None
    """Folder of the EventLog. null uses `data.path` of the training."""
    store: str | None = None
    """Folder or URL of a store of the run's summaries, refreshed with the `until` of its split. null refreshes one in a
    temporary folder next to `out`. Other runs, and later refreshes (`data.refresh_days`), always get a temporary
    store."""
    horizon_events: int = 50
    """With target=window: length of the windows, in events."""
    top_k: int = 10
    """Cutoff k of the ranking metrics, in items."""
    baselines: bool = True
    """Also measure simple baselines: counting, pooled vectors, and, with scikit-learn, trees on earlier labels. Takes
    seconds for a million events."""
    category: str | None = None
    """Name of a category among the log's item features. Quality is then shown by the age of the newest event with the
    label's category. null uses events with the same item, or with the most similar item if items of the history are not
    ranked."""
    out: str | None = None
    """HTML file. An existing file is replaced. null writes report.html into the folder of the run."""

    def __post_init__(self) -> None:
        AsksLabels.__post_init__(self)
        require_counts(self, "", ("top_k",), most=MAX_TOP_K)
        require_counts(self, "", ("horizon_events",), most=MAX_HORIZON_EVENTS)
        require(len({*self.others, self.run}) == 1 + len(self.others), "others", "names a run twice")


@dataclass(kw_only=True, slots=True)
class CompareConfig(Checked):
    """A paired test between two models that were evaluated on the same users."""

    a: list[str] = field(default_factory=list)
    """Files that `vista evaluate` wrote as `out`: the first model, with one file per seed. The metrics of each user are
    read from <file>.npz, and averaged over the seeds."""
    b: list[str] = field(default_factory=list)
    """The same of the second model. Differences are those of b minus a."""


@dataclass(kw_only=True, slots=True)
class RunsConfig(WritesJson):
    """The list of training runs in a folder."""

    folder: str = "runs"
    """Folder that contains run folders, at most four levels deep."""
    sort: RunOrder = RunOrder.best
    """Order of the list: best (the best metric first), name, newest, seconds, or parameters."""
    metric: str | None = None
    """Validation metric of each run's best model, to list and to sort by. null uses the metric that selected it."""


@dataclass(kw_only=True, slots=True)
class RunsCompareConfig(WritesJson):
    """Training runs side by side."""

    runs: list[str] = field(default_factory=list)
    """Folders of two or more runs."""


@dataclass(kw_only=True, slots=True)
class SimulateOnlineConfig(Threads, Seeded, UsesModel):
    """Policies that play against a simulated world, round by round."""

    source: str = "data/simulated"
    """Folder of `vista simulate`. Its users see lists during the test part, the last 15% of the period."""
    policy: list[OnlinePolicy] = field(default_factory=lambda: [*OnlinePolicy])
    """What chooses the lists. model: the trained model that `model` names. popular: the most events in the last 28
    days. random: any items. oracle: the highest true probabilities. Each policy plays on its own copy of the world."""
    task: str | None = None
    """Task whose scores the model ranks by; null takes click, or the model's first task."""
    rounds: int = 8
    """Number of rounds, equal parts of the test part. Each user sees one list per round."""
    list_size: int = 10
    """Number of items in a list."""
    follow_events: int = 3
    """Number of events on the item's topic that a user adds after each click, which is an event, too. In most worlds,
    more events on a topic make later clicks on it more likely."""
    satiation: float = 0.0
    """How much users tire of a topic that they are shown again and again. It is what a click's logit loses if all
    recent lists showed nothing but this topic. Each list counts half as much as the next one. 0 turns it off."""
    new_users: float = 0.0
    """Share of the users who join in a random round, without a history."""
    out: str = "online.jsonl"
    """File for the results, one line of JSON per policy and round. The model's log and store need space in the same
    folder while it plays, and are removed afterwards."""

    def __post_init__(self) -> None:
        Seeded.__post_init__(self)
        require_counts(self, "", ("rounds", "list_size"), most=MAX_TOP_K)
        require_counts(self, "", ("follow_events",), least=0, most=MAX_TOP_K)
        require_share(self, "", ("new_users",))
        require_finite(self, "", ("satiation",), most=20)
        require(self.source != "", "source", "must not be empty")
        require(len({*self.policy}) == len(self.policy) > 0, "policy", "name one or more policies, each once")
