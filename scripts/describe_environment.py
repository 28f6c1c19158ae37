"""Print the torch build and the C++ compiler; with --require-gpu, fail without a GPU.

python scripts/describe_environment.py
"""

from __future__ import annotations

import argparse
import os
import platform
import runpy
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

COMPILERS = ("c++", "g++", "clang++")


def torch_text() -> str:
    """The torch build, read from its version file, since importing torch takes a second."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return "torch is not installed"
    version = runpy.run_path(str(Path(spec.origin).parent / "version.py"))
    if version.get("cuda"):
        build = f"build for CUDA {version['cuda']}"
    elif version.get("hip"):
        build = f"build for ROCm {version['hip']}"
    else:
        build = "CPU build: no GPU will be used"
    return f"torch {version['__version__']}, {build}"


def compiler_text() -> str:
    """The C++ compiler, which only torch.compile would need."""
    for name in (os.environ.get("CXX", ""), *COMPILERS):
        path = shutil.which(name) if name else None
        if path:
            return f"C++ compiler: {path}"
    return f"no C++ compiler ({', '.join(COMPILERS)}), which vista does not need"


def gpu_text() -> str | None:
    """The GPU that torch would use, or None."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def main(argv: list[str] | None = None) -> int:
    """Print the description; return 1 if a required GPU is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--require-gpu", action="store_true")
    if parser.parse_args(argv).require_gpu:
        gpu = gpu_text()
        print(f"GPU: {gpu}" if gpu else "error: torch finds no GPU on this machine; nothing was run")
        return 0 if gpu else 1
    print(f"Python {platform.python_version()}; {torch_text()}; {compiler_text()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
