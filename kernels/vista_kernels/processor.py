"""What the processor multiplies fastest: the only module that asks, and the setting that answers in its place.

Three choices depend on the processor:

- the torch backend multiplies bfloat16 tokens as bfloat16, or widens them to float32 first;
- vista's `precision=auto` is bfloat16 or float32 on a CPU;
- vista packs the weights of frozen linear maps for oneDNN, or leaves them to torch.

The answers follow from the processor's name and instruction sets, never from timing. So all processes on one kind of
machine make the same choices, and so does a run that is resumed there.

Set the environment variable VISTA_PROCESSOR to one of these profiles to force the answers:

=========  ============================================  =================  ===================
profile    as on                                         bfloat16 products  packed weights
=========  ============================================  =================  ===================
float32    AVX2, or Intel's AVX-512 without AMX          no                 none
bfloat16   AMD's AVX-512 with bfloat16 (Zen 4 and later) yes                float32 and bfloat16
amx        Intel's AMX (Sapphire Rapids and later)       yes                bfloat16
=========  ============================================  =================  ===================

If it is unset or empty, the processor is detected. The variable is read once per process, at the first use.

Forcing changes choices, not the hardware. Results are as correct as on a machine of that kind, but they can be slow:
a processor without bfloat16 instructions emulates them. Results are not bit-identical to those of such a machine,
because torch's libraries still choose their instructions. Weights are packed only where oneDNN can multiply them at
all.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch

VARIABLE = "VISTA_PROCESSOR"
_LOG = logging.getLogger("vista_kernels")


class ProcessorError(ValueError):
    """VISTA_PROCESSOR is not one of the profiles."""


@dataclass(frozen=True, slots=True)
class Processor:
    """What the choices depend on."""

    name: str
    """For logs."""
    multiplies_bfloat16: bool
    """Products of bfloat16 matrices are faster than those of float32."""
    packed_dtypes: tuple[torch.dtype, ...]
    """Dtypes of weights that oneDNN multiplies faster once they are packed, that is, laid out for it."""


PROFILES = {
    "float32": Processor("float32", False, ()),
    "bfloat16": Processor("bfloat16", True, (torch.float32, torch.bfloat16)),
    "amx": Processor("amx", True, (torch.bfloat16,)),
}
"""The values of VISTA_PROCESSOR."""


@cache
def processor() -> Processor:
    """Return the profile that VISTA_PROCESSOR names, or what torch says of this processor. Asked and logged once.

    Raises:
        ProcessorError: if VISTA_PROCESSOR is not one of `PROFILES`.
    """
    profile = os.environ.get(VARIABLE, "")
    if profile and profile not in PROFILES:
        raise ProcessorError(
            f"{VARIABLE}={profile}: not a processor profile; set one of {', '.join(PROFILES)}, or unset it"
        )
    if profile:
        chosen = replace(PROFILES[profile], name=f"{profile} (forced by {VARIABLE})")
    else:
        chosen = detect(torch.cpu.get_capabilities())
    chosen = replace(chosen, packed_dtypes=tuple(filter(can_pack, chosen.packed_dtypes)))
    packed = ", ".join(str(dtype).removeprefix("torch.") for dtype in chosen.packed_dtypes) or "none"
    products = "bfloat16" if chosen.multiplies_bfloat16 else "float32"
    _LOG.debug("processor: %s; products of bfloat16 tokens in %s; packed weights: %s", chosen.name, products, packed)
    return chosen


def multiplies_bfloat16(device_type: str) -> bool:
    """Return whether products of bfloat16 are faster than those of float32: always on "cuda", by processor on "cpu".

    Raises:
        ProcessorError: on "cpu", if VISTA_PROCESSOR is not one of `PROFILES`.
    """
    return processor().multiplies_bfloat16 if device_type == "cpu" else device_type == "cuda"


def detect(capabilities: Mapping[str, object]) -> Processor:
    """Return what `torch.cpu.get_capabilities` says of a processor.

    With AMX, or with avx512_bf16 on AMD's processors, bfloat16 products are 2 to 7 times as fast as float32 ones at a
    layer's shapes. With Intel's avx512_bf16 alone they are half as fast (a Sapphire Rapids whose AMX is masked: 70 to
    80 GFLOP/s per core against 100 to 160).

    On AMD's processors with AVX-512, torch's MKL uses half of it for float32: a packed product took 0.43 of the time
    (EPYC of Zen 5, [504, 256] @ [256, 1024] on one thread, torch 2.13). Where bfloat16 is fast, oneDNN multiplies it
    packed or not; packed products took 0.95 of the time, and 0.85 for few rows.
    """
    name = str(capabilities.get("cpu_name", "unknown processor"))
    is_amd = "AMD" in name
    if capabilities.get("amx_tile"):
        fast_bfloat16 = "AMX"
    elif is_amd and capabilities.get("avx512_bf16"):
        fast_bfloat16 = "avx512_bf16"
    else:
        fast_bfloat16 = ""
    packed = [torch.float32] if is_amd and capabilities.get("avx512_f") else []
    packed += [torch.bfloat16] if fast_bfloat16 else []
    return Processor(f"{name}, {fast_bfloat16 or 'no fast bfloat16'}", bool(fast_bfloat16), tuple(packed))


def can_pack(dtype: torch.dtype) -> bool:
    """Return whether oneDNN multiplies packed weights of a dtype at all, in this build of torch on this processor."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
