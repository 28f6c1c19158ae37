"""The device that kernels run on, as far as block sizes depend on it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Whether Triton was told, before its import, to run kernels in its interpreter."""


@dataclass(frozen=True, slots=True)
class Accelerator:
    """A GPU, or Triton's interpreter."""

    kind: str
    """"cuda", "hip" or "interpreter"."""
    capability: int
    """80 for compute capability 8.0; 0 if the device has none."""
    num_processors: int
    """Streaming multiprocessors or compute units."""

    @property
    def precision(self) -> str:
        """How float32 tiles are multiplied: nearly as exactly as float32, on tensor cores if there are any."""
        return "tf32x3" if self.kind == "cuda" else "ieee"


def accelerator_of(x: Tensor) -> Accelerator:
    """Return the accelerator that runs kernels on this tensor.

    Raises:
        ValueError: if there is none.
    """
    if x.device.type == "cuda":
        return _gpu(x.device)
    if not INTERPRETED or x.device.type != "cpu":
        raise ValueError(
            f"backend 'triton' needs tensors on a GPU, got {x.device}; on a CPU it runs only in Triton's interpreter, "
            "slowly and for tests: set TRITON_INTERPRET=1 before the first import"
        )
    return Accelerator("interpreter", 0, 1)


@cache
def _gpu(device: torch.device) -> Accelerator:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Accelerator("hip", 0, properties.multi_processor_count)
    return Accelerator("cuda", 10 * properties.major + properties.minor, properties.multi_processor_count)
