"""Single checks of `vista doctor`, with the values of other machines. `vista doctor`: what it prints and writes,
for machines and folders that work and that do not."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.conftest import Served, run_python, sign_model
from vista import doctor
from vista.cli.main import main
from vista.config import DoctorConfig, SourceColumns
from vista.doctor import (
    NUM_WRITES,
    Finding,
    Verdict,
    address_space_finding,
    age_finding,
    check_disk,
    check_disks,
    existing_folder,
    file_system_of,
    kind_finding,
    log_size_finding,
    maps_finding,
    open_files_finding,
    segments_finding,
    size_finding,
    space_finding,
    sync_finding,
    sync_seconds,
    thread_finding,
)
from vista.installation import install_command
from vista.log.event_log import EventLog
from vista.machine import cpu_quota, memory_limit_bytes
from vista.refresh import refresh
from vista.threads import ThreadChoice

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


def test_every_extra_for_users_is_listed() -> None:
    assert set(doctor.EXTRAS) == set(PROJECT["optional-dependencies"]) - {"dev", "docs"}


def test_modules_of_packages() -> None:
    checked = 0
    for line in (
        *PROJECT["dependencies"],
        *(one for extra in PROJECT["optional-dependencies"].values() for one in extra),
    ):
        name = Requirement(line).name
        if name in ("mkdocstrings", "pre-commit", "pytest-timeout", "pytest-xdist", "pymdown-extensions"):
            continue  # for developers
        try:
            distribution(name)
        except PackageNotFoundError:
            continue
        assert find_spec(doctor.module_of(name)) is not None, name
        checked += 1
    assert checked > 8


def test_a_version_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "0.1")
    found = {one.name: one for one in doctor.check_core(DoctorConfig())}
    assert found["numpy"].verdict is Verdict.broken
    assert found["numpy"].advice == "vista requires >=2: pip install 'numpy>=2'"


@pytest.mark.parametrize(
    ("threads", "cores", "advice"),
    [
        (4, 4, ""),
        (8, 16, "training and refresh use 8 of 16 cores; set OMP_NUM_THREADS=16"),
        (9, 16, ""),
        (1, 8, "use 1 of 8 cores"),
        (8, 2.5, "8 threads share 2.5 cores and wait for one another; set OMP_NUM_THREADS=2"),
        (2, 0.5, "set OMP_NUM_THREADS=1"),
        (1, 0.5, "use one core"),
        (1, 1, "use one core"),
    ],
)
def test_threads(threads: int, cores: float, advice: str) -> None:
    found = thread_finding(ThreadChoice(threads, "one per core"), cores)
    assert advice in found.advice and (found.verdict is Verdict.fine) == (not advice)


def test_limits_of_control_groups(tmp_path: Path) -> None:
    own = tmp_path / "own"
    assert (cpu_quota(tmp_path, own), memory_limit_bytes(tmp_path, own)) == (None, None)
    second = tmp_path / "second" / "pods" / "one"
    second.mkdir(parents=True)
    own.write_text("0::/pods/one\n")
    (second / "cpu.max").write_text("max 100000\n")
    (second.parent / "cpu.max").write_text("150000 100000\n")
    (second / "memory.max").write_text("max\n")
    root = tmp_path / "second"
    assert (cpu_quota(root, own), memory_limit_bytes(root, own)) == (1.5, None)
    (second / "memory.max").write_text("1000\n")
    (root / "memory.max").write_text("2000\n")
    assert memory_limit_bytes(root, own) == 1000
    first = tmp_path / "first"
    for name, text in (("cpu.cfs_quota_us", "50000"), ("cpu.cfs_period_us", "100000")):
        (first / "cpu" / "docker").mkdir(parents=True, exist_ok=True)
        (first / "cpu" / "docker" / name).write_text(text)
    (first / "memory").mkdir()
    (first / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712")
    own.write_text("4:memory:/docker\n3:cpu,cpuacct:/docker\n2:pids:/docker\n")
    assert (cpu_quota(first, own), memory_limit_bytes(first, own)) == (0.5, None)
    (first / "cpu" / "docker" / "cpu.cfs_quota_us").write_text("-1")
    assert cpu_quota(first, own) is None


def test_kinds_of_file_systems(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        f"30 22 0:50 / {tmp_path} rw shared:1 - nfs4 server:/data rw\n"
        rf"31 22 0:51 / {tmp_path}/a\040b rw - tmpfs tmpfs rw" + "\n"
        f"32 22 0:52 / {tmp_path}-other rw - xfs /dev/sdb rw\n"
    )
    (tmp_path / "a b").mkdir()
    assert file_system_of(tmp_path, mounts) == "nfs4" and file_system_of(tmp_path / "a b", mounts) == "tmpfs"
    assert file_system_of(tmp_path.parent, mounts) == "ext4" and file_system_of(tmp_path, tmp_path / "none") is None
    assert kind_finding("nfs4", has_store=True).verdict is Verdict.broken
    assert "vista store copy" in kind_finding("fuse.sshfs", has_store=False).advice
    assert kind_finding("cifs", has_store=False).verdict is Verdict.limited
    assert "mount a volume" in kind_finding("overlay", has_store=True).advice
    assert "in memory" in kind_finding("tmpfs", has_store=True).advice
    assert kind_finding("xfs", has_store=True).verdict is kind_finding(None, has_store=True).verdict is Verdict.fine


def test_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = sync_seconds(tmp_path)
    assert 1 <= len(times) <= NUM_WRITES and all(time > 0 for time in times) and not list(tmp_path.iterdir())
    monkeypatch.setattr(doctor, "MOST_S", 0.0)
    assert sync_seconds(tmp_path) == []
    assert sync_finding(0.0004).verdict is Verdict.fine
    slow = sync_finding(0.025)
    assert slow.value == "25 ms for 4 KiB; about 100 ms per batch of a refresh, 620 ms to publish"
    assert slow.verdict is Verdict.limited and "use a local SSD" in slow.advice


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> list[float]:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(doctor, "sync_seconds", refuse)  # root may write anywhere
    found = {one.name: one for one in check_disk(tmp_path, ["store"])}
    assert f"{tmp_path}: Permission denied; refresh, train" in found["fsync"].advice
    assert found["fsync"].verdict is Verdict.limited


def test_disks_of_folders_that_do_not_exist_yet(tmp_path: Path) -> None:
    assert existing_folder(tmp_path / "a" / "b") == tmp_path
    (tmp_path / "file").write_text("")
    assert existing_folder(tmp_path / "file") == tmp_path
    found = list(check_disks(DoctorConfig(store=str(tmp_path / "stores" / "x"), model="redis://host/not/a/store")))
    assert found[0].name == "disk" and found[0].value.startswith(f"{tmp_path} (store")


def test_what_is_too_small() -> None:
    assert space_finding(2e9).verdict is Verdict.fine and "second generation" in space_finding(5e8).advice
    assert "ulimit -v unlimited" in address_space_finding(1 << 34).advice
    assert address_space_finding(resource.RLIM_INFINITY).verdict is Verdict.fine
    assert open_files_finding(resource.RLIM_INFINITY, 10**6).verdict is Verdict.fine
    assert open_files_finding(1024, 500).verdict is Verdict.fine
    assert "ulimit -n 65536" in open_files_finding(1024, 600).advice
    assert maps_finding(65_530, 10).verdict is Verdict.fine
    assert "vm.max_map_count=160000" in maps_finding(65_530, 40_000).advice
    assert "vista log compact" in segments_finding(500).advice and segments_finding(3).verdict is Verdict.fine
    for finding in (log_size_finding, size_finding):
        assert finding(10**9, 10**10).verdict is finding(10**9, None).verdict is Verdict.fine
        assert "only 1 GB of memory" in finding(10**10, 10**9).advice


def test_a_clock_that_is_wrong() -> None:
    assert age_finding(7200).value == "2 h ago" and age_finding(-5).value == "0 s ago"
    assert age_finding(-7200).verdict is Verdict.broken and "NTP" in age_finding(-7200).advice


def test_a_check_that_fails_shows_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(config: DoctorConfig):  # type: ignore[no-untyped-def]
        yield Finding("memory", "much")
        raise OSError(5, "Input/output error", "/proc/meminfo")

    monkeypatch.setitem(doctor.CHECKS, "Memory", check)
    found = {section.title: section.findings for section in doctor.diagnose(DoctorConfig()).sections}
    first, second = found["Memory"]
    assert first.value == "much" and second.verdict is Verdict.broken
    assert second.advice == "this check failed: OSError: [Errno 5] Input/output error: '/proc/meminfo'"
    assert found["Limits"]


BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
from vista.cli.main import main
sys.exit(main(sys.argv[2:]))
"""
"""Runs a command line in an environment without a module."""
TITLES = ("Packages", "Extras", "Processor", "Threads", "Memory", "GPU", "Disk", "Limits")


