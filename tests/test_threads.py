"""How many threads compute, why, and that idle ones do not take time from others."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import run_python, small_config
from vista import threads
from vista.device import cpu_settings
from vista.log.event_log import EventLog
from vista.threads import ACTIVATIONS_PER_THREAD, choose_threads, num_threads, thread_settings, waiting
from vista.training.trainer import train_model

CLEAN = "import json, os, sys\nfor name in ('OMP_NUM_THREADS', 'OMP_WAIT_POLICY'): os.environ.pop(name, None)\n"
"""The environment of a user who has set nothing."""


def printed(code: str) -> Any:
    done = run_python(CLEAN + code)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def on_machine(monkeypatch: pytest.MonkeyPatch, cores: int, quota: float | None, *, from_user: bool = False) -> None:
    monkeypatch.setattr(threads, "usable_cores", lambda: cores)
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    monkeypatch.setattr(threads, "_from_user", from_user)
    monkeypatch.setattr(threads, "_spins", False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")


@pytest.mark.parametrize(
    ("quota", "activations", "number", "reason"),
    [
        (None, None, 8, "one per core"),
        (None, 8 * ACTIVATIONS_PER_THREAD, 8, "one per core"),
        (None, 8 * ACTIVATIONS_PER_THREAD - 1, 7, "batches of 524,287 activations are small"),
        (2.5, None, 2, "a quota of 2.5 cores"),
        (0.5, None, 1, "a quota of 0.5 cores"),
        (2.5, ACTIVATIONS_PER_THREAD, 1, "batches of 65,536 activations are small"),
    ],
)
def test_choice(
    quota: float | None, activations: int | None, number: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_machine(monkeypatch, 8, quota)
    chosen = choose_threads(0, 8, activations)
    assert (chosen.number, chosen.reason) == (number, reason)


def test_a_choice_ends_with_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_number", None)
    before = num_threads()
    with thread_settings(before + 1):
        assert num_threads() == torch.get_num_threads() == before + 1
    assert num_threads() == torch.get_num_threads() == before
    torch.set_num_threads(before + 2)
    threads.adopt_num_threads()
    assert torch.get_num_threads() == before + 2, "the caller's setting stays"
    torch.set_num_threads(before)


def test_settings_of_users_win(monkeypatch: pytest.MonkeyPatch) -> None:
    on_machine(monkeypatch, 8, 2.0)
    assert str(choose_threads(1, 8, 0)) == "1 thread (num_threads)"
    assert choose_threads(5, 8, 0).number == 5
    assert choose_threads(0, 1).reason == "torch's setting"  # torch.set_num_threads(1), which the quota does not raise
    on_machine(monkeypatch, 8, 2.0, from_user=True)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert str(choose_threads(0, 3, 0)) == "3 threads (OMP_NUM_THREADS=3, OMP_WAIT_POLICY=active)"
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert waiting() == "idle ones sleep"


def test_an_import_prepares_openmp_without_torch() -> None:
    report = "print(json.dumps([os.environ.get('OMP_WAIT_POLICY'), 'torch' in sys.modules, waiting()]))"
    late = "idle ones spin: torch was imported before vista"
    code = "import vista\nfrom vista.threads import waiting\n" + report
    assert printed(code) == ["passive", False, "idle ones sleep"]
    assert printed("os.environ['OMP_WAIT_POLICY'] = 'active'\n" + code) == ["active", False, "OMP_WAIT_POLICY=active"]
    assert printed("import torch, vista_kernels\n" + code) == ["passive", True, late]


def test_an_import_limits_all_libraries_to_the_quota() -> None:
    start = "from vista import threads\nthreads.cpu_quota, threads.usable_cores = lambda: 1.9, lambda: 64\n"
    code = (
        "os.environ.pop('OMP_NUM_THREADS', None)\n"  # of a quota of this machine
        "threads.prepare_openmp()\n"
        "import torch\n"
        "number = torch.get_num_threads()\n"
        "print(json.dumps([os.environ['OMP_NUM_THREADS'], number, str(threads.choose_threads(0, number))]))"
    )
    assert printed(start + code) == ["1", 1, "1 thread (a quota of 1.9 cores)"]
    kept = "os.environ['OMP_NUM_THREADS'] = '2'\nthreads.prepare_openmp()\n"
    assert printed(f"{start}{kept}print(json.dumps(os.environ['OMP_NUM_THREADS']))") == "2"


def test_idle_threads_sleep() -> None:
    """While the main thread computes alone between operators, the other one takes no time.

    With libgomp's default it spins for all of these 2 ms. Its share of an operator takes 0.02 ms, and the bound of
    0.5 ms leaves the rest to slower processors.
    """
    code = """
import vista, torch, time

torch.set_num_threads(2)
values, rounds = torch.ones(1 << 16), 50
values.add(1)
everything, own = time.process_time(), time.thread_time()
for _ in range(rounds):
    values.add(1)
    until = time.thread_time() + 2e-3
    while time.thread_time() < until:
        pass
print(json.dumps((time.process_time() - everything - (time.thread_time() - own)) / rounds))
"""
    assert printed(code) < 0.5e-3


def test_training_on_a_small_log_uses_one_thread_and_says_why(
    event_log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(event_log, tmp_path, optim__epochs=1, num_threads=0)
    with cpu_settings(2), caplog.at_level(logging.INFO):
        on_machine(monkeypatch, 2, None)
        train_model(config, event_log)
        assert torch.get_num_threads() == 2
    assert "1 thread (batches of 1,024 activations are small); kernels: torch" in caplog.text


def test_a_wrong_path_fails_before_torch_is_loaded() -> None:
    code = "from vista.cli.main import main\ncode = main(['train', 'data.path=/no/such/log'])\n"
    assert printed(code + "print(json.dumps([code, 'torch' in sys.modules]))") == [1, False]
