"""Files of a store: generations, each a complete set of records, and CURRENT, which names the published one.

store/CURRENT            "gen-7": the generation that readers open
store/LAST               "gen-8": numbers up to this one are never used again, even after their folders are removed
store/writer.lock        locked (flock) by the one writer; holds its process id
store/erase.lock         locked (flock) by an erasure or a publication, briefly
store/tombstones         digests of erased users, if there are any
store/gen-7/summary/     LMDB environment: data.mdb, lock.mdb
store/gen-7/state/       another one, which only refreshes open: the states, if the store keeps any
store/gen-8/summary/     an unfinished run: without `!complete`; `!cursor` says where to resume
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from vista.errors import StoreError
from vista.files import make_folders, sync
from vista.store.lmdb.permissions import (
    PRIVATE,
    Permissions,
    is_owner,
    make_folder,
    permissions_of,
    set_mode,
    set_tree_permissions,
)

CURRENT = "CURRENT"
LAST = "LAST"
WRITER_LOCK = "writer.lock"
ERASURE_LOCK = "erase.lock"
TOMBSTONES = "tombstones"

REMOVED_PREFIX = ".removed-"
PARTIAL_PREFIX = ".partial-"
"""Of a generation that is built from existing records, until it is complete and verified."""

_PREFIX = "gen-"


def generation_path(root: Path, generation: int) -> Path:
    """Folder of a generation."""
    return root / f"{_PREFIX}{generation}"


def environment_path(root: Path, generation: int) -> Path:
    """Folder of the LMDB environment with a generation's summaries."""
    return generation_path(root, generation) / "summary"


def state_path(root: Path, generation: int) -> Path:
    """Folder of the LMDB environment with a generation's states."""
    return generation_path(root, generation) / "state"


def environments_of(root: Path, generation: int) -> list[Path]:
    """Folders of all LMDB environments of a generation."""
    paths = (environment_path(root, generation), state_path(root, generation))
    return [path for path in paths if path.is_dir()]


def list_generations(root: Path) -> list[int]:
    """Numbers of all generation folders, finished or not, ascending."""
    names = [entry.name.removeprefix(_PREFIX) for entry in root.iterdir() if entry.name.startswith(_PREFIX)]
    return sorted(int(name) for name in names if name.isdecimal())


def read_current(root: Path) -> int:
    """Number of the published generation.

    Raises:
        StoreError: nothing is published there, or CURRENT is damaged.
    """
    try:
        text = (root / CURRENT).read_text(encoding="ascii", errors="replace").strip()
    except FileNotFoundError as error:
        raise StoreError(f"{root} {_why_not_published(root)}") from error
    except OSError as error:
        raise StoreError(f"{root / CURRENT}: {error.strerror}; check the path and its permissions") from error
    number = text.removeprefix(_PREFIX)
    if not text.startswith(_PREFIX) or not number.isdecimal():
        raise StoreError(
            f"{root / CURRENT} holds {text[:40]!r} instead of the name of a generation; {_remedy_for_current(root)}"
        )
    return int(number)


def published_or_none(root: Path) -> int | None:
    """As `read_current`, but None if nothing is published or CURRENT is damaged."""
    try:
        return read_current(root)
    except StoreError:
        return None


def generations_to_keep(root: Path) -> list[int]:
    """What stays when a new generation is published: the published one, or all of them if CURRENT is unreadable."""
    published = published_or_none(root)
    return list_generations(root) if published is None else [published]


def missing_generation(root: Path, generation: int) -> StoreError:
    """The error for a CURRENT that names a generation that does not exist."""
    name = f"{_PREFIX}{generation}"
    return StoreError(f"{root / CURRENT} names {name}, which does not exist; {_remedy_for_current(root)}")


def write_current(root: Path, generation: int) -> None:
    """Publish a generation atomically and durably: readers that open or reload from now on get it."""
    record_complete(root, generation)
    _write_name(root, CURRENT, generation)


