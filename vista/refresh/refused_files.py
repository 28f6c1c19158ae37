"""The files that a watch has refused, and why: one small JSON file for each, in `<folder>/refused`."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vista.files import make_folders, read_limited, replace_file
from vista.refresh.file_version import FileVersion

logger = logging.getLogger(__name__)
_MAX_BYTES = 1 << 16


class RefusedFiles:
    """The refused files of one folder. The list outlives the process, so a restart does not retry a refused file.

    A file is retried after the file or the settings have changed, or after its entry was deleted.

    Args:
        folder: the folder that is watched.
        settings: how its files are read, as JSON values.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self._folder = folder / "refused"
        self._settings = dict(settings)
        self._unwritten: set[FileVersion] = set()
        """Refused files whose entries could not be written."""

    def __contains__(self, version: FileVersion) -> bool:
        if version in self._unwritten:
            return True
        try:
            entry = json.loads(read_limited(self._entry(version), _MAX_BYTES))
        except (OSError, ValueError, RecursionError):
            return False  # no entry, or a damaged one: the file is retried, and its entry is rewritten
        return isinstance(entry, dict) and all(entry.get(key) == value for key, value in self._key(version).items())

    def add(self, version: FileVersion, reason: str) -> None:
        """Remember a file that was refused."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        entry = {"reason": reason, "refused_at": now} | self._key(version)
        try:
            make_folders(self._folder)
            replace_file(self._entry(version), json.dumps(entry, indent=2).encode())
        except OSError as error:
            self._unwritten.add(version)
            logger.warning(
                "%s: cannot be written (%s); the file will be retried after a restart", self._entry(version), error
            )

    def _entry(self, version: FileVersion) -> Path:
        return self._folder / f"{version.name}.json"

    def _key(self, version: FileVersion) -> dict[str, Any]:
        return {"size": version.size, "mtime_ns": version.mtime_ns, "settings": self._settings}
