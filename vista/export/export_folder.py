"""The folder of an export: the graph, what its inputs mean, and an example (docs/guides/export.md)."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from vista.config.choices import ExportFormat
from vista.errors import ExportError
from vista.export import example_program
from vista.export.graph_input import CANDIDATES, REQUEST, TAIL, USER, USERS, GraphInput
from vista.export.parity import Parity
from vista.export.request_arrays import Arrays
from vista.log.vocabulary import Vocabulary
from vista.model.hashed_vocabulary import HashedVocabulary
from vista.model.vista_model import VistaModel

FORMAT_NAME, FORMAT_VERSION = "vista-export", 1
MANIFEST_FILE, ITEMS_FILE, EXAMPLE_FILE, PROGRAM_FILE = "export.json", "items.json", "example.npz", "example.py"
_BLOCK = 1 << 16


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
