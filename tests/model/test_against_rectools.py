"""With RecTools' weights, SASRec and HSTU compute RecTools' states. Comments name the differences."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.conftest import model_config
from vista.config import DataConfig
from vista.log.vocabulary import Vocabulary
from vista.model.baselines.history_model import tiles
from vista.model.baselines.sequence_models import HSTU, EmbeddedSequences, SASRec
from vista.model.features import Schema
from vista.model.registry import ARCHITECTURES

NUM_ITEMS = 50
HEADS = 2


@pytest.mark.rectools
@pytest.mark.parametrize("name", ["SASRec", "HSTU"])
@torch.inference_mode()
def test_states_are_those_of_rectools(rectools: Path, name: str, tmp_path: Path) -> None:
    script = Path(__file__).with_name("rectools_states.py")
    command = [rectools / "bin" / "python", script, name, tmp_path / "states.npz"]
    settings = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "states.npz", allow_pickle=False) as arrays:
        theirs = {key: torch.from_numpy(value) for key, value in arrays.items()}
    length, dim = theirs["out"].shape[1:]
    config = model_config(name.lower(), dim=dim, num_heads=HEADS, history_limit=length, dropout=0.0)
    items = Vocabulary.from_ids(np.arange(NUM_ITEMS))
    model = ARCHITECTURES[config.architecture](config, Schema(["view"], False, None, []), items, DataConfig())
    model = model.double().eval()
    model.item_table.copy_(theirs["item_model.item_net_blocks.0.ids_emb.weight"])
    copied = copy_sasrec(model, theirs) if isinstance(model, SASRec) else copy_hstu(model, theirs)  # type: ignore[arg-type]
    # What RecTools lacks: a state before the first event.
    ours = {"item_table", "position", "start"}
    assert copied | ours == dict(model.named_parameters()).keys()
    for x, expected in zip(theirs["x"], theirs["out"], strict=True):
        item = x[x > 0]
        # RecTools' positions count from the newest event.
        model.position[: len(item)] = theirs["pos_encoding_layer.pos_emb.weight"][: len(item)].flip(0)
        events = EmbeddedSequences(model.item_table[item], torch.arange(len(item)), np.array([0, len(item)]))
        (tile,) = tiles(events.offsets, torch.device("cpu"))
        states, _ = model._encode(events, tile)
        torch.testing.assert_close(states[0, 1:], expected[-len(item) :], rtol=1e-12, atol=1e-12)


def copy_sasrec(model: SASRec, theirs: dict[str, Tensor]) -> set[str]:
    """Returns the names of the parameters that were set."""
    dim = model.config.dim
    for index, block in enumerate(model.blocks):
        prefix = f"transformer_layers.transformer_blocks.{index}."
        for name in ("weight", "bias"):
            joint = theirs[f"{prefix}multi_head_attn.in_proj_{name}"]
            getattr(block.query, name).copy_(joint[:dim])
            getattr(block.key_value, name).copy_(joint[dim:])
        linear(block.out, theirs, f"{prefix}multi_head_attn.out_proj")
        linear(block.up, theirs, f"{prefix}feed_forward.ff_linear_1")
        linear(block.down, theirs, f"{prefix}feed_forward.ff_linear_2")
        norm(block.attention_norm, theirs, f"{prefix}q_layer_norm", 1e-5)
        norm(block.network_norm, theirs, f"{prefix}ff_layer_norm", 1e-5)
    norm(model.final_norm, theirs, "transformer_layers.last_layernorm", 1e-8)
    return {name for name, _ in model.named_parameters() if name.startswith(("blocks.", "final_norm."))}


def copy_hstu(model: HSTU, theirs: dict[str, Tensor]) -> set[str]:
    limit = model.config.history_limit
    for index, layer in enumerate(model.layers):
        prefix = f"transformer_layers.stu_blocks.{index}."
        layer.projection.weight.copy_(theirs[f"{prefix}uvqk_proj"].t())
        # RecTools has one bias for all heads, by key position minus query position from 1 - N on.
        layer.position_bias[:, :limit] = theirs[f"{prefix}rel_attn.pos_weights"][:limit].flip(0)
        linear(layer.out, theirs, f"{prefix}output_mlp")
        norm(layer.norm, theirs, f"{prefix}norm_input", 1e-6)
        norm(layer.head_norm, theirs, f"{prefix}norm_attn_output", 1e-6)
    return {name for name, _ in model.named_parameters() if name.startswith("layers.")}


def linear(mine: nn.Linear, theirs: dict[str, Tensor], name: str) -> None:
    mine.weight.copy_(theirs[f"{name}.weight"])
    mine.bias.copy_(theirs[f"{name}.bias"])


def norm(mine: nn.LayerNorm, theirs: dict[str, Tensor], name: str, eps: float) -> None:
    """RecTools' has a bias, which is 0 here, and another eps."""
    assert not theirs[f"{name}.bias"].any()
    mine.weight.copy_(theirs[f"{name}.weight"])
    mine.eps = eps
