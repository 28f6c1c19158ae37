"""Run by RecTools' interpreter: random weights and inputs of its SASRec or HSTU, and its states, as an npz.

    python rectools_states.py {SASRec,HSTU} OUT.npz

Inputs `x` are item rows int64 [3, 20], padded with 0 in front; states are `out` float64 [3, 20, 16].
"""

import sys

import numpy as np
import pandas as pd
import torch
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import HSTUModel, SASRecModel

LENGTH, NUM_ITEMS, DIM, HEADS = 20, 50, 16, 2

name, out = sys.argv[1:]
torch.manual_seed(0)
rng = np.random.default_rng(0)
frame = pd.DataFrame(
    {Columns.User: np.arange(NUM_ITEMS) // 10, Columns.Item: np.arange(NUM_ITEMS), Columns.Weight: 1.0}
)
frame[Columns.Datetime] = pd.Timestamp("2020-01-01")
kind, own = {
    "SASRec": (SASRecModel, {"use_key_padding_mask": True, "pos_encoding_kwargs": {"use_scale_factor": True}}),
    "HSTU": (HSTUModel, {"relative_time_attention": False}),
}[name]
model = kind(n_blocks=2, n_heads=HEADS, n_factors=DIM, session_max_len=LENGTH, **own)
model._build_model_from_dataset(Dataset.construct(frame))
net = model.torch_model.double().eval()
with torch.no_grad():
    for key, parameter in net.named_parameters():
        if "norm" in key and key.endswith("bias"):
            continue  # our layers have no biases, so these are 0 here
        # Float32 numbers, because RecTools' HSTU adds its biases in float32 regardless of the weights.
        parameter.copy_((torch.randn_like(parameter) * 0.2 + ("norm" in key)).float())
    x = np.zeros((3, LENGTH), np.int64)
    for row, length in enumerate((LENGTH, 7, 1)):
        x[row, -length:] = rng.integers(1, NUM_ITEMS + 1, length)
    states = net.encode_sessions({"x": torch.from_numpy(x)}, net.item_model.get_all_embeddings())
np.savez(out, x=x, out=states.numpy(), **{key: value.numpy() for key, value in net.state_dict().items()})
