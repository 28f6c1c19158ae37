"""A soak test: processes that ask, one that changes the store, and the judge of the answers in this process.

The keeper runs one operation after the other. After each it freezes the changed generations: it copies their records to
a place that is never written again. The number of a question determines it, so that the judge can ask the same question
of a frozen copy later. An answer is right if it equals that of one copy that was in service during the call. An answer
that is too old, contains an erased user, or mixes two generations is wrong.
"""

from __future__ import annotations

import multiprocessing
import queue
import shutil
import time
import traceback
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scripts.benchmarks.benchmark import BenchmarkRecorder
from scripts.benchmarks.workloads import ACTIONS, START_MS, lifelong_log, untrained
from vista.config import SourceColumns
from vista.device import set_threads
from vista.log.event_log import EventLog
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, erase, refresh, refresh_incremental
from vista.scorer import Scorer
from vista.store import StoreReader
from vista.store.admin import compact_store
from vista.store.layout import environment_path, list_generations, read_current, write_current

OPERATIONS = ("full", "erase", "incremental", "compact", "export", "incremental", "model", "erase", "incremental")
"""The cycle of operations. A full refresh includes a new event of every user, so that publishing it changes every
answer. "model" replaces the model and then refreshes in full. "export" replaces it by the same model with a shorter
tail, or with the full tail again, which changes answers without a refresh."""
SHORTER_TAIL = 8
ERASED_AT_ONCE = 5
LATER_MS = START_MS + 10**11
"""Time of the requests: after all events."""
Arrays = list[NDArray[Any]]
TOLERANCE = 2e-5
"""Of an answer: the tests' tolerance for scores of the same user in different batches."""
OPEN_COPIES = 8
State = tuple[int, int, int]
"""Generation, operation after which it was copied, and length of the model's tail."""
HANGS_S = 600.0
SHOWN_FAILURES = 5


@dataclass(frozen=True, slots=True)
class SoakAnswer:
    """A worker's answer, and the states of the store that may have produced it."""

    thread: int
    question: int
    since: int
    """The last operation that ended before the call."""
    until: int
    """The last operation that began before the end of the call."""
    generations: tuple[int, int]
    """The store's generation before and after the call."""
    tail_lens: tuple[int, int]
    """The model's length of the tail before and after the call."""
    latency_s: float
    arrays: Arrays
    num_retries: int = 0
    """Times that the question was asked again on a new connection."""


@dataclass(frozen=True, slots=True)
class SoakOperation:
    """A finished operation of the keeper, whose result is frozen."""

    kind: str
    seconds: float


@dataclass(frozen=True, slots=True)
class SoakRefusal:
    """A question that was refused, because too many were waiting."""


@dataclass(frozen=True, slots=True)
class SoakFailure:
    """An error in a worker or in the keeper."""

    text: str


class SoakStage:
    """The folders and the shared state of the soak test's processes."""

    def __init__(self, folder: Path, num_users: int, num_items: int) -> None:
        """Create a log, an untrained model and its store, and freeze it as operation 0."""
        self.num_users, self.num_items = num_users, num_items
        self.log, self.model, self.store, self.frozen, self.models = (
            folder / name for name in ("log", "model", "store", "frozen", "models")
        )
        self.context = multiprocessing.get_context("spawn")
        # Only the keeper writes these, so they need no lock.
        self.begun, self.done, self.frozen_until, self.served = (
            self.context.Value("q", 0, lock=False) for _ in range(4)
        )
        """The last operation that has begun, ended, and is frozen, and the generation that is published."""
        self.said = self.context.Queue(maxsize=256)
        """Answers, operations and failures; workers wait if the judge is too slow."""
        self.stop = self.context.Event()
        log = lifelong_log(self.log, [40] * num_users, num_items=num_items)
        refresh(self.new_model(log, seed=0), log, self.store)
        self.served.value = read_current(self.store)
        freeze(self.store, self.frozen, 0)

    def new_model(self, log: EventLog, seed: int) -> VistaModel:
        """Export a new model."""
        model = untrained(log, dim=64, num_seeds=16, seed=seed)
        self.export(model)
        return model

    def export(self, model: VistaModel) -> None:
        """Save a model to the folder in service, and a copy for the judge."""
        model.save_pretrained(self.copy_of_model(model.summarizer_id(), model.config.tail_len))
        model.save_pretrained(self.model)

    def copy_of_model(self, summarizer_id: bytes, tail_len: int) -> Path:
        """The judge's copy of a model."""
        return self.models / f"{summarizer_id.hex()}-{tail_len}"


