"""What features of requests add to candidates: prepared per value, against a plain reading."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.conftest import small_config
from tests.scorer.test_scorer_request_features import DEVICES, READER
from vista.log.event_log import EventLog
from vista.model.row_feature_reader import EncodedRows
from vista.model.vista_model import VistaModel
from vista.scorer import request_projections
from vista.scorer.request_projections import RequestProjections
from vista.training.log_schema import schema_of


@pytest.fixture(scope="module")
def model(impression_log: EventLog) -> VistaModel:
    config = small_config(impression_log, "unused", model__dim=32)
    schema = replace(schema_of(impression_log, config), request_features=READER.columns)
    torch.manual_seed(3)
    made = VistaModel(config.model, schema, impression_log.items, config.data).eval()
    made.request_features = READER
    assert made.request_encoder is not None
    for weight in made.request_encoder.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return made


@pytest.fixture(scope="module")
def rows() -> EncodedRows:
    """100 requests; some values are missing."""
    rng = np.random.default_rng(0)
    given = {
        "hour": np.where(rng.random(100) < 0.2, np.nan, rng.uniform(-5, 30, 100)),
        "device": np.array([*DEVICES, None], object)[rng.integers(0, len(DEVICES) + 1, 100)],
        "premium": rng.random(100) < 0.5,
    }
    return READER.encode(READER.parse({name: values.tolist() for name, values in given.items()}, 100), 100)


@pytest.fixture(params=["prepared", "large"])
def projections(
    request: pytest.FixtureRequest, model: VistaModel, monkeypatch: pytest.MonkeyPatch
) -> RequestProjections:
    """Those of few values, which are projected once, and those of too many."""
    if request.param == "large":
        monkeypatch.setattr(request_projections, "MAX_PREPARED_ROWS", 3)
    made = RequestProjections(model)
    assert (made._table is None) == (request.param == "large")
    return made


def test_they_equal_a_plain_reading(projections: RequestProjections, model: VistaModel, rows: EncodedRows) -> None:
    encoder, projection = model.request_encoder, model.target_attention.request_projection
    assert encoder is not None and encoder.dense is not None
    for given in (rows, None):
        read = READER.missing(100) if given is None else given
        values, dense = (part.detach().double().numpy() for part in (encoder.values, encoder.dense))
        vectors = values[read.entry].sum(1) + read.dense.astype(np.float64) @ dense
        expected = np.concatenate([vectors, vectors @ projection.weight.detach().double().numpy().T], 1)
        np.testing.assert_allclose(projections.of(given, 100).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_their_bits_do_not_depend_on_the_other_rows(projections: RequestProjections, rows: EncodedRows) -> None:
    whole = projections.of(rows, 100)
    for some in ([0], [7, 3], [*range(50, 61)], [99, 99, 4, 5, 6, 7, 8, 9], []):
        index = np.array(some, np.int64)
        assert torch.equal(projections.of(rows.select(index), len(index)), whole[index])
