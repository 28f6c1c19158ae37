"""The backend of Triton kernels, for GPUs of NVIDIA and AMD: the functions of `launch.Backend`.

`pieces.py` shares the tokens out to programs, `blocks.py` chooses block sizes; then one file a kernel family.
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