def freeze(store: Path, frozen: Path, operation: int) -> None:
    """Copy each generation that changed since its last copy to a store `frozen/<generation>-<operation>`."""
    for generation in list_generations(store):
        records = environment_path(store, generation) / "data.mdb"
        mark = f"{records.stat().st_mtime_ns}"
        last = max((number for other, number in copies(frozen) if other == generation), default=None)
        if last is not None and (frozen / f"{generation}-{last}" / "mark").read_text() == mark:
            continue
        copy = frozen / f"{generation}-{operation}"
        target = environment_path(copy, generation)
        target.mkdir(parents=True)
        shutil.copyfile(records, target / "data.mdb")
        write_current(copy, generation)
        (copy / "mark").write_text(mark)


def copies(frozen: Path) -> list[tuple[int, int]]:
    """All frozen copies as (generation, operation after which it was copied)."""
    names = [path.name.split("-") for path in frozen.iterdir()] if frozen.is_dir() else []
    return [(int(generation), int(operation)) for generation, operation in names]


def keep(stage: SoakStage, pause_s: float) -> None:
    """Change the store until the stage stops, then compare it with a rebuilt store."""
    set_threads(1)
    try:
        _compare_with_rebuilt(stage, *_operate(stage, pause_s))
    except Exception:
        stage.said.put(SoakFailure(f"keeper: {traceback.format_exc()}"))


