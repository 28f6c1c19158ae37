"""The one place that imports Polars: for ingest alone. Readers of a log never come here (a fork after Polars hangs)."""

from __future__ import annotations

from vista.errors import MissingDependencyError

try:
    import polars as pl
except ImportError as error:
    raise MissingDependencyError(
        f"reading source tables needs Polars ({error}); install it with: pip install 'vista-recsys[data]'"
    ) from error

__all__ = ["pl"]
