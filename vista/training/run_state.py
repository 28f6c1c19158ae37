"""The state of a run in its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vista.errors import CheckpointError
from vista.model.ranking_model import RankingModel
from vista.training.checkpoint import load_checkpoint, pack_state, save_checkpoint, unpack_state
from vista.training.optimizers import Optimizers
from vista.training.progress import Progress
from vista.training.run_identity import check_identity


def save_run(
    run_dir: Path, model: RankingModel, optimizers: Optimizers, progress: Progress, identity: dict[str, Any]
) -> None:
    """Write a checkpoint of a run.

    Args:
        identity: `run_identity`.
    """
    state = {
        "model": model.state_dict(),
        "optimizer": optimizers.dense.state_dict(),
        "table_optimizer": optimizers.table.state_dict(),
        "rng": torch.get_rng_state(),
        "cuda_rng": [torch.cuda.get_rng_state(model.device)] if model.device.type == "cuda" else [],
        "progress": {name: getattr(progress, name) for name in Progress.__slots__},
        "config": identity,
    }
    tensors, skeleton = pack_state(state, "state")
    save_checkpoint(run_dir / "checkpoints", progress.step, tensors, {"run": skeleton})


def restore_run(
    path: Path, run_dir: str, model: RankingModel, optimizers: Optimizers, identity: dict[str, Any]
) -> Progress:
    """Read the checkpoint `path` of a run. Arguments as in `save_run`.

    Raises:
        ConfigError: if it belongs to a run with another identity.
        CheckpointError: if it is damaged, or belongs to another version of the model.
    """
    tensors, body = load_checkpoint(path)
    state = unpack_state(body["run"], tensors)
    check_identity(identity, state["config"], run_dir)
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise CheckpointError(
            f"{path}: belongs to another version of the model ({error}); remove {run_dir}, or set resume=false"
        ) from error
    optimizers.dense.load_state_dict(state["optimizer"])
    optimizers.table.load_state_dict(state["table_optimizer"])
    torch.set_rng_state(state["rng"])
    if state["cuda_rng"] and model.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda_rng"][0], model.device)
    return Progress(**state["progress"])
