"""Every Triton kernel compiles for GPUs of NVIDIA and AMD, within their shared memory and the spills allowed.

This runs `scripts.benchmarks.compile_kernels` in another process, because Triton may use its interpreter in this one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

REPOSITORY = Path(__file__).parents[2]
DEVICES = ["sm_80", "sm_90", "sm_100", "gfx942"]


def compile_kernels(*words: str) -> str:
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'kernels'}"}
    command = [sys.executable, "-W", "ignore", "-m", "scripts.benchmarks.compile_kernels", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.research
@pytest.mark.parametrize("device", DEVICES)
def test_compiles(device: str) -> None:
    lines = compile_kernels("--device", device).splitlines()
    assert len(lines) > 15
    assert all(line.startswith(f"| {device} |") for line in lines[2:])


@pytest.mark.research
def test_compiles_in_float32() -> None:
    compile_kernels("--device", "sm_90", "--dtype", "float32")


@pytest.mark.aot
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("device", DEVICES)
def test_compiles_in_every_width_and_dtype(device: str) -> None:
    compile_kernels("--device", device, "--all")
