"""Linear-attention operators on packed sequences; see README.md for formulas, backends and proofs."""

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
