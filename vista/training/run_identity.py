"""What must not change between a run and its resumption."""

from __future__ import annotations

from typing import Any

import torch

from vista.config import TrainConfig
from vista.config.checks import to_dict
from vista.config.choices import Precision
from vista.config.train_config import without_places
from vista.errors import ConfigError
from vista.installation import __version__
from vista.log.event_log import EventLog, log_digest
from vista.training.downstream import Downstream
from vista.training.warm_start import WarmStart


def run_identity(
    config: TrainConfig, log: EventLog, origin: Downstream | WarmStart | None, precision: Precision
) -> dict[str, Any]:
    """Settings and data that decide the bits of a run, flat: {"model.dim": 64, …}."""
    values = to_dict(config)
    flat: dict[str, Any] = {"seed": values["seed"], "log": log_digest(log)}
    for group, own in without_places(values).items():
        flat |= {f"{group}.{key}": value for key, value in own.items()}
    flat |= origin.identity() if origin is not None else {}
    return flat | {"precision": precision.value}


def facts_of_rank(config: TrainConfig, identity: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What all ranks of a job must have in common, flat: that of a run and its resumption, versions, and the folder.

    Args:
        identity: `run_identity`.
    """
    versions = {"vista": __version__, "torch": torch.__version__}
    own = {"run_dir": config.run_dir, "resume": config.resume, "device": device.type}
    return versions | own | identity


def check_identity(here: dict[str, Any], there: dict[str, Any], run_dir: str) -> None:
    """Refuse to resume another run.

    Args:
        here: `run_identity` of this run; there: that of the run in `run_dir`.

    Raises:
        ConfigError: if they differ.
    """
    changed = [f"{k} ({there.get(k)} -> {here.get(k)})" for k in here | there if here.get(k) != there.get(k)]
    if changed:
        raise ConfigError(
            f"run_dir={run_dir} holds a run with another {', '.join(changed)}; choose another run_dir, or set "
            "resume=false to start a new run in it"
        )
