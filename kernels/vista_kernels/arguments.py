"""Checks of public arguments. Every failure is a ValueError that names the argument and the shapes.

Shapes, dtypes and devices are checked before an operator is called; values of offsets are checked inside the operator,
where they are known even under torch.compile.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("silu", "relu", "identity")
NORMALIZATIONS = ("none", "length")

IntArray = npt.NDArray[np.int64]


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that states are accumulated in: float32, or float64 for float64 tokens."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_tokens(**tokens: Tensor) -> None:
    """Check that the named token tensors are [T, H, D], of one float dtype and on one device, and agree in T and H.

    `k` and `q` must agree in D as well; `v` may have a width of its own.
    """
    first_name, first = next(iter(tokens.items()))
    for name, x in tokens.items():
        if x.dim() != 3:
            raise ValueError(f"{name} must be [T, H, D], got shape {_shape(x)}")
        if x.dtype not in FLOATS:
            raise ValueError(f"{name} must be a floating tensor, got {x.dtype}")
        same_width = name == "v" or first_name == "v" or x.shape[2] == first.shape[2]
        if x.shape[:2] != first.shape[:2] or not same_width:
            raise ValueError(f"{name} {_shape(x)} does not fit {first_name} {_shape(first)}")
        _check_alike(name, x, first_name, first)


def check_offsets(offsets: Tensor, device: torch.device) -> None:
    """Check that offsets are int64 [B+1] and lie on `device` or the CPU (values: see `host_offsets`)."""
    if offsets.dim() != 1 or offsets.shape[0] < 1:
        raise ValueError(f"offsets must be [B+1], got shape {_shape(offsets)}")
    if offsets.dtype != torch.int64:
        raise ValueError(f"offsets must be int64, got {offsets.dtype}")
    if offsets.device != device and offsets.device.type != "cpu":
        raise ValueError(f"offsets are on {offsets.device}, the tokens on {device}")


def host_offsets(offsets: Tensor, total: int) -> IntArray:
    """Return the offsets as NumPy, after checking that they start at 0, never fall and end at `total`."""
    host: IntArray = offsets.numpy(force=True)
    if host[0] != 0:
        raise ValueError(f"offsets {_shape(offsets)} must start at 0, got {host[0]}")
    if host[-1] != total:
        raise ValueError(f"offsets {_shape(offsets)} must end at the number of rows {total}, got {host[-1]}")
    if bool((host[1:] < host[:-1]).any()):
        place = int(np.argmax(host[1:] < host[:-1]))
        raise ValueError(f"offsets {_shape(offsets)} must rise: {host[place]} is followed by {host[place + 1]}")
    return host


def check_weight(weight: Tensor | None, k: Tensor) -> None:
    """Check that weight is None or a float [T] or [T, H] on the device of k."""
    if weight is None:
        return
    if weight.dtype not in FLOATS:
        raise ValueError(f"weight must be a floating tensor, got {weight.dtype}")
    if weight.shape not in (k.shape[:1], k.shape[:2]):
        raise ValueError(f"weight must be [T] or [T, H] of k {_shape(k)}, got shape {_shape(weight)}")
    if weight.device != k.device:
        raise ValueError(f"weight is on {weight.device}, k on {k.device}")


def check_state(name: str, state: Tensor | None, shape: tuple[int, ...], like: Tensor) -> None:
    """Check the shape, dtype (float32, or float64 for float64 tokens) and device of a state or count tensor."""
    if state is None:
        return
    if tuple(state.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {_shape(state)}")
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


def check_candidates(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    bias: Tensor | None,
    own_bias: Tensor | None,
    context_mask: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Check the tensors of `target_attention`, and return bias with 4 axes and own_bias with 3.

    Each axis of them may be 1; an own_bias of one axis is [H].
    """
    for name, x in (("q", q), ("k", k), ("v", v), ("own_k", own_k), ("own_v", own_v)):
        if x.dim() != 4:
            raise ValueError(f"{name} must be [B, H, N, D], got shape {_shape(x)}")
        if x.dtype not in FLOATS:
            raise ValueError(f"{name} must be a floating tensor, got {x.dtype}")
        _check_alike(name, x, "q", q)
    batch, heads, num_queries, width = q.shape
    num_context = k.shape[2]
    if k.shape != (batch, heads, num_context, width):
        raise ValueError(f"k {_shape(k)} does not fit q {_shape(q)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v {_shape(v)} does not fit k {_shape(k)}")
    if own_k.shape != q.shape:
        raise ValueError(f"own_k {_shape(own_k)} does not fit q {_shape(q)}")
    if own_v.shape != (batch, heads, num_queries, v.shape[3]):
        raise ValueError(f"own_v {_shape(own_v)} does not fit q {_shape(q)} and v {_shape(v)}")
    if context_mask is not None:
        if context_mask.shape != (batch, num_context) or context_mask.dtype != torch.bool:
            raise ValueError(
                f"context_mask must be bool [B, C] of k {_shape(k)}, got {context_mask.dtype} {_shape(context_mask)}"
            )
        if context_mask.device != q.device:
            raise ValueError(f"context_mask is on {context_mask.device}, q on {q.device}")
    if own_bias is not None and own_bias.dim() == 1:
        if own_bias.shape[0] != heads:
            raise ValueError(f"own_bias of one axis must be [H] of q {_shape(q)}, got shape {_shape(own_bias)}")
        own_bias = own_bias[:, None]
    return (
        _broadcastable("bias", bias, (batch, heads, num_queries, num_context), q),
        _broadcastable("own_bias", own_bias, (batch, heads, num_queries), q),
    )


def _broadcastable(name: str, x: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
    """Return x with leading axes of 1 up to the rank of `shape`, after checking that it broadcasts to it."""
    if x is None:
        return None
    if x.dtype not in FLOATS:
        raise ValueError(f"{name} must be a floating tensor, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, q on {like.device}")
    full = (1,) * (len(shape) - x.dim()) + tuple(x.shape)
    if len(full) != len(shape) or any(a not in (1, b) for a, b in zip(full, shape, strict=True)):
        raise ValueError(f"{name} must be broadcastable to {list(shape)}, got shape {_shape(x)}")
    return x.reshape(full)


def _check_alike(name: str, x: Tensor, first_name: str, first: Tensor) -> None:
    if x.dtype != first.dtype:
        raise ValueError(f"{name} {_shape(x)} is {x.dtype} but {first_name} {_shape(first)} is {first.dtype}")
    if x.device != first.device:
        raise ValueError(f"{name} {_shape(x)} is on {x.device} but {first_name} {_shape(first)} is on {first.device}")


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)
