"""Core seconds of refreshes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vista.config.store_config import PlanConfig
from vista.planning.store_sizes import StoreSizes


def token_s(config: PlanConfig, num_layers: int) -> float:
    """Core seconds per token of a stage with this many layers."""
    return config.measured.token_ns * 1e-9 * num_layers * config.model.dim**2


@dataclass(frozen=True, slots=True)
class RefreshCost:
    """Core seconds that a refresh takes per event, user, and batch."""

    event_s: float
    """Per event that is summarized."""
    full_user_s: float
    """Per user of a full refresh, besides the events of the history."""
    changed_user_s: float
    """Per user with new events, besides these. Without states, it includes summarizing the history again."""
    batch_s: float
    """Per incremental refresh of a worker."""

    @classmethod
    def of(cls, config: PlanConfig, sizes: StoreSizes) -> RefreshCost:
        """The cost with a configuration and the sizes of its records."""
        event_s = token_s(config, config.model.num_layers)
        rows = config.model.num_seeds + config.model.num_state_rows
        written_s = (sizes.record_on_disk + sizes.state_on_disk) / (config.measured.write_mb_per_s * 1e6)
        user_s = rows * event_s + written_s
        again_s = 0.0 if sizes.state else config.history_events * event_s
        return cls(event_s, user_s, user_s + again_s, config.measured.batch_ms / 1e3)

    def seconds(self, num_events: float, num_users: float) -> float:
        """Core seconds to add new events of `num_users` active users to the store, without the time per batch."""
        return num_events * self.event_s + changed_users(num_events, num_users) * self.changed_user_s


def changed_users(num_events: float, num_users: float) -> float:
    """Expected number of distinct users among events that are spread evenly over `num_users` users."""
    return -num_users * math.expm1(-num_events / num_users)
