"""Exports a model: writes the graph, compares it with the scorer, and describes it (docs/guides/export.md)."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vista.config.checks import Architecture, ExportFormat, Precision
from vista.errors import ExportError
from vista.export import example_program
from vista.export.formats import write_aotinductor, write_onnx
from vista.export.serving_graph import (
    CANDIDATES,
    REQUEST,
    TAIL,
    USER,
    USERS,
    Arrays,
    ExportRunner,
    GraphInput,
    ServingGraph,
    graph_inputs,
)
from vista.export.trial_requests import TrialRequests, trial_requests, write_trial_store
from vista.files import checked_path, replaced_folder
from vista.log.vocabulary import Vocabulary
from vista.model.features import HashedVocabulary
from vista.model.ranking_model import NEXT_TASK
from vista.model.saved_model import ModelDescription
from vista.model.vista_model import VistaModel
from vista.progress_bar import elapsed_time, progress_bar
from vista.scorer.serving_snapshot import ServingSnapshot
from vista.scorer.serving_source import ServingSource

LOGITS = "logits"
FORMAT_NAME, FORMAT_VERSION = "vista-export", 1
MANIFEST_FILE, ITEMS_FILE, EXAMPLE_FILE, PROGRAM_FILE = "export.json", "items.json", "example.npz", "example.py"
_BLOCK = 1 << 16


@dataclass(frozen=True, slots=True)
class Parity:
    """How an export differs from the scorer."""

    num_requests: int
    """Requests that were compared."""
    max_difference: dict[str, float]
    """Largest absolute difference, by output."""


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
    adapter: str | None = None,
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
        adapter: file of `vista adapt`, which becomes part of the graph.

    Raises:
        ExportError: the export cannot be written, or differs from the scorer; nothing was written.
        AdapterError: the adapter is missing, damaged, or of another model.
        MissingDependencyError: a package that the format needs is not installed.
        CheckpointError, StoreError: the model or the store cannot be read.
    """
    folder, architecture = checked_path(out, ExportError), ModelDescription.read(Path(model)).config.architecture
    if architecture is not Architecture.vista:
        raise ExportError(
            f"model={model}: is a baseline ({architecture.value}), which reads raw histories; export a model with "
            "model.kind=vista"
        )
    check_replaceable(folder)
    write = write_onnx if kind is ExportFormat.onnx else write_aotinductor
    with tempfile.TemporaryDirectory(prefix="vista-export-") as temporary:
        if store is None:
            store = str(Path(temporary) / "store")
            write_trial_store(VistaModel.from_pretrained(model), Path(store))
            key = None
        snapshot = ServingSource(model, store, "cpu", key, Precision.float32, adapter=adapter).open()
        try:
            adapted = snapshot.model.with_adapter(snapshot.adapter(None))
            inputs, graph = graph_inputs(adapted), ServingGraph(adapted, snapshot.items)
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


def compare(
    run: ExportRunner, snapshot: ServingSnapshot, num_requests: int, max_difference: float
) -> tuple[Parity, Arrays]:
    """Differences between the export and the scorer, and the inputs and outputs of one batch as an example.

    Args:
        run: the export.
        snapshot: of the same model.
        num_requests: random requests.
        max_difference: of an output.

    Raises:
        ExportError: a difference is larger.
    """
    trials = progress_bar(trial_requests(snapshot, num_requests), desc="compare", unit="batch")
    worst: dict[str, float] = {}
    example: Arrays = {}
    for trial in trials:
        outputs, expected = run(trial.arrays), scorer_outputs(snapshot, trial)
        for name, values in expected.items():
            difference = float(np.abs(outputs[name] - values).max())
            worst[name] = max(worst.get(name, 0.0), difference)
            if not difference <= max_difference:  # also for NaN
                raise ExportError(
                    f"{name} of the export differ by up to {difference:.3g} from the scorer's, but at most "
                    f"{max_difference:.3g} is allowed (max_difference); nothing was written"
                )
        if not example or 3 <= len(trial.rows) < 10:
            example = trial.arrays | outputs
    return Parity(num_requests, worst), example


