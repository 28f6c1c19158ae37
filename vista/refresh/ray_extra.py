"""The only module that imports Ray, for refreshes with `engine=ray`."""

from __future__ import annotations

from vista.errors import MissingDependencyError
from vista.install_command import install_command

try:
    import ray
except ImportError as error:
    raise MissingDependencyError(
        f"engine=ray needs Ray ({error}); install it with: {install_command('ray')}"
    ) from error

__all__ = ["ray"]
