"""`Scorer.answered_from`: the generation and the model of a thread's last call."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from tests.conftest import ITEMS, USERS, Served
from vista.refresh import refresh
from vista.scorer import Scorer
from vista.scorer.answer_source import AnswerSource
from vista.store.shards import Shard


def test_the_source_of_an_answer(served: Served, tmp_path: Path) -> None:
    store, checksum = tmp_path / "store", json.loads((served.model_dir / "config.json").read_text())["checksum"]
    refresh(served.model, served.log, store)
    with Scorer.open(served.model_dir, store) as scorer:
        assert scorer.answered_from is None
        scorer.score(USERS, ITEMS)
        assert scorer.answered_from == AnswerSource(1, checksum)
        refresh(served.model, served.log, store)
        assert scorer.reload()
        assert scorer.answered_from == AnswerSource(1, checksum)  # No call since.
        seen = []

        def work() -> None:
            seen.append(scorer.answered_from)
            scorer.rank(USERS[0])
            seen.append(scorer.answered_from)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert seen == [None, AnswerSource(2, checksum)] and scorer.answered_from == AnswerSource(1, checksum)
        scorer.user_vectors([])
        assert scorer.answered_from == AnswerSource(2, checksum)


def test_a_model_in_memory_and_a_store_with_shards(served: Served, tmp_path: Path) -> None:
    """The model has no checksum. The number is that of the oldest generation."""
    for index in (0, 1, 1):
        refresh(served.model, served.log, tmp_path, shard=Shard(index, 2))
    with Scorer.open(served.model, tmp_path) as scorer:
        assert sorted(reader.generation for reader in scorer.store._readers) == [1, 2]  # type: ignore[union-attr]
        scorer.score(USERS, ITEMS)
        assert scorer.answered_from == AnswerSource(1, None)
