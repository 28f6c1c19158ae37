"""The error about a batch whose loss or gradient is not finite."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.torch import save

from vista.errors import NonFiniteLossError
from vista.examples.batch import Batch
from vista.files import replace_file
from vista.log.event_log import EventLog

NAMED_USERS = 20
"""Most users of a refused batch that the error names."""


def non_finite(
    batch: Batch, what: str, parts: dict[str, float], *, step: int, run_dir: Path, log: EventLog
) -> NonFiniteLossError:
    """The error, which names the batch's users; the batch is saved in the run folder.

    Args:
        what: "loss" or "gradient".
        parts: the losses.
    """
    path = run_dir / f"nonfinite-step-{step}.safetensors"
    try:
        replace_file(path, save({name: tensor.cpu().contiguous() for name, tensor in batch.tensors().items()}))
        saved = f"the batch is saved in {path}"
    except OSError as error:
        saved = f"the batch cannot be saved in {path} ({error.strerror})"
    users = np.unique(batch.user.cpu().numpy())
    named = log.users.ids(users[:NAMED_USERS]).tolist()
    losses = ", ".join(f"{name} {value:.4g}" for name, value in parts.items())
    return NonFiniteLossError(
        f"step {step}: the {what} is not finite ({losses}); {saved}, its {len(users)} users are "
        f"{named}{' …' if len(users) > NAMED_USERS else ''}. Lower optim.learning_rate, or look at the features of "
        f"these users; the last checkpoint is in {run_dir / 'checkpoints'}"
    )