def scorer_outputs(snapshot: ServingSnapshot, trial: TrialRequests) -> Arrays:
    """What the scorer gives: logits float32 [B, C, tasks], and scores of `next` float32 [B, C]."""
    outputs: Arrays = {}
    if snapshot.model.schema.tasks:
        outputs[LOGITS] = snapshot.logits(trial.request, trial.rows)
    if NEXT_TASK in snapshot.tasks:
        outputs[NEXT_TASK] = snapshot.scores(trial.request, trial.rows, [NEXT_TASK])[NEXT_TASK]
    return outputs


def check_replaceable(folder: Path) -> None:
    """Raise ExportError if a folder holds something other than an export, which would be lost."""
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"out={folder}: is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST_FILE).is_file():
        raise ExportError(
            f"out={folder}: holds something other than an export, and would be replaced; name another folder, or "
            "remove this one"
        )


def write_description(
    folder: Path,
    model: VistaModel,
    inputs: list[GraphInput],
    outputs: list[str],
    kind: ExportFormat,
    compared: Parity,
    example: Arrays,
) -> None:
    """Write everything but the graph, which is already in the folder.

    Args:
        compared: with the scorer.
        example: inputs and outputs of one batch.

    Raises:
        OSError: a file cannot be written.
    """
    _write_ids(folder / ITEMS_FILE, model.items)
    numbered = [(f"input_{place}", one.name) for place, one in enumerate(inputs)]
    numbered += [(f"output_{place}", name) for place, name in enumerate(outputs)]
    np.savez(folder / EXAMPLE_FILE, **{key: example[name] for key, name in numbered})  # type: ignore[arg-type]
    described = [asdict(one) | _values(folder, model, place, one) for place, one in enumerate(inputs)]
    shapes = {"next": [USERS, CANDIDATES]}
    labeled = [USERS, CANDIDATES, len(model.schema.tasks)]
    shutil.copyfile(Path(example_program.__path__[0], f"{kind.value}.py"), folder / PROGRAM_FILE)
    manifest: dict[str, Any] = {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "kind": kind.value,
        "summarizer_id": model.summarizer_id().hex(),
        "tasks": model.schema.tasks,
        "actions": model.schema.actions,
        "num_items": len(model.items),
        "tail_len": model.config.tail_len,
        "inputs": described,
        "outputs": [{"name": name, "dtype": "float32", "shape": shapes.get(name, labeled)} for name in outputs],
        "compared": asdict(compared),
        "files": {path.name: _digest(path) for path in sorted(folder.iterdir())},
    }
    text = json.dumps(manifest, indent=1)
    (folder / MANIFEST_FILE).write_text(f"{text}\n", encoding="utf-8")


def _values(folder: Path, model: VistaModel, place: int, one: GraphInput) -> dict[str, Any]:
    """What the codes of a category stand for: a file of values, or the number of rows that hashed values share."""
    prefix, _, name = one.name.partition(".")
    readers = {TAIL: model.tail_features, USER: model.user_features, REQUEST: model.request_features}
    reader = readers.get(prefix) if name else None
    known = None if reader is None else reader.values[name]
    if known is None:
        return {}
    if isinstance(known, HashedVocabulary):
        return {"hashed": len(known)}
    file = f"values_{place}.json"
    _write_ids(folder / file, known)
    return {"values": file}


def _write_ids(path: Path, known: Vocabulary) -> None:
    """Write the ids of a vocabulary as a JSON array, in the order of its rows; null for an erased one."""
    with path.open("w", encoding="utf-8") as file:
        file.write("[")
        for first in range(0, len(known), _BLOCK):
            rows = np.arange(first, min(first + _BLOCK, len(known)))
            present = known.has_ids(rows)
            ids = np.full(len(rows), None, object)
            ids[present] = known.ids(rows[present])
            file.write(",\n" if first else "")
            file.write(json.dumps(ids.tolist())[1:-1])
        file.write("]\n")


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
