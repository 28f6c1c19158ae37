"""An exported model: whether this version reads it, and what it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vista.config.choices import Mixing
from vista.config.serve_config import DoctorConfig
from vista.doctor.finding import Finding
from vista.doctor.verdict import Verdict
from vista.errors import CheckpointError
from vista.model.model_description import FORMAT_VERSION, ModelDescription
from vista.planning.plan_text import size


def check_model(config: DoctorConfig) -> Iterator[Finding]:
    """Format, sizes, and summarizer of the model if one is given, without reading its weights.

    Raises:
        CheckpointError: the model is missing or damaged, has another format, or lacks a file.
    """
    if config.model is None:
        return
    folder = Path(config.model)
    description = ModelDescription.read(folder)
    yield Finding("model", str(folder))
    yield Finding("format", str(FORMAT_VERSION))
    sizes = description.config
    yield Finding(
        "architecture",
        f"{sizes.architecture.value}, dim {sizes.dim}, {sizes.num_seeds} seeds, tails of {sizes.tail_len}",
    )
    check_sizes(folder, description)
    num_bytes = sum(entry.bytes for entry in description.files.values())
    yield Finding("size", f"{size(num_bytes)} in {len(description.files)} files; contents are not checked here")
    yield Finding("trained items", f"{description.num_trained_items:,}")
    if description.summarizer_id is None:
        advice = f"{sizes.architecture.value} reads the raw history in each request, so it has no store"
        yield Finding("summarizer", "none", Verdict.limited, advice)
        return
    yield Finding("summarizer", description.summarizer_id)
    if sizes.mixing is Mixing.bidirectional:
        advice = (
            "an incremental refresh reads the complete history of each user with new events; train with "
            "model.mixing=separable to read only the new events"
        )
        yield Finding("mixing", sizes.mixing.value, Verdict.limited, advice)


def check_sizes(folder: Path, description: ModelDescription) -> None:
    """Compare the sizes of the model's files with those in its description.

    Raises:
        CheckpointError: a file is missing, or has another size.
    """
    for name, entry in description.files.items():
        path = folder / name
        actual = path.stat().st_size if path.is_file() else None
        if actual != entry.bytes:
            state = "is missing" if actual is None else f"holds {actual} bytes instead of {entry.bytes}"
            raise CheckpointError(f"{path}: {state}; copy the model again, or export it again")
