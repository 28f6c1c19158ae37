"""A serving graph as torch.export records it, for any number of users, events, keys, and candidates."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from vista.export.graph_input import CANDIDATES, EVENTS, KEYS, USERS, GraphInput
from vista.export.serving_graph import ServingGraph

LEAST = {USERS: 1, CANDIDATES: 1, EVENTS: 0, KEYS: 0}
"""Smallest length per axis."""
_TRACED = {USERS: 2, CANDIDATES: 3, EVENTS: 4, KEYS: 5}


def traced(graph: ServingGraph, inputs: list[GraphInput]) -> ExportedProgram:
    """Trace a graph into operators that do not depend on vista.

    Args:
        graph: on the CPU.
        inputs: of the graph.
    """
    dims = {name: Dim(name, min=least) for name, least in LEAST.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # of torch about itself
        return torch.export.export(
            graph, tuple(map(_example, inputs)), dynamic_shapes={"inputs": by_axis(inputs, dims)}
        )


def by_axis(inputs: list[GraphInput], dims: dict[str, Any]) -> tuple[dict[int, Any], ...]:
    """For every input, what `dims` says about its axes that a caller chooses."""
    return tuple({axis: dims[name] for axis, name in enumerate(one.shape) if isinstance(name, str)} for one in inputs)


def _example(one: GraphInput) -> Tensor:
    shape = [_TRACED[length] if isinstance(length, str) else length for length in one.shape]
    return torch.zeros(shape, dtype=getattr(torch, one.dtype))
