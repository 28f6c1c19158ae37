"""The generations of a store, with what is wrong with them."""

from __future__ import annotations

from typing import Any

from vista.explore.user_page import shown_time
from vista.store.admin.managed_store import managed_store
from vista.store.admin.store_stats import GenerationStats, StoreStats, store_stats
from vista.store.shards import stores_in


def generation_rows(store: str) -> tuple[list[dict[str, Any]], list[str]]:
    """A row per generation of a store and its shards, and the problems found.

    Raises:
        StoreError: there is no store.
    """
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    for root in stores_in(store):
        stats = store_stats(root)
        rows += [_row(stats, one) for one in reversed(stats.generations)]
        problems += [stats.problem] * bool(stats.problem)
        problems += [f"gen-{one.number}: {one.problem}" for one in stats.generations if one.problem]
        problems += managed_store(root).problems()
    return rows, problems


def _row(stats: StoreStats, one: GenerationStats) -> dict[str, Any]:
    if one.manifest is None:
        return {"generation": one.number, "state": "damaged"}
    manifest, size = one.manifest, one.live_bytes if one.size_bytes is None else one.size_bytes
    served = one.number == stats.published
    return {
        "generation": one.number,
        "state": "served" if served else "kept" if one.complete else "unfinished",
        "users": one.num_records,
        "refreshed": shown_time(max(manifest.refreshed_at, manifest.created_at)),
        "events": "all" if manifest.until in (None, "all") else f"until={manifest.until}",
        "bytes per user": round(one.live_bytes / one.num_records) if one.num_records else None,
        "on disk (MB)": round(size / 1e6, 1),
        "codec": manifest.codec,
        "summary": f"{manifest.num_tokens} x {manifest.dim}",
        "tail": manifest.tail_len,
        "summarizer": manifest.summarizer_id[:12],
    }
