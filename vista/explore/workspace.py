"""What the page has open: the model with its store, the log, and what to compare with; or why it is not open."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
from vista.config import ExploreConfig
from vista.config.checks import Precision
from vista.errors import ConfigError, VistaError, without_password
from vista.log.event_log import EventLog
from vista.log.inspection import ItemNames
from vista.log.segment import find_segments
from vista.log.vocabulary import Vocabulary, ids_of_words
from vista.runs.run_list import log_of_run
from vista.scorer import Scorer
from vista.scorer.serving_source import ServingSource
from vista.store.reader import StoredBatch
from vista.store.record_encoding import read_key

DEMO = Path("demo")
"""Where `make demo` puts its folders, one per data set."""
HEAVY_SHARE = 0.01
"""Users with the most events, from whom a user is drawn as the first one to show."""


@dataclass(frozen=True, slots=True)
class Places:
    """Folders that the page reads, of a configuration or of the demo, and the URLs of stores on a server."""

    model: Path
    store: str
    data: Path | None
    """None if no log is named or found."""
    other_model: Path | None = None
    other_store: str | None = None
    key_file: str | None = None
    is_demo: bool = False
    item_name: str | None = None
    """Column with the names of items; None looks for one."""

    @classmethod
    def of(cls, config: ExploreConfig) -> Places:
        """The places that a configuration names; what is null is looked for. Raises ConfigError if config.yaml of the
        model's run cannot be read."""
        model, store, data, other_store = config.model, config.store, config.data, config.other_store
        is_demo = model is None
        if model is None or store is None:
            demo = demo_folder()
            model, store, data = str(demo / "vista" / "best"), str(demo / "store"), data or str(demo / "log")
            if other_store is None and config.other_model is None and (demo / "store-test").is_dir():
                other_store = str(demo / "store-test")
        log = Path(data) if data is not None else log_of_run(Path(model).parent)
        other_model = None if config.other_model is None else Path(config.other_model)
        key_file, column = config.authentication_key_file, config.item_name
        return cls(Path(model), store, log, other_model, other_store, key_file, is_demo, column)


def demo_folder() -> Path:
    """The folder of the demo's data set: the simulation, or the first one that was trained."""
    trained = sorted(path.parent.parent for path in DEMO.glob("*/vista/best"))
    simulation = DEMO / "simulation"
    return simulation if simulation in trained or not trained else trained[0]


Opened = TypeVar("Opened")


@dataclass(frozen=True, slots=True)
class Workspace:
    """Parts that are open; the others are None, and `problems` says why."""

    places: Places
    scorer: Scorer | None
    log: EventLog | None
    names: ItemNames
    problems: dict[str, str] = field(default_factory=dict)
    """By part ("model", "log", "names"): what is wrong, and what to do."""

    @classmethod
    def open(
        cls,
        places: Places,
        open_scorer: Callable[[Places], Scorer] | None = None,
        open_log: Callable[[Path], EventLog] | None = None,
    ) -> Workspace:
        """Open what can be opened.

        Args:
            places: where it is.
            open_scorer: opens the model and its store; the page passes a function that keeps them open.
            open_log: likewise for the log.
        """
        problems: dict[str, str] = {}

        def attempt(part: str, opener: Callable[[], Opened]) -> Opened | None:
            try:
                return opener()
            except VistaError as error:
                problems[part] = str(error)
                return None

        def of_page(places: Places) -> Scorer:
            return open_page_scorer(str(places.model), places.store, places.key_file)

        scorer = attempt("model", lambda: (open_scorer or of_page)(places))
        log, path = None, places.data
        if path is None:
            problems["log"] = "There is no event log, so histories are not shown. Name a log with data=..."
        else:
            log = attempt("log", lambda: (open_log or EventLog.open)(path))
        names = attempt("names", lambda: ItemNames.of(log, places.item_name)) or ItemNames.by_id(log)
        return cls(places, scorer, log, names, problems)


def open_page_scorer(
    model: str,
    store: str,
    key_file: str | None,
    kind: type[Scorer] = Scorer,
    *,
    task: str | None = None,
    generation: int | None = None,
) -> Scorer:
    """A scorer on the CPU.

    Args:
        model: folder of the model.
        store: folder or URL of its store.
        key_file: of the authentication key, as in `ExploreConfig`.
        kind: of scorer.
        task: that rankings use; None for the model's first one.
        generation: of the store; None follows the published one.

    Raises:
        StoreError, CheckpointError, ConfigError: as in `Scorer.open` and `read_key`.
    """
    source = ServingSource(model, store, "cpu", read_key(key_file), Precision.float32, generation=generation)
    return kind(source, task=task)


