"""The formats of an export: ONNX (`model.onnx`, with its tables alongside in `model.onnx.data`), and AOTInductor
(`model.pt2`, which PyTorch runs in Python or C++)."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from vista.errors import ExportError
from vista.export.serving_graph import CANDIDATES, EVENTS, KEYS, USERS, Arrays, ExportRunner, GraphInput, ServingGraph
from vista.installation import require_module

ONNX_FILE, AOTINDUCTOR_FILE = "model.onnx", "model.pt2"
LEAST = {USERS: 1, CANDIDATES: 1, EVENTS: 0, KEYS: 0}
"""Smallest length per axis."""
_TRACED = {USERS: 2, CANDIDATES: 3, EVENTS: 4, KEYS: 5}


def traced(graph: ServingGraph, inputs: list[GraphInput]) -> ExportedProgram:
    """Trace a graph into operators that do not depend on vista, for any number of users, events, keys, and candidates.

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


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what the exporter logs about each operator, about missing torchvision, and warns about torch itself."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def write_onnx(graph: ServingGraph, inputs: list[GraphInput], folder: Path) -> ExportRunner:
    """Write a graph into a folder, and load it in onnxruntime. Tables are in a file of their own, of any size. Raises
    OSError if the files cannot be written."""
    for package in ("onnx", "onnxruntime", "onnxscript"):
        require_module(package, "onnx")
    program = traced(graph, inputs)
    with _quiet():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            dynamic_shapes={"inputs": by_axis(inputs, {name: name for name in LEAST})},
            input_names=graph.names,
            output_names=graph.outputs,
            verbose=False,
        )
    assert exported is not None
    exported.save(folder / ONNX_FILE, external_data=True)
    session = require_module("onnxruntime", "onnx").InferenceSession(
        folder / ONNX_FILE, providers=["CPUExecutionProvider"]
    )

    def run(arrays: Arrays) -> Arrays:
        return dict(zip(graph.outputs, session.run(graph.outputs, arrays), strict=True))

    return run


def write_aotinductor(graph: ServingGraph, inputs: list[GraphInput], folder: Path) -> ExportRunner:
    """Compile a graph for this processor into a folder, and load it. Raises ExportError if there is no C++ compiler,
    and OSError if the file cannot be written."""
    from torch._inductor import aoti_compile_and_package, aoti_load_package, config

    compilers = (config.cpp.cxx,) if isinstance(config.cpp.cxx, str) else config.cpp.cxx
    if not any(name and shutil.which(name) for name in compilers):
        raise ExportError("format=aotinductor needs a C++ compiler, such as g++; install one, or use format=onnx")
    program, path = traced(graph, inputs), folder / AOTINDUCTOR_FILE
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # of torch about itself
        aoti_compile_and_package(program, package_path=str(path))
    package = aoti_load_package(str(path))

    def run(arrays: Arrays) -> Arrays:
        outputs = package(*(torch.from_numpy(arrays[name]) for name in graph.names))
        return {name: output.numpy() for name, output in zip(graph.outputs, outputs, strict=True)}

    return run
