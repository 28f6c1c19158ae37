"""The command that installs vista with an extra, for error messages."""

from __future__ import annotations

import importlib
import json
import shlex
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from vista.errors import MissingDependencyError

DISTRIBUTION = "vista-recsys"
_FOLDER = Path(__file__).resolve().parents[1]
_NEEDED_FOR = {
    "data": "source tables and Parquet files need Polars",
    "explore": "vista explore needs Streamlit, Altair, and pandas",
    "faiss": "indexes and codes of items need faiss",
    "kafka": "source=kafka://... needs the Kafka client",
    "mlflow": "tracking=mlflow needs MLflow",
    "onnx": "format=onnx needs onnx, onnxruntime, and onnxscript",
    "optuna": "sampler=tpe needs Optuna",
    "plots": "tracking needs Matplotlib for its plots",
    "ray": "engine=ray needs Ray",
    "redis": "stores on a Valkey or Redis server need redis-py",
    "serve": "vista serve needs FastAPI, uvicorn, and other packages",
    "tensorboard": "tracking=tensorboard needs TensorBoard",
    "wandb": "tracking=wandb needs Weights & Biases",
}
_NEXT_COMMAND = {"torchrec": " && pip install --no-deps torchrec==1.8.0"}


def require_module(module: str, extra: str) -> Any:
    """Import a module that one of vista's extras installs.

    Raises:
        MissingDependencyError: it cannot be imported; the message says what needs it, and how to install it.
    """
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
    try:
        record = json.loads(distribution(DISTRIBUTION).read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        return ""
    url = str(record.get("url", ""))
    if "vcs_info" in record:
        return f"{record['vcs_info']['vcs']}+{url}@{record['vcs_info']['commit_id']}"
    return url