def record_of(scorer: Scorer, user: int | str) -> StoredBatch:
    """The record of one user, as a batch of one; errors as of `StoreReader.get_many`."""
    return scorer.store.get_many(cast(list[str], [user]))


def log_version(path: Path) -> tuple[str, ...]:
    """Names of the log's segments, which change when events are appended. Raises LogFormatError if there is no log."""
    return tuple(folder.name for folder in find_segments(path))


@dataclass(slots=True)
class _Open:
    """An open scorer, and the number of running `lending` blocks that have borrowed it."""

    scorer: Scorer
    num_borrowers: int = 0


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why a scorer could not be opened, and when."""

    error: VistaError
    at_s: float


class ScorerPool:
    """Keeps up to `limit` scorers open between reruns of the page; beyond that, closes the least recently borrowed one.

    A borrowed scorer stays open until its `lending` block ends, so more than `limit` may be open temporarily. Threads
    that need the same scorer wait until one of them has opened it; other threads do not wait.

    Args:
        limit: how many scorers can stay open without a borrower.
        retry_s: seconds to wait after a scorer could not be opened, so that many sessions do not each try.
    """

    def __init__(self, limit: int, retry_s: float = 5.0) -> None:
        self._limit, self._retry_s = limit, retry_s
        self._lock = threading.Lock()
        """Guards the fields below. Never held while a scorer is opened or closed."""
        self._open: dict[Hashable, _Open] = {}
        """By key, the least recently borrowed first."""
        self._opening: dict[Hashable, threading.Lock] = {}
        """By key, held while its scorer is opened."""
        self._failures: dict[Hashable, _Failure] = {}
        self._borrowed: ContextVar[dict[Hashable, _Open] | None] = ContextVar("borrowed", default=None)
        """Scorers that the `lending` block of this thread has borrowed."""

    def __len__(self) -> int:
        return len(self._open)

    @contextmanager
    def lending(self) -> Iterator[None]:
        """Let this thread `borrow` scorers, which stay open until the block ends."""
        borrowed: dict[Hashable, _Open] = {}
        token = self._borrowed.set(borrowed)
        try:
            yield
        finally:
            self._borrowed.reset(token)
            with self._lock:
                for each in borrowed.values():
                    each.num_borrowers -= 1
            self._close_spare()

    def borrow(self, key: Hashable, opener: Callable[[], Scorer]) -> Scorer:
        """The scorer of a key, which is opened if needed. Call it inside a `lending` block. Raises VistaError from
        `opener`; within `retry_s` after a failure, raised again without another try."""
        borrowed = self._borrowed.get()
        assert borrowed is not None, "scorers are borrowed within `lending`"
        with self._lock:
            opening = self._opening.setdefault(key, threading.Lock())
        with opening:
            scorer = self._lend(key, borrowed) or self._lend_new(key, borrowed, opener)
        self._close_spare()
        return scorer

    def _lend(self, key: Hashable, borrowed: dict[Hashable, _Open], new: Scorer | None = None) -> Scorer | None:
        """Lend the scorer of a key that is open, or a new one; None if there is neither."""
        with self._lock:
            each = self._open.pop(key, None) or (None if new is None else _Open(new))
            if each is None:
                return None
            self._open[key] = each
            if key not in borrowed:
                borrowed[key] = each
                each.num_borrowers += 1
            return each.scorer

    def _lend_new(self, key: Hashable, borrowed: dict[Hashable, _Open], opener: Callable[[], Scorer]) -> Scorer:
        failure = self._failures.get(key)
        if failure is not None and time.monotonic() - failure.at_s < self._retry_s:
            raise copy(failure.error)
        try:
            scorer = opener()
        except VistaError as error:
            self._failures[key] = _Failure(copy(error), time.monotonic())  # a copy, which holds no traceback
            raise
        self._failures.pop(key, None)
        lent = self._lend(key, borrowed, scorer)
        assert lent is scorer, "only the thread that holds a key's lock adds its scorer"
        return lent

    def _close_spare(self) -> None:
        with self._lock:
            spare = [key for key, each in self._open.items() if not each.num_borrowers]
            closed = [self._open.pop(key) for key in spare[: max(0, len(self._open) - self._limit)]]
        for each in closed:
            each.scorer.close()


class UserSearch:
    """Finds users of a log, or of a store if there is no log, by their id or its beginning, without handing all ids to
    the browser."""

    def __init__(self, users: Vocabulary, lengths: Int | None = None) -> None:
        """Search `users`; lengths int64 [N] are their numbers of events, None if they are unknown."""
        self.users, self.lengths = users, lengths

    @classmethod
    def of(cls, log: EventLog | None, scorer: Scorer | None) -> UserSearch:
        """The users of the log; without a log, those who have a record, whose ids are read once."""
        if log is not None:
            return cls(log.users, log.lengths)
        ids: list[Any] = [] if scorer is None else list(scorer.store.keys())
        return cls(Vocabulary.from_ids(ids) if ids else Vocabulary.empty("int"))

    def __len__(self) -> int:
        return len(self.users) - self.users.num_blank

    def exact(self, text: str) -> int | str | None:
        """The id that a text names, whether a user has it or not; None if ids are integers and this is none."""
        try:
            (user,) = ids_of_words([text.strip()], "user", self.users.kind)
        except ConfigError:  # the text is the beginning of no integer
            return None
        return user if text.strip() else None

    def matches(self, text: str, limit: int = 20) -> list[int | str]:
        """At most `limit` users whose id begins with a text, the exact one first; the shortest ids of integers."""
        text = text.strip()
        if not text or not len(self.users):
            return []
        rows = _int_rows(self.users, text) if self.users.kind == "int" else _str_rows(self.users, text)
        rows = rows[self.users.has_ids(rows)]
        if self.users.kind == "int":
            found: list[int | str] = np.sort(self.users.ids(rows))[:limit].tolist()
            return found
        exact = self.users.rows([text])
        rows = np.concatenate([exact[exact >= 0], rows[rows != exact[0]]])
        return list(self.users.ids(rows[:limit]).tolist())

    def sample(self, count: int) -> Int:
        """Rows int64 [at most count] of random users, ascending, the same ones at every call."""
        rows = np.arange(len(self.users))
        rows = rows[self.users.has_ids(rows)]
        if len(rows) > count:
            rows = np.sort(np.random.default_rng(0).choice(rows, count, replace=False))
        return rows

    def heavy_user(self, rng: np.random.Generator) -> int | str | None:
        """A random one of the users with the most events; of all users if lengths are unknown; None without users."""
        rows = np.arange(len(self.users))
        if self.lengths is not None:
            count = max(int(HEAVY_SHARE * len(rows)), min(10, len(rows)))
            rows = np.argpartition(-self.lengths, max(count - 1, 0))[:count] if len(rows) else rows
        rows = rows[self.users.has_ids(rows)]
        if not len(rows):
            return None
        (user,) = self.users.ids([rng.choice(rows)]).tolist()
        return str(user) if self.users.kind == "str" else int(user)


def ids_with_prefix(vocabulary: Vocabulary, text: str, limit: int = 20) -> Sequence[int | str]:
    """At most `limit` ids that begin with a text, such as items."""
    return UserSearch(vocabulary).matches(text, limit)


def _int_rows(users: Vocabulary, text: str) -> NDArray[np.int64]:
    """Rows of the integer ids whose decimal digits begin with a text."""
    digits = text.removeprefix("-")
    is_padded = digits[:1] == "0" and text != "0"  # No id is written as -0 or 07.
    if not digits.isdecimal() or not digits.isascii() or is_padded or len(digits) > 19:
        return np.zeros(0, np.int64)
    ids, sign, low = users.arrays()["ids"], -1 if text.startswith("-") else 1, int(digits)
    found = np.zeros(len(ids), np.bool_)
    for power in range(20 - len(digits)):
        first, last = low * 10**power, (low + 1) * 10**power - 1
        if first >= 1 << 63 or (low == 0 and power):
            break
        last = min(last, (1 << 63) - 1)
        found |= (ids >= first) & (ids <= last) if sign > 0 else (ids <= -first) & (ids >= -last)
    return np.flatnonzero(found)


def _str_rows(users: Vocabulary, text: str) -> NDArray[np.int64]:
    """Rows of the ids whose UTF-8 bytes begin with those of a text."""
    arrays, wanted = users.arrays(), text.encode("utf-8", "replace")
    content, offsets = arrays["ids"], arrays["offsets"]
    rows = np.flatnonzero(np.diff(offsets) >= len(wanted))
    for place, byte in enumerate(wanted):
        rows = rows[content[offsets[rows] + place] == byte]
    return rows


_SPECIAL = re.compile(r"[\\`*_\[\]{}$<>&~:#|]")


def escaped(text: object) -> str:
    """A text that the page shows on one line: no style, link, image, formula, or color of its own, and no password."""
    return _SPECIAL.sub(r"\\\g<0>", " ".join(without_password(str(text)).split()))
