"""Atomic, durable writes of files and folders."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vista.errors import ConfigError

_PARTIAL_NAME = re.compile(r"\..+\.\d+\.tmp")


def sync(path: Path) -> None:
    """fsync a file or a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_text(path: Path, text: str) -> None:
    """Write a small file atomically and durably: temporary name, fsync, rename, fsync of the folder."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def writable_folder(folder: Path, key: str) -> None:
    """Make a folder if it does not exist, and check that files can be written in it.

    Raises:
        ConfigError: if they cannot, naming `key` (the setting of the folder) and the reason.
    """
    probe = folder / f".probe.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"{key}={folder}: cannot be written ({error.strerror}); choose another folder, or make this one writable"
        ) from None


def remove_leftovers(folder: Path) -> None:
    """Remove leftovers of `replace_text` and `replaced_folder` in killed processes. No other process may write here."""
    for path in folder.iterdir():
        if _PARTIAL_NAME.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that replaces `folder` when the `with` block ends without an error.

    A crash leaves the old folder, the new one, or (between two renames) the old one as `<name>.old`, never a mixture.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for file in partial.rglob("*"):
            sync(file)
        sync(partial)
        old = folder.with_name(f"{folder.name}.old")
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        partial.rename(folder)
        sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
