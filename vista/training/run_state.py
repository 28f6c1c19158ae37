"""The state of a run in its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vista.errors import CheckpointError
from vista.model.ranking_model import RankingModel
from vista.training.checkpoint import load_checkpoint, pack_state, save_checkpoint, unpack_state
from vista.training.optimizers import Optimizers
from vista.training.progress import Progress
from vista.training.row_shards import RowShards, send_rows
from vista.training.run_identity import check_identity

if TYPE_CHECKING:
    from vista.model.sharded_table import ShardedTable

TABLE, TABLE_INDEX = "item_table", 0
"""The item table's name among the weights, and its index in the state of the optimizer of tables."""


def save_run(
    run_dir: Path, model: RankingModel, optimizers: Optimizers, progress: Progress, identity: dict[str, Any]
) -> None:
    """Write a checkpoint of a run. With a sharded table, all ranks call this; else only the one that writes.

    Args:
        identity: `run_identity`.
    """
    weights, moments, sums = model.state_dict(), optimizers.table.state_dict(), None
    if (table := model.sharded_table) is not None:
        weights[TABLE] = RowShards(table, model.item_table, model.item_table.dtype)
        of_rows = moments["state"].get(TABLE_INDEX, {}).items()
        moments["state"] = moments["state"] | {TABLE_INDEX: {k: _shards(table, value) for k, value in of_rows}}
        sums = _shards(table, table.adagrad_sums)
    state = {
        "model": weights,
        "optimizer": optimizers.dense.state_dict(),
        "table_optimizer": moments,
        "adagrad_sums": sums,
        "rng": torch.get_rng_state(),
        "cuda_rng": [torch.cuda.get_rng_state(model.device)] if model.device.type == "cuda" else [],
        "progress": {name: getattr(progress, name) for name in Progress.__slots__},
        "config": identity,
    }
    tensors, skeleton = pack_state(state, "state")
    if table is not None and not table.leads:
        send_rows(tensors)
        return
    save_checkpoint(run_dir / "checkpoints", progress.step, tensors, {"run": skeleton})


def restore_run(
    path: Path, run_dir: str, model: RankingModel, optimizers: Optimizers, identity: dict[str, Any]
) -> Progress:
    """Read the checkpoint `path` of a run. Arguments as in `save_run`.

    Raises:
        ConfigError: if it belongs to a run with another identity.
        CheckpointError: if it is damaged, or belongs to another version of the model.
    """
    table = model.sharded_table
    tensors, body = load_checkpoint(path, mapped=None if table is None else _is_sharded)
    state = unpack_state(body["run"], tensors)
    check_identity(identity, state["config"], run_dir)
    if table is not None:
        state["model"][TABLE] = table.own(state["model"][TABLE])
        moments = state["table_optimizer"]["state"].get(TABLE_INDEX, {})
        moments |= {k: table.own(value).clone() for k, value in moments.items() if isinstance(value, Tensor)}
        table.adagrad_sums.copy_(table.own(state["adagrad_sums"]))
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


def _shards(table: ShardedTable, value: Any) -> Any:
    """What has a row per row of the table, divided like it; other values stay."""
    return RowShards(table, value, value.dtype) if isinstance(value, Tensor) and value.dim() else value


def _is_sharded(name: str) -> bool:
    """Whether a tensor of a checkpoint has a row per row of the item table."""
    return name in (f"state.model.{TABLE}", "state.adagrad_sums") or name.startswith(
        f"state.table_optimizer.state.{TABLE_INDEX}."
    )
