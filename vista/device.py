"""Which device, how many threads and which precision: chosen in one place, and logged."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from vista.config.checks import Precision
from vista.errors import ConfigError
from vista.threads import ThreadChoice, choose_threads
from vista_kernels.backend import choose_backend
from vista_kernels.processor import ProcessorError, multiplies_bfloat16, processor

logger = logging.getLogger(__name__)
DEVICES = ("cpu", "cuda")
SMALLEST_DENORMAL = 5e-324
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt."""
KEPT_BYTES = 1 << 30


def resolve_device(name: str) -> torch.device:
    """Return the device that `auto`, `cpu`, `cuda` or `cuda:N` names.

    Apple's mps is not supported: decay is computed in float64, which it lacks.

    Raises:
        ConfigError: if the name is not one of these, torch cannot use the device, or VISTA_PROCESSOR is not a profile.
    """
    try:
        processor()
    except ProcessorError as error:
        raise ConfigError(str(error)) from None
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in DEVICES:
        raise ConfigError(f"device={name}: write auto, {', '.join(DEVICES)} or cuda:N")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"device={name}: torch cannot use it here ({reason}); try device=auto") from None
    return device


def set_threads(num_threads: int, activations: int | None = None) -> ThreadChoice:
    """Set the number of torch's CPU threads in this process, and flush denormal numbers to zero.

    Weights that decay towards zero become denormal numbers, which CPUs compute with many times slower.

    Args:
        num_threads, activations: as of `choose_threads`; a num_threads of 0 leaves the number to it.
    """
    chosen = choose_threads(num_threads, torch.get_num_threads(), activations)
    torch.set_num_threads(chosen.number)
    torch.set_flush_denormal(True)
    return chosen


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for later tensors, for the rest of this process. Without glibc this does nothing.

    By default glibc returns large blocks to the system, and the next tensor of that size pays a page fault for every
    4 KB: a quarter of the time of attention with outputs of 64 MB. Only vista's own processes (commands and
    benchmarks) call this.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not (mallopt(M_MMAP_THRESHOLD, KEPT_BYTES) and mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)):
        logger.debug("the C library returns freed memory to the system: each large tensor pays page faults")


def return_freed_memory() -> None:
    """Have glibc give freed memory back to the system. Later tensors pay page faults once. Without glibc this does
    nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


@contextmanager
def cpu_settings(num_threads: int) -> Iterator[ThreadChoice]:
    """Apply `set_threads` to a block, and restore the settings afterwards, since the process belongs to the caller."""
    threads = torch.get_num_threads()
    flushing = bool(torch.tensor([SMALLEST_DENORMAL], dtype=torch.float64).mul(1.0) == 0)
    try:
        yield set_threads(num_threads)
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(flushing)


def choose_precision(asked: Precision, device: torch.device) -> Precision:
    """Return the precision of matrix products. `auto` is bfloat16 on GPUs and on processors that multiply it
    faster (`vista_kernels.processor`), else float32."""
    if asked is not Precision.auto:
        return asked
    chosen = Precision.bfloat16 if multiplies_bfloat16(device.type) else Precision.float32
    logger.debug("precision=auto: %s on %s", chosen.value, device)
    return chosen


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Run a block's matrix products in bfloat16, if that is the precision. Sums, norms and residuals stay float32."""
    return torch.autocast(device.type, torch.bfloat16) if precision is Precision.bfloat16 else nullcontext()


def announce(device: torch.device, threads: ThreadChoice) -> None:
    """Log the device, what it can do, the CPU threads and why so many, and the backend of the kernels there."""
    backend = choose_backend("auto", device)
    if device.type == "cuda":
        logger.info("device %s: %s; kernels: %s", device, torch.cuda.get_device_name(device), backend)
    else:
        logger.info("device %s: %s, %s; kernels: %s", device, processor().name, threads, backend)
