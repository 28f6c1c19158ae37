"""Compiles the C++ sources of this folder, with g++ or clang++, to the library that `library.py` loads.

`setup.py` runs this when vista is installed; in a checkout, run `python -m vista_kernels.cpp_backend.build`. It imports
nothing of vista, since vista is not installed yet.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
LIBRARY = SOURCES / "libvista_scoring.so"
"""Built in place, and shipped in wheels for one kind of machine."""
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-Wall", "-Wextra", "-Wno-psabi", "-fno-math-errno", "-ffp-contract=fast")
LANES: dict[str, dict[int, tuple[str, ...]]] = {
    "x86_64": {
        4: (),
        8: ("-mavx2", "-mfma"),
        16: ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mprefer-vector-width=512"),
    },
    "aarch64": {4: ()},
}
"""By machine: the widths of vectors that the library has code for, in floats, and how to compile it."""
MACHINES = {"AMD64": "x86_64", "arm64": "aarch64"}
"""Other names of these machines."""


class BuildError(RuntimeError):
    """The library cannot be built here; the message says why."""


def build(out: Path = LIBRARY, extra: Sequence[str] = ()) -> Path:
    """Compile the library; a file at `out` is replaced at once, so that processes which use it keep the old one.

    Args:
        out: file to write.
        extra: flags for the compiler and the linker, such as -fsanitize=address.

    Raises:
        BuildError: there is no compiler, it fails, or the sources do not support this machine.
    """
    machine = MACHINES.get(platform.machine(), platform.machine())
    if sys.platform == "win32" or machine not in LANES:
        raise BuildError(f"no native code for {sys.platform} on {machine}; there is some for {', '.join(LANES)}")
    compiler = next(filter(None, map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++")))), None)
    if compiler is None:
        raise BuildError("no C++ compiler; install g++ or clang++")
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        compiles: list[tuple[str, str, tuple[str, ...]]] = [
            ("library.cpp", "library.o", ()),
            ("records.cpp", "records.o", ()),
            ("answering.cpp", "answering.o", ("-ffp-contract=off",)),
        ]
        compiles += [
            ("lanes.cpp", f"lanes{count}.o", (f"-DVISTA_LANES={count}", *flags))
            for count, flags in LANES[machine].items()
        ]
        if 16 in LANES[machine]:
            own = ("-DVISTA_LANES=16", "-DVISTA_BFLOAT16", "-mavx512bf16", *LANES[machine][16])
            compiles.append(("lanes.cpp", "bfloat16.o", own))
        flags = (*FLAGS, "-fvisibility=hidden", *extra)
        running = [
            subprocess.Popen(
                [compiler, *flags, *own, "-c", str(SOURCES / source), "-o", str(Path(folder, name))],
                stderr=subprocess.PIPE,
                text=True,
            )
            for source, name, own in compiles
        ]
        for process in running:
            _require(process.communicate()[1], process.returncode)
        objects = [str(Path(folder, name)) for _, name, _ in compiles]
        library = Path(folder, out.name)
        linked = subprocess.run(
            [compiler, "-shared", "-pthread", *extra, *objects, "-o", str(library)], stderr=subprocess.PIPE, text=True
        )
        _require(linked.stderr, linked.returncode)
        os.replace(library, out)
    return out


def _require(errors: str, status: int) -> None:
    if status:
        raise BuildError(f"the C++ compiler failed:\n{errors}")


if __name__ == "__main__":
    try:
        print(build())
    except BuildError as error:
        sys.exit(f"error: {error}")
