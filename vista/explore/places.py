"""Which folders the page reads: those of a configuration, or those of the demo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vista.config import ExploreConfig
from vista.errors import ConfigError
from vista.runs.run_files import read_settings
from vista.runs.run_list import run_folders

DEMO = Path("demo")
"""Where `make demo` puts its folders, one per data set."""


@dataclass(frozen=True, slots=True)
class Places:
    """Folders, and the URLs of stores on a server."""

    model: Path
    store: str
    data: Path | None
    """None if no log is named or found."""
    runs: tuple[Path, ...]
    """Run folders, and folders that were named as runs but contain none."""
    results: Path
    other_model: Path | None = None
    other_store: str | None = None
    key_file: str | None = None
    is_demo: bool = False

    @classmethod
    def of(cls, config: ExploreConfig) -> Places:
        """The places that a configuration names; what is null is looked for.

        Raises:
            ConfigError: config.yaml of the model's run cannot be read.
        """
        model, store, data, other_store = config.model, config.store, config.data, config.other_store
        is_demo = model is None
        if model is None or store is None:
            demo = demo_folder()
            model, store, data = str(demo / "vista" / "best"), str(demo / "store"), data or str(demo / "log")
            if other_store is None and config.other_model is None and (demo / "store-test").is_dir():
                other_store = str(demo / "store-test")
        run = Path(model).parent
        log = Path(data) if data is not None else _log_of(run)
        named = [Path(folder) for folder in config.runs or [str(run)]]
        runs = tuple(dict.fromkeys(each for folder in named for each in run_folders(folder) or [folder]))
        other_model = None if config.other_model is None else Path(config.other_model)
        key_file, results = config.authentication_key_file, Path(config.results)
        return cls(Path(model), store, log, runs, results, other_model, other_store, key_file, is_demo)


def demo_folder() -> Path:
    """The folder of the demo's data set: the simulation, or the first one that was trained."""
    trained = sorted(path.parent.parent for path in DEMO.glob("*/vista/best"))
    simulation = DEMO / "simulation"
    return simulation if simulation in trained or not trained else trained[0]


def _log_of(run: Path) -> Path | None:
    """The log that a run was trained on, if its config.yaml names one that exists."""
    if not (run / "config.yaml").is_file():
        return None
    problems: list[str] = []
    path = read_settings(run, problems).get("data.path")
    if problems:
        raise ConfigError(f"{run}: {problems[0]}, so the log of the run is not known; name one with data=...")
    return Path(path) if isinstance(path, str) and Path(path).is_dir() else None
