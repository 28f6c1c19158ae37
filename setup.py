"""Compiles vista's C++ library when vista is installed, if there is a C++ compiler; pyproject.toml has all the rest."""

import runpy
import sys
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

_BUILD = runpy.run_path(str(Path(__file__).parent / "kernels" / "vista_kernels" / "cpp_backend" / "build.py"))


class BuildLibrary(build_ext):
    """Runs build.py. Without the library, torch computes the scores."""

    def run(self) -> None:
        package = "vista_kernels.cpp_backend"
        # For an editable install, the folder of the sources; otherwise the one that the wheel is made of.
        folder = Path(self.get_finalized_command("build_py").get_package_dir(package))
        if not self.inplace:
            folder = Path(self.build_lib, *package.split("."))
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self.library = [str(_BUILD["build"](folder / _BUILD["LIBRARY"].name))]
        except _BUILD["BuildError"] as error:
            self.library = []
            print(
                f"vista's C++ library was not built, so scoring on CPUs takes 2 to 7 times as long: {error}",
                file=sys.stderr,
            )

    def get_outputs(self) -> list[str]:
        return self.library

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class AnyPython(bdist_wheel):
    """A wheel for one kind of machine and every version of Python: the library does not use Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class WithLibrary(Distribution):
    """A distribution that is not the same on all kinds of machines."""

    def has_ext_modules(self) -> bool:
        return True


setup(
    distclass=WithLibrary,
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPython},
    ext_modules=[Extension("vista_kernels.cpp_backend.libvista_scoring", [])],
)
