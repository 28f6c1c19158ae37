"""`vista simulate online`: policies play against a simulated world, each from the same start.

In every round, a policy shows one list to each user of its own copy of the world (`vista.simulation.environment`).
`model` is a trained model that is served: a scorer ranks all items, and before each round the new events are appended
to a log, from which an incremental refresh updates the store. The others need no training: `popular` shows the items
with the most events in the last weeks, `random` any items, and `oracle` those with the highest true probabilities.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from vista.arrays import Float32s, Floats, Int
from vista.config import RefreshOptions, SimulateConfig, SimulateOnlineConfig, SourceColumns
from vista.config.checks import OnlinePolicy, WorldName
from vista.device import cpu_settings
from vista.errors import ConfigError, DataError
from vista.files import checked_path, make_folders, replace_text
from vista.log.event_log import EventLog
from vista.model.vista_model import VistaModel
from vista.progress_bar import progress_bar
from vista.refresh import refresh, refresh_incremental
from vista.scorer import Scorer
from vista.simulation.environment import USERS_AT_ONCE, Environment, UserEvents
from vista.simulation.simulate import MANIFEST_FILE, generate
from vista.simulation.streams import ACTIONS, SimulatedLog
from vista.text_table import text_table

POPULAR_DAYS = 28.0
"""Days whose events `popular` counts."""


@dataclass(frozen=True, slots=True)
class RoundMetrics:
    """What one policy reached in one round."""

    policy: str
    round: int
    time: int
    """Start of the round, ms."""
    num_users: int
    """Users who saw a list."""
    clicks: float
    """Clicks per list: the satisfaction of users."""
    regret: float
    """Expected clicks per list that were lost, compared with the best list for the same users at the same time."""
    regret_error: float
    """Standard error over users."""
    coverage: float
    """Share of all items that were in at least one list."""
    diversity: float
    """Share of the pairs of items in a list that differ in topic."""
    num_unknown: int
    """Items that were never shown, because the model does not know them."""


@dataclass(frozen=True, slots=True)
class OnlineReport:
    """All rounds of all policies, and where they were written."""

    rounds: tuple[RoundMetrics, ...]
    out: Path

    def __str__(self) -> str:
        header = ["policy", "round", "users", "clicks/list", "regret", "+-", "coverage", "diversity"]
        cells = [
            [one.policy, str(one.round + 1), str(one.num_users)]
            + [f"{value:.3f}" for value in (one.clicks, one.regret, one.regret_error, one.coverage, one.diversity)]
            for one in self.rounds
        ]
        lines = [text_table(header, cells)]
        if most := max((one.num_unknown for one in self.rounds), default=0):
            lines.append(f"the model could not show up to {most} items, which it does not know; train on a newer log")
        return "\n".join([*lines, f"written to {self.out}"])


class PlayedModel:
    """A trained model with a log, a store, and a scorer, in a folder that it fills. A context manager."""

    def __init__(self, model: str, task: str | None, folder: Path) -> None:
        self._model = VistaModel.from_pretrained(model)
        tasks = self._model.schema.tasks
        self._task = task or ("click" if "click" in tasks else None)
        self._log, self._store = folder / "log", folder / "store"
        self._scorer: Scorer | None = None

    def __enter__(self) -> PlayedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._scorer is not None:
            self._scorer.close()

    def learn(self, new: UserEvents) -> None:
        """Append events to the log, and refresh the store: all users at first, then those with new events."""
        events = new.events
        frame = {
            "user": new.user + 1,
            "item": events.item.astype(np.int64) + 1,
            "timestamp": events.timestamp,
            "action": np.array(ACTIONS, dtype=object)[events.action],
        }
        columns = SourceColumns(action="action")
        is_first = self._scorer is None
        if not is_first and not len(new.user):
            return
        log = EventLog.from_frame(frame, self._log, time_unit="ms", columns=columns, append=not is_first)
        options = RefreshOptions(verify_log=False)
        if self._scorer is None:
            refresh(self._model, log, self._store, options=options)
            self._scorer = Scorer.open(self._model, self._store, task=self._task)
        else:
            refresh_incremental(self._model, log, self._store, options=options)
            self._scorer.reload()

    def scores(self, users: Int, items: Int, now: int) -> Float32s:
        """Scores [U, I] of items for users, as rows of the simulation; -inf for items that the model does not know."""
        assert self._scorer is not None
        parts = range(0, len(users), USERS_AT_ONCE)
        rows = [self._scorer.score((users[begin : begin + USERS_AT_ONCE] + 1), items + 1, now=now) for begin in parts]
        scores = np.concatenate(rows)
        scores[:, self._model.items.rows((items + 1).tolist()) < 0] = -np.inf
        return scores


def play(
    environment: Environment, policy: OnlinePolicy, size: int, model: PlayedModel | None
) -> Iterator[RoundMetrics]:
    """Play all rounds of an environment.

    Args:
        size: items of a list.
        model: for the policy `model`.
    """
    topic, num_rounds = environment.log.catalog.topic, len(environment.round_starts)
    for _ in progress_bar(range(num_rounds), desc=policy.value, unit="round"):
        new = environment.next_round()
        users, items = environment.users(), environment.items()
        if not len(users):  # all of them are new, and nobody has joined
            continue
        true = environment.probabilities(users, items)
        if model is not None:
            model.learn(new)
            scores: Floats | Float32s = model.scores(users, items, environment.now)
        elif policy is OnlinePolicy.oracle:
            scores = true
        elif policy is OnlinePolicy.popular:
            scores = np.tile(environment.counts(POPULAR_DAYS)[items].astype(np.float64), (len(users), 1))
        else:
            scores = environment.rng(policy.value).random(true.shape)
        num_unknown = int(np.isneginf(scores[0]).sum())
        if (num_known := len(items) - num_unknown) < size:
            raise ConfigError(f"list_size: must be at most {num_known}, the items of the source that the model knows")
        order = np.argsort(-scores, axis=1, kind="stable")[:, :size]
        lists, chance = items[order], np.take_along_axis(true, order, 1)
        clicked = environment.show(users, lists, chance)
        examined = environment.examined(size)
        best = -np.sort(-true, axis=1)[:, :size]
        regret = (best.astype(np.float64) - chance) @ examined
        of_list = topic[lists]
        same = (of_list[:, :, None] == of_list[:, None, :]).sum((1, 2)) - size
        yield RoundMetrics(
            policy=policy.value,
            round=environment.round,
            time=environment.now,
            num_users=len(users),
            clicks=float(clicked.sum() / len(users)),
            regret=float(regret.mean()),
            regret_error=float(regret.std() / np.sqrt(len(users))),
            coverage=len(np.unique(lists)) / len(items),
            diversity=float(1 - same.mean() / max(size * (size - 1), 1)),
            num_unknown=num_unknown,
        )


def read_simulation(folder: str) -> SimulatedLog:
    """Draw the log of a folder of `vista simulate` again.

    Raises:
        DataError: if the folder holds none, or one of another version.
    """
    path = checked_path(folder, DataError) / MANIFEST_FILE
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))["config"]
        return generate(SimulateConfig(**settings | {"world": WorldName(settings["world"])}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: is not a simulation ({error}); make one with `vista simulate out={folder}`"
        ) from error


def simulate_online(config: SimulateOnlineConfig) -> OnlineReport:
    """Play the policies of a configuration, and write a line of JSON per policy and round.

    Raises:
        DataError: if the source is not a simulation.
        ConfigError: if a list is longer than the catalog or what the model knows of it, or the model cannot read the
            simulation's log.
        CheckpointError: if there is no model.
    """
    log = read_simulation(config.source)
    num_items = int((log.catalog.birth == 0).sum())
    if config.list_size > num_items:
        raise ConfigError(f"list_size: must be at most {num_items}, the items of {config.source}")
    out = checked_path(config.out, ConfigError)
    make_folders(out.parent)
    rounds: list[RoundMetrics] = []
    for policy in config.policy:
        environment = Environment(
            log,
            num_rounds=config.rounds,
            follow_events=config.follow_events,
            satiation=config.satiation,
            new_users=config.new_users,
            seed=config.seed,
        )
        with ExitStack() as stack, cpu_settings(config.num_threads):
            model = None
            if policy is OnlinePolicy.model:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=".online-", dir=out.parent))
                model = stack.enter_context(PlayedModel(config.model, config.task, Path(folder)))
            rounds += play(environment, policy, config.list_size, model)
    replace_text(out, "".join(json.dumps(asdict(one)) + "\n" for one in rounds))
    return OnlineReport(tuple(rounds), out)
