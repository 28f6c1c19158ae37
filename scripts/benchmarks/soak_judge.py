"""The judge of a soak test: asks every question again of frozen copies of the store and of the model.

An answer is right if it equals that of one copy that was in service during the call. An answer that is too old,
contains an erased user, or mixes two generations is wrong.
"""

from __future__ import annotations

import shutil
from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from scripts.benchmarks.soak_load import Arrays, SoakAnswer, SoakStage, copies
from vista.scorer import Scorer
from vista.store import StoreReader

TOLERANCE = 2e-5
"""Of an answer: the tests' tolerance for scores of the same user in different batches."""
OPEN_COPIES = 8
State = tuple[int, int, int]
"""Generation, operation after which it was copied, and length of the model's tail."""


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
