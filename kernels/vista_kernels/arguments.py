"""Checks of public arguments. Every failure is a ValueError that names the argument and the shapes.

Shapes, dtypes and devices are checked before an operator is called. The values of offsets are checked inside the
operator, where they are known even under torch.compile.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vista_kernels.segments import IntArray
from vista_kernels.state_layout import state_dtype

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("silu", "relu", "identity")
NORMALIZATIONS = ("none", "length")


def check_tokens(**tokens: Tensor) -> None:
    """Check that the named token tensors are [T, H, D], of one float dtype, on one device, and agree in T and H.

    `k` and `q` must agree in D as well; `v` may have a width of its own.
    """
    first_name, first = next(iter(tokens.items()))
    for name, x in tokens.items():
        if x.dim() != 3:
            raise ValueError(f"{name} must be [T, H, D], got shape {list(x.shape)}")
        check_float(name, x)
        same_width = name == "v" or first_name == "v" or x.shape[2] == first.shape[2]
        if x.shape[:2] != first.shape[:2] or not same_width:
            raise ValueError(f"{name} {list(x.shape)} does not fit {first_name} {list(first.shape)}")
        check_alike(name, x, first_name, first)


def check_offsets(offsets: Tensor, device: torch.device) -> None:
    """Check that offsets are int64 [B+1] on `device` or the CPU. `host_offsets` checks their values."""
    if offsets.dim() != 1 or offsets.shape[0] < 1:
        raise ValueError(f"offsets must be [B+1], got shape {list(offsets.shape)}")
    if offsets.dtype != torch.int64:
        raise ValueError(f"offsets must be int64, got {offsets.dtype}")
    if offsets.device != device and offsets.device.type != "cpu":
        raise ValueError(f"offsets are on {offsets.device}, the tokens on {device}")


def host_offsets(offsets: Tensor, total: int) -> IntArray:
    """Return the offsets as NumPy, after checking that they start at 0, never decrease and end at `total`."""
    host: IntArray = offsets.numpy(force=True)
    shape = list(offsets.shape)
    if host[0] != 0:
        raise ValueError(f"offsets {shape} must start at 0, got {host[0]}")
    if host[-1] != total:
        raise ValueError(f"offsets {shape} must end at the number of rows {total}, got {host[-1]}")
    if bool((host[1:] < host[:-1]).any()):
        place = int(np.argmax(host[1:] < host[:-1]))
        raise ValueError(f"offsets {shape} must not decrease: {host[place]} is followed by {host[place + 1]}")
    return host


def check_weight(weight: Tensor | None, k: Tensor) -> None:
    """Check that weight is None or a float [T] or [T, H] on the device of k."""
    if weight is None:
        return
    check_float("weight", weight)
    if weight.shape not in (k.shape[:1], k.shape[:2]):
        raise ValueError(f"weight must be [T] or [T, H] of k {list(k.shape)}, got shape {list(weight.shape)}")
    if weight.device != k.device:
        raise ValueError(f"weight is on {weight.device}, k on {k.device}")


def check_state(name: str, state: Tensor | None, shape: tuple[int, ...], like: Tensor) -> None:
    """Check the shape, dtype (float32, or float64 for float64 tokens) and device of a state or weight sum, or None."""
    if state is None:
        return
    if tuple(state.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(state.shape)}")
    if state.dtype != state_dtype(like.dtype):
        raise ValueError(f"{name} must be {state_dtype(like.dtype)} for {like.dtype} tokens, got {state.dtype}")
    if state.device != like.device:
        raise ValueError(f"{name} is on {state.device}, the tokens on {like.device}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Check that a named option is one of its choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_activation(name: str, value: str) -> None:
    """Check that an activation is known."""
    check_choice(name, value, ACTIVATIONS)


def check_float(name: str, x: Tensor) -> None:
    """Check that a tensor has a float dtype that the operators take."""
    if x.dtype not in FLOATS:
        raise ValueError(f"{name} must be a floating tensor, got {x.dtype}")


def check_alike(name: str, x: Tensor, first_name: str, first: Tensor) -> None:
    """Check that two tensors agree in dtype and device."""
    if x.dtype != first.dtype:
        raise ValueError(f"{name} {list(x.shape)} is {x.dtype} but {first_name} {list(first.shape)} is {first.dtype}")
    if x.device != first.device:
        raise ValueError(
            f"{name} {list(x.shape)} is on {x.device} but {first_name} {list(first.shape)} is on {first.device}"
        )
