"""Packaging: complete package lists, a wheel and an editable install that run from anywhere, fast imports."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import vista
from vista.config import TrainConfig
from vista.config.composition import compose_config
from vista.config.config_keys import to_yaml

REPOSITORY = Path(__file__).parents[1]
SOURCES = ("vista", "kernels", "conf", "pyproject.toml", "README.md", "LICENSE")


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
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(source, copy / name)
    return copy


def pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", *words, "--no-deps", "--no-build-isolation", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(source_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", str(source_tree), "--wheel-dir", str(folder))
    (path,) = folder.glob("*.whl")
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
PRINT_ORIGIN = "print('#', vista.__file__, vista_kernels.__file__)"


def test_every_folder_is_listed(pyproject: dict[str, Any]) -> None:
    modules = {path.parent for top in ("vista", "kernels/vista_kernels") for path in (REPOSITORY / top).rglob("*.py")}
    expected = {str(folder.relative_to(REPOSITORY)).removeprefix("kernels/").replace("/", ".") for folder in modules}
    conf = {path.parent.relative_to(REPOSITORY) for path in (REPOSITORY / "conf").rglob("*.yaml")}
    expected |= {f"vista.{folder}".replace("/", ".") for folder in map(str, conf)}
    setuptools = pyproject["tool"]["setuptools"]
    assert set(setuptools["packages"]) == expected
    assert {name for name in expected if f"{name}.".startswith("vista.conf.")} <= set(setuptools["package-data"])


@pytest.mark.parametrize(
    "module", ["vista", "vista.config.train_config", "vista.store.reader", "vista.log.event_log", "vista.scorer"]
)
def test_light_import(module: str) -> None:
    if find_spec(module) is None:
        pytest.skip(f"{module} is not part of this build")
    code = f"import json, sys, {module}; print(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    path = os.pathsep.join(str(REPOSITORY / folder) for folder in (".", "kernels"))
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout))
    assert not loaded & {"hydra", "omegaconf", "polars", "triton", "pandas", "matplotlib"}
    if module in ("vista", "vista.config.train_config"):
        assert not loaded & {"torch", "numpy"}


def test_public_names(pyproject: dict[str, Any]) -> None:
    assert vista.TrainConfig is TrainConfig
    assert set(vista.__all__) <= set(dir(vista))
    for name, module in vista._MODULE_OF_NAME.items():
        if find_spec(module) is not None:
            assert getattr(vista, name).__module__.startswith("vista.")
    with pytest.raises(AttributeError, match="no attribute 'Scorrer'; public names: EventLog"):
        _ = vista.Scorrer


@pytest.mark.research
class TestInstalled:
    def test_wheel_contains_conf_kernels_and_typing_marks(self, wheel: Path) -> None:
        files = set(zipfile.ZipFile(wheel).namelist())
        conf = {f"vista/{path.relative_to(REPOSITORY)}" for path in (REPOSITORY / "conf").rglob("*.yaml")}
        assert len(conf) > 10 and conf <= files
        for top in ("vista", "kernels/vista_kernels"):
            sources = {
                str(path.relative_to(REPOSITORY)).removeprefix("kernels/") for path in (REPOSITORY / top).rglob("*.py")
            }
            assert sources <= files
        assert {"vista/py.typed", "vista_kernels/py.typed"} <= files
        tops = {name.partition("/")[0] for name in files}
        assert tops == {"vista", "vista_kernels", f"vista_recsys-{vista.__version__}.dist-info"}

    def test_wheel_metadata(self, wheel: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            info = f"vista_recsys-{vista.__version__}.dist-info"
            metadata = archive.read(f"{info}/METADATA").decode()
            assert "vista = vista.cli.main:main" in archive.read(f"{info}/entry_points.txt").decode()
            assert "Apache License" in archive.read(f"{info}/licenses/LICENSE").decode()
        assert "Name: vista-recsys\n" in metadata and "License-Expression: Apache-2.0\n" in metadata
        assert "Requires-Dist: torch" in metadata and 'polars>=2; extra == "data"' in metadata

    def test_installed_wheel_runs_from_another_directory(self, wheel: Path, tmp_path: Path) -> None:
        site, cwd = tmp_path / "site", tmp_path / "elsewhere"
        cwd.mkdir()
        pip("install", str(wheel), "--target", str(site))
        printed = run_installed(site, cwd, RUN_CFG + PRINT_ORIGIN)
        text, _, origin = printed.partition("# ")
        assert text == to_yaml(compose_config(TrainConfig, ["experiment=ml-1m"]))
        assert origin.split() == [str(site / package / "__init__.py") for package in ("vista", "vista_kernels")]
        assert list(cwd.iterdir()) == []

    def test_editable_install_runs_from_another_directory(self, source_tree: Path, tmp_path: Path) -> None:
        site, cwd = tmp_path / "site", tmp_path / "elsewhere"
        cwd.mkdir()
        pip("install", "--editable", str(source_tree), "--target", str(site))
        text, _, origin = run_installed(site, cwd, RUN_CFG + PRINT_ORIGIN).partition("# ")
        assert text == to_yaml(compose_config(TrainConfig, ["experiment=ml-1m"]))
        folders = ("vista", "kernels/vista_kernels")
        assert origin.split() == [str(source_tree / folder / "__init__.py") for folder in folders]
