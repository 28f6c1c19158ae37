"""A model with a plain item table, made from one whose table is sharded: for validation and export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from vista.config.choices import TableKind, TablePrecision
from vista.errors import CheckpointError
from vista.model.ranking_model import RankingModel
from vista.model.tables import tables_from_file
from vista.ranks import Ranks
from vista.training.row_shards import RowShards, send_rows, write_tensors
from vista.training.run_state import TABLE

PLAIN_WEIGHTS = ".weights.0.tmp"
"""Name of the file in a run folder; `remove_leftovers` removes it."""


def plain_model(model: RankingModel, run_dir: Path, ranks: Ranks | None) -> RankingModel:
    """The model, or a copy for inference if its table is sharded. All ranks call this.

    All ranks map the weights of the copy from one file, which rank 0 writes in pieces. So no rank needs memory for the
    whole table.

    Returns:
        The model or the copy, whose file `run_dir / PLAIN_WEIGHTS` may be moved or removed.

    Raises:
        CheckpointError: if the file cannot be written or read.
    """
    if model.sharded_table is None or ranks is None:
        return model
    path = run_dir / PLAIN_WEIGHTS
    weights = model.state_dict() | {TABLE: RowShards(model.sharded_table, model.item_table, torch.float32)}
    config = replace(model.config, table=TableKind.plain, table_precision=TablePrecision.float32)
    with torch.random.fork_rng(devices=[]), tables_from_file():
        plain = type(model)(config, model.schema, model.items, model.data)
    try:
        if ranks.leads:
            path.unlink(missing_ok=True)  # another copy may still map it
            write_tensors(path, weights)
        else:
            send_rows(weights)
        ranks.wait()
        plain.take_weights(load_file(path))
    except OSError as error:
        raise CheckpointError(
            f"{path}: the weights could not be written or read ({error}); free space, and give all ranks the same "
            "run_dir"
        ) from error
    plain.take_catalog(model)
    return plain.to(model.device).eval()
