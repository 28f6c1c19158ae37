"""Weights & Biases: a server, or files in the run's folder that are uploaded later."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from vista.errors import TrackingError
from vista.installation import require_module
from vista.tracking.tracker import TrackedFolder

START_TIMEOUT_S = 30
FINISH_TIMEOUT_S = 120
"""How long the end of a run waits for uploads. What is not uploaded by then is still in <run_dir>/wandb."""


class WandbTracker:
    """A run of Weights & Biases. Its process uploads in the background, so training does not wait for the server."""

    def __init__(self, folder: TrackedFolder, run_id: str | None) -> None:
        tracking = folder.tracking
        self._wandb = wandb = require_module("wandb", "wandb")
        self.run_id = secrets.token_hex(4) if run_id is None else run_id
        settings = wandb.Settings(
            console="off",
            silent=True,
            save_code=False,
            disable_git=True,
            init_timeout=START_TIMEOUT_S,
            finish_timeout=FINISH_TIMEOUT_S,
            finish_timeout_raises=True,
            x_save_requirements=False,
        )
        if tracking.server is not None:
            settings.base_url = tracking.server
        if not tracking.offline and not wandb.login(host=tracking.server, prompt=False):
            raise TrackingError("no API key is set; run `wandb login`, or set tracking.offline=true")
        self._run = wandb.init(
            project=tracking.project,
            name=folder.run_dir.name,
            dir=str(folder.run_dir),
            id=self.run_id,
            resume="allow",
            mode="offline" if tracking.offline else "online",
            config={**folder.settings, **folder.tags},
            allow_val_change=True,
            settings=settings,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """As `Tracker.log`."""
        self._run.log(dict(values), step=step)

    def close(self, files: Sequence[Path] | None) -> None:
        """As `Tracker.close`."""
        for path in files or ():
            if path.suffix == ".png":
                self._run.log({path.stem: self._wandb.Image(str(path))})
            else:
                own = shutil.copy(path, self._run.dir)
                self._run.save(own, base_path=self._run.dir, policy="now")
        self._run.finish(exit_code=255 if files is None else 0)
