"""The command `vista prepare`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vista.config import PrepareConfig
from vista.log.ingest.source_parser import SourceParser

if TYPE_CHECKING:
    from vista.log.ingest.prepare_report import PrepareReport


def run_prepare(config: PrepareConfig) -> PrepareReport:
    """`vista prepare`; errors as of `prepare`."""
    with SourceParser() as parser:
        parser.start()
        from vista.log.ingest.prepare import prepare  # imports Polars, while the parser does the same

        return prepare(config, parser=parser)
