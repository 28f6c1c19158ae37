"""TensorBoard: event files in the run's folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from vista.installation import require_module
from vista.tracking.tracker import TrackedFolder


class TensorboardTracker:
    """Events in <run_dir>/tensorboard, one file per process."""

    run_id = "tensorboard"

    def __init__(self, folder: TrackedFolder, run_id: str | None) -> None:
        events = folder.run_dir / self.run_id
        if run_id is None:
            shutil.rmtree(events, ignore_errors=True)
        self._writer = require_module("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(events))
        if run_id is None:
            table = "\n".join(f"| {name} | {value} |" for name, value in folder.tags.items())
            self._writer.add_text("run", f"| | |\n|---|---|\n{table}")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """As `Tracker.log`. The events are written to the file immediately, so a killed process loses none."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, files: Sequence[Path] | None) -> None:
        """As `Tracker.close`."""
        for path in files or ():
            if path.suffix == ".png":
                image = require_module("matplotlib.image", "plots").imread(path)
                self._writer.add_image(path.stem, image[..., :3], dataformats="HWC")
            else:
                text = path.read_text(encoding="utf-8")
                self._writer.add_text(path.stem, text if path.suffix == ".md" else f"```\n{text}\n```")
        self._writer.close()
