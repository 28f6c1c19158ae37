"""The Triton backend, for GPUs of NVIDIA and AMD: the functions of `Backend`.

`work_plan.py` shares the tokens out to programs and `blocks.py` chooses block sizes. Each kernel family has a file.
"""

from vista_kernels.triton_backend.accumulate import accumulate, accumulate_backward
from vista_kernels.triton_backend.causal import causal_attention, causal_attention_backward
from vista_kernels.triton_backend.read import read, read_backward
from vista_kernels.triton_backend.scan import scan_rows
from vista_kernels.triton_backend.targets import add_targets, add_targets_backward

__all__ = [
    "accumulate",
    "accumulate_backward",
    "add_targets",
    "add_targets_backward",
    "causal_attention",
    "causal_attention_backward",
    "read",
    "read_backward",
    "scan_rows",
]
