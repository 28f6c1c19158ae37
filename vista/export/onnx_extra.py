"""The only module that imports onnx and onnxruntime, for exports with `format=onnx`."""

from __future__ import annotations

from vista.errors import MissingDependencyError

try:
    import onnx
    import onnxruntime
    import onnxscript
except ImportError as error:
    raise MissingDependencyError(
        f"format=onnx needs onnx, onnxruntime, and onnxscript ({error}); install them with: "
        "pip install 'vista-recsys[onnx]'"
    ) from error

__all__ = ["onnx", "onnxruntime", "onnxscript"]
