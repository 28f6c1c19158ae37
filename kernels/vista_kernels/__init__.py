"""Linear-attention operators on packed sequences; see README.md for formulas, backends and proofs."""

from vista_kernels.causal_linear_attention import causal_linear_attention
from vista_kernels.quasi_linear_attention import quasi_linear_attention
from vista_kernels.state import accumulate_state, read_state, scan_counts, scan_states
from vista_kernels.target_attention import target_attention

__all__ = [
    "accumulate_state",
    "causal_linear_attention",
    "quasi_linear_attention",
    "read_state",
    "scan_counts",
    "scan_states",
    "target_attention",
]
