"""The only module that imports Weights & Biases."""

from __future__ import annotations

from vista.errors import MissingDependencyError
from vista.install_command import install_command

try:
    import wandb
except ImportError as error:
    raise MissingDependencyError(
        f"tracking=wandb needs Weights & Biases ({error}); install it with: {install_command('wandb')}"
    ) from error

__all__ = ["wandb"]
