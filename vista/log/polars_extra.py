"""The only module that imports Polars, for ingest and for exports of a store.

Readers of a log never import it, because a process that forks after Polars was used can hang.
"""

from __future__ import annotations

from vista.errors import MissingDependencyError
from vista.install_command import install_command

try:
    import polars as pl
    from polars.io.plugins import register_io_source
except ImportError as error:
    raise MissingDependencyError(
        f"source tables and Parquet files need Polars ({error}); install it with: {install_command('data')}"
    ) from error

__all__ = ["pl", "register_io_source"]
