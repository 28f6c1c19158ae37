"""Configuration of `vista export`."""

from __future__ import annotations

from dataclasses import dataclass

from vista.config.checks import MAX_THREADS, check_types, require, require_counts
from vista.config.choices import ExportFormat


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    """Export stage 2 with its tables, to score without vista, and compare it with the scorer."""

    model: str = "runs/vista/best"
    """Folder of the model."""
    format: ExportFormat = ExportFormat.onnx
    """onnx, for onnxruntime in any language, or aotinductor, for PyTorch in Python or C++. aotinductor compiles for the
    processor of this machine, and needs a C++ compiler."""
    out: str = "exports/vista"
    """Folder to write; an earlier export there is replaced."""
    store: str | None = None
    """Folder or URL of a store of the model's summaries, whose users make the requests of the comparison. null makes
    random users."""
    num_requests: int = 1000
    """Number of random requests on which the export is compared with the scorer."""
    max_difference: float = 1e-4
    """Largest absolute difference of a logit, or of a score of `next`. If there is a larger one, nothing is written."""
    authentication_key_file: str | None = None
    """File with the key that authenticates records of the store: 32 bytes, or 64 hex digits. null uses the environment
    variable VISTA_AUTHENTICATION_KEY, or no key if that is unset."""
    num_threads: int = 0
    """Number of CPU threads. 0 leaves the choice to PyTorch."""

    def __post_init__(self) -> None:
        check_types(self)
        require_counts(self, "", ("num_requests",), most=1_000_000)
        require_counts(self, "", ("num_threads",), least=0, most=MAX_THREADS)
        require(0 < self.max_difference < 1, "max_difference", f"must lie between 0 and 1, got {self.max_difference}")
