"""Publishing a generation: readers that open or reload from now on get it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from vista.store.generation_files import GenerationFiles
from vista.store.layout import list_generations, remove_generation, write_current
from vista.store.lmdb.flock import WAIT_S
from vista.store.locks import erasure_lock
from vista.store.tombstones import Tombstones

ATTEMPTS_BESIDE_ERASURES = 3
"""How often work that an erasure has outdated is repeated; after that, erasures wait for it."""

logger = logging.getLogger(__name__)


def publish_generation(root: Path, generation: int, keep: Sequence[int], *, wait_s: float = WAIT_S) -> None:
    """Publish a complete, verified generation, then remove all others except those in `keep`.

    Before that, it removes all erased users from the generation, including those of interrupted erasures. Erasures wait
    only while CURRENT is written.

    Raises:
        StoreLockedError: an erasure does not end within `wait_s` seconds; the generation stays unpublished.
    """
    tombstones, num_erased = Tombstones(root), 0  # users that are removed from the generation already

    def remove_erased() -> None:
        with closing(GenerationFiles.open(root, generation)) as files:
            files.remove_erased(tombstones)

    for attempt in range(ATTEMPTS_BESIDE_ERASURES + 1):
        is_last = attempt == ATTEMPTS_BESIDE_ERASURES
        with erasure_lock(root, wait_s):
            if is_last:
                remove_erased()
            if len(tombstones) == num_erased or is_last:
                write_current(root, generation)
                break
            num_erased = len(tombstones)
        remove_erased()
    for number in list_generations(root):
        if number not in (generation, *keep):
            logger.info("%s: removing gen-%d", root, number)
            remove_generation(root, number)
