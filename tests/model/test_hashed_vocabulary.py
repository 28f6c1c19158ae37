"""Values that share rows by a hash."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from vista.log.item_features import CategoryColumn, ItemFeatures
from vista.log.row_features import RowFeatures
from vista.log.vocabulary import Vocabulary
from vista.model.feature_spec import FeatureSpec
from vista.model.hashed_vocabulary import HashedVocabulary
from vista.model.item_feature_table import ItemFeatureTable
from vista.model.row_feature_reader import RowFeatureReader

URL = FeatureSpec("url", "category", 1000, hashed=True)


def test_rows_never_change() -> None:
    """Saved models rely on them."""
    assert HashedVocabulary(1000).rows(["a", "b", "naïve", "a", ""]).tolist() == [719, 615, 928, 719, -1]
    assert HashedVocabulary(7).rows(["a", "b"]).tolist() == [1, 4]


def test_any_number_of_values_spreads_over_all_rows() -> None:
    values = HashedVocabulary(100)
    counts = np.bincount(values.rows([f"value {number}" for number in range(20_000)]), minlength=100)
    assert len(counts) == len(values) == 100 and counts.min() > 120 and counts.max() < 290  # 200 expected


def test_it_is_a_vocabulary_that_does_not_grow(tmp_path: Path) -> None:
    values = HashedVocabulary(1000)
    assert values.extended(["new"]) is values and values.save(tmp_path, "x") == [] == list(tmp_path.iterdir())
    copied = pickle.loads(pickle.dumps(values))
    assert copied.rows(["a"]) == values.rows(["a"]) and copied.digest() == values.digest()
    assert values.digest() != HashedVocabulary(1001).digest() and len(values.digest()) == 64
    assert values.ids(np.array([3, 4])).tolist() == ["row 3 of 1000", "row 4 of 1000"]


def test_a_reader_reads_logs_and_callers_alike(tmp_path: Path) -> None:
    reader = RowFeatureReader.of(RowFeatures({}), {"url": HashedVocabulary(1000)})
    assert reader.columns == [URL]
    of_log = {"url": Vocabulary.from_ids(["x", "y", "z"])}
    rows = reader.recoder(of_log)(RowFeatures({"url": np.array([2, 0, -1], np.int32)}), 3)
    given = reader.parse({"url": ["z", "x", None]}, 3)
    np.testing.assert_array_equal(rows.columns["url"], given.columns["url"])
    assert given.columns["url"][2] == -1 and (given.columns["url"][:2] >= 0).all()
    assert reader.parse({"url": ["never seen"]}, 1).columns["url"][0] >= 0
    reader.save(tmp_path, "request")
    loaded = RowFeatureReader.load(tmp_path, "request", [URL])
    assert loaded is not None and loaded.digests() == reader.digests()


def test_an_item_table_reads_hashed_values(tmp_path: Path) -> None:
    texts = Vocabulary.from_ids(["p", "q", "r"])
    columns = CategoryColumn(texts, np.array([0, 2, 1], np.int32), np.array([0, 2, 2, 3]))
    table = ItemFeatureTable.of(ItemFeatures({"url": columns}), [URL])
    expected = 1 + HashedVocabulary(1000).rows(["p", "r", "q"])
    assert table.entry.tolist() == [*sorted(expected[:2].tolist()), 0, expected[2]]
    assert table.weight.tolist() == [0.5, 0.5, 1.0, 1.0] and table.fits(4, URL.num_rows, 0)
    new = CategoryColumn(Vocabulary.from_ids(["new"]), np.array([0], np.int32), np.array([0, 1]))
    grown = table.extended(ItemFeatures({"url": new}), [URL])
    assert grown.entry[-1] == 1 + HashedVocabulary(1000).rows(["new"])[0]
    grown.save(tmp_path)
    assert ItemFeatureTable.load(tmp_path, [URL]).entry.tolist() == grown.entry.tolist()


def test_only_categories_can_be_hashed() -> None:
    with pytest.raises(ValueError, match="only a category can be hashed"):
        FeatureSpec("price", "number", 1, hashed=True)
