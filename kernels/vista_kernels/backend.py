"""What a backend is, and the only place that chooses one.

A backend is a subpackage `<name>_backend` with the functions of `Backend`. The public operators check their arguments,
make the outputs and call these functions. So shapes, autograd and torch.compile do not depend on the backend.
"""

from __future__ import annotations

import importlib
import logging
from functools import cache
from typing import Protocol, cast

import torch
from torch import Tensor

from vista_kernels.causal_tokens import CausalTokens
from vista_kernels.qla_tokens import QlaTokens
from vista_kernels.segments import IntArray, Segments
from vista_kernels.state_queries import StateQueries
from vista_kernels.state_tokens import StateTokens

BACKENDS = ("torch", "triton", "reference")
"""What an operator can run on; `auto` chooses among them by device."""

_LOADED: dict[str, Backend] = {}
_LOG = logging.getLogger("vista_kernels")


class Backend(Protocol):
    """The functions of a backend. Tokens are [T, H, D or E], states [B, H, D, E] and weight sums [B, H].

    Tokens are float64, float32, bfloat16 or float16, of any strides. States and all sums are float32, or float64 for
    float64 tokens. Outputs are allocated by the caller: contiguous, and uninitialized unless said otherwise. Sizes of
    blocks and windows are keyword arguments of the implementations, with defaults.
    """

    def accumulate(self, tokens: StateTokens, z: Tensor, n: Tensor, *, fresh: bool = True) -> None:
        """Add sum_s w_s phi(k_s) v_s^T of each segment to z and sum_s w_s to n, in place; `fresh` takes z as zero."""

    def accumulate_backward(self, grad_z: Tensor, tokens: StateTokens, grad_k: Tensor, grad_v: Tensor) -> None:
        """Write dk = phi'(k) * w v dZ^T and dv = w phi(k) dZ of the segments' tokens."""

    def read(self, queries: StateQueries, out: Tensor) -> None:
        """Write o = phi1(q) phi2(z * c) of the segments' queries."""

    def read_backward(self, grad_out: Tensor, queries: StateQueries, grad_q: Tensor, grad_z: Tensor) -> None:
        """Write dq, and dz = phi2'(z * c) * c * sum phi1(q)^T dO."""

    def attend_short(self, tokens: QlaTokens, segments: Segments, out: Tensor) -> None:
        """Accumulate and read the sequences `segments` in one pass that keeps no states.

        Only the torch backend has it, for short segments. There are no targets.
        """

    def attend_short_backward(
        self, grad_out: Tensor, tokens: QlaTokens, segments: Segments, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor
    ) -> None:
        """Write dq, dk and dv of `attend_short`."""

    def add_targets(self, tokens: QlaTokens, rows: IntArray, out: Tensor) -> None:
        """Add (phi(q_t) . phi(k_t)) v_t of the tokens `rows` to out."""

    def add_targets_backward(
        self, grad_out: Tensor, tokens: QlaTokens, rows: IntArray, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor
    ) -> None:
        """Add dq of `add_targets` to the rows `rows` of grad_q, and write its dk and dv to theirs."""

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
        """Scan the rows x [N, H, F] of every sequence. A carry c [H, F] passes from row to row.

        The result of row i is s_i = x_i + decay_i c, and then c = s_i. With `decay_after` it is s_i = x_i + c, and then
        c = decay_i s_i. Decay [N, H] lies in [0, 1]; None is 1. `descending` visits each sequence from its last row to
        its first. So a descending scan with `decay_after` is the gradient of the plain scan.

        Returns:
            The results [N, H, F], and each sequence's last carry [B, H, F] (`initial`, or zero, where it is empty).
        """

    def causal_attention(self, tokens: CausalTokens, carry: Tensor, out: Tensor) -> None:
        """Write o_t = phi(q_t) Z_t, and turn carry [B, H, D, E] from the state before a sequence into that after it."""

    def causal_attention_backward(
        self,
        grad_out: Tensor,
        tokens: CausalTokens,
        initial_z: Tensor | None,
        grad_carry: Tensor,
        grad_q: Tensor,
        grad_k: Tensor,
        grad_v: Tensor,
    ) -> None:
        """Write dq, dk and dv, and turn grad_carry from the gradient of the last states into that of the first."""


def choose_backend(backend: str, device: torch.device, *, sdpa: bool = False) -> str:
    """Return the backend for tensors on `device`; `auto` takes Triton on a GPU and torch elsewhere.

    The choice is logged once per kind of device. `sdpa` marks an operator that runs on torch's SDPA on every device.

    Raises:
        ValueError: if `backend` is neither `auto` nor one of `BACKENDS`, or is "triton" for such an operator.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if backend == "triton" and sdpa:
        raise ValueError("backend 'triton': this operator runs on torch's SDPA on all devices; use 'auto' or 'torch'")
    chosen = ("triton" if device.type == "cuda" and not sdpa else "torch") if backend == "auto" else backend
    if not torch.compiler.is_compiling():
        _announce(backend, chosen, device.type)
    return chosen


def needs_dispatch(*arguments: object) -> bool:
    """Return whether torch must dispatch an operator, since autograd, a compiler or a tensor subclass must see it.

    Otherwise its function is called directly. The first call of a custom operator imports torch._dynamo, and Triton if
    it is installed, which takes seconds that a server should not spend.
    """
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    traced = torch.compiler.is_compiling() or any(type(x) not in (Tensor, torch.nn.Parameter) for x in tensors)
    return traced or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


def load_backend(name: str) -> Backend:
    """Return a backend, imported on first use, so that a process on a CPU never loads Triton.

    Raises:
        ValueError: if a package that the backend needs is not installed.
    """
    if name not in _LOADED:
        try:
            _LOADED[name] = cast(Backend, importlib.import_module(f"vista_kernels.{name}_backend"))
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise ValueError(
                f"backend {name!r} needs the package {name}, which is not installed: pip install {name}"
            ) from error
    return _LOADED[name]


@cache
def _announce(asked: str, chosen: str, device_type: str) -> None:
    _LOG.debug("backend %s for %s tensors (requested: %s)", chosen, device_type, asked)
