"""The tab "Store": the generation in service, whether it is fresh, and whether it is intact."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import streamlit as st

from vista.explore.charts import coverage_chart
from vista.explore.explore_workspace import Workspace
from vista.explore.markdown_text import escaped
from vista.explore.page_cache import user_search
from vista.explore.record_sample import RecordSample, record_sample
from vista.explore.store_freshness import Freshness, store_freshness
from vista.explore.store_health import generation_rows
from vista.explore.user_page import shown_time
from vista.log.log_stats import LogStats
from vista.scorer import Scorer
from vista.store.admin.verification import verify_store
from vista.store.format.authentication import read_key
from vista.store.shards import stores_in


def show_store(workspace: Workspace, user: int | str | None) -> None:
    """Draw the tab; it works without a model, too."""
    rows, problems = generation_rows(workspace.places.store)
    sample = None
    if workspace.scorer is not None:
        sample = _show_health(workspace, workspace.scorer)
    for problem in problems:
        st.error(escaped(problem), icon=":material/error:")
    st.markdown("#### Generations")
    st.dataframe(pd.DataFrame(rows), hide_index=True, width="stretch")
    left, right = st.columns(2, gap="large")
    with left:
        st.markdown("#### Events in the records")
        if sample is None or not sample.covered:
            st.caption("This needs the model and the log.")
        else:
            st.altair_chart(coverage_chart(sample.covered), width="stretch")
            st.caption("Each point is a user of the sample. On the line, the record covers every event of the user.")
    with right:
        _show_log(workspace)
        _show_verification(workspace)


def _show_health(workspace: Workspace, scorer: Scorer) -> RecordSample:
    manifest, stats = scorer.manifest, scorer.stats()
    fresh = store_freshness(manifest, workspace.log)
    show = {Freshness.fresh: st.success, Freshness.behind: st.warning}.get(fresh.state, st.info)
    show(f"**{fresh.state.value}.** {fresh.reason}", icon=":material/schedule:")
    with st.spinner("Reading a sample of records …"):
        sample = record_sample(scorer, workspace.log, user_search(workspace))
    refreshed = shown_time(max(manifest.refreshed_at, manifest.created_at))
    of_sample = f"Of {sample.num_users:,} random users"
    cells = [
        ("Generation in service", f"{manifest.generation}", f"Refreshed {refreshed} UTC"),
        ("Users", f"{manifest.count:,}", "Users with a record"),
        ("Without a record", _share(sample.without_record, sample.num_users), of_sample),
        (
            "Behind the log",
            _share(sample.behind, sample.num_users),
            f"{of_sample}: records that lack events",
        ),
    ]
    for column, (label, value, note) in zip(st.columns(len(cells)), cells, strict=True):
        column.metric(label, value, help=note)
    if stats.last_reload_error:
        st.error(escaped(stats.last_reload_error), icon=":material/error:")
    return sample


def _show_log(workspace: Workspace) -> None:
    st.markdown("#### Log")
    if workspace.log is None:
        st.caption(escaped(workspace.problems["log"]))
        return
    stats = LogStats.of(workspace.log)
    plural = "s" * (len(stats.segments) != 1)
    times = "" if stats.first_ms is None else f", {shown_time(stats.first_ms)[:10]} to {shown_time(stats.last_ms)[:10]}"
    st.markdown(
        f"**{stats.num_events:,} events** of {stats.num_users:,} users and {stats.num_items:,} items, "
        f"{len(stats.segments)} segment{plural}{times}"
    )
    st.caption(f"`{stats.path}`")


def _show_verification(workspace: Workspace) -> None:
    st.markdown("#### Verification")
    st.caption("Checks the files and every record, as `vista store verify` does. Takes minutes for a large store.")
    if not st.button("Verify the store", icon=":material/verified:"):
        return
    key = read_key(workspace.places.key_file)
    for root in stores_in(workspace.places.store):
        with st.spinner(f"Checking {root} …"):
            report = verify_store(root, key=key)
        text = str(report).removeprefix(f"{report.path}: ")
        (st.error if report.num_problems else st.success)(escaped(f"{Path(str(root)).name}: {text}"))


def _share(count: int, total: int) -> str:
    return f"{count / total:.0%}" if total else "–"
