"""The only module that imports onnx and onnxruntime, for exports with `format=onnx`."""

from __future__ import annotations

from vista.errors import MissingDependencyError
from vista.install_command import install_command

try:
    import onnx
    import onnxruntime
    import onnxscript
except ImportError as error:
    raise MissingDependencyError(
        f"format=onnx needs onnx, onnxruntime, and onnxscript ({error}); install them with: " + install_command("onnx")
    ) from error

__all__ = ["onnx", "onnxruntime", "onnxscript"]
