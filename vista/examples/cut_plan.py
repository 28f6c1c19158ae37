"""How chunks are cut into training examples (`vista.examples.cuts`)."""

from __future__ import annotations

from dataclasses import dataclass

from vista.config import TrainConfig
from vista.config.choices import Architecture, Mixing
from vista.examples.anchors import AnchorPlan


@dataclass(frozen=True, slots=True)
class CutPlan:
    """How chunks are cut. Fields have the names and meanings of those of `DataConfig` and `ModelConfig`."""

    mixing: Mixing
    tail_len: int
    label_spacing: int
    windows_per_chunk: int
    num_cuts: int
    staleness_events: float
    staleness_share: float
    unknown_share: float
    reconstruction_len: int
    timeless_share: float = 0.1
    """Share of windows whose requests have no time, because callers of the scorer may not pass one."""
    featureless_share: float = 0.1
    """The same for features of requests; and the share of chunks without features of their users, because the scorer
    does not know those of users without a record."""
    anchors: AnchorPlan | None = None
    """None draws no anchors."""
    summary_lag: int = 0
    """0, or tail_len if summaries leave the events of the tail out."""
    exact_counters: bool = False
    """Count up to each request, as baselines do, which read the whole history. False counts up to a window's cut, and
    adds the events of its tail, as the scorer does."""

    @classmethod
    def of(cls, config: TrainConfig, *, has_time: bool) -> CutPlan:
        """The plan of a training run on a log with or without times."""
        data, model = config.data, config.model
        return cls(
            mixing=model.mixing,
            tail_len=model.tail_len,
            label_spacing=data.label_spacing,
            windows_per_chunk=data.windows_per_chunk,
            num_cuts=data.num_cuts,
            staleness_events=data.staleness_events,
            staleness_share=data.staleness_share,
            unknown_share=data.unknown_share,
            reconstruction_len=data.reconstruction_len,
            anchors=AnchorPlan.of(config, has_time=has_time),
            summary_lag=model.summary_lag,
            exact_counters=model.architecture is not Architecture.vista,
        )

    @property
    def cut_distance(self) -> int:
        """Events between a window's boundary and the newest cut that the window may read."""
        return self.summary_lag + 1 - self.label_spacing if self.summary_lag else 0
