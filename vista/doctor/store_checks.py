"""A summary store: what it serves, how old that is, and whether a model's summarizer wrote it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vista.config.choices import StateDtype
from vista.config.serve_config import DoctorConfig
from vista.doctor.finding import Finding
from vista.doctor.memory_checks import free_bytes
from vista.doctor.verdict import Verdict
from vista.errors import CheckpointError
from vista.model.model_description import ModelDescription
from vista.planning.plan_text import duration, size
from vista.store.admin.store_stats import StoreStats, store_stats
from vista.store.manifest import Manifest
from vista.store.remote.store_url import StoreUrl
from vista.store.shards import stores_in

_CLOCK_TOLERANCE_S = 60.0


def check_store(config: DoctorConfig) -> Iterator[Finding]:
    """Every shard of the store if one is given, or the store itself; compared with the model if one is given.

    Raises:
        StoreError, ConfigError: the store is missing, damaged, or cannot be reached.
    """
    for root in [] if config.store is None else stores_in(config.store):
        yield from _check(root, config.model)


def _check(root: Path | StoreUrl, model: str | None) -> Iterator[Finding]:
    yield Finding("store", str(root))
    stats = store_stats(root)
    published = next((one for one in stats.generations if one.number == stats.published), None)
    if published is None or published.manifest is None:
        problem = stats.problem if published is None else published.problem
        yield Finding("generation", "none can be served", Verdict.broken, problem)
        return
    manifest = published.manifest
    yield Finding(
        "generation",
        f"{manifest.generation}, {published.num_records:,} records, {manifest.codec} {manifest.num_tokens} x "
        f"{manifest.dim}, until {manifest.until or 'the end of the log'}",
    )
    yield age_finding(stats.now / 1000 - manifest.refreshed_at / 1000)
    if isinstance(root, Path):
        yield size_finding(published.live_bytes, free_bytes())
    yield from _unfinished(stats)
    if manifest.state_dtype == StateDtype.none.value:
        advice = "an incremental refresh reads complete histories; keep states (a full refresh with state=float32)"
        yield Finding("states", "none", Verdict.limited, advice)
    yield summarizer_finding(manifest, model)


def _unfinished(stats: StoreStats) -> Iterator[Finding]:
    for one in stats.generations:
        if one.manifest is None:
            yield Finding(f"generation {one.number}", "damaged", Verdict.limited, one.problem)
        elif not one.complete:
            advice = "a refresh was interrupted; rerun the same command to resume it"
            value = f"unfinished, {one.num_records:,} users done"
            yield Finding(f"generation {one.number}", value, Verdict.limited, advice)


def age_finding(age_s: float) -> Finding:
    """Judge the time since the last finished refresh, which a clock that is wrong makes negative."""
    if age_s < -_CLOCK_TOLERANCE_S:
        advice = (
            "the time of the refresh is in the future, so max_age_s does not work: synchronize the clocks of this "
            "machine and of the one that refreshes (NTP)"
        )
        return Finding("refreshed", f"in {duration(-age_s)}", Verdict.broken, advice)
    return Finding("refreshed", f"{duration(max(age_s, 0.0))} ago")


def size_finding(live_bytes: int, memory_bytes: int | None) -> Finding:
    """Compare the records with the memory that could cache them."""
    value = f"{size(live_bytes)} in use"
    if memory_bytes is None or live_bytes <= memory_bytes:
        return Finding("size", value)
    advice = (
        f"only {size(memory_bytes)} of memory are available to cache it, so requests of other users read the disk: add "
        "memory, divide the store (refresh shard=i/n), or refresh with codec=int4"
    )
    return Finding("size", value, Verdict.limited, advice)


def summarizer_finding(manifest: Manifest, model: str | None) -> Finding:
    """Compare the summarizer that wrote a store with a model's."""
    name, wrote = "summarizer", manifest.summarizer_id
    if model is None:
        return Finding(name, f"{wrote} (pass model= to compare it)")
    try:
        own = ModelDescription.read(Path(model)).summarizer_id
    except CheckpointError:  # The model's own check reports it.
        return Finding(name, f"{wrote}; the model cannot be read, so it was not compared")
    if own == wrote:
        return Finding(name, "the model's")
    advice = (
        f"{wrote[:12]}… wrote the store, but the model's is {'none' if own is None else f'{own[:12]}…'}: name the "
        "model that wrote it, or run a full `vista refresh` with this one"
    )
    return Finding(name, "of another model", Verdict.broken, advice)
