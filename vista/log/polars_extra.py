"""The one place that imports Polars: for ingest and for a store's exports alone.

Readers of a log never come here (a fork after Polars hangs).
"""

from __future__ import annotations

from vista.errors import MissingDependencyError

try:
    import polars as pl
    from polars.io.plugins import register_io_source
except ImportError as error:
    raise MissingDependencyError(
        f"source tables and Parquet files need Polars ({error}); install it with: pip install 'vista-recsys[data]'"
    ) from error

__all__ = ["pl", "register_io_source"]
