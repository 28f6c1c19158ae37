"""GPUs, and whether torch and Triton can use them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from vista.config.serve_config import DoctorConfig
from vista.doctor.finding import Finding
from vista.doctor.verdict import Verdict
from vista.planning.plan_text import size

_DRIVER = Path("/proc/driver/nvidia/version")
_DEVICES = (Path("/dev/nvidia0"), Path("/dev/kfd"))
"""Devices of NVIDIA's and AMD's drivers."""


def check_gpus(config: DoctorConfig) -> Iterator[Finding]:
    """torch's build, the driver, and every GPU that torch sees."""
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else ""
    build = build or (f"ROCm {torch.version.hip}" if torch.version.hip else "")
    yield Finding("torch build", build or "for the CPU only")
    if _DRIVER.exists():
        yield Finding("driver", _DRIVER.read_text(encoding="utf-8").splitlines()[0].removeprefix("NVRM version: "))
    has_device = any(device.exists() for device in _DEVICES) or shutil.which("nvidia-smi") is not None
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(number)
            capability = f"compute capability {gpu.major}.{gpu.minor}"
            yield Finding(f"cuda:{number}", f"{gpu.name}, {size(gpu.total_memory)}, {capability}")
        if find_spec("triton") is None:
            advice = "vista's kernels on GPUs need Triton: pip install triton, or set device=cpu"
            yield Finding("triton", "missing", Verdict.broken, advice)
    elif has_device and build:
        advice = "torch cannot use the GPU; compare the driver with torch's build (nvidia-smi, or rocminfo)"
        yield Finding("GPU", "there is one, but torch does not see it", Verdict.limited, advice)
    elif has_device:
        advice = "torch's build for CPUs does not use the GPU; install a build for GPUs (https://pytorch.org)"
        yield Finding("GPU", "there is one, but torch cannot use it", Verdict.limited, advice)
    else:
        yield Finding("GPU", "none; device=auto is the CPU")
