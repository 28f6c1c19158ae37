"""The only module that imports Ray, for refreshes with `engine=ray`."""

from __future__ import annotations

from vista.errors import MissingDependencyError

try:
    import ray
except ImportError as error:
    raise MissingDependencyError(
        f"engine=ray needs Ray ({error}); install it with: pip install 'vista-recsys[ray]'"
    ) from error

__all__ = ["ray"]
