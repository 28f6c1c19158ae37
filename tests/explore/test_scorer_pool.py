"""Scorers that the page keeps open: shared, closed beyond a limit, and never while a session uses them."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Served
from vista.errors import StoreError, VistaError
from vista.explore.workspace import ScorerPool
from vista.scorer import Scorer

DESCRIPTORS = Path("/proc/self/fd")


@pytest.fixture
def stores(served: Served, tmp_path: Path) -> list[Path]:
    """Four copies of a store."""
    return [Path(shutil.copytree(served.store, tmp_path / f"store-{number}")) for number in range(4)]


@pytest.fixture
def opener(served: Served) -> Callable[[Path], Callable[[], Scorer]]:
    """Opens the scorer of a store, which follows it as on the page."""

    def of(store: Path) -> Callable[[], Scorer]:
        def opened() -> Scorer:
            scorer = Scorer.open(served.model, store)
            scorer.follow(60)
            return scorer

        return opened

    return of


def num_open_files(folder: Path) -> int:
    """Descriptors and memory maps of files in a folder."""
    paths = [str(each.resolve()) for each in DESCRIPTORS.iterdir() if each.exists()]
    return sum(str(folder) in text for text in (*paths, *Path("/proc/self/maps").read_text().splitlines()))


def num_followers() -> int:
    return sum(thread.name == "vista-follow" for thread in threading.enumerate())


def test_the_scorer_that_was_borrowed_longest_ago_is_closed(
    stores: list[Path], opener: Callable[[Path], Callable[[], Scorer]]
) -> None:
    pool, lent, before = ScorerPool(limit=2), {}, num_followers()
    for store in (*stores[:2], stores[0], stores[2]):
        with pool.lending():
            lent[store] = pool.borrow(store, opener(store))
            lent[store].rank(104, top_k=1)
    assert len(pool) == 2 and num_followers() == before + 2
    with pytest.raises(StoreError, match="is closed"):
        lent[stores[1]].rank(104, top_k=1)
    if DESCRIPTORS.exists():
        assert [num_open_files(store) > 0 for store in stores] == [True, False, True, False]
    with pool.lending():
        assert pool.borrow(stores[0], opener(stores[0])) is lent[stores[0]], "it was kept open"
        assert pool.borrow(stores[1], opener(stores[1])).rank(104, top_k=1).items, "it is opened again"


def test_a_scorer_that_another_session_uses_stays_open_until_its_run_ends(
    stores: list[Path], opener: Callable[[Path], Callable[[], Scorer]]
) -> None:
    pool, borrowed, may_end = ScorerPool(limit=1), threading.Event(), threading.Event()
    scorers: list[Scorer] = []

    def session() -> None:
        with pool.lending():
            scorers.append(pool.borrow(stores[0], opener(stores[0])))
            borrowed.set()
            may_end.wait(60)

    thread = threading.Thread(target=session)
    thread.start()
    assert borrowed.wait(60)
    for store in stores[1:]:
        with pool.lending():
            pool.borrow(store, opener(store)).rank(104, top_k=1)
            assert scorers[0].rank(104, top_k=1).items
    assert len(pool) == 1, "only the one that is in use"
    may_end.set()
    thread.join(60)
    assert scorers[0].rank(104, top_k=1).items, "the limit allows one"
    with pool.lending():
        pool.borrow(stores[1], opener(stores[1]))
    with pytest.raises(StoreError, match="is closed"):
        scorers[0].rank(104, top_k=1)


def test_one_run_may_borrow_more_than_the_limit(
    stores: list[Path], opener: Callable[[Path], Callable[[], Scorer]]
) -> None:
    pool = ScorerPool(limit=1)
    with pool.lending():
        for _ in range(2):
            scorers = [pool.borrow(store, opener(store)) for store in stores[:3]]
        assert all(scorer.rank(104, top_k=1).items for scorer in scorers)
        assert len(pool) == 3
    assert len(pool) == 1


def test_what_cannot_be_opened_is_tried_again(
    stores: list[Path], opener: Callable[[Path], Callable[[], Scorer]], tmp_path: Path
) -> None:
    pool, late = ScorerPool(limit=1, retry_s=0.0), tmp_path / "late"
    with pool.lending():
        with pytest.raises(VistaError):
            pool.borrow(late, opener(late))
        assert len(pool) == 0
        shutil.copytree(stores[0], late)
        assert pool.borrow(late, opener(late)).rank(104, top_k=1).items


def test_a_slow_open_does_not_block_other_sessions(
    stores: list[Path], opener: Callable[[Path], Callable[[], Scorer]]
) -> None:
    pool, began, may_open = ScorerPool(limit=2), threading.Event(), threading.Event()
    ended = threading.Event()

    def slow() -> Scorer:
        began.set()
        may_open.wait(60)
        return opener(stores[0])()

    lent: list[Scorer] = []

    def first() -> None:
        with pool.lending():
            lent.append(pool.borrow("slow", slow))

    def second() -> None:
        with pool.lending():
            pool.borrow(stores[1], opener(stores[1]))
        ended.set()

    threads = [threading.Thread(target=first, daemon=True) for _ in range(2)]
    threads.append(threading.Thread(target=second, daemon=True))
    threads[0].start()
    assert began.wait(60)
    for thread in threads[1:]:
        thread.start()
    assert ended.wait(30), "it waited for a store that it does not need"
    may_open.set()
    for thread in threads:
        thread.join(60)
    assert len(pool) == 2 and lent[0] is lent[1], "both sessions share the slow one"


def test_a_failure_is_remembered_for_a_while(
    stores: list[Path], opener: Callable[[Path], Callable[[], Scorer]], tmp_path: Path
) -> None:
    pool, late, tries = ScorerPool(limit=1, retry_s=3600.0), tmp_path / "late", 0

    def opened() -> Scorer:
        nonlocal tries
        tries += 1
        return opener(late)()

    for _ in range(2):
        with pool.lending(), pytest.raises(StoreError, match="late"):
            pool.borrow(late, opened)
    assert tries == 1
