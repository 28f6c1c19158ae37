"""Exports a model: writes the graph, compares it with the scorer, and describes it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from vista.config.choices import Architecture, ExportFormat, Precision
from vista.errors import ExportError
from vista.export.export_folder import check_replaceable, write_description
from vista.export.graph_input import graph_inputs
from vista.export.parity import Parity, compare
from vista.export.serving_graph import ServingGraph
from vista.export.trial_store import write_trial_store
from vista.files import checked_path, replaced_folder
from vista.model.model_description import ModelDescription
from vista.model.vista_model import VistaModel
from vista.progress_bar import elapsed_time
from vista.scorer.serving_source import ServingSource


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export wrote."""

    out: str
    kind: ExportFormat
    size_bytes: int
    compared: Parity

    def __str__(self) -> str:
        differences = ", ".join(f"{name} {difference:.1e}" for name, difference in self.compared.max_difference.items())
        return (
            f"{self.out}: {self.kind.value}, {self.size_bytes / 1e6:.1f} MB\n"
            f"largest differences to the scorer in {self.compared.num_requests:,} requests: {differences}"
        )


def export(
    model: str | Path,
    out: str | Path,
    kind: ExportFormat,
    *,
    store: str | None = None,
    num_requests: int = 1000,
    max_difference: float = 1e-4,
    key: bytes | None = None,
) -> ExportReport:
    """Write a folder with stage 2 and its tables; an earlier export there is replaced atomically.

    Args:
        model: folder of a model.
        out: folder of the export.
        kind: what will run it.
        store: of the model's summaries; None compares on random users.
        num_requests: to compare with the scorer.
        max_difference: of a logit, or a score of `next`.
        key: 32 bytes, if the records of the store are authenticated.

    Raises:
        ExportError: the export cannot be written, or differs from the scorer; nothing was written.
        MissingDependencyError: a package that the format needs is not installed.
        CheckpointError, StoreError: the model or the store cannot be read.
    """
    folder, architecture = checked_path(out, ExportError), ModelDescription.read(Path(model)).config.architecture
    if architecture is not Architecture.vista:
        raise ExportError(
            f"model={model}: is a baseline ({architecture.value}), which reads raw histories; export a model with "
            "model.architecture=vista"
        )
    check_replaceable(folder)
    if kind is ExportFormat.onnx:
        from vista.export.onnx_export import write_onnx as write
    else:
        from vista.export.aot_export import write_aotinductor as write
    with tempfile.TemporaryDirectory(prefix="vista-export-") as temporary:
        if store is None:
            store = str(Path(temporary) / "store")
            write_trial_store(VistaModel.from_pretrained(model), Path(store))
            key = None
        snapshot = ServingSource(model, store, "cpu", key, Precision.float32).open()
        try:
            inputs, graph = graph_inputs(snapshot.model), ServingGraph(snapshot.model, snapshot.items)
            with replaced_folder(folder) as partial:
                with elapsed_time("export"):
                    run = write(graph, inputs, partial)
                compared, example = compare(run, snapshot, num_requests, max_difference)
                write_description(partial, snapshot.model, inputs, graph.outputs, kind, compared, example)
        except OSError as error:
            raise ExportError(
                f"{folder}: the export could not be written ({error}); free space or correct the permissions, then try "
                "again"
            ) from error
        finally:
            snapshot.store.close()
    size = sum(path.stat().st_size for path in folder.iterdir())
    return ExportReport(str(folder), kind, size, compared)
