"""A reader of a given generation stays on it, whatever is published."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from vista.errors import StoreError, SummarizerMismatchError
from vista.store import StoreReader
from vista.store.sharded_reader import open_store
from vista.store.shards import Shard

USERS = range(40)


def test_a_given_generation_is_opened_and_kept(tmp_path, build):
    for run in range(2):
        build.write_store(tmp_path, salt=run, run_digest=f"log-{run}")
    with open_store(tmp_path, generation=1) as earlier, open_store(tmp_path) as served:
        assert (earlier.generation, served.generation) == (1, 2)
        build.write_store(tmp_path, salt=2, run_digest="log-2")
        assert served.reload() and served.generation == 3
        with pytest.raises(StoreError, match="has no gen-1"):  # a publication keeps one earlier generation
            earlier.reload()
        np.testing.assert_allclose(earlier.get_many(USERS).summary, build.summaries(USERS, 0), atol=0.02)
    with open_store(tmp_path, generation=2) as earlier:
        assert not earlier.reload() and earlier.generation == 2
        again = pickle.loads(pickle.dumps(earlier))
        assert again.generation == 2
        again.close()


def test_a_given_generation_of_another_summarizer_is_refused(tmp_path, build):
    build.write_store(tmp_path)
    build.write_store(tmp_path, salt=1, summarizer_id=build.summarizer("b").hex())
    with pytest.raises(SummarizerMismatchError):  # although generation 1 would match
        StoreReader.open(tmp_path, summarizer_id=build.summarizer(), generation=2)


def test_a_generation_of_a_sharded_store_is_refused(tmp_path, build):
    build.write_store(Shard(0, 1).path(tmp_path))
    with pytest.raises(StoreError, match="is sharded"):
        open_store(tmp_path, generation=1)
