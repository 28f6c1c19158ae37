"""The backend of torch's own operators, made for CPUs: the functions of `Backend`."""

from vista_kernels.torch_backend.accumulate import accumulate, accumulate_backward
from vista_kernels.torch_backend.causal import causal_attention, causal_attention_backward
from vista_kernels.torch_backend.read import read, read_backward
from vista_kernels.torch_backend.scan import scan_rows
from vista_kernels.torch_backend.short_segments import attend_short, attend_short_backward
from vista_kernels.torch_backend.targets import add_targets, add_targets_backward

__all__ = [
    "accumulate",
    "accumulate_backward",
    "add_targets",
    "add_targets_backward",
    "attend_short",
    "attend_short_backward",
    "causal_attention",
    "causal_attention_backward",
    "read",
    "read_backward",
    "scan_rows",
]
