"""Who may read a store: its owner alone, or a group too; whatever the umask (docs/reference/file-formats.md, "Files").

A folder's own mode says which, so that a file made in it later, by whatever command, gets the mode that belongs there.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

_SETGID = 0o2000


@dataclass(frozen=True, slots=True)
class Modes:
    """Permission bits."""

    folder: int
    file: int
    lock: int
    """Of lock.mdb: readers register in it, so they write it."""


PRIVATE = Modes(folder=0o700, file=0o600, lock=0o600)
GROUP = Modes(folder=0o2750, file=0o640, lock=0o660)
"""New files take the folder's group: `chgrp` the store's folder once."""


def modes_of(folder: Path) -> Modes:
    """What files in a folder of a store should have."""
    try:
        mode = stat.S_IMODE(folder.stat().st_mode)
    except OSError:
        return PRIVATE
    return GROUP if mode | _SETGID == GROUP.folder else PRIVATE


def set_mode(path: Path, mode: int) -> None:
    """Give a file or folder a mode if it has another.

    Raises:
        OSError: it has another and belongs to another account.
    """
    if stat.S_IMODE(path.stat().st_mode) != mode:
        path.chmod(mode)


def make_folder(path: Path, modes: Modes) -> None:
    """Make one folder; it is never wider than it ends up.

    Raises:
        OSError: it is there already, or cannot be made.
    """
    path.mkdir(mode=PRIVATE.folder)
    set_mode(path, modes.folder)


def set_tree_modes(folder: Path, modes: Modes) -> None:
    """Give a generation's folder, and all that lies in it, their modes."""
    set_mode(folder, modes.folder)
    for entry in folder.iterdir():
        if entry.is_dir():
            set_tree_modes(entry, modes)
        else:
            set_mode(entry, modes.lock if entry.name == "lock.mdb" else modes.file)


def is_owner(path: Path) -> bool:
    """Whether this process may change a path's mode."""
    return path.stat().st_uid == os.geteuid() or os.geteuid() == 0
