"""The only module that imports Polars, for ingest and for exports of a store.

Readers of a log never import it, because a process that forks after Polars was used can hang.
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
