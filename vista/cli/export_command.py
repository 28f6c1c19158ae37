"""The command `vista export`."""

from __future__ import annotations

from vista.config import ExportConfig
from vista.device import cpu_settings
from vista.export.export import ExportReport, export
from vista.store.format.authentication import read_key


def run_export(config: ExportConfig) -> ExportReport:
    """`vista export`: an ONNX or AOTInductor export of stage 2, which was compared with the scorer.

    Raises:
        ExportError: the export cannot be written, or differs from the scorer; nothing was written.
        MissingDependencyError: a package that the format needs is not installed.
        CheckpointError, StoreError: the model or the store cannot be read.
    """
    with cpu_settings(config.num_threads):
        return export(
            config.model,
            config.out,
            config.format,
            store=config.store,
            num_requests=config.num_requests,
            max_difference=config.max_difference,
            key=read_key(config.authentication_key_file),
        )
