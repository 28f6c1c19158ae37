"""Packaging: package lists, a wheel and an editable install that run from anywhere, fast imports, install commands."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import vista
from tests.conftest import run_python
from tests.required_program import require_compiler
from vista.cli.command_table import COMMANDS
from vista.config import TrainConfig
from vista.config.composition import compose_config, to_yaml
from vista.installation import install_command, source_commit
from vista_kernels.cpp_backend.build import LIBRARY

REPOSITORY = Path(__file__).parents[1]
SOURCES = ("vista", "kernels", "conf", "pyproject.toml", "setup.py", "README.md", "LICENSE", "Makefile")


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that a build leaves nothing in the checkout."""
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so"))
        else:
            shutil.copy(source, copy / name)
    return copy


def pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", *words, "--no-deps", "--no-build-isolation", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(source_tree: Path) -> Path:
    """The wheel that `make wheel` builds."""
    require_compiler()
    command = ["make", "--assume-old=setup", "wheel", f"VENV={sys.prefix}"]
    done = subprocess.run(command, cwd=source_tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (source_tree / "dist").glob("*.whl")
    return path


def run_installed(site: Path, cwd: Path, code: str) -> str:
    """Run code with the packages installed in `site`, using its .pth files but not those of this environment."""
    others = sysconfig.get_path("purelib")
    prelude = f"import site, sys; site.addsitedir({str(site)!r}); sys.path.append({others!r})\n"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-c", prelude + code], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


RUN_CFG = "import vista, vista_kernels; from vista.cli.main import main; main(['train', '--cfg', 'experiment=ml-1m'])\n"
LOAD_LIBRARY = "from vista_kernels.cpp_backend.library import load; load()"
PRINT_ORIGIN = "print('#', vista.__file__, vista_kernels.__file__)"


def test_every_folder_is_listed(pyproject: dict[str, Any]) -> None:
    modules = {path.parent for top in ("vista", "kernels/vista_kernels") for path in (REPOSITORY / top).rglob("*.py")}
    expected = {str(folder.relative_to(REPOSITORY)).removeprefix("kernels/").replace("/", ".") for folder in modules}
    conf = {path.parent.relative_to(REPOSITORY) for path in (REPOSITORY / "conf").rglob("*.yaml")}
    expected |= {f"vista.{folder}".replace("/", ".") for folder in map(str, conf)}
    setuptools = pyproject["tool"]["setuptools"]
    assert set(setuptools["packages"]) == expected
    assert {name for name in expected if f"{name}.".startswith("vista.conf.")} <= set(setuptools["package-data"])


def test_light_imports() -> None:
    """Settings load neither NumPy nor torch; logs, stores, and scorers no torch."""
    code = "import sys\n"
    for modules in ("vista.config.train_config", "vista.log.event_log, vista.store, vista.scorer"):
        code += f"import {modules}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))\n"
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    settings, scorer = (set(line.split()) for line in done.stdout.splitlines())
    assert not scorer & {"torch", "hydra", "omegaconf", "polars", "triton", "pandas", "matplotlib"}
    assert not settings & {"torch", "numpy"}


def test_public_names(pyproject: dict[str, Any]) -> None:
    assert vista.TrainConfig is TrainConfig
    assert set(vista.__all__) <= set(dir(vista))
    for name, module in vista._MODULE_OF_NAME.items():
        assert getattr(vista, name).__module__.startswith("vista."), module
    with pytest.raises(AttributeError, match="no attribute 'Scorrer'; public names: EventLog"):
        _ = vista.Scorrer


@pytest.mark.research
def test_wheel_contains_conf_kernels_and_typing_marks(wheel: Path) -> None:
    files = set(zipfile.ZipFile(wheel).namelist())
    conf = {f"vista/{path.relative_to(REPOSITORY)}" for path in (REPOSITORY / "conf").rglob("*.yaml")}
    assert len(conf) > 10 and conf <= files
    for top in ("vista", "kernels/vista_kernels"):
        sources = {
            str(path.relative_to(REPOSITORY)).removeprefix("kernels/") for path in (REPOSITORY / top).rglob("*.py")
        }
        assert sources <= files
    assert {"vista/py.typed", "vista_kernels/py.typed"} <= files
    native = "vista_kernels/cpp_backend"
    own = {path.name for path in LIBRARY.parent.iterdir() if path.suffix in (".cpp", ".h")} | {LIBRARY.name}
    assert {f"{native}/{name}" for name in own} <= files
    assert wheel.stem.endswith("-py3-none-linux_" + platform.machine())  # any Python, since the library uses none
    tops = {name.partition("/")[0] for name in files}
    assert tops == {"vista", "vista_kernels", f"vista_recsys-{vista.__version__}.dist-info"}


@pytest.mark.research
def test_wheel_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = f"vista_recsys-{vista.__version__}.dist-info"
        metadata = archive.read(f"{info}/METADATA").decode()
        assert "vista = vista.cli.main:main" in archive.read(f"{info}/entry_points.txt").decode()
        assert "Apache License" in archive.read(f"{info}/licenses/LICENSE").decode()
    assert "Name: vista-recsys\n" in metadata and "License-Expression: Apache-2.0\n" in metadata
    assert "Requires-Dist: torch" in metadata and 'polars>=2; extra == "data"' in metadata


@pytest.mark.research
def test_installed_wheel_runs_from_another_directory(wheel: Path, tmp_path: Path) -> None:
    site, cwd = tmp_path / "site", tmp_path / "elsewhere"
    cwd.mkdir()
    pip("install", str(wheel), "--target", str(site))
    printed = run_installed(site, cwd, RUN_CFG + PRINT_ORIGIN)
    run_installed(site, cwd, LOAD_LIBRARY)
    text, _, origin = printed.partition("# ")
    assert text == to_yaml(compose_config(TrainConfig, ["experiment=ml-1m"]))
    assert origin.split() == [str(site / package / "__init__.py") for package in ("vista", "vista_kernels")]
    assert list(cwd.iterdir()) == []


@pytest.mark.nightly
def test_an_installed_wheel_prepares_a_log(wheel: Path, tmp_path: Path) -> None:
    """Without a network: the program tells its version, and reads ten rows and a configuration that is in the wheel."""
    site = tmp_path / "site"
    pip("install", "--no-index", str(wheel), "--target", str(site))
    done = subprocess.run(
        [sys.executable, str(site / "bin" / "vista"), "--version"],
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"vista {vista.__version__}\n", done.stderr
    rows = "".join(f"{row % 3},{row},{1_700_000_000 + row}\n" for row in range(10))
    (tmp_path / "clicks.csv").write_text("user,item,time\n" + rows)
    code = (
        "import vista, vista_kernels; from vista.cli.main import main\n"
        "assert main(['prepare', 'clicks.csv']) == 0 and main(['plan', '--cfg']) == 0\n"
    )
    printed = run_installed(site, tmp_path, code + PRINT_ORIGIN)
    assert "data/log: segment 1 with 10 events" in printed and f"# {site}" in printed


@pytest.mark.nightly
def test_the_source_distribution_is_next_to_the_wheel(wheel: Path) -> None:
    (archive,) = wheel.parent.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "conf/train.yaml", "kernels/vista_kernels/__init__.py"} <= names


@pytest.mark.research
def test_a_wheel_without_a_compiler_lacks_only_the_library(
    source_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    shutil.copytree(source_tree, tmp_path / "source", ignore=shutil.ignore_patterns("build", "*.so"))
    pip("wheel", str(tmp_path / "source"), "--wheel-dir", str(tmp_path / "wheels"))
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    files = zipfile.ZipFile(wheel).namelist()
    assert "vista_kernels/cpp_backend/library.py" in files
    assert not [name for name in files if name.endswith(".so")]


@pytest.mark.research
def test_editable_install_runs_from_another_directory(source_tree: Path, tmp_path: Path) -> None:
    site, cwd = tmp_path / "site", tmp_path / "elsewhere"
    cwd.mkdir()
    pip("install", "--editable", str(source_tree), "--target", str(site))
    text, _, origin = run_installed(site, cwd, RUN_CFG + PRINT_ORIGIN).partition("# ")
    run_installed(site, cwd, LOAD_LIBRARY)
    assert text == to_yaml(compose_config(TrainConfig, ["experiment=ml-1m"]))
    folders = ("vista", "kernels/vista_kernels")
    assert origin.split() == [str(source_tree / folder / "__init__.py") for folder in folders]


def test_the_container_copies_what_exists_and_starts_the_service(pyproject: dict[str, Any]) -> None:
    """What can be checked without a builder: the files, the extra, the command, its words, and the user."""
    lines = (REPOSITORY / "Dockerfile").read_text().replace("\\\n", "").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    assert {name for name, _ in steps} <= {"FROM", "WORKDIR", "COPY", "RUN", "USER", "EXPOSE", "ENTRYPOINT", "CMD"}
    copied = {source for name, words in steps if name == "COPY" for source in words.split()[:-1]}
    packages = {folder.partition("/")[0] for folder in pyproject["tool"]["setuptools"]["package-dir"].values()}
    assert copied == packages | {"pyproject.toml", "setup.py", "README.md", "LICENSE"}
    allowed = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert copied == {line[1:] for line in allowed if line.startswith("!")}
    (extra,) = re.findall(r"'\.\[(\w+)\]'", "".join(words for name, words in steps if name == "RUN"))
    assert extra == "serve" and extra in pyproject["project"]["optional-dependencies"]
    last = dict(steps)
    assert json.loads(last["ENTRYPOINT"]) == ["vista", "serve"] and last["USER"] != "root"
    config = compose_config(COMMANDS["serve"].schema, json.loads(last["CMD"]))
    assert (config.host, str(config.port)) == ("0.0.0.0", last["EXPOSE"])
    assert f"Programming Language :: Python :: {last['FROM'][7:11]}" in pyproject["project"]["classifiers"]


@pytest.mark.nightly
def test_the_container_is_built() -> None:
    if shutil.which("docker") is None or subprocess.run(["docker", "info"], capture_output=True).returncode:
        pytest.skip("needs docker and its daemon")  # the command alone builds nothing
    subprocess.run(["docker", "build", "--tag", "vista-test", str(REPOSITORY)], check=True)
    done = subprocess.run(
        ["docker", "run", "--rm", "--entrypoint", "vista", "vista-test", "version"], capture_output=True, text=True
    )
    assert done.stdout == f"vista {vista.__version__}\n", done.stderr


def test_in_a_checkout() -> None:
    assert install_command("serve") == f"pip install -e '{REPOSITORY}[serve]'"
    assert install_command() == f"pip install -e {REPOSITORY}"
    assert install_command("torchrec").endswith("[torchrec]' && pip install --no-deps torchrec==1.8.0")


@pytest.mark.parametrize(
    ("record", "command"),
    [
        pytest.param(
            {"url": "file:///home/me/vista", "dir_info": {}},
            "pip install 'vista-recsys[serve] @ file:///home/me/vista'",
            id="folder",
        ),
        pytest.param(
            {"url": "https://example.org/vista.git", "vcs_info": {"vcs": "git", "commit_id": "0a1b"}},
            "pip install 'vista-recsys[serve] @ git+https://example.org/vista.git@0a1b'",
            id="repository",
        ),
        pytest.param(None, "pip install 'vista-recsys[serve]'", id="index"),
    ],
)
def test_in_an_installed_package(
    record: dict[str, Any] | None, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = tmp_path / "vista_recsys-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vista-recsys\nVersion: 0.1.0\n")
    if record is not None:
        (metadata / "direct_url.json").write_text(json.dumps(record))
    monkeypatch.setattr("vista.installation._FOLDER", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert install_command("serve") == command


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_commit_distinguishes_sources_from_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "vista" / "source_commit.py"
    module.parent.mkdir(parents=True)
    module.write_text("")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "results.jsonl").write_text("")
    git(tmp_path, "init", "-q")
    monkeypatch.setattr("vista.installation.__file__", str(module))
    outside = source_commit()  # nothing is tracked yet
    assert outside.startswith("v") or outside == "unknown"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    short = git(tmp_path, "rev-parse", "--short", "HEAD")
    assert source_commit() == short
    (tmp_path / "docs" / "results.jsonl").write_text("a result\n")
    assert source_commit() == short
    (tmp_path / "vista" / "new.py").write_text("")
    assert source_commit() == short + "+dirty"
    (tmp_path / "vista" / "new.py").unlink()
    module.write_text("# changed\n")
    assert source_commit() == short + "+dirty"
