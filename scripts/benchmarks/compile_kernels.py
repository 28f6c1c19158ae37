"""Compile every Triton kernel for several GPUs, which need not be present, and list the compilers' statistics.

    python -m scripts.benchmarks.compile_kernels                            # D = E = 64, bfloat16, four targets
    python -m scripts.benchmarks.compile_kernels --all > build/kernels_aot.md

The backend's functions run on small CPU tensors, and their launches are recorded instead of made. So the compiled
kernels have the block sizes and other parameters that the backend chooses for each target. Requires Triton but no GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"

import numpy as np
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vista_kernels import triton_backend
from vista_kernels.causal_tokens import CausalTokens
from vista_kernels.qla_tokens import QlaTokens
from vista_kernels.read_settings import ReadSettings
from vista_kernels.segments import Segments
from vista_kernels.state_queries import StateQueries
from vista_kernels.state_tokens import StateTokens
from vista_kernels.triton_backend import accelerator, blocks
from vista_kernels.triton_backend.accelerator import Accelerator

HEADS = 4
LONG, SHORT = (2000, 40), (16,) * 6
"""Lengths of the recorded batches: one with a segment in chunks, and one with only short segments."""
WIDTHS = (16, 32, 64, 128)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
OPTIONS = ("num_warps", "num_stages", "maxnreg")
_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
}
TOLERATED_SPILLS = 32
"""Bytes per thread. ptxas spills a few on its own, far below 255 registers, so that one more program can run."""
WIDE, WIDE_SPILLS = ("accumulate_bwd_kernel", "causal_kernel"), 512
"""Kernels that spill with float32 heads wider than 64, whose operands take three products, and the bytes allowed."""


@dataclass(frozen=True)
class KernelDevice:
    """A GPU to compile for, and its limits."""

    name: str
    target: GPUTarget
    processors: int
    shared_limit: int
    """Largest shared memory per program, bytes."""
    shared_total: int
    """Shared memory per processor, bytes."""
    registers: int
    """Registers per processor, counted per lane (CUDA), or per lane of one of its four SIMDs (AMD)."""
    max_warps: int

    @property
    def accelerator(self) -> Accelerator:
        """What `accelerator_of` would return on it."""
        arch = self.target.arch
        return Accelerator(self.target.backend, arch if isinstance(arch, int) else 0, self.processors)


DEVICES = {
    device.name: device
    for device in (
        KernelDevice("sm_80", GPUTarget("cuda", 80, 32), 108, 163 << 10, 164 << 10, 65536, 64),
        KernelDevice("sm_90", GPUTarget("cuda", 90, 32), 132, 227 << 10, 228 << 10, 65536, 64),
        KernelDevice("sm_100", GPUTarget("cuda", 100, 32), 148, 227 << 10, 228 << 10, 65536, 64),
        KernelDevice("gfx942", GPUTarget("hip", "gfx942", 64), 304, 64 << 10, 64 << 10, 512, 32),
    )
}


@dataclass(frozen=True)
class KernelLaunch:
    """A recorded launch."""

    kernel: Any
    args: tuple[object, ...]
    constants: dict[str, object]
    options: dict[str, Any]


@dataclass(frozen=True)
class CompiledKernel:
    """The compilers' statistics of one kernel."""

    device: KernelDevice
    kernel: str
    variant: str
    """The kernel's enabled constants, in words."""
    dtype: str
    width: int
    block_t: int
    num_warps: int
    registers: int
    spills: int
    """Local memory per thread, bytes: spilled registers and stack."""
    shared: int
    """Shared memory per program, bytes."""

    @property
    def occupancy(self) -> float:
        """Share of the processor's warps that registers, shared memory and number of programs let be resident."""
        device = self.device
        if device.target.backend == "hip":
            per_simd = min(8, device.registers // (-(-max(self.registers, 1) // 8) * 8))
            programs = per_simd * 4 // self.num_warps
        else:
            programs = device.registers // (-(-self.registers // 8) * 8 * 32 * self.num_warps)
        programs = min(programs, 32, device.max_warps // self.num_warps)
        reserved = 0 if device.target.backend == "hip" else 1024
        if self.shared + reserved:
            programs = min(programs, device.shared_total // (self.shared + reserved))
        return programs * self.num_warps / device.max_warps

    @property
    def problems(self) -> list[str]:
        """Limits that the kernel exceeds."""
        wide = self.dtype == "float32" and self.width > 64 and self.kernel in WIDE
        limit = WIDE_SPILLS if wide else TOLERATED_SPILLS
        exceeded = [f"{self.spills} bytes spilled"] if self.spills > limit else []
        if self.shared > self.device.shared_limit:
            exceeded.append(f"{self.shared} bytes of shared memory, limit {self.device.shared_limit}")
        return exceeded


def record(device: KernelDevice, dtype: torch.dtype, width: int, lengths: tuple[int, ...]) -> list[KernelLaunch]:
    """Run all functions of the backend once, and return the launches that they would make on the device."""
    launches: dict[tuple[object, ...], KernelLaunch] = {}

    def launch(kernel: Any, num_programs: int, *args: object, **flags: Any) -> None:
        options = {name: flags.pop(name) for name in OPTIONS if name in flags}
        types = [str(arg.dtype) for arg in args if isinstance(arg, Tensor)]
        key = (kernel.__name__, *types, *sorted((name, str(value)) for name, value in flags.items()))
        if num_programs:
            launches.setdefault(key, KernelLaunch(kernel, args, flags, options))

    with (
        mock.patch.object(blocks, "launch", launch),
        mock.patch.object(accelerator, "accelerator_of", lambda x: device.accelerator),
    ):
        _run_all(dtype, width, lengths)
    return list(launches.values())


def compile_launch(device: KernelDevice, launch: KernelLaunch) -> CompiledKernel:
    """Compile a recorded launch and read registers, spills and shared memory from the result."""
    signature, constants, attributes = _signature(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    done = triton.compile(source, target=device.target, options=launch.options)
    registers, spills = _amd_usage(done.asm["amdgcn"]) if "amdgcn" in done.asm else _cuda_usage(done.asm["cubin"])
    tokens = next(arg for arg in launch.args if isinstance(arg, Tensor))
    dtype = str(launch.constants.get("DTYPE", _POINTERS[tokens.dtype].removeprefix("*")))
    return CompiledKernel(
        device,
        launch.kernel.__name__,
        _variant(launch.constants),
        {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[dtype],
        int(str(next(launch.constants[name] for name in "ADF" if name in launch.constants))),
        int(str(launch.constants.get("BLOCK_T", 0))),
        launch.options["num_warps"],
        registers,
        spills,
        done.metadata.shared,
    )


def compile_all(
    devices: list[str], cases: list[tuple[str, int]], lengths: tuple[tuple[int, ...], ...] = (LONG,)
) -> Iterator[CompiledKernel]:
    """Compile every kernel for every device and (dtype, width)."""
    for name in devices:
        for dtype, width in cases:
            for batch in lengths:
                for launch in record(DEVICES[name], DTYPES[dtype], width, batch):
                    yield compile_launch(DEVICES[name], launch)


def _variant(constants: dict[str, object]) -> str:
    """Return the constants that distinguish variants of a kernel, in words."""
    words = [
        word for name, word in (("HAS_WEIGHT", "weight"), ("ADD", "add"), ("HAS_COUNT", "count")) if constants.get(name)
    ]
    words += [word for name, word in (("HAS_FACTOR", "factor"), ("FROM_BACK", "from back")) if constants.get(name)]
    if constants.get("ACTIVATION_X", "identity") != "identity":
        words.append("slope")
    return " ".join([*words, *(str(constants[name]) for name in ("STORE",) if name in constants)])


def kernels() -> set[str]:
    """Return the names of all kernels of the backend."""
    modules = [module for name, module in sys.modules.items() if name.startswith(triton_backend.__name__ + ".")]
    return {name for module in modules for name in vars(module) if re.search(r"_kernel(_\w+)?$", name)}


def _run_all(dtype: torch.dtype, width: int, lengths: tuple[int, ...]) -> None:
    """Call every function of the backend on empty tensors."""
    total, batch = sum(lengths), len(lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    segments = Segments.from_offsets(offsets)
    q, k, v, out, *grads = (torch.empty(total, HEADS, width, dtype=dtype) for _ in range(8))
    z, grad_z = (torch.empty(batch, HEADS, width, width) for _ in range(2))
    n, weight = torch.empty(batch, HEADS), torch.empty(total, HEADS)
    for w in (weight, None):
        written = StateTokens(k, v, segments, w, "silu")
        triton_backend.accumulate(written, z, n, fresh=w is None)
        triton_backend.accumulate_backward(grad_z, written, grads[0], grads[1])
    queries = StateQueries(q, z, n, segments, ReadSettings("silu", "silu", 0.5))
    triton_backend.read(queries, out)
    triton_backend.read_backward(out, queries, grads[0], grad_z)
    attending = QlaTokens(q, k, v, torch.from_numpy(offsets))
    triton_backend.add_targets(attending, segments.starts, out)
    triton_backend.add_targets_backward(out, attending, segments.starts, *grads[:3])
    tokens = CausalTokens(q, k, v, offsets, "silu")
    triton_backend.causal_attention(tokens, z, out)
    triton_backend.causal_attention_backward(out, tokens, z, grad_z, *grads[:3])
    whole = tokens._replace(offsets=np.array([0, lengths[-1]]))  # without chunks and without initial states
    triton_backend.causal_attention_backward(out, whole, None, grad_z[:1], *grads[:3])
    rows = torch.empty(300, HEADS, width * width)
    decay = torch.empty(300, HEADS)
    triton_backend.scan_rows(rows, decay, np.array([0, 300]), None)
    triton_backend.scan_rows(rows, decay, np.array([0, 300]), None, descending=True, decay_after=True)


def _signature(launch: KernelLaunch) -> tuple[dict[str, str], dict[str, object], dict[tuple[int], list[list[object]]]]:
    """Return the types, constants and divisibility attributes that Triton's JIT would derive from the arguments."""
    signature: dict[str, str] = {}
    constants: dict[str, object] = dict(launch.constants)
    attributes: dict[tuple[int], list[list[object]]] = {}
    for place, (name, arg) in enumerate(zip(launch.kernel.arg_names, launch.args, strict=False)):
        if isinstance(arg, Tensor):
            signature[name] = _POINTERS[arg.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif arg == 1:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32"
            if int(str(arg)) % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    for name in launch.kernel.arg_names[len(launch.args) :]:
        signature[name] = "constexpr"
    return signature, constants, attributes


def _cuda_usage(cubin: bytes) -> tuple[int, int]:
    """Return the registers per thread and the bytes of local memory and stack of a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    registers, stack, local = (int(re.search(rf"\b{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    return registers, stack + local


def _amd_usage(assembly: str) -> tuple[int, int]:
    """Return the vector registers per lane, and the spilled registers plus private bytes, of AMD assembly."""

    def number(key: str) -> int:
        match = re.search(rf"\.{key}:\s+(\d+)", assembly)
        if match is None:
            raise ValueError(f"the assembly has no .{key}")
        return int(match[1])

    spills = number("vgpr_spill_count") + number("sgpr_spill_count") + number("private_segment_fixed_size")
    return number("vgpr_count"), spills


def table(rows: list[CompiledKernel]) -> list[str]:
    """Return the lines of a Markdown table.

    Registers and spilled bytes are per thread; shared is the bytes of shared memory per program. For sums and scans the
    width is the number of elements of a state.
    """
    head = "target|kernel|dtype|D = E|block|warps|registers|spilled|shared|occupancy"
    lines = [f"| {head.replace('|', ' | ')} |", "|" + "---|" * 10]
    for row in rows:
        cells = [row.device.name, f"{row.kernel} {row.variant}".strip(), row.dtype, row.width, row.block_t or ""]
        cells += [row.num_warps, row.registers, row.spills or "", row.shared, f"{row.occupancy:.0%}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Compile and print the table; return 1 if a kernel spills, needs too much shared memory or is not compiled."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--all", action="store_true", help="compile every width and dtype, also for short segments")
    parser.add_argument(
        "--device", choices=list(DEVICES), action="append", help="compile for this device (repeatable; default: all)"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--width", type=int, default=64, help="D = E")
    options = parser.parse_args(argv)
    chosen = [(options.dtype, options.width)]
    cases = [(dtype, width) for dtype in DTYPES for width in WIDTHS] if options.all else chosen
    rows = []
    print(*table([]), sep="\n")
    for row in compile_all(options.device or list(DEVICES), cases, (LONG, SHORT) if options.all else (LONG,)):
        if row in rows:
            continue
        rows.append(row)
        print(table([row])[2], *row.problems, flush=True)
    names = {row.kernel for row in rows}
    missing = sorted(kernels() - names)
    if missing:
        print("not compiled:", *missing)
    return int(bool(missing) or any(row.problems for row in rows))


if __name__ == "__main__":
    sys.exit(main())