def _operate(stage: SoakStage, pause_s: float) -> tuple[VistaModel, list[int]]:
    """Returns the last model, and the erased users."""
    model = exported = VistaModel.from_pretrained(stage.model)
    rng = np.random.default_rng(0)
    erased: list[int] = []
    for number, kind in enumerate(cycle(OPERATIONS), start=1):
        if stage.stop.wait(pause_s):
            break
        everyone = 1 + np.arange(stage.num_users)
        if kind in ("full", "model"):
            log = append_events(stage, number, everyone, rng)
        elif kind == "incremental":
            log = append_events(stage, number, rng.choice(everyone, stage.num_users // 10, replace=False), rng)
        began = time.perf_counter()
        stage.begun.value = number
        if kind in ("full", "model"):
            if kind == "model":
                model = exported = stage.new_model(log, seed=number)
            refresh(model, log, stage.store)
        elif kind == "incremental":
            # In one transaction, so that there are no states between two operations.
            refresh_incremental(model, log, stage.store, options=RefreshOptions(users_per_batch=stage.num_users))
        elif kind == "erase":
            users = rng.choice(everyone, ERASED_AT_ONCE, replace=False).tolist()
            erase(stage.store, users)
            erased += users
        elif kind == "export":
            exported = model.with_tail(SHORTER_TAIL) if exported is model else model
            stage.export(exported)
        else:
            compact_store(stage.store)
        stage.done.value = number
        seconds = time.perf_counter() - began
        with StoreReader.open(stage.store) as store:
            assert not store.get_many(erased).found.any(), f"the store serves erased users after {kind}"
            assert len(store) == stage.num_users - len(set(erased)), f"the store holds {len(store)} users after {kind}"
        stage.served.value = read_current(stage.store)
        freeze(stage.store, stage.frozen, number)
        stage.frozen_until.value = number
        stage.said.put(SoakOperation(kind, seconds))
    return model, erased


def append_events(stage: SoakStage, operation: int, users: NDArray[np.int64], rng: np.random.Generator) -> EventLog:
    """Append one new event per user."""
    events = {
        "user": users,
        "item": rng.integers(1, stage.num_items + 1, len(users)),
        "timestamp": np.full(len(users), START_MS + 10**10 + operation * 60_000),
        "action": rng.choice(ACTIONS, len(users)).tolist(),
    }
    return EventLog.from_frame(events, stage.log, time_unit="ms", columns=SourceColumns(action="action"), append=True)


def _compare_with_rebuilt(stage: SoakStage, model: VistaModel, erased: list[int]) -> None:
    """Require that the store equals one refresh of the whole log, except for the erased users."""
    rebuilt, log = stage.store.with_name("rebuilt"), EventLog.open(stage.log)
    refresh_incremental(model, log, stage.store)
    refresh(model, log, rebuilt)
    users = np.setdiff1d(1 + np.arange(stage.num_users), erased)
    with StoreReader.open(stage.store) as store, StoreReader.open(rebuilt) as other:
        actual, expected = store.get_many(users), other.get_many(users)
    assert actual.found.all() and expected.found.all()
    assert (actual.history_digest == expected.history_digest).all(), "a history differs from the log's"
    assert (actual.tail.items == expected.tail.items).all() and (actual.tail.times == expected.tail.times).all()
    # int8: a different rounding in float32 may move a value to the next step.
    step = (expected.summary.max(-1) - expected.summary.min(-1)) / 255
    assert (np.abs(actual.summary - expected.summary).max(-1) <= 1.5 * step + 1e-5).all(), "a summary differs"


class SoakJudge:
    """Asks questions again of frozen copies.

    Args:
        stage: its folders hold the copies.
        ask: the answer of a scorer to the question of this number.
        lag: number of generations that a thread's next answer may be older than its latest one, because another process
            gives it.
    """

    def __init__(self, stage: SoakStage, ask: Callable[[Scorer, int], Arrays], lag: int = 0) -> None:
        self._stage, self._ask, self._lag = stage, ask, lag
        self._opened: OrderedDict[State, Scorer | None] = OrderedDict()
        self.latest: dict[int, SoakAnswer] = {}
        self.num_changing = 0
        """Answers that an operation changed during the call."""

    def is_right(self, answer: SoakAnswer) -> bool:
        """Whether a single state of the store that was in service during the call gives this answer."""
        expected = []
        for state in self._states(answer):
            scorer = self._scorer(state)
            if scorer is not None:
                expected.append(self._ask(scorer, answer.question))
        same = [equal(answer.arrays, arrays) for arrays in expected]
        self.num_changing += any(not equal(expected[0], arrays) for arrays in expected[1:])
        self.latest[answer.thread] = answer
        return any(same)

    def forget(self, num_threads: int) -> None:
        """Remove the copies that no later answer of the threads can come from."""
        if len(self.latest) < num_threads:
            return
        since = min(answer.since for answer in self.latest.values())
        first = min(answer.generations[0] for answer in self.latest.values()) - self._lag
        known = copies(self._stage.frozen)
        for copy in known:
            generation, operation = copy
            outdated = any(g == generation and operation < other <= since for g, other in known)
            if generation < first or outdated:
                for state in [state for state in self._opened if state[:2] == copy]:
                    self._close(state)
                shutil.rmtree(self._stage.frozen / f"{generation}-{operation}")

    def _states(self, answer: SoakAnswer) -> list[State]:
        """Copies of the generations that were open: the last one before the call, and those made during the call."""
        known = copies(self._stage.frozen)
        states: list[State] = []
        for generation in range(answer.generations[0], answer.generations[1] + 1):
            operations = sorted(number for other, number in known if other == generation and number <= answer.until)
            before = [number for number in operations if number <= answer.since]
            own = [number for number in operations if number >= max(before, default=0)]
            states += [(generation, number, tail) for number in own for tail in sorted(set(answer.tail_lens))]
        return states

    def _scorer(self, state: State) -> Scorer | None:
        """A scorer of a copy; None if the generation's model was never exported with this length of the tail."""
        if state not in self._opened:
            generation, operation, tail_len = state
            folder = self._stage.frozen / f"{generation}-{operation}"
            with StoreReader.open(folder) as store:
                model = self._stage.copy_of_model(store.summarizer_id, tail_len)
            exported = model.is_dir()
            self._opened[state] = Scorer.open(model, folder, on_missing="nan", task="click") if exported else None
        self._opened.move_to_end(state)
        while len(self._opened) > OPEN_COPIES:
            self._close(next(iter(self._opened)))
        return self._opened[state]

    def _close(self, state: State) -> None:
        scorer = self._opened.pop(state)
        if scorer is not None:
            scorer.close()


def equal(actual: Arrays, expected: Arrays) -> bool:
    """Whether two answers are the same, up to rounding."""
    return len(actual) == len(expected) and all(
        a.shape == b.shape and np.allclose(a, b, rtol=0, atol=TOLERANCE, equal_nan=True)
        for a, b in zip(actual, expected, strict=True)
    )


class Soak:
    """The processes, and what they reported so far.

    Args:
        stage: what they share.
        judge: of the answers.
        askers: processes that ask questions, not yet started.
        num_threads: of all askers together.
        pause_s: between two operations of the keeper.
    """

    def __init__(
        self,
        stage: SoakStage,
        judge: SoakJudge,
        askers: Sequence[SpawnProcess],
        num_threads: int,
        pause_s: float,
    ) -> None:
        self.stage, self.judge, self.num_threads = stage, judge, num_threads
        self.keeper = stage.context.Process(target=keep, args=(stage, pause_s), daemon=True)
        self.processes = [*askers, self.keeper]
        self.failures: list[str] = []
        self.wrong: list[str] = []
        self.operations: Counter[str] = Counter()
        self.latencies_s: list[list[float]] = [[]]
        """Per minute."""
        self.num_retries = 0
        """Questions that were asked again, because the process that should have answered was killed."""
        self.num_refused = 0
        """Questions that were refused, because too many were waiting."""

    @property
    def num_answers(self) -> int:
        """Number of answers that were judged."""
        return sum(map(len, self.latencies_s))

    def run(self, seconds: float, minute_s: float, on_start: Callable[[], None] = lambda: None) -> None:
        """Run all processes until `seconds` after the first answer and until each operation ran, and judge answers.

        Args:
            seconds: see above.
            minute_s: length of what the output calls a minute.
            on_start: called after the first answer.
        """
        for process in self.processes:
            process.start()
        deadline = time.monotonic() + HANGS_S
        while not self.num_answers and time.monotonic() < deadline:
            self._take()
        on_start()
        began = time.monotonic()
        while all(process.is_alive() for process in self.processes):
            now = time.monotonic() - began
            if now >= seconds and (set(self.operations) == set(OPERATIONS) or now >= seconds + HANGS_S):
                break
            self._take()
            if now >= minute_s * len(self.latencies_s):
                self._end_minute()
        self._end_minute()
        early = [process for process in self.processes if not process.is_alive()]
        self.stage.stop.set()
        while any(process.is_alive() for process in self.processes) or not self.stage.said.empty():
            self._take()
        self.failures += [f"{p.name} ended with {p.exitcode}" for p in self.processes if p.exitcode or p in early]

    def _take(self, timeout_s: float = 1.0) -> None:
        try:
            said = self.stage.said.get(timeout=timeout_s)
        except queue.Empty:
            return
        if isinstance(said, SoakAnswer):
            self.num_retries += said.num_retries
            self.latencies_s[-1].append(said.latency_s)
            deadline = time.monotonic() + HANGS_S
            while self.stage.frozen_until.value < said.until:  # Its last copy is not finished.
                if not self.keeper.is_alive() or time.monotonic() > deadline:
                    self.failures.append(f"the keeper did not finish operation {said.until}")
                    return
                time.sleep(0.005)
            if not self.judge.is_right(said):
                states = f"generations {said.generations}, operations {said.since} to {said.until}"
                self.wrong.append(f"question {said.question} of thread {said.thread}: {states}")
        elif isinstance(said, SoakOperation):
            self.operations[said.kind] += 1
            self.judge.forget(self.num_threads)
        elif isinstance(said, SoakRefusal):
            self.num_refused += 1
        elif isinstance(said, SoakFailure):
            self.failures.append(said.text)

    def _end_minute(self) -> None:
        own = np.array(self.latencies_s[-1] or [np.nan])
        median, p99 = 1e3 * np.percentile(own, [50, 99])
        print(
            f"{len(self.latencies_s):3d}: {len(own):,} answers, median {median:.1f} ms, p99 {p99:.1f} ms, "
            f"generation {self.stage.served.value}, {sum(self.operations.values())} operations; "
            f"{len(self.failures)} failed, {len(self.wrong)} wrong",
            flush=True,
        )
        self.latencies_s.append([])


def record(soak: Soak, recorder: BenchmarkRecorder, case: str) -> None:
    """Record the answers, the operations, what went wrong, and the slowest calls, and print the first failures."""
    recorder.add(f"{case}: answers", soak.num_answers, "answers", bar="value > 0")
    recorder.add(f"{case}: answers that changed while they were asked for", soak.judge.num_changing, "answers")
    for kind in sorted(set(OPERATIONS)):
        recorder.add(f"{case}: operations, {kind}", soak.operations[kind], "operations", bar="value > 0")
    recorder.add(f"{case}: failed", len(soak.failures), "failures", bar="value <= 0")
    recorder.add(f"{case}: wrong", len(soak.wrong), "answers", bar="value <= 0")
    for text in [*soak.failures, *soak.wrong][:SHOWN_FAILURES]:
        print(text)
    if minutes := [own for own in soak.latencies_s if own]:
        slowest = max(np.percentile(own, 99) for own in minutes)
        recorder.add(f"{case}: p99 of a call", float(1e3 * np.percentile(np.concatenate(minutes), 99)), "ms")
        recorder.add(f"{case}: p99 of a call in the slowest minute", float(1e3 * slowest), "ms")
