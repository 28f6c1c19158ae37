"""The only module that imports TensorBoard."""

from __future__ import annotations

from vista.errors import MissingDependencyError
from vista.install_command import install_command

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError as error:
    raise MissingDependencyError(
        f"tracking=tensorboard needs TensorBoard ({error}); install it with: {install_command('tensorboard')}"
    ) from error

__all__ = ["SummaryWriter"]
