"""Configuration of `vista train`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vista.config.checks import MAX_THREADS, check_types, require, require_counts, require_only_with
from vista.config.choices import (
    Architecture,
    Counting,
    InitFreeze,
    ItemStart,
    Precision,
    ReconstructionTarget,
    Search,
    Split,
    Stage,
    TableKind,
    TableOptimizer,
    TablePrecision,
)
from vista.config.data_config import PLACES, DataConfig
from vista.config.model_config import ModelConfig
from vista.config.optim_config import OptimConfig
from vista.config.tracking_config import TrackingConfig


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """A training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    stage: Stage = Stage.joint
    """What is trained: everything (joint), or only stage 2 and the heads over the summaries of a store
    (downstream)."""
    base: str | None = None
    """With stage=downstream: folder of the exported model whose item table, event encoder, and stage 1 are used
    unchanged. null with stage=joint."""
    store: str | None = None
    """With stage=downstream: folder of the base model's store. Training labels begin at the `until` of its refresh.
    null with stage=joint."""
    init_from: str | None = None
    """Folder of an exported model to start from, such as runs/yesterday/best. Items, features, actions, and tasks are
    matched by name, and the optimizers start from the newest checkpoint of that run if there is one. null draws new
    weights."""
    init_freeze: InitFreeze = InitFreeze.none
    """With init_from: train everything (none), or keep what summaries depend on (summarizer), so that stores stay
    valid."""
    authentication_key_file: str | None = None
    """File with the key that authenticates records: 32 bytes, or 64 hex digits. null uses the environment variable
    VISTA_AUTHENTICATION_KEY, or no key if that is unset."""
    run_dir: str = "runs/vista"
    """Folder for config.yaml, run.json, train.log, metrics.jsonl, checkpoints/, and best/ (the exported model)."""
    seed: int = 1
    """Seed of initial weights, batch order, cuts, negatives, and dropout."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N. auto uses a GPU if there is one."""
    precision: Precision = Precision.auto
    """Data type of matrix products: float32 or bfloat16. auto uses bfloat16 where the device multiplies it fast."""
    num_threads: int = 0
    """Number of CPU threads. 0 leaves the choice to PyTorch."""
    checkpoint_every: int = 200
    """Number of steps between checkpoints. A checkpoint is also written after each epoch."""
    resume: bool = True
    """Resume from the newest checkpoint in run_dir, if there is one."""
    verify_log: bool = True
    """Check first that no byte of the log's files has changed since it was written."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        check_types(self)
        require_counts(self, "", ("checkpoint_every",))
        require_counts(self, "", ("seed",), least=0)
        require_counts(self, "", ("num_threads",), least=0, most=MAX_THREADS)
        self._check_search()
        self._check_data()
        self._check_stage()
        self._check_init()
        self._check_reconstruction()
        self._check_item_start()
        self._check_table()

    def _check_search(self) -> None:
        hard = self.model.search is Search.hard
        require(
            not hard or self.model.architecture is Architecture.sim,
            "model.search",
            "only SIM can search by category; set model.architecture=sim",
        )
        require(
            hard or self.data.item_categories is None,
            "data.item_categories",
            "only applies with model.search=hard; set that, or leave this out",
        )

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
        reads_popularity = self.model.counters is not False or self.model.popularity is not False
        uses_frequencies = self.data.negative_power != 0 or self.optim.logq_strength != 1 or reads_popularity
        require(
            self.data.frequencies is Counting.exact or uses_frequencies,
            "data.frequencies",
            "frequencies are not used; set data.negative_power above 0, optim.logq_strength below 1, model.counters, "
            "or model.popularity",
        )

    def _check_stage(self) -> None:
        downstream = self.stage is Stage.downstream
        for key in ("base", "store"):
            require_only_with(getattr(self, key) is not None, downstream, key, "stage=downstream")
        require(
            not downstream or self.model.architecture is Architecture.vista,
            "model.architecture",
            "stage=downstream needs vista, because a baseline has no summaries",
        )
        require(
            not downstream or self.data.split is Split.time,
            "data.split",
            "stage=downstream needs time, because labels lie between the store's `until` and data.validation_from",
        )
        require(
            not downstream or not self.data.min_item_events,
            "data.min_item_events",
            "stage=downstream has the items of its base; leave it out",
        )

    def _check_init(self) -> None:
        warm, freezes = self.init_from is not None, self.init_freeze is InitFreeze.summarizer
        require(
            not warm or self.stage is Stage.joint,
            "init_from",
            "stage=downstream starts from `base`; leave this out, or set stage=joint",
        )
        require(
            not warm or self.model.item_start is not ItemStart.user_factors,
            "model.item_start",
            "user_factors of a new log do not align with the vectors of the trained model; leave out init_from, or set "
            "model.item_start=factors",
        )
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
            "init_freeze=none, or train only stage 2 with stage=downstream",
        )

    def _check_reconstruction(self) -> None:
        is_vista, is_joint = self.model.architecture is Architecture.vista, self.stage is Stage.joint
        reconstructs = is_vista and is_joint and self.model.num_seeds > 0 and self.optim.reconstruction_weight > 0
        require(
            not reconstructs or self.ranks_items or self.model.reconstruction_target is ReconstructionTarget.vectors,
            "model.reconstruction_target",
            "items needs negatives, which are only drawn if items are ranked; set optim.next_weight or "
            "optim.window_weight above 0, or use vectors",
        )

    def _check_item_start(self) -> None:
        starts = self.stage is Stage.joint and self.model.item_start is ItemStart.user_factors
        require(
            not starts or self.optim.table_rate == 0,
            "model.item_start",
            f"user_factors hold the labels of the users that they are made from, so a table that starts from them is "
            f"not trained; set optim.table_rate=0, got {self.optim.table_rate:g}, or model.item_start=factors",
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
        require(not sharded or self.stage is Stage.joint, "stage", f"{start}, or stage=joint")
        require(not sharded or self.init_from is None, "init_from", f"{start}, or leave this out")
        require(
            not sharded or self.model.item_start is not ItemStart.user_factors,
            "model.item_start",
            f"user_factors are not trained, and {start}, or model.item_start=factors",
        )

    @property
    def ranks_items(self) -> bool:
        """Whether items are predicted: the next one, or those of the window that follows."""
        return (self.next_weight > 0 or self.trains_window) and not self.model.architecture.ranks_only

    @property
    def trains_window(self) -> bool:
        """Whether the items of the window that follows are predicted."""
        return self.window_weight > 0 and not self.model.architecture.ranks_only

    @property
    def next_weight(self) -> float:
        """`optim.next_weight`, with null resolved: what validation can ask decides."""
        weight = self.optim.next_weight
        only_windows = self.model.counters and self.trains_window and self.data.split is not Split.leave_last_out
        return float(not only_windows) if weight is None else weight

    @property
    def window_weight(self) -> float:
        """`optim.window_weight`, with null resolved."""
        weight = self.optim.window_weight
        return float(bool(self.model.counters)) if weight is None else weight


def without_places(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Groups model, data, and optim of `to_dict(TrainConfig)` without PLACES: what a result depends on."""
    groups = ("model", "data", "optim")
    return {group: {k: v for k, v in values[group].items() if k not in PLACES} for group in groups if group in values}
