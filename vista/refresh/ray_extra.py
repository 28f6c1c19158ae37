"""The only module that imports Ray, for refreshes with `engine=ray`."""

from __future__ import annotations

import os

from vista.errors import MissingDependencyError

# Ray reads these when it is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")  # or it prints the messages of its services to stdout
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # without it, Ray warns that its default will change

try:
    import ray
except ImportError as error:
    raise MissingDependencyError(
        f"engine=ray needs Ray ({error}); install it with: pip install 'vista-recsys[ray]'"
    ) from error

__all__ = ["ray"]
