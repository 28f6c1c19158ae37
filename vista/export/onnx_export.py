"""Exports to ONNX: `model.onnx`, with its tables alongside in `model.onnx.data`."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from vista.export.export_runner import ExportRunner
from vista.export.graph_input import GraphInput
from vista.export.request_arrays import Arrays
from vista.export.serving_graph import ServingGraph
from vista.export.traced_graph import LEAST, by_axis, traced
from vista.install_command import require_module

FILE = "model.onnx"


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
    """Write a graph into a folder, and load it in onnxruntime. Tables are in a file of their own, of any size.

    Raises:
        OSError: the files cannot be written.
    """
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
    exported.save(folder / FILE, external_data=True)
    session = require_module("onnxruntime", "onnx").InferenceSession(folder / FILE, providers=["CPUExecutionProvider"])

    def run(arrays: Arrays) -> Arrays:
        return dict(zip(graph.outputs, session.run(graph.outputs, arrays), strict=True))

    return run
