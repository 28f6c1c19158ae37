"""Vectors of features of rows, against a plain reading in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vista.log.row_features import RowFeatures
from vista.log.vocabulary import Vocabulary
from vista.model.feature_spec import MAX_ABS_SCORE
from vista.model.row_feature_encoder import RowFeatureEncoder
from vista.model.row_feature_reader import RowFeatureReader

DIM = 6
DEVICES = ["desktop", "phone", "tv"]
VALUES = {"device": Vocabulary.from_ids(DEVICES), "seconds": None}


def features_of(device: list[int], seconds: list[float]) -> RowFeatures:
    return RowFeatures({"device": np.array(device, np.int32), "seconds": np.array(seconds, np.float32)})


drawn_rows = st.lists(
    st.tuples(st.integers(-1, 2), st.one_of(st.just(math.nan), st.floats(-1e6, 1e6, width=32))), min_size=1, max_size=20
)


def drawn_encoder(reader: RowFeatureReader) -> RowFeatureEncoder:
    """A float64 encoder with drawn weights."""
    made, generator = RowFeatureEncoder(reader.columns, DIM).double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    return made


@given(drawn_rows)
@settings(max_examples=60, deadline=None)
def test_vectors_equal_a_plain_reading(rows: list[tuple[int, float]]) -> None:
    features = features_of(*map(list, zip(*rows, strict=True)))
    reader = RowFeatureReader.of(features, VALUES)
    encoder = drawn_encoder(reader)
    encoded = reader.encode(features, len(rows))
    found = encoder(torch.from_numpy(encoded.entry), torch.from_numpy(encoded.dense)).detach().numpy()
    values, seconds = encoder.values.detach().numpy(), reader.columns[1]
    for index, (code, number) in enumerate(rows):
        expected = values[1 + code].copy()
        first = 1 + len(DEVICES)
        if math.isnan(number):
            expected += values[first]
        else:
            expected += values[first + 1 + sum(number > bound for bound in seconds.bounds)]
            score = np.clip((number - seconds.mean) / seconds.scale, -MAX_ABS_SCORE, MAX_ABS_SCORE)
            assert encoder.dense is not None
            expected += np.float32(score) * encoder.dense.detach().numpy()[0]
        np.testing.assert_allclose(found[index], expected, rtol=1e-12, atol=1e-12)


def test_features_change_nothing_before_training() -> None:
    features = features_of([0, -1], [1.0, math.nan])
    reader = RowFeatureReader.of(features, VALUES)
    encoded = reader.encode(features, 2)
    made = RowFeatureEncoder(reader.columns, DIM)
    assert not made(torch.from_numpy(encoded.entry), torch.from_numpy(encoded.dense)).any()


def test_parsed_values_equal_those_of_the_log() -> None:
    features = features_of([2, 0, -1, 1], [1.5, math.nan, 2.0, 3.0])
    reader = RowFeatureReader.of(features, VALUES)
    given = {"seconds": [1.5, None, 2.0, 3.0], "device": ["tv", "desktop", None, "phone"]}
    for name, column in reader.parse(given, 4).columns.items():
        np.testing.assert_array_equal(column, features.columns[name])


def test_unknown_values_and_columns_that_are_not_given_are_missing() -> None:
    reader = RowFeatureReader.of(features_of([0], [1.0]), VALUES)
    parsed = reader.parse({"device": ["watch", None, math.nan]}, 3)
    assert parsed.columns["device"].tolist() == [-1, -1, -1]
    assert np.isnan(parsed.columns["seconds"]).all()


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"devise": ["tv"]}, "'devise' is not one of this model's features"),
        ({"device": ["tv", "tv"]}, "'device' has 2 values, but 1 are needed"),
        ({"device": [1.5]}, "'device' is a category and needs texts, integers, or booleans, got 1.5"),
        ({"seconds": ["soon"]}, "'seconds' needs numbers"),
        ({"seconds": [math.inf]}, "'seconds': value number 0 is infinite"),
        ({"seconds": [1e300]}, "'seconds': value number 0 is infinite, or too large"),
        ({"seconds": [10**400]}, "'seconds' needs numbers"),
        ({"seconds": [[1.0]]}, "'seconds' needs numbers, one per row"),
    ],
)
def test_values_that_are_refused(given: dict[str, Any], problem: str) -> None:
    reader = RowFeatureReader.of(features_of([0], [1.0]), VALUES)
    with pytest.raises(ValueError, match=problem):
        reader.parse(given, 1)


def test_a_log_with_other_codes_reads_the_same() -> None:
    reader = RowFeatureReader.of(features_of([0], [1.0]), VALUES)
    grown = {"seconds": None, "device": Vocabulary.from_ids(["watch", *reversed(DEVICES)])}
    log = RowFeatures({"device": np.array([0, 1, 2, 3, -1], np.int32), "seconds": np.zeros(5, np.float32)})
    kept = grown["device"]
    assert kept is not None
    names = [*kept.ids(range(4)), None]
    expected = [-1 if name in (None, "watch") else DEVICES.index(name) for name in names]
    assert reader.recoder(grown)(log, 5).columns["device"].tolist() == expected
    assert np.isnan(reader.recoder({})(RowFeatures({}), 2).columns["seconds"]).all()


def test_a_saved_reader_reads_the_same(tmp_path: Path) -> None:
    features = features_of([2, -1, 1], [1.0, 7.0, math.nan])
    reader = RowFeatureReader.of(features, VALUES)
    reader.save(tmp_path, "event")
    loaded = RowFeatureReader.load(tmp_path, "event", reader.columns)
    assert loaded is not None
    for expected, found in zip(reader.columns, loaded.columns, strict=True):
        assert expected == found
    assert (loaded.encode(features, 3).entry == reader.encode(features, 3).entry).all()
    with pytest.raises(ValueError, match="do not fit"):
        RowFeatureReader(reader.columns[:1], {"device": None})
    Vocabulary.from_ids([1, 2]).save(tmp_path, "event_values_0")
    (tmp_path / "event_values_0.offsets.npy").unlink()
    with pytest.raises(ValueError, match="event_values_0 must hold at most 3 texts"):
        RowFeatureReader.load(tmp_path, "event", reader.columns)
