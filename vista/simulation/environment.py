"""The users of a simulated world after its log: what they click in lists, and what they do next.

The log of a simulation is played again from the start of its test part, in rounds of equal length. In each round, every
user sees one list. The world's true probabilities, and how far down users look, decide the clicks. Until the next
round, users do what the log says, and in addition:

- Each click is an event, and some more events on the item's topic follow it. The world's rule reads all events, so the
  lists that were shown change what users click later.
- Users can tire of topics (`satiation`): the more of the last lists a topic filled, the less likely are its clicks.
- A share of the users joins in a random round, without a history. New items come from `SimulateConfig.new_items`.

Letters: U users, I items, K places of a list, T events.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Float32s, Floats, Int, offsets_of
from vista.log.histories import DAY_MS
from vista.simulation.streams import (
    EVENT_GAP_MS,
    EventStream,
    Queries,
    SimulatedLog,
    draw_actions,
    draw_items,
    period,
    period_of,
    split_times,
)
from vista.simulation.worlds import WORLDS

NEWEST_LIST = 0.5
"""Weight of the newest list in what a user was shown lately. Each list before has half the weight of the next one."""
USERS_AT_ONCE = 64
"""Users whose probabilities are computed at once."""


@dataclass(frozen=True, slots=True)
class UserEvents:
    """Events of users, which are rows of the simulation."""

    user: Int
    """[T]"""
    events: EventStream

    def select(self, chosen: NDArray[np.bool_] | Int) -> UserEvents:
        """Some of the events."""
        events = self.events
        return UserEvents(
            self.user[chosen], EventStream(events.item[chosen], events.timestamp[chosen], events.action[chosen])
        )

    def with_others(self, other: UserEvents) -> UserEvents:
        """These and other events, by user and time."""
        user, mine, more = np.concatenate([self.user, other.user]), self.events, other.events
        both = EventStream(
            np.concatenate([mine.item, more.item]),
            np.concatenate([mine.timestamp, more.timestamp]),
            np.concatenate([mine.action, more.action]),
        )
        return UserEvents(user, both).select(np.lexsort((both.timestamp, user)))


class Environment:
    """The users of a simulation, who see one list per round.

    Everything random depends on the seed and the number of the round, and not on what is shown, so that two policies
    meet the same chance: a place that both fill with the same item is clicked for both or for none.
    """

    def __init__(
        self,
        log: SimulatedLog,
        *,
        num_rounds: int,
        follow_events: int = 3,
        satiation: float = 0.0,
        new_users: float = 0.0,
        seed: int = 1,
    ) -> None:
        """
        Args:
            num_rounds: rounds from the start of the log's test part to its end.
            follow_events: events on the item's topic that follow each click.
            satiation: what the logit of a click loses if all recent lists showed nothing but the item's topic.
            new_users: share of the users who join in a random round but the last; what they did before never happened.
        """
        self.log, self.world = log, WORLDS[log.config.world]
        self._follow_events, self._satiation, self._seed = follow_events, satiation, seed
        self._shown_lately = np.zeros((log.config.num_users, log.config.num_topics))
        """Share of each topic in what users looked at, as a mean over their lists with weights of `NEWEST_LIST`."""
        begin, end = split_times(log.config)[1], period(log.config)[1]
        self.round_starts: Int = begin + (end - begin) * np.arange(num_rounds) // num_rounds
        """[num_rounds] ms."""
        num_users = log.config.num_users
        self.round = -1
        """Of the newest `next_round`, from 0."""
        rng = self.rng("users")
        is_new = rng.random(num_users) < new_users
        joined = self.round_starts[rng.integers(0, max(num_rounds - 1, 1), num_users)]  # all are seen by the last round
        user = np.repeat(np.arange(num_users), np.diff(log.offsets))
        organic = UserEvents(user, EventStream(log.item, log.timestamp, log.action))
        self._coming = organic.select(~is_new[user] | (log.timestamp >= joined[user]))
        nothing = np.zeros(len(user), np.bool_)
        self._past = organic.select(nothing)

    def next_round(self) -> UserEvents:
        """Start the next round; returns the events since the last round started, or all events before the first."""
        self.round += 1
        is_past = self._coming.events.timestamp < self.now
        new = self._coming.select(is_past)
        self._past, self._coming = self._past.with_others(new), self._coming.select(~is_past)
        self._offsets = offsets_of(np.bincount(self._past.user, minlength=self.log.config.num_users))
        return new

    def rng(self, purpose: str) -> np.random.Generator:
        """Random numbers of a round for a purpose."""
        return np.random.default_rng([self._seed, 1 + self.round, *purpose.encode()])

    @property
    def now(self) -> int:
        """When the round began, ms."""
        return int(self.round_starts[self.round])

    def users(self) -> Int:
        """Rows of the users who see a list in this round: all that have an event."""
        return np.flatnonzero(np.diff(self._offsets))

    def items(self) -> Int:
        """Rows of the items that exist."""
        birth = self.log.catalog.birth
        return np.flatnonzero(birth <= period_of(self.log.config, np.array([self.now]))[0])

    def counts(self, days: float) -> Int:
        """[num_items] events of each item in the last days."""
        events = self._past.events
        recent = events.item[events.timestamp >= self.now - round(days * DAY_MS)]
        return np.bincount(recent, minlength=len(self.log.catalog.topic))

    def probabilities(self, users: Int, items: Int) -> Float32s:
        """True probabilities [U, I] that users click items that they look at, as of now.

        Args:
            users: [U] sorted rows from `users`; items: [I].
        """
        out = np.empty((len(users), len(items)), np.float32)
        events, offsets = self._past.events, self._offsets
        for begin in range(0, len(users), USERS_AT_ONCE):
            own = users[begin : begin + USERS_AT_ONCE]
            first, last = offsets[own[0]], offsets[own[-1] + 1]
            known = EventStream(events.item[first:last], events.timestamp[first:last], events.action[first:last])
            asked = Queries(
                np.tile(items, len(own)).astype(np.int32),
                np.full(len(own) * len(items), self.now),
                np.repeat(offsets[own] - first, len(items)),
                np.repeat(offsets[own + 1] - first, len(items)),
            )
            of_click = self.world.probabilities(self.log.catalog, known, asked)[:, 0]
            out[begin : begin + len(own)] = of_click.reshape(len(own), len(items))
        if self._satiation:
            lost = self._satiation * self._shown_lately[users][:, self.log.catalog.topic[items]]
            out = (out / (out + (1 - out) * np.exp(lost))).astype(np.float32)
        return out

    def examined(self, num_places: int) -> Floats:
        """Probabilities [K] that a user looks at the places of a list."""
        return self.world.examined(np.arange(num_places))

    def show(self, users: Int, lists: Int, probability: Float32s) -> NDArray[np.bool_]:
        """Show lists; returns the clicks [U, K], which become events before the next round.

        Args:
            users: [U]; lists: [U, K] rows of items; probability: [U, K] from `probabilities`.
        """
        config, size = self.log.config, lists.shape
        rng = self.rng("clicks")
        draws = rng.random((config.num_users, size[1]))[users]
        looks = self.examined(size[1])
        clicked = draws < probability * looks
        self._shown_lately[users] *= 1 - NEWEST_LIST
        each_topic = users[:, None], self.log.catalog.topic[lists]
        np.add.at(self._shown_lately, each_topic, np.broadcast_to(NEWEST_LIST * looks / looks.sum(), size))
        row, place = np.nonzero(clicked)
        # A click, and then what follows it, one place after the other.
        each = 1 + self._follow_events
        step = np.tile(np.arange(each), len(row))
        item, user = np.repeat(lists[row, place], each).astype(np.int32), np.repeat(users[row], each)
        time = self.now + 1 + (np.repeat(place, each) * each + step) * EVENT_GAP_MS
        later = step > 0
        topic = self.log.catalog.topic[item]
        item[later] = draw_items(rng, config, self.log.catalog, topic[later], time[later])
        action = draw_actions(rng, np.ones(len(item), np.bool_))
        self._coming = self._coming.with_others(UserEvents(user, EventStream(item, time, action)))
        return clicked
