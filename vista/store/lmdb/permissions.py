"""Who may read a store: its owner alone, or a group too, whatever the umask (docs/reference/file-formats.md, "Files").

A folder's own mode decides, so that a file created in it later, by any command, gets the matching mode.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from vista.files import open_file

_SETGID = 0o2000


@dataclass(frozen=True, slots=True)
class Permissions:
    """Modes of folders and files."""

    folder: int
    file: int
    lock: int
    """Of lock.mdb, which readers write to when they register."""


PRIVATE = Permissions(folder=0o700, file=0o600, lock=0o600)
GROUP = Permissions(folder=0o2750, file=0o640, lock=0o660)
"""New files inherit the folder's group: run `chgrp` once on the store's folder."""


def permissions_of(folder: Path) -> Permissions:
    """What the files in a folder of a store should have."""
    try:
        mode = stat.S_IMODE(folder.stat().st_mode)
    except OSError:
        return PRIVATE
    return GROUP if mode | _SETGID == GROUP.folder else PRIVATE


def set_mode(path: Path, mode: int) -> None:
    """Give a file or folder a mode unless it has it already.

    Raises:
        OSError: it has another mode and belongs to another account.
    """
    if stat.S_IMODE(path.stat().st_mode) != mode:
        path.chmod(mode)


def open_private(path: Path, flags: int) -> int:
    """Open a file of a store that is its owner's alone, whatever the umask, and make it if it does not exist.

    Args:
        flags: of `os.open`, without O_CREAT.

    Raises:
        OSError: it cannot be opened, is a symbolic link or not a regular file, or belongs to another account.
    """
    descriptor = open_file(path, flags | os.O_CREAT, PRIVATE.file, follow=False)
    try:
        if stat.S_IMODE(os.fstat(descriptor).st_mode) != PRIVATE.file:
            os.fchmod(descriptor, PRIVATE.file)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def make_folder(path: Path, permissions: Permissions) -> None:
    """Make one folder; its mode is never wider than the final one.

    Raises:
        OSError: it exists already, or cannot be made.
    """
    path.mkdir(mode=PRIVATE.folder)
    set_mode(path, permissions.folder)


def set_tree_permissions(folder: Path, permissions: Permissions) -> None:
    """Give a generation's folder and everything in it their modes."""
    set_mode(folder, permissions.folder)
    for entry in folder.iterdir():
        if entry.is_symlink():
            continue  # Its target is not a part of the store.
        if entry.is_dir():
            set_tree_permissions(entry, permissions)
        else:
            set_mode(entry, permissions.lock if entry.name == "lock.mdb" else permissions.file)


def is_owner(path: Path) -> bool:
    """Whether this process may change a path's mode."""
    return path.stat().st_uid == os.geteuid() or os.geteuid() == 0
