"""The only module that imports faiss, for indexes and codes of items."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vista.errors import MissingDependencyError
from vista.install_command import install_command

logging.getLogger("faiss").setLevel(logging.WARNING)
try:
    import faiss as _faiss
except ImportError as error:
    raise MissingDependencyError(
        f"indexes and codes of items need faiss ({error}); install it with: {install_command('faiss')}"
    ) from error
faiss: Any = _faiss
"""Its type stubs lack classes and attributes that vista uses."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Let faiss use one thread in this block, so that its results do not depend on the number of threads.

    The setting belongs to the calling thread, so other threads may call faiss meanwhile.
    """
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


__all__ = ["faiss", "one_thread"]
