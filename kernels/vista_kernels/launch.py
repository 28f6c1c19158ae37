"""The one place that chooses a backend; the choice is logged once for each backend and kind of device.

A backend is a package of this one with the functions of `Backend`. The public operators validate, make their outputs,
and call these functions, so that shapes, autograd and torch.compile are the same whatever runs.
"""

from __future__ import annotations

import importlib
import logging
from functools import cache
from typing import Protocol, cast

import torch
from torch import Tensor

from vista_kernels.arguments import IntArray

BACKENDS = ("torch", "triton", "reference")
"""What an operator can run on; `auto` chooses among them by device."""

_LOG = logging.getLogger("vista_kernels")


class Backend(Protocol):
    """What a backend implements. Tokens [T, H, D or E], states [B, H, D, E], counts [B, H]; segments by start, length.

    Tokens are float64, float32, bfloat16 or float16 and may have any strides; states are float32 (float64 for float64
    tokens), as are all sums. Outputs are given, contiguous and uninitialised unless said otherwise.
    """

    def accumulate(
        self,
        k: Tensor,
        v: Tensor,
        starts: IntArray,
        lengths: IntArray,
        weight: Tensor | None,
        z: Tensor,
        n: Tensor,
        activation: str,
        *,
        fresh: bool = True,
    ) -> None:
        """Add sum_s w_s phi(k_s) v_s^T of each segment to z and sum_s w_s to n, in place; `fresh` takes z as zero."""

    def accumulate_backward(
        self,
        grad_z: Tensor,
        k: Tensor,
        v: Tensor,
        starts: IntArray,
        lengths: IntArray,
        weight: Tensor | None,
        activation: str,
        grad_k: Tensor,
        grad_v: Tensor,
    ) -> None:
        """Write dk = phi'(k) * w v dZ^T and dv = w phi(k) dZ of the segments' tokens."""

    def read(
        self,
        q: Tensor,
        z: Tensor,
        scale: Tensor | None,
        starts: IntArray,
        lengths: IntArray,
        activation: str,
        state_activation: str,
        out: Tensor,
    ) -> None:
        """Write o = phi1(q) phi2(z * c) of the segments' queries; scale is c [B, H], or None for 1."""

    def read_backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        z: Tensor,
        scale: Tensor | None,
        starts: IntArray,
        lengths: IntArray,
        activation: str,
        state_activation: str,
        grad_q: Tensor,
        grad_z: Tensor,
    ) -> None:
        """Write dq, and dz = phi2'(z * c) * c * sum phi1(q)^T dO."""

    def attend_short(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        starts: IntArray,
        lengths: IntArray,
        weight: Tensor | None,
        normalization: str,
        alpha: float,
        activation: str,
        state_activation: str,
        out: Tensor,
    ) -> None:
        """Accumulate and read in one, keeping no states: asked of the torch backend for short segments only."""

    def attend_short_backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        starts: IntArray,
        lengths: IntArray,
        weight: Tensor | None,
        normalization: str,
        alpha: float,
        activation: str,
        state_activation: str,
        grad_q: Tensor,
        grad_k: Tensor,
        grad_v: Tensor,
    ) -> None:
        """Write dq, dk and dv of `attend_short`."""

    def add_targets(self, q: Tensor, k: Tensor, v: Tensor, tokens: IntArray, activation: str, out: Tensor) -> None:
        """Add (phi(q_t) . phi(k_t)) v_t to the rows `tokens` of out."""

    def add_targets_backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tokens: IntArray,
        activation: str,
        grad_q: Tensor,
        grad_k: Tensor,
        grad_v: Tensor,
    ) -> None:
        """Add that term's dq to the rows `tokens` of grad_q, and write its dk and dv there."""

    def scan_rows(
        self,
        x: Tensor,
        decay: Tensor | None,
        offsets: IntArray,
        initial: Tensor | None,
        *,
        descending: bool = False,
        decay_after: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Scan the rows x [N, H, F] of every sequence, a carry c [H, F] passing from row to row.

        With s_i the result of row i, s_i = x_i + decay_i c and then c = s_i; with `decay_after`, s_i = x_i + c and then
        c = decay_i s_i. Decay [N, H] lies in [0, 1]; None is 1. `descending` visits each sequence from its last row to
        its first. So descending with decay_after is the gradient of the plain scan.

        Returns:
            The results [N, H, F], and each sequence's last carry [B, H, F] (`initial`, or zero, where it is empty).
        """

    def causal_attention(
        self, q: Tensor, k: Tensor, v: Tensor, offsets: IntArray, carry: Tensor, activation: str, out: Tensor
    ) -> None:
        """Write o_t = phi(q_t) Z_t, and move carry [B, H, D, E] from the state before a sequence to that after it."""

    def causal_attention_backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        offsets: IntArray,
        initial_z: Tensor | None,
        activation: str,
        grad_carry: Tensor,
        grad_q: Tensor,
        grad_k: Tensor,
        grad_v: Tensor,
    ) -> None:
        """Write dq, dk and dv, and move grad_carry from the gradient of the last states to that of the first ones."""


def choose_backend(backend: str, device: torch.device, *, sdpa: bool = False) -> str:
    """Return the backend that runs tensors of `device`; `auto` takes Triton on a GPU and torch elsewhere.

    `sdpa` marks an operator that runs on torch's SDPA on every device.

    Raises:
        ValueError: if `backend` is neither `auto` nor one of `BACKENDS`, or is "triton" for such an operator.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if backend == "triton" and sdpa:
        raise ValueError("backend 'triton': this operator runs on torch's SDPA on all devices; take 'auto' or 'torch'")
    chosen = ("triton" if device.type == "cuda" and not sdpa else "torch") if backend == "auto" else backend
    if not torch.compiler.is_compiling():
        _announce(backend, chosen, device.type)
    return chosen


def needs_dispatch(*arguments: object) -> bool:
    """Say whether autograd, a compiler or a tensor subclass must see an operator: then it is dispatched by torch.

    Where not, its function is called as it is: the first call of a custom_op imports torch._dynamo, and Triton where
    there is one, some seconds that serving does not want.
    """
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    traced = torch.compiler.is_compiling() or any(type(x) not in (Tensor, torch.nn.Parameter) for x in tensors)
    return traced or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


@cache
def load_backend(name: str) -> Backend:
    """Return the package that implements a backend; imported on first use, so that a CPU never loads Triton.

    Raises:
        ValueError: if a package that the backend needs is not installed.
    """
    try:
        return cast(Backend, importlib.import_module(f"vista_kernels.{name}_backend"))
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ValueError(
            f"backend {name!r} needs the package {name}, which is not installed: pip install {name}"
        ) from error


@cache
def _announce(asked: str, chosen: str, device_type: str) -> None:
    _LOG.info("backend %s for %s tensors (asked for: %s)", chosen, device_type, asked)
