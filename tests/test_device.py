"""Devices, precision, settings that end with their block, and what the processor is called and may use."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import run_python
from tests.forked_child import in_child
from vista.config.checks import Precision
from vista.device import announce, choose_precision, cpu_settings, resolve_device
from vista.errors import ConfigError
from vista.machine import cpu_name, usable_cores
from vista.threads import ThreadChoice
from vista_kernels.processor import PROFILES, processor


def denormals_live() -> bool:
    alive = [float(torch.tensor([5e-324], dtype=torch.float64) * 1.0) > 0, float(np.array([5e-324])[0] * 1.0) > 0]
    assert alive[0] == alive[1]
    return alive[0]


def test_cpu_settings_end_with_their_block() -> None:
    threads = torch.get_num_threads()
    assert denormals_live()
    with cpu_settings(threads + 1):
        assert torch.get_num_threads() == threads + 1 and not denormals_live()
        with pytest.raises(KeyboardInterrupt), cpu_settings(0):
            assert torch.get_num_threads() == threads + 1
            raise KeyboardInterrupt
        assert not denormals_live()
    assert torch.get_num_threads() == threads and denormals_live()


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda")
    for name in ("tpu", "meta", "", "cuda:99", "cpu:x"):
        with pytest.raises(ConfigError, match=f"device={name}: ") as caught:
            resolve_device(name)
        assert "\n" not in str(caught.value)


@pytest.mark.processor
def test_precision(force_processor: Callable[[str], None], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    cpu = torch.device("cpu")
    assert choose_precision(Precision.float32, cpu) is Precision.float32
    assert choose_precision(Precision.bfloat16, cpu) is Precision.bfloat16
    expected = Precision.bfloat16 if processor().multiplies_bfloat16 else Precision.float32
    assert choose_precision(Precision.auto, cpu) is expected
    for profile, forced in PROFILES.items():
        force_processor(profile)
        expected = Precision.bfloat16 if forced.multiplies_bfloat16 else Precision.float32
        assert choose_precision(Precision.auto, cpu) is expected
        assert choose_precision(Precision.auto, torch.device("cuda")) is Precision.bfloat16
        assert choose_precision(Precision.auto, torch.device("mps")) is Precision.float32
    assert not caplog.messages


def test_a_wrong_processor_is_an_error_of_the_configuration(force_processor: Callable[[str], None]) -> None:
    force_processor("abacus")
    with pytest.raises(ConfigError, match="VISTA_PROCESSOR=abacus: not a processor profile; set one of float32"):
        resolve_device("cpu")


def test_the_device_is_logged_with_its_processor(
    force_processor: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    force_processor("amx")
    with caplog.at_level(logging.INFO, logger="vista.device"):
        announce(torch.device("cpu"), ThreadChoice(1, "num_threads"))
    (message,) = (record.getMessage() for record in caplog.records)
    assert message == "device cpu: amx (forced by VISTA_PROCESSOR), 1 thread (num_threads); kernels: torch"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc for it")
@pytest.mark.nightly
def test_freed_memory_is_kept_for_the_next_tensor() -> None:
    """In a process of its own, since it is for good: without it each tensor of 64 MB faults in 16,384 pages."""
    code = """
import resource, torch
from vista.device import keep_freed_memory

def faults():
    torch.ones(1 << 24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

returned = faults()
keep_freed_memory()
print(faults() < 100 < returned)
"""
    assert run_python(code).stdout == "True\n"


def test_cores_are_those_on_which_the_process_may_run() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system cannot bind a process to cores")
    own = min(os.sched_getaffinity(0))
    assert in_child(lambda: os.sched_setaffinity(0, {own}) or usable_cores()) == 1


def test_the_name_is_that_of_linux() -> None:
    name, path = cpu_name(), Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    assert (name is None) == ("\nmodel name" not in text)
    assert name is None or (name and f": {name}\n" in text)
