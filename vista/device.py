"""Which device and how many threads: chosen in one place, and logged."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from vista.config.choices import Precision
from vista.errors import ConfigError
from vista_kernels.launch import choose_backend
from vista_kernels.torch_backend.precision import multiplies_bfloat16

logger = logging.getLogger(__name__)
DEVICES = ("cpu", "cuda")
SMALLEST_DENORMAL = 5e-324
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt."""
KEPT_BYTES = 1 << 30
LARGEST_HEEDED_BYTES = (32 << 20) - (64 << 10)
"""Just under the largest block that glibc's thresholds adapt to (DEFAULT_MMAP_THRESHOLD_MAX)."""


def resolve_device(name: str) -> torch.device:
    """auto | cpu | cuda | cuda:N -> torch.device. (Not Apple's mps: decay is reckoned in float64, which it lacks.)

    Raises:
        ConfigError: if it is none of these, or torch cannot use it here.
    """
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


def set_threads(num_threads: int) -> None:
    """Set torch's CPU threads (0 leaves torch's own choice), and flush denormal numbers to zero, in this process.

    Weights that decay towards zero leave denormals behind, on which CPUs calculate many times slower.
    """
    if num_threads > 0:
        torch.set_num_threads(num_threads)
    torch.set_flush_denormal(True)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next tensor, in this process, for good (elsewhere: does nothing).

    By default it hands large blocks back, and the next tensor of that size pays a page fault for every 4 KB: a quarter
    of the time of attention with outputs of 64 MB. So this is for processes of vista's own: commands and benchmarks.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not (mallopt(M_MMAP_THRESHOLD, KEPT_BYTES) and mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)):
        logger.debug("the C library hands freed memory back: large tensors pay page faults each time")


def reuse_freed_memory() -> None:
    """Let glibc keep some 64 MB of freed memory for the next tensors (elsewhere: does nothing).

    It hands large blocks back to the system until it has seen one as large freed, and then keeps twice as much. Here it
    sees the largest one that it heeds; its pages are never touched. A process of the caller's own may well have that
    (`keep_freed_memory` is another matter), and without it a request pays a page fault for every 4 KB of its buffers.
    """
    torch.empty(LARGEST_HEEDED_BYTES, dtype=torch.uint8)


@contextmanager
def cpu_settings(num_threads: int) -> Iterator[None]:
    """`set_threads` for a block: afterwards all is as before, for the process belongs to the caller."""
    threads = torch.get_num_threads()
    flushing = bool(torch.tensor([SMALLEST_DENORMAL], dtype=torch.float64).mul(1.0) == 0)
    set_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(flushing)


def choose_precision(asked: Precision, device: torch.device) -> Precision:
    """Precision of training's matrix products; `auto` looks at what the device can do, and logs it.

    bfloat16 on GPUs and on CPUs that multiply it faster (`vista_kernels.torch_backend.precision`).
    """
    if asked is not Precision.auto:
        return asked
    chosen = Precision.bfloat16 if multiplies_bfloat16(device.type) else Precision.float32
    logger.info("precision=auto: %s on %s", chosen.value, device)
    return chosen


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Matrix products in bfloat16 for a block, if that is the precision; sums, norms and residuals stay float32."""
    return torch.autocast(device.type, torch.bfloat16) if precision is Precision.bfloat16 else nullcontext()


def announce(device: torch.device) -> None:
    """Log the device, what it can do, and what the kernels run on there."""
    backend = choose_backend("auto", device)
    if device.type == "cuda":
        logger.info("device %s: %s; kernels: %s", device, torch.cuda.get_device_name(device), backend)
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        logger.info("device %s: %d threads, %s; kernels: %s", device, torch.get_num_threads(), capability, backend)
