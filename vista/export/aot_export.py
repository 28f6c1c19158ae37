"""Exports with AOTInductor: `model.pt2`, which PyTorch runs in Python or C++."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import torch

from vista.errors import ExportError
from vista.export.export_runner import ExportRunner
from vista.export.graph_input import GraphInput
from vista.export.request_arrays import Arrays
from vista.export.serving_graph import ServingGraph
from vista.export.traced_graph import traced

FILE = "model.pt2"


def write_aotinductor(graph: ServingGraph, inputs: list[GraphInput], folder: Path) -> ExportRunner:
    """Compile a graph for this processor into a folder, and load it.

    Raises:
        ExportError: there is no C++ compiler.
        OSError: the file cannot be written.
    """
    from torch._inductor import aoti_compile_and_package, aoti_load_package, config

    compilers = (config.cpp.cxx,) if isinstance(config.cpp.cxx, str) else config.cpp.cxx
    if not any(name and shutil.which(name) for name in compilers):
        raise ExportError("format=aotinductor needs a C++ compiler, such as g++; install one, or use format=onnx")
    program, path = traced(graph, inputs), folder / FILE
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # of torch about itself
        aoti_compile_and_package(program, package_path=str(path))
    package = aoti_load_package(str(path))

    def run(arrays: Arrays) -> Arrays:
        outputs = package(*(torch.from_numpy(arrays[name]) for name in graph.names))
        return {name: output.numpy() for name, output in zip(graph.outputs, outputs, strict=True)}

    return run
