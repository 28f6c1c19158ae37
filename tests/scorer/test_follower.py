"""`Scorer.follow`: a thread that keeps a scorer up to date, whatever happens to the store."""

from __future__ import annotations

import gc
import logging
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ITEMS, USERS, Served
from tests.forked_child import in_child
from vista.errors import StoreError
from vista.refresh import refresh
from vista.scorer import Scorer
from vista.scorer.serving_source import Follower

TIMEOUT_S = 60
EVERY_S = 0.02


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


_others: set[threading.Thread] = set()
"""Threads of earlier tests of this process."""


@pytest.fixture(autouse=True)
def forget_others() -> None:
    """Count only threads that begin in the test."""
    _others.clear()
    _others.update(threading.enumerate())


def followers() -> int:
    return sum(thread.name == "vista-follow" for thread in set(threading.enumerate()) - _others)


@pytest.fixture
def store(served: Served, tmp_path: Path) -> Path:
    shutil.copytree(served.store, tmp_path / "store")
    return tmp_path / "store"


def test_a_new_generation_is_followed_until_close(served: Served, store: Path) -> None:
    scorer = Scorer.open(served.model_dir, store)
    scorer.follow(EVERY_S)
    scorer.follow(EVERY_S)  # replaces the first
    assert followers() == 1
    wait_for(lambda: scorer.stats().followed_at > 0)
    assert abs(scorer.stats().followed_at - 1000 * time.time()) < 1000 * TIMEOUT_S
    before = scorer.manifest.generation
    refresh(served.model, served.log, store)
    wait_for(lambda: scorer.stats().reloads == 1)
    assert scorer.manifest.generation == before + 1 and scorer.stats().failed_reloads == 0
    scorer.close()
    assert followers() == 0
    scorer.close()
    with pytest.raises(StoreError, match="is closed"):
        scorer.follow()
    assert followers() == 0


def test_a_store_that_disappears_and_returns(served: Served, store: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "vista.scorer.serving_source"), Scorer.open(served.model_dir, store) as scorer:
        expected = scorer.score(USERS, ITEMS)
        scorer.follow(EVERY_S)
        store.rename(store.with_name("away"))
        wait_for(lambda: scorer.stats().failed_reloads >= 3)
        assert (error := scorer.stats().last_reload_error) is not None and str(store) in error
        np.testing.assert_array_equal(scorer.score(USERS, ITEMS), expected)
        store.with_name("away").rename(store)
        refresh(served.model, served.log, store)
        wait_for(lambda: scorer.stats().reloads == 1)
        assert scorer.stats().last_reload_error is None
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [f"reload failed; the previous model and store stay in service: {error}"], (
        "once, not at every call"
    )
    assert caplog.records[-1].message == "reload works again"


class PanicException(BaseException):
    """As those of extensions in Rust."""


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (OSError(5, "Input/output error"), "OSError: [Errno 5] Input/output error"),
        (PanicException("index out of bounds"), "PanicException: index out of bounds"),
    ],
)
def test_a_failure_does_not_end_the_thread(
    served: Served,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    failure: BaseException,
    message: str,
) -> None:
    def fail() -> bool:
        raise failure

    with Scorer.open(served.model_dir, store) as scorer:
        with monkeypatch.context() as patch:
            patch.setattr(scorer, "_moved", fail)
            scorer.follow(EVERY_S)
            wait_for(lambda: scorer.stats().failed_reloads >= 2)
            assert scorer.stats().last_reload_error == message
            with pytest.raises(type(failure), match=str(failure.args[-1])):
                scorer.reload()
        wait_for(lambda: scorer.stats().last_reload_error is None)
        assert followers() == 1
    assert any(message in record.message for record in caplog.records)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_a_request_to_exit_ends_the_thread(kind: type[BaseException]) -> None:
    class Exiting:
        calls = 0

        def reload(self) -> bool:
            self.calls += 1
            raise kind

    exiting = Exiting()
    follower = Follower(exiting)
    follower.start(EVERY_S)
    wait_for(lambda: exiting.calls > 0 and followers() == 0)
    follower.stop()
    assert exiting.calls == 1


def test_close_waits_for_a_reload_that_is_running() -> None:
    class Slow:
        ended = 0

        def reload(self) -> bool:
            began.set()
            time.sleep(0.2)
            self.ended += 1
            return False

    began, slow = threading.Event(), Slow()
    follower = Follower(slow)
    follower.start(EVERY_S)
    assert began.wait(TIMEOUT_S)
    follower.stop()
    assert slow.ended >= 1 and followers() == 0


def test_the_thread_does_not_keep_a_scorer_alive(served: Served, store: Path) -> None:
    scorer = Scorer.open(served.model_dir, store)
    scorer.follow(EVERY_S)
    del scorer
    gc.collect()
    wait_for(lambda: followers() == 0)


@pytest.mark.parametrize("every_s", [0, -1, float("nan"), float("inf"), 1e300])
def test_periods_that_are_refused(scorer: Scorer, every_s: float) -> None:
    with pytest.raises(ValueError, match="every_s: must be positive and at most"):
        scorer.follow(every_s)
    assert followers() == 0


def test_a_forked_worker_follows_by_itself(served: Served, store: Path) -> None:
    with Scorer.open(served.model_dir, store) as scorer:
        scorer.follow(EVERY_S)
        wait_for(lambda: scorer.stats().followed_at > 0)

        def follow_again() -> bool:
            alone = threading.active_count() == 1 and scorer.stats().followed_at == 0
            scorer.follow(EVERY_S)
            wait_for(lambda: scorer.stats().followed_at > 0)
            scorer.close()
            return alone

        assert in_child(follow_again)
