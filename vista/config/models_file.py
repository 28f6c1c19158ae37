"""The file of `vista serve models=…`: several models for one service, and how users are split among them."""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vista.config.checks import check_types, require
from vista.config.yaml_size import check_size
from vista.errors import ConfigError, shown
from vista.files import read_limited

MAX_BYTES = 1 << 20
MAX_MODELS = 64
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(kw_only=True, slots=True)
class ServedModel:
    """A model of the file. Its keys replace those of the command line."""

    model: str
    """Folder of the exported model."""
    store: str
    """Folder or URL of its store. Models with the same summarizer can share one."""
    index: str | None = None
    """Folder of the index that `vista index` wrote for this model."""
    task: str | None = None
    """Task that score and rank use. null uses the first labeled task, or next if there are none."""
    project_per_request: bool = True
    """Compute projections of candidates in each request instead of mapping the exported ones, which models cannot share
    if their stage 2 differs. Requests of 500 candidates take 1 to 6 % longer."""


@dataclass(frozen=True, slots=True)
class ModelsFile:
    """The content of the file."""

    path: str
    models: dict[str, ServedModel]
    """By name, in the order of the file. Without a split, the first model answers requests that do not name one."""
    split: dict[str, float]
    """Share of the users per model; they sum to 1. Empty without a split."""
    experiment: str
    """Salt of the split: different experiments assign users independently."""
    memory_bytes: int | None
    """Maximum number of bytes of the large arrays of open models. None sets no limit."""

    @classmethod
    def read(cls, path: str) -> ModelsFile:
        """Read a file.

        Raises:
            ConfigError: it is missing or not YAML, or a key or a value is wrong; the message names the file and key.
        """
        content = _mapping(_content(path), path)
        _require_keys(content, ("models", "split", "experiment", "memory_bytes"), path)
        given = _mapping(content.get("models"), f"{path}: models")
        require(0 < len(given) <= MAX_MODELS, f"{path}: models", f"must name 1 to {MAX_MODELS} models")
        models = {}
        for name, keys in given.items():
            where = f"{path}: models.{shown(name).strip(chr(39))}"
            if not isinstance(name, str) or _NAME.fullmatch(name) is None:
                raise ConfigError(f"{where}: a name has at most 64 letters, digits, dots, underscores, and hyphens")
            keys = _mapping(keys, where)
            _require_keys(keys, [field.name for field in fields(ServedModel)], where)
            missing = [key for key in ("model", "store") if keys.get(key) is None]
            require(not missing, where, f"needs {' and '.join(missing)}")
            models[name] = ServedModel(**keys)
            check_types(models[name], f"{where}.")
        split = _split(content.get("split"), models, f"{path}: split")
        experiment, memory = content.get("experiment"), content.get("memory_bytes")
        require(experiment is None or isinstance(experiment, str), f"{path}: experiment", "must be text")
        require(
            memory is None or (type(memory) is int and memory > 0),
            f"{path}: memory_bytes",
            "must be a positive integer",
        )
        return cls(path, models, split, ",".join(split) if experiment is None else experiment, memory)


def _content(path: str) -> Any:
    try:
        text = read_limited(Path(path), MAX_BYTES).decode("utf-8-sig")
        check_size(text)
        return OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))  # refuses a key that occurs twice
    except OSError as error:
        raise ConfigError(f"models={path}: {error.strerror or error}") from error
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: invalid YAML: {' '.join(str(error).split())}") from error


def _mapping(value: Any, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: must hold keys and values, got {shown(value)}")
    return value


def _require_keys(given: dict[Any, Any], known: list[str] | tuple[str, ...], where: str) -> None:
    unknown = [str(key) for key in given if key not in known]
    require(not unknown, where, f"unknown key {', '.join(unknown)}; the keys are {', '.join(known)}")


def _split(given: Any, models: dict[str, ServedModel], where: str) -> dict[str, float]:
    if given is None:
        return {}
    shares = _mapping(given, where)
    for name, share in shares.items():
        require(name in models, where, f"{shown(name)} is not one of the models, {', '.join(models)}")
        good = isinstance(share, int | float) and not isinstance(share, bool) and 0 <= share <= 1
        require(good, f"{where}.{name}", f"must lie in [0, 1], got {shown(share)}")
    total = math.fsum(shares.values())
    require(abs(total - 1) < 1e-9, where, f"the shares must sum to 1, but sum to {total:g}")
    return {name: float(share) for name, share in shares.items()}
