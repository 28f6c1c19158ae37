"""The weights of a model file, which must be finite."""

from __future__ import annotations

import math
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from vista.errors import CheckpointError


def finite_weights(file: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        OSError, ValueError, SafetensorError: it cannot be read.
        CheckpointError: a weight is not finite.
    """
    weights = load_file(file)
    for name, weight in weights.items():
        bounds = weight.aminmax() if weight.is_floating_point() and weight.numel() else ()  # NaN if any value is
        if not all(math.isfinite(bound.item()) for bound in bounds):
            raise CheckpointError(
                f"{file}: {name} is not finite; export an earlier checkpoint, or train the model again"
            )
    return weights
