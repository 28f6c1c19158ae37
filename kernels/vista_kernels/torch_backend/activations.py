"""Derivatives of activations, each a fused ATen operator."""

from __future__ import annotations

import torch
from torch import Tensor


def activate_gradient_(name: str, x: Tensor, grad: Tensor) -> None:
    """Multiply grad by phi'(x), in place."""
    if name == "silu":
        torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=grad)
    elif name == "relu":
        torch.ops.aten.threshold_backward.grad_input(grad, x, 0, grad_input=grad)
