"""The graph that is exported computes what the scorer computes, before any runtime sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.export.models import drawn_model
from vista.config.choices import Precision, TargetAttentionKind
from vista.errors import ExportError
from vista.export.graph_input import graph_inputs
from vista.export.parity import compare
from vista.export.request_arrays import Arrays
from vista.export.serving_graph import ServingGraph
from vista.export.trial_requests import trial_requests
from vista.export.trial_store import write_trial_store
from vista.log.gaps import NUM_GAPS, gap_bucket
from vista.model.item_projections import ItemProjections
from vista.model.vista_model import VistaModel
from vista.scorer.serving_snapshot import ServingSnapshot
from vista.scorer.serving_source import ServingSource

Kind = TargetAttentionKind
MODELS: dict[str, dict[str, Any]] = {
    "pointwise": {},
    "softmax": {"kind": Kind.softmax},
    "quasi_linear": {"kind": Kind.quasi_linear},
    "no summary": {"num_seeds": 0},
    "mean token": {"mean_token": True},
    "one layer": {"num_layers": 1},
    "only next": {"tasks": ()},
    "only tasks": {"has_retrieval": False},
    "no counters": {"counters": False},
    "no features": {"features": False},
    "no times": {"has_time": False},
    "categories": {"categories": True},
    "little": {"counters": False, "features": False, "has_time": False, "num_seeds": 0},
}


def snapshot_of(model: VistaModel, folder: Path) -> ServingSnapshot:
    write_trial_store(model, folder / "store")
    return ServingSource(model, folder / "store", "cpu", None, Precision.float32).open()


def eager(graph: ServingGraph) -> Any:
    def run(arrays: Arrays) -> Arrays:
        outputs = graph(*(torch.from_numpy(arrays[name]) for name in graph.names))
        return {name: output.numpy() for name, output in zip(graph.outputs, outputs, strict=True)}

    return run


@pytest.mark.parametrize("name", MODELS)
def test_a_graph_scores_as_the_scorer_does(tmp_path: Path, name: str) -> None:
    model = drawn_model(**MODELS[name])
    snapshot = snapshot_of(model, tmp_path)
    graph = ServingGraph(model, snapshot.items)
    compared, example = compare(eager(graph), snapshot, 150, 1e-4)
    snapshot.store.close()
    assert set(compared.max_difference) == ({"logits"} if model.schema.tasks else set()) | (
        {"next"} if model.has_retrieval else set()
    )
    for output in compared.max_difference:
        assert np.std(example[output]) > 1e-3


def test_trial_requests_differ_in_everything_that_a_model_reads(tmp_path: Path) -> None:
    """A comparison means nothing if no request has a counted candidate, a new event, or an unknown user."""
    model = drawn_model()
    snapshot = snapshot_of(model, tmp_path)
    trials = list(trial_requests(snapshot, 150))
    arrays = [trial.arrays for trial in trials]
    assert sum(len(one["candidates"]) for one in arrays) == 150
    counters = [trial.request.counters for trial in trials]
    counted = [
        len(one.find(slice(0, len(trial.rows)), trial.rows, slice(0, trial.rows.shape[1]))[0])
        for one, trial in zip(counters, trials, strict=True)
        if one is not None
    ]
    assert sum(counted) > 100
    for name in ("found", "tail_is_new", "request.device", "user.device", "tail.device", "now", "candidates"):
        assert len(np.unique(np.concatenate([one[name].ravel() for one in arrays]))) > 1, name
    assert {one["candidates"].shape[1] for one in arrays} >= {1, 2, 17, 100}
    snapshot.store.close()


def test_a_difference_is_an_error(tmp_path: Path) -> None:
    model = drawn_model(features=False, counters=False)
    snapshot = snapshot_of(model, tmp_path)
    graph = ServingGraph(model, snapshot.items)
    run = eager(graph)
    for wrong in (1e-3, np.nan):

        def changed(arrays: Arrays, wrong: float = wrong) -> Arrays:
            outputs = run(arrays)
            outputs["logits"][-1, -1, -1] += wrong
            return outputs

        with pytest.raises(ExportError, match=r"logits of the export differ by up to .* from the scorer's"):
            compare(changed, snapshot, 10, 1e-4)
    snapshot.store.close()


def test_the_graph_leaves_its_model_alone(tmp_path: Path) -> None:
    model = drawn_model(kind=Kind.softmax)
    before = {name: (own.clone(), own.requires_grad) for name, own in model.named_parameters()}
    snapshot = snapshot_of(model, tmp_path)
    ServingGraph(model, snapshot.items)
    for name, own in model.named_parameters():
        assert torch.equal(own, before[name][0])
        assert own.requires_grad == before[name][1]
    snapshot.store.close()


def test_gaps_have_the_buckets_of_training() -> None:
    model = drawn_model(features=False, counters=False)
    graph = ServingGraph(model, ItemProjections.of(model))
    edges = 1000 * (2 ** np.arange(34) - 1)
    gaps = np.unique(np.concatenate([edges - 1, edges, edges + 1, edges + 500, [-5, 0, 999, 10**14]]))
    np.testing.assert_array_equal(graph._bucket(torch.from_numpy(gaps)).numpy(), gap_bucket(gaps))
    assert graph._bucket(torch.tensor([2**62])).item() == NUM_GAPS - 1


def test_inputs_that_a_model_does_not_read_are_left_out() -> None:
    names = [one.name for one in graph_inputs(drawn_model(**MODELS["little"]))]
    assert names == ["candidates", "found", "tail_lengths", "tail_items", "tail_actions"]
