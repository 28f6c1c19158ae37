"""The processor, the cores that this process may use, and the threads that torch uses."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator

from vista.config.serve_config import DoctorConfig
from vista.doctor.cgroup import cpu_quota
from vista.doctor.finding import Finding
from vista.doctor.verdict import Verdict
from vista.machine import cpu_name, usable_cores

INSTRUCTIONS = ("avx2", "avx512_f", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "sve", "bf16", "i8mm")
"""Names in torch.cpu.get_capabilities of what matters for products of matrices, on x86 and on ARM."""


def check_processor(config: DoctorConfig) -> Iterator[Finding]:
    """Its name, its instructions, and what vista makes of them."""
    import torch

    from vista_kernels.processor import VARIABLE, processor

    capabilities = torch.cpu.get_capabilities()
    yield Finding("processor", cpu_name() or str(capabilities.get("cpu_name", platform.machine())))
    has = [name for name in INSTRUCTIONS if capabilities.get(name)]
    lacks = [name for name in ("avx2", "avx512_f") if name in capabilities and name not in has]
    yield Finding("instructions", ", ".join(has) or "none that matter")
    if "avx2" in lacks:
        yield Finding(
            "avx2", "missing", Verdict.limited, "matrix products are several times slower; use a newer processor"
        )
    chosen = processor()
    if os.environ.get(VARIABLE):
        yield Finding(
            VARIABLE,
            os.environ[VARIABLE],
            Verdict.limited,
            f"vista imitates another processor, which can be slow; unset {VARIABLE} unless this is a test",
        )
    if chosen.multiplies_bfloat16:
        yield Finding("precision=auto", f"bfloat16 ({chosen.name})")
    else:
        yield Finding(
            "precision=auto",
            f"float32 ({chosen.name})",
            Verdict.limited,
            "without AMX or AMD's avx512_bf16, matrix products use float32, 2 to 7 times slower than bfloat16; "
            "train and refresh wide models on a processor that has one of them",
        )


def check_threads(config: DoctorConfig) -> Iterator[Finding]:
    """Cores that this process may use, and torch's threads."""
    import torch

    cores, quota = usable_cores(), cpu_quota()
    yield Finding("cores", f"{cores} of {os.cpu_count() or cores}")
    yield Finding("quota", "none" if quota is None else f"{quota:g} cores (cgroup)")
    yield Finding("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "not set"))
    yield thread_finding(torch.get_num_threads(), cores if quota is None else min(cores, quota))


def thread_finding(threads: int, cores: float) -> Finding:
    """Compare torch's threads with the cores that this process may use; `cores` need not be whole."""
    most = max(1, int(cores))
    remedy = f"set OMP_NUM_THREADS={most}, or num_threads={most} of a command"
    if threads > cores and threads > 1:
        advice = f"{threads} threads share {cores:g} cores and wait for one another; {remedy}"
        return Finding("torch threads", str(threads), Verdict.limited, advice)
    if 2 * threads <= cores:
        advice = f"training and refresh use {threads} of {most} cores; {remedy}"
        return Finding("torch threads", str(threads), Verdict.limited, advice)
    if most == 1:
        advice = "training and refresh use one core, and vista serve one worker; use a machine with more cores"
        return Finding("torch threads", str(threads), Verdict.limited, advice)
    return Finding("torch threads", str(threads))
