"""Stores that change under a scorer, are closed during calls, or are not stores at all."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ITEMS, USERS, Served, small_config
from vista.errors import StoreError, VistaError
from vista.refresh import erase, refresh
from vista.scorer import Scorer
from vista.store.admin.store_compaction import compact_store
from vista.training.trainer import train

pytestmark = pytest.mark.usefixtures("no_warnings")
Call = Callable[[Scorer], object]


class TestStoresThatChange:
    def test_during_compactions(self, served: Served, tmp_path: Path) -> None:
        refresh(served.model, served.log, tmp_path / "store")
        stop, answers = threading.Event(), list[np.ndarray]()
        with Scorer.open(served.model, tmp_path / "store", on_missing="nan") as scorer:
            expected = scorer.score(USERS, ITEMS)

            def ask() -> None:
                while not stop.is_set():
                    answers.append(scorer.score(USERS, ITEMS))

            asking = threading.Thread(target=ask)
            asking.start()
            for _ in range(5):
                compact_store(tmp_path / "store")
                assert scorer.reload() is True
            stop.set()
            asking.join()
            assert answers and all(np.array_equal(scores, expected) for scores in answers)
            assert scorer.store.generation == 6
            # An erased user is missing at once, or after a reload if a compaction has removed the open generation.
            erase(tmp_path / "store", [USERS[0]])
            rows = scorer.score(USERS, ITEMS)
            assert np.isnan(rows[0]).all() and np.array_equal(rows[1:], expected[1:])
            compact_store(tmp_path / "store")
            erase(tmp_path / "store", [USERS[1]])
            np.testing.assert_array_equal(scorer.score(USERS, ITEMS), rows)
            assert scorer.reload() is True
            rows[1] = np.nan
            np.testing.assert_array_equal(scorer.score(USERS, ITEMS), rows)

    def test_a_store_that_moves_to_another_model(self, served: Served, tmp_path: Path) -> None:
        """Scorers of the old model use its generation until they are moved to the new model."""
        refresh(served.model, served.log, tmp_path / "store")
        other = train(small_config(served.log, tmp_path / "other", optim__epochs=1, seed=9), served.log)
        with Scorer.open(served.model, tmp_path / "store") as scorer:
            expected = scorer.score(USERS, ITEMS)
            refresh(other, served.log, tmp_path / "store")
            assert scorer.reload() is False
            np.testing.assert_array_equal(scorer.score(USERS, ITEMS), expected)
        with Scorer.open(served.model, tmp_path / "store") as again:
            assert again.store.generation == 1
            np.testing.assert_array_equal(again.score(USERS, ITEMS), expected)

    def test_closed(self, served: Served) -> None:
        scorer = Scorer.open(served.model, served.store)
        scorer.close()
        calls: list[Call] = [
            lambda s: s.score([100], ITEMS),
            lambda s: s.predict([100], ITEMS),
            lambda s: s.rank(100),
            lambda s: s.user_vectors([100]),
            lambda s: s.explain(100, ITEMS),
            lambda s: s.score([], []),
            lambda s: s.reload(),
            lambda s: s.encode(ITEMS),
            lambda s: s.item_vectors(),
            lambda s: s.manifest,
        ]
        for call in calls:
            with pytest.raises(StoreError, match="is closed; open a new one"):
                call(scorer)

    def test_closed_during_calls(self, served: Served) -> None:
        """A running call either succeeds or says that the store is closed."""
        for _ in range(5):
            scorer = Scorer.open(served.model, served.store)
            expected, ended = scorer.score(USERS, ITEMS), list[object]()
            begun = threading.Barrier(4)

            def ask(scorer: Scorer = scorer, ended: list[object] = ended, begun: threading.Barrier = begun) -> None:
                begun.wait()
                try:
                    while True:
                        ended.append(scorer.score(USERS, ITEMS))
                except VistaError as closed:
                    ended.append(closed)

            threads = [threading.Thread(target=ask) for _ in range(3)]
            for thread in threads:
                thread.start()
            begun.wait()
            time.sleep(0.02)
            scorer.close()
            for thread in threads:
                thread.join(30)
                assert not thread.is_alive()
            errors = [one for one in ended if isinstance(one, Exception)]
            assert len(errors) == 3 and all("is closed" in str(error) for error in errors)
            assert all(np.array_equal(one, expected) for one in ended if isinstance(one, np.ndarray))


def test_folders_that_are_not_a_store_are_neither_opened_nor_written(served: Served, tmp_path: Path) -> None:
    shutil.copytree(served.store, tmp_path / "store")
    shutil.copytree(served.model_dir, tmp_path / "model")
    shutil.copytree(served.log.path, tmp_path / "log")
    for folder, message in {
        "store/gen-1": f"is a generation of the store {tmp_path / 'store'}; pass that folder instead",
        "store/gen-2": "is a generation of the store",
        "log": "is not a store, but a log, a model or a run",
        "model": "is not a store, but a log, a model or a run",
    }.items():
        before = sorted(str(path) for path in tmp_path.rglob("*"))
        with pytest.raises(StoreError, match=message):
            Scorer.open(served.model, tmp_path / folder)
        with pytest.raises(StoreError, match=message):
            refresh(served.model, served.log, tmp_path / folder)
        assert sorted(str(path) for path in tmp_path.rglob("*")) == before
