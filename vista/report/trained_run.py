"""What a run folder says about a training run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vista.config import TrainConfig
from vista.config.composition import compose_config
from vista.errors import ConfigError
from vista.files import read_limited
from vista.model.saved_model import CONFIG_FILE, ModelDescription
from vista.runs.run_files import RunFiles
from vista.runs.run_summary import RunSummary

MAX_CARD_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class TrainedRun:
    """The settings, the metrics, and the model card of a run whose model was exported."""

    folder: Path
    config: TrainConfig
    card: str
    """Model card in Markdown; empty if the model has none."""
    files: RunFiles
    summary: RunSummary

    @property
    def model_folder(self) -> Path:
        """Folder of the exported model."""
        return self.folder / "best"

    @classmethod
    def read(cls, folder: str | Path, key: str = "run") -> TrainedRun:
        """Read a run folder.

        Args:
            folder: `run_dir` of the training.
            key: of the configuration that names it, for errors.

        Raises:
            ConfigError: it is not a run folder, is of another version of vista, or has no exported model yet.
            CheckpointError: the model's config.json is damaged or of another format.
        """
        folder = Path(folder)
        if (folder / CONFIG_FILE).exists() and not (folder / "config.yaml").exists():
            raise ConfigError(f"{key}={folder}: is an exported model; name its run folder, such as {folder.parent}")
        if not (folder / "config.yaml").exists():
            raise ConfigError(f"{key}={folder}: is not a run folder (no config.yaml); name the run_dir of a training")
        try:
            config = compose_config(TrainConfig, config_file=folder / "config.yaml")
        except ConfigError as error:
            raise ConfigError(
                f"{key}={folder}: its config.yaml cannot be read ({error}); if another version of vista wrote it, "
                "train again"
            ) from error
        if not (folder / "best" / CONFIG_FILE).exists():
            raise ConfigError(
                f"{key}={folder}: has no exported model (best/) yet, because training has not reached its first "
                "validation; rerun its `vista train` command to resume"
            )
        ModelDescription.read(folder / "best")  # A damaged one is an error before anything is measured.
        files = RunFiles.read(folder)
        card = _text(folder / "best" / "README.md", MAX_CARD_BYTES)
        return cls(folder, config, card, files, RunSummary.of_files(files, folder.name))


def _text(path: Path, limit: int) -> str:
    """Text of a file; empty if there is none.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return read_limited(path, limit).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); correct its permissions, or remove it") from error
