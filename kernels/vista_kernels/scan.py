"""Inclusive decayed prefix sums of packed states: Z_i = exp(log_decay_i) Z_{i-1} + z_i in every sequence.

Shapes: z [N, H, D, E], n and log_decay [N, H], offsets [B+1], initial_z [B, H, D, E], initial_n [B, H].
Backward is the reverse scan G_i = g_i + exp(log_decay_{i+1}) G_{i+1}: dz = G, and d initial_z = exp(log_decay_0) G_0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vista_kernels import reference
from vista_kernels.arguments import check_offsets, check_state, host_offsets
from vista_kernels.backend import choose_backend, load_backend, needs_dispatch
from vista_kernels.state_layout import state_dtype


def scan_states(
    z: Tensor,
    n: Tensor,
    log_decay: Tensor,
    offsets: Tensor,
    *,
    initial_z: Tensor | None = None,
    initial_n: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the states after each row of every sequence, Z_i = exp(log_decay_i) Z_{i-1} + z_i, and n likewise.

    With z and n from `accumulate_state` over blocks of events, row i is the state at the end of block i.

    Args:
        z: [N, H, D, E] float32 (or float64) contributions, sequences end to end.
        n: [N, H] contributions to the weight sum, of z's dtype.
        log_decay: [N, H] of z's dtype, at most 0, may be -inf: the decay of the state before row i. No gradient.
        offsets: [B+1] int64, the rows where sequences begin; 0 first, N last.
        initial_z: [B, H, D, E] state before each sequence's first row; None is zero.
        initial_n: [B, H] weight sum before it; None is zero.
        backend: "auto", "torch", "triton" or "reference".

    Returns:
        (Z [N, H, D, E], n [N, H]). z and initial_z get gradients; n, initial_n and log_decay get none.

    Raises:
        ValueError: if shapes, dtypes, devices, offsets or the sign of log_decay are wrong.
    """
    if z.dim() != 4:
        raise ValueError(f"z must be [N, H, D, E], got shape {list(z.shape)}")
    _check_scan(n, log_decay, offsets, initial_n, "z", z)
    check_state("initial_z", initial_z, (offsets.shape[0] - 1, *z.shape[1:]), z)
    n, log_decay = n.detach(), log_decay.detach()
    initial_n = None if initial_n is None else initial_n.detach()
    chosen = choose_backend(backend, z.device)
    if chosen == "reference":
        states, counts = reference.scan_states(z, n, log_decay, offsets, initial_z=initial_z, initial_n=initial_n)
        return states.to(z.dtype), counts.to(z.dtype)
    run = _scan_op if needs_dispatch(z, initial_z) else _scan
    states, counts = run(z, n, log_decay, offsets, initial_z, initial_n, chosen)
    return states, counts.detach()


def scan_counts(
    n: Tensor, log_decay: Tensor, offsets: Tensor, *, initial_n: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Return only the weight sums [N, H] of `scan_states`: n_i = exp(log_decay_i) n_{i-1} + (row i of n).

    Arguments and errors are those of `scan_states`. There is no gradient.
    """
    _check_scan(n, log_decay, offsets, initial_n, "n", n)
    empty = n.new_empty((*n.shape, 0, 0))
    return scan_states(empty, n, log_decay, offsets, initial_n=initial_n, backend=backend)[1]


def _check_scan(
    n: Tensor, log_decay: Tensor, offsets: Tensor, initial_n: Tensor | None, name: str, like: Tensor
) -> None:
    if n.dim() != 2:
        raise ValueError(f"n must be [N, H], got shape {list(n.shape)}")
    if like.dtype != state_dtype(like.dtype):
        raise ValueError(f"{name} must be float32 or float64, got {like.dtype}")
    check_offsets(offsets, like.device)
    check_state("n", n, tuple(like.shape[:2]), like)
    check_state("log_decay", log_decay, tuple(n.shape), like)
    check_state("initial_n", initial_n, (offsets.shape[0] - 1, n.shape[1]), like)


def _scan(
    z: Tensor,
    n: Tensor,
    log_decay: Tensor,
    offsets: Tensor,
    initial_z: Tensor | None,
    initial_n: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    host = host_offsets(offsets, z.shape[0])
    if not bool((log_decay <= 0).all()):  # NaN too
        raise ValueError(f"log_decay {list(log_decay.shape)} must be at most 0, got {float(log_decay.max())}")
    decay, scan_rows = log_decay.exp(), load_backend(backend).scan_rows
    counts = scan_rows(n.unsqueeze(2), decay, host, _column(initial_n))[0].squeeze(2)
    if z[:1].numel() == 0:
        return torch.empty_like(z, memory_format=torch.contiguous_format), counts
    initial = None if initial_z is None else initial_z.flatten(2)
    return scan_rows(z.flatten(2), decay, host, initial)[0].view(z.shape), counts


_scan_op = torch.library.custom_op("vista_kernels::scan_states", mutates_args=())(_scan)


@_scan_op.register_fake
def _(z: Tensor, n: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), n.new_empty(n.shape)


@torch.library.custom_op("vista_kernels::scan_states_backward", mutates_args=())
def _scan_backward_op(grad: Tensor, log_decay: Tensor, offsets: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Return dz [N, H, D, E] and d initial_z [B, H, D, E]."""
    host = host_offsets(offsets, grad.shape[0])
    scan_rows = load_backend(backend).scan_rows
    rows, first = scan_rows(grad.flatten(2), log_decay.exp(), host, None, descending=True, decay_after=True)
    return rows.view(grad.shape), first.view(len(host) - 1, *grad.shape[1:])


@_scan_backward_op.register_fake
def _(grad: Tensor, log_decay: Tensor, offsets: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape), grad.new_empty((offsets.shape[0] - 1, *grad.shape[1:]))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, _, log_decay, offsets, initial_z, _, ctx.backend = inputs
    ctx.save_for_backward(log_decay, offsets)
    ctx.has_initial = initial_z is not None


def _backward(ctx, grad_z, grad_n):  # type: ignore[no-untyped-def]
    log_decay, offsets = ctx.saved_tensors
    rows, first = _scan_backward_op(grad_z, log_decay, offsets, ctx.backend)
    return rows, None, None, None, first if ctx.has_initial else None, None, None


_scan_op.register_autograd(_backward, setup_context=_setup_context)


def _column(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.unsqueeze(2)
