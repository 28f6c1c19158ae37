"""What a processor multiplies fastest, by its name and instruction sets, and the variable that forces the answer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import vista_kernels
from vista_kernels.processor import PROFILES, ProcessorError, detect, multiplies_bfloat16, processor
from vista_kernels.torch_backend.precision import product_dtype

pytestmark = pytest.mark.processor
REPOSITORY = Path(__file__).parents[2]
QUESTIONS = ("get_capabilities", "get_cpu_capability", "backends.mkldnn", "_is_mkldnn_bf16_supported", "cpuinfo")
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
OFFSETS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("name", "flags", "fast", "packed"),
    [
        ("AMD EPYC", {"avx512_f"}, False, (FLOAT32,)),
        ("AMD EPYC", {"avx512_f", "avx512_bf16"}, True, (FLOAT32, BFLOAT16)),
        ("AMD EPYC", set(), False, ()),
        ("Intel(R) Xeon(R)", {"avx512_f", "avx512_bf16", "amx_tile"}, True, (BFLOAT16,)),
        ("Intel(R) Xeon(R)", {"avx512_f", "amx_tile"}, True, (BFLOAT16,)),
        ("Intel Xeon", {"avx512_f", "avx512_bf16"}, False, ()),
        (None, set(), False, ()),
    ],
)
def test_detection(name: str | None, flags: set[str], fast: bool, packed: tuple[torch.dtype, ...]) -> None:
    detected = detect(({"cpu_name": name} if name else {}) | dict.fromkeys(flags, True))
    assert detected.multiplies_bfloat16 is fast and detected.packed_dtypes == packed
    assert (name or "unknown") in detected.name


def test_profiles_are_machines_that_exist() -> None:
    amd, amx = {"cpu_name": "AMD EPYC", "avx512_f": True, "avx512_bf16": True}, {"cpu_name": "Intel", "amx_tile": True}
    for profile, capabilities in (("float32", {}), ("bfloat16", amd), ("amx", amx)):
        machine, forced = detect(capabilities), PROFILES[profile]
        assert (machine.multiplies_bfloat16, machine.packed_dtypes) == (
            forced.multiplies_bfloat16,
            forced.packed_dtypes,
        )


@pytest.mark.parametrize("profile", PROFILES)
def test_forcing_a_profile(
    profile: str, force_processor: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    force_processor(profile)
    with caplog.at_level(logging.INFO, logger="vista_kernels"):
        forced = processor()
        assert processor() is forced
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == [
        f"processor: {profile} (forced by VISTA_PROCESSOR)"
    ]
    assert forced.multiplies_bfloat16 is multiplies_bfloat16("cpu") is PROFILES[profile].multiplies_bfloat16
    # Forcing does not give oneDNN instructions that the hardware lacks.
    assert set(forced.packed_dtypes) <= set(PROFILES[profile].packed_dtypes)
    if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert forced.packed_dtypes == PROFILES[profile].packed_dtypes
    expected = BFLOAT16 if forced.multiplies_bfloat16 else FLOAT32
    assert product_dtype(torch.ones(1, dtype=BFLOAT16)) == expected
    assert product_dtype(torch.ones(1, dtype=torch.float16)) == product_dtype(torch.ones(1)) == FLOAT32
    assert product_dtype(torch.ones(1, dtype=torch.float64)) == torch.float64


def test_other_devices_do_not_depend_on_the_processor(force_processor: Callable[[str], None]) -> None:
    for profile in PROFILES:
        force_processor(profile)
        assert multiplies_bfloat16("cuda") and not multiplies_bfloat16("mps")


def test_an_empty_variable_forces_nothing(force_processor: Callable[[str], None]) -> None:
    force_processor("")
    assert processor().name == detect(torch.cpu.get_capabilities()).name


def test_a_wrong_value_names_the_profiles(force_processor: Callable[[str], None]) -> None:
    force_processor("avx1024")
    for call in (processor, lambda: vista_kernels.accumulate_state(*[torch.ones(1, 1, 1).bfloat16()] * 2, OFFSETS)):
        with pytest.raises(
            ProcessorError,
            match=r"VISTA_PROCESSOR=avx1024: not a processor profile; set one of float32, bfloat16, amx, or unset it",
        ):
            call()
    assert issubclass(ProcessorError, ValueError)


def test_nobody_else_asks_what_the_processor_can_do() -> None:
    sources = [path for folder in ("vista", "kernels") for path in (REPOSITORY / folder).rglob("*.py")]
    asking = {path.name for path in sources if any(question in path.read_text() for question in QUESTIONS)}
    assert len(sources) > 100 and asking == {"processor.py", "processor_checks.py", "machine.py"}  # These show it.
