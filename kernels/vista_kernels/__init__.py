"""Linear-attention operators on packed sequences; see README.md for formulas, backends and proofs.

The operators are imported on first use, so that `vista_kernels.cpp_backend` does not load torch.
"""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

# OpenMP reads this when the operators load torch. Idle threads then sleep. By default they spin for milliseconds,
# which slows everything many times if other processes use the cores too.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if TYPE_CHECKING:
    from vista_kernels.candidate_attention import candidate_attention
    from vista_kernels.causal_linear_attention import causal_linear_attention
    from vista_kernels.quasi_linear_attention import quasi_linear_attention
    from vista_kernels.scan import scan_counts, scan_states
    from vista_kernels.state import accumulate_state, read_state

__all__ = [
    "accumulate_state",
    "candidate_attention",
    "causal_linear_attention",
    "quasi_linear_attention",
    "read_state",
    "scan_counts",
    "scan_states",
]

_MODULE_OF_NAME = {
    "accumulate_state": "state",
    "candidate_attention": "candidate_attention",
    "causal_linear_attention": "causal_linear_attention",
    "quasi_linear_attention": "quasi_linear_attention",
    "read_state": "state",
    "scan_counts": "scan",
    "scan_states": "scan",
}


def __getattr__(name: str) -> Any:
    """Import an operator on first use (PEP 562)."""
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module 'vista_kernels' has no attribute {name!r}")
    value = getattr(import_module(f"vista_kernels.{_MODULE_OF_NAME[name]}"), name)
    globals()[name] = value  # in place of the module of that name, which the import has set
    return value