def last_complete(root: Path) -> int:
    """The highest generation number that was ever complete; 0 if there was none."""
    try:
        number = (root / LAST).read_text(encoding="ascii", errors="replace").strip().removeprefix(_PREFIX)
    except OSError:
        return 0
    return int(number) if number.isdecimal() else 0


def record_complete(root: Path, generation: int) -> None:
    """Include a generation in `last_complete`, durably; call it before publishing or removing the generation."""
    if generation > last_complete(root):
        _write_name(root, LAST, generation)


def remove_leftovers(root: Path, except_for: str = "") -> None:
    """Remove the folders that killed processes left of generations being removed or copied; only under the lock.

    Args:
        except_for: a name to keep.
    """
    for prefix in (REMOVED_PREFIX, PARTIAL_PREFIX):
        for entry in root.glob(f"{prefix}*"):
            if entry.name != except_for:
                shutil.rmtree(entry, ignore_errors=True)


def _write_name(root: Path, name: str, generation: int) -> None:
    temporary = root / f"{name}.tmp"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, PRIVATE.file)
    try:
        os.fchmod(descriptor, permissions_of(generation_path(root, generation)).file)
        os.write(descriptor, f"{_PREFIX}{generation}\n".encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, root / name)
    sync(root)


def _why_not_published(root: Path) -> str:
    """Why a folder has no CURRENT, and what to do about it."""
    if is_generation(root):
        return f"is a generation of the store {root.parent}; name that folder"
    if is_other_folder(root):
        return "is not a store, but a log, a model or a run; name the store's folder"
    return f"holds no published generation; run `vista refresh store={root}` first"


def is_generation(root: Path) -> bool:
    """Whether this is the folder of a generation inside of a store."""
    return root.name.startswith(_PREFIX) and (root.parent / WRITER_LOCK).exists()


def is_other_folder(root: Path) -> bool:
    """Whether this is the folder of an event log, a model or a run, and not of a store."""
    if (root / WRITER_LOCK).exists() or not root.is_dir():
        return False
    return any((root / name).exists() for name in ("config.json", "config.yaml")) or any(root.glob("segment-*"))


def prepare_root(root: Path, permissions: Permissions) -> None:
    """Make the store's folder if it does not exist. A folder with other contents keeps its mode.

    Raises:
        StoreError: it is a generation of another store, or the folder of a log, a model or a run.
        OSError: it cannot be made, or belongs to another account.
    """
    if is_generation(root) or is_other_folder(root):
        raise StoreError(f"{root} {_why_not_published(root)}")
    if not root.exists():
        make_folders(root.parent)
        with suppress(FileExistsError):  # Another writer is starting at the same time.
            make_folder(root, permissions)
    make_folders(root)  # Or a killed process made it, and a parent, without a sync.
    if is_owner(root) and ((root / WRITER_LOCK).exists() or not any(root.iterdir())):
        set_mode(root, permissions.folder)


def set_store_permissions(root: Path, permissions: Permissions) -> None:
    """Give all files of a store their modes; only under the lock.

    Raises:
        OSError: a file belongs to another account.
    """
    for name in (CURRENT, LAST):
        if (root / name).exists():
            set_mode(root / name, permissions.file)
    for generation in list_generations(root):
        set_tree_permissions(generation_path(root, generation), permissions)


def remove_generation(root: Path, generation: int) -> None:
    """Remove a generation's folder. If killed halfway, it leaves a name that does not look like a generation.

    Readers that have it open keep their files until they close them.
    """
    removed = root / f"{REMOVED_PREFIX}{generation}"
    shutil.rmtree(removed, ignore_errors=True)
    os.rename(generation_path(root, generation), removed)
    shutil.rmtree(removed, ignore_errors=True)


def _remedy_for_current(root: Path) -> str:
    names = ", ".join(f"{_PREFIX}{number}" for number in list_generations(root)) or "none"
    return f"existing generations: {names}. Write the name of one into {CURRENT}, or refresh the store again"