def diagnosis(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> str:
    """Output of a run with an exit code, as one line without the breaks of the table."""
    capsys.readouterr()
    assert main(["doctor", *words]) == code
    return " ".join(capsys.readouterr().out.split())


def test_all_that_works(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = (f"model={served.model_dir}", f"store={served.store}", f"data={served.log.path}", "out=doctor.json")
    text = diagnosis(capsys, 0, *words)
    assert "Nothing is broken." in text and "x Broken" not in text
    assert "summarizer the model's" in text and "16 users, 40 items, 233 events" in text
    sections = json.loads((tmp_path / "doctor.json").read_text())["sections"]
    assert [section["title"] for section in sections] == [*TITLES, "Model", "Store", "Log"]
    found = [finding for section in sections for finding in section["findings"]]
    assert {finding["verdict"] for finding in found} <= {"fine", "limited"}
    assert all(finding["value"] and bool(finding["advice"]) == (finding["verdict"] == "limited") for finding in found)
    assert [path.name for path in tmp_path.iterdir()] == ["doctor.json"]


def test_without_folders_only_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if line in (*TITLES, "Model", "Store", "Log")] == list(TITLES)


def test_a_store_of_another_model(
    served: Served, served_tasks: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = diagnosis(capsys, 1, f"model={served_tasks.model_dir}", f"store={served.store}")
    own, other = served_tasks.model.summarizer_id().hex(), served.model.summarizer_id().hex()
    assert f"{other[:12]}… wrote the store, but the model's is {own[:12]}…: name the model that wrote it" in text
    assert "Nothing is broken" not in text


def test_a_store_that_is_behind_the_log(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, words = shutil.copytree(served.log.path, tmp_path / "log"), [f"store={tmp_path / 'store'}"]
    refresh(served.model, EventLog.open(log), tmp_path / "store")
    assert "covers" in (text := diagnosis(capsys, 0, *words, f"data={log}")) and "behind the log" not in text
    frame = {"user": [100], "item": [10], "timestamp": [2_000_000_000_000], "action": ["click"], "rating": [5.0]}
    columns = SourceColumns(action="action", rating="rating")
    EventLog.from_frame(frame, log, time_unit="ms", append=True, columns=columns)
    text = " ".join(diagnosis(capsys, 0, *words, f"data={log}").split())
    assert "behind the log" in text and "1 newer segment with changes of 1 user; run `vista refresh" in text


def test_a_store_without_its_model(
    served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = diagnosis(capsys, 1, "model=nowhere", f"store={served.store}")
    assert "nowhere: no readable model" in text and "train one with `vista train run_dir=…`" in text
    assert "the model cannot be read, so it was not compared" in text
    assert "(pass model= to compare it)" in diagnosis(capsys, 0, f"store={served.store}")


def test_a_model_of_another_version(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(served.model_dir, tmp_path / "old")
    sign_model(tmp_path / "old", lambda fields: fields.update(format_version=1))
    text = diagnosis(capsys, 1, f"model={tmp_path / 'old'}")
    assert "format 1, but this version of vista reads" in text and "export the model again" in text


def test_a_model_without_one_of_its_files(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(served.model_dir, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    os.truncate(weights, 100)
    assert f"{weights}:holds100bytesinsteadof" in "".join(diagnosis(capsys, 1, f"model={weights.parent}").split())
    weights.unlink()
    found = "".join(diagnosis(capsys, 1, f"model={weights.parent}").split())  # A long path is broken across lines.
    assert f"{weights}:ismissing;copythemodelagain" in found


def test_folders_that_are_something_else(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    text = diagnosis(capsys, 1, f"model={served.store}", f"store={served.log.path}", f"data={served.model_dir}")
    assert "no readable model" in text and "is not a store, but a log, a model or a run" in text
    assert text.count("(cannot be used)") == 3


def test_a_damaged_generation(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(served.store, tmp_path / "store")
    os.truncate(tmp_path / "store" / "gen-1" / "summary" / "data.mdb", 5000)
    assert "none can be served" in diagnosis(capsys, 1, f"store={tmp_path / 'store'}")


def test_a_log_of_many_segments_keeps_many_files_open(
    event_log: EventLog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        text = diagnosis(capsys, 0, f"data={event_log.path}")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "open files (at most 512): the log has" in text and "vista log compact" in text


def test_missing_extras(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for module in ("faiss", "polars"):
        monkeypatch.setitem(sys.modules, module, None)
    shown = "".join(diagnosis(capsys, 0).split())  # A long path is broken across lines.
    assert all("".join(install_command(extra).split()) in shown for extra in ("faiss", "data"))


def test_a_missing_core_package() -> None:
    done = run_python(BLOCKED, "torch", "doctor")
    text = " ".join(done.stdout.split())
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "torch (cannot be imported): ModuleNotFoundError" in text and "pip install 'torch" in text
    assert "threads (unknown): this check needs torch" in text
    assert "memory" in text and "open files" in text, "the other checks still run"
    assert "error: broken: torch, processor, threads" in done.stderr


def test_a_missing_core_package_is_one_line_of_every_command() -> None:
    done = run_python(BLOCKED, "hydra", "doctor")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: hydra is not installed; install vista again: {install_command()}\n"
