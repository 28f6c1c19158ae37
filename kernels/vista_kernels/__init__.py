"""Linear-attention operators on packed sequences; see README.md for formulas, backends and proofs."""

import os
import sys

# OpenMP reads this when the imports below load torch. Idle threads then sleep. By default they spin for milliseconds,
# which slows everything many times if other processes use the cores too.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

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
