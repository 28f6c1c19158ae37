"""Weights of label events by what these earned: advantage-weighted supervised fine-tuning.

The reward of an event is its rating, one of its numbers, or whether it has a given action. Its advantage is the reward
less the mean reward of its user, in standard deviations. Its weight is exp(advantage / temperature), at most
MOST_WEIGHT, divided by the mean weight. So the losses of next items prefer what users liked better than what they
usually get, and step sizes stay as they are. Nothing after the training part is read.

A mean per item is not subtracted: it would cancel that some items are better than others.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np

from vista.arrays import Float32s, Floats, Int
from vista.config import OptimConfig
from vista.errors import ConfigError
from vista.log.event_log import EventLog
from vista.log.histories import Histories
from vista.log.splits import visible_blocks

logger = logging.getLogger(__name__)
RATING = "rating"
MOST_WEIGHT = 20.0
"""Largest exp(advantage / temperature), so that a rare reward does not decide a step."""
PRIOR_EVENTS = 10
"""Events with the mean reward of the log that each user's mean starts from."""


def read_rewards(log: EventLog, name: str, events: Histories) -> Floats:
    """float64 [T] what events earned; NaN where it is unknown.

    Args:
        name: `optim.reward`.
        events: of the log, with features.

    Raises:
        ConfigError: if the log has no reward of this name.
    """
    if name == RATING and events.rating is not None:
        return events.rating.astype(np.float64)
    if log.event_features.get(name, ...) is None:
        return events.features.columns[name].astype(np.float64)
    if name in log.actions:
        return np.asarray(events.action == log.actions.index(name), np.float64)
    numbers = [column for column, values in log.event_features.items() if values is None]
    offered = [*([RATING] if log.has_rating else []), *numbers, *log.actions]
    raise ConfigError(
        f"optim.reward={name}: is neither rating, nor a number or an action of the events of {log.path}, which has: "
        f"{', '.join(offered) or 'none'}"
    )


class EventRewards:
    """The weight of each event as a label."""

    def __init__(self, log: EventLog, counts: Int, optim: OptimConfig) -> None:
        """
        Args:
            counts: int64 [num_users], visible events per user. Nothing after them is read.

        Raises:
            ConfigError: if the log has no such reward, or it is the same in all visible events.
        """
        assert optim.reward is not None
        self._log, self._name, self._temperature = log, optim.reward, optim.reward_temperature
        total, known = np.zeros(log.num_users), np.zeros(log.num_users, np.int64)
        for user, events in self._visible(counts):
            reward = read_rewards(log, self._name, events)
            is_known = np.isfinite(reward)
            total += np.bincount(user[is_known], reward[is_known], log.num_users)
            known += np.bincount(user[is_known], minlength=log.num_users)
        if not known.any():
            raise ConfigError(f"optim.reward={self._name}: no training event of {log.path} has a value")
        mean = total.sum() / known.sum()
        self.baseline: Floats = (total + PRIOR_EVENTS * mean) / (known + PRIOR_EVENTS)
        """float64 [num_users] mean reward of each user's visible events, shrunk towards that of all."""
        square, self._deviation, self._mean_weight = 0.0, 1.0, 1.0
        for user, events in self._visible(counts):
            square += float((self._advantages(user, events) ** 2).sum())
        self._deviation = float(np.sqrt(square / known.sum()))
        if self._deviation < 1e-6 * max(abs(mean), 1e-30):
            raise ConfigError(
                f"optim.reward={self._name}: is {mean:g} in all training events of {log.path}, so it cannot tell them "
                "apart; choose another one"
            )
        weights = [self.weights(user, events).sum(dtype=np.float64) for user, events in self._visible(counts)]
        self._mean_weight = float(sum(weights) / counts.sum())
        logger.info(
            "reward %s: %.4g on average, known of %d of %d training events; its advantages over users' means have the "
            "standard deviation %.4g",
            self._name,
            mean,
            known.sum(),
            counts.sum(),
            self._deviation,
        )

    def weights(self, user: Int, events: Histories) -> Float32s:
        """float32 [T] weights of events as labels, whose mean over the visible events is 1.

        Args:
            user: int64 [T] users of the events, rows of the log.
            events: of the log, with features.
        """
        exponent = self._advantages(user, events) / (self._deviation * self._temperature)
        weight = np.exp(np.minimum(exponent, np.log(MOST_WEIGHT)))
        return (weight / self._mean_weight).astype(np.float32)

    def _advantages(self, user: Int, events: Histories) -> Floats:
        """float64 [T]; 0 where the reward is unknown."""
        advantage = read_rewards(self._log, self._name, events) - self.baseline[user]
        return np.where(np.isfinite(advantage), advantage, 0.0)

    def _visible(self, counts: Int) -> Iterator[tuple[Int, Histories]]:
        first = 0
        for events in visible_blocks(self._log, counts, features=True):
            yield first + events.owner, events
            first += events.num_users
