"""The tab "User": the history, the record, the tail, the counters, and what the summary recalls."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from vista.evaluation.recall import bands
from vista.explore.charts import recall_chart, timeline_chart
from vista.explore.explore_workspace import Workspace
from vista.explore.markdown_text import escaped
from vista.explore.page_cache import user_recall
from vista.explore.timeline import timeline
from vista.explore.user_page import UserFacts, frequent_items, history_of, shown_age, shown_time, user_facts
from vista.log.histories import Histories

SHOWN_ROWS = 40
TABLE_HEIGHT = 318


def show_user(workspace: Workspace, user: int | str | None) -> None:
    """Draw the tab."""
    scorer, log = workspace.scorer, workspace.log
    if scorer is None or user is None:
        st.info("A user's page needs a model and its store.")
        return
    if log is None:
        st.warning(escaped(workspace.problems["log"]), icon=":material/history:")
    facts = user_facts(workspace, scorer, user)
    _show_facts(facts)
    history = history_of(workspace, user)
    if log is not None and history is not None and history.num_events:
        st.markdown("#### History")
        line = timeline(log, history, workspace.names, [row["time"] for row in facts.tail[::-1]])
        st.altair_chart(timeline_chart(line, has_time=log.has_time), width="stretch")
    if not facts.has_record:
        return
    left, right = st.columns(2, gap="large")
    with left:
        st.markdown("#### Tail")
        st.caption("The newest events, which the record stores unchanged. Newest first.")
        _show_tail(facts, has_time=scorer.model.schema.has_time)
    with right:
        if facts.counters or history is None:
            st.markdown("#### Counters")
            _show_counters(facts)
        else:
            st.markdown("#### Most frequent items")
            _show_frequent(workspace, history)
    st.markdown("#### What the summary recalls")
    with st.spinner("Measuring the recall of older events …"):
        report = user_recall(workspace, scorer, user)
    if report is None:
        st.caption("Recall needs the log, a record, and a model with summaries.")
        return
    rows = [
        {"age": band, "recall": 100 * (own - other), "own": own, "other": other, "events": count}
        for band, own, other, count in zip(
            bands(), report.own.tolist(), report.other.tolist(), report.num_events.tolist(), strict=True
        )
        if count
    ]
    if not rows:
        st.caption("No event of this history could be measured: too few items are new to the user.")
        return
    st.altair_chart(recall_chart(rows), width="stretch")
    st.caption(
        "The decoder ranks each event of the history among 100 items that are about as popular and new to the user. "
        "Recall is how many more of these items the event beats with this user's summary than with another user's, in "
        "percentage points. A recall near 0 does not mean that the summary is useless for ranking; see *Results*."
    )


def _show_facts(facts: UserFacts) -> None:
    if not facts.has_record:
        where = f"has {facts.num_events:,} events in the log, but" if facts.num_events is not None else "is unknown:"
        st.warning(
            f"User {escaped(facts.user)} {where} no record in the store. Requests get the summary of an empty history. "
            "Refresh the store to add a record, unless the user was erased on purpose.",
            icon=":material/person_off:",
        )
        return
    tokens, dim = facts.summary_shape
    cells = [
        ("Events in the log", "–" if facts.num_events is None else f"{facts.num_events:,}", None),
        ("Events in the record", f"{facts.num_covered:,}", _missing(facts)),
        ("Summary", f"{tokens} x {dim}", f"{tokens} tokens of {dim} numbers"),
        ("Newest event", shown_time(facts.newest_at)[:10], None),
        ("Record written", shown_time(facts.created_at)[:10], None),
    ]
    for column, (label, value, note) in zip(st.columns(len(cells)), cells, strict=True):
        column.metric(label, value, help=note)


def _missing(facts: UserFacts) -> str | None:
    missing = facts.num_missing
    return f"The log has {missing:,} newer events that the record does not cover." if missing else None


def _show_tail(facts: UserFacts, *, has_time: bool) -> None:
    if not facts.tail:
        st.caption("This record has no tail.")
        return
    rows = [
        {"item": row["name"], "time": shown_time(row["time"]) if has_time else row["time"], "action": row["action"]}
        | {key: value for key, value in row.items() if key not in ("item", "name", "time", "action")}
        for row in facts.tail
    ]
    st.dataframe(pd.DataFrame(rows), hide_index=True, height=TABLE_HEIGHT, width="stretch")


def _show_counters(facts: UserFacts) -> None:
    if not facts.counters:
        st.caption("This model has no counters.")
        return
    fields = list(facts.counters)
    field = fields[0]
    if len(fields) > 1:
        chosen = st.segmented_control(
            "Field", fields, default=field, required=True, format_func=escaped, key="counters"
        )
        field = chosen or field
    st.caption("Number of events per value: in total, and with more weight on newer events.")
    rows = [dict(row) for row in facts.counters[field][:SHOWN_ROWS]]
    for row in rows:
        if "seconds since the last" in row:
            row["last"] = shown_age(1000 * row.pop("seconds since the last"))
    sums = [name for row in rows[:1] for name in row if name.startswith("last ~")]
    formats = {name: st.column_config.NumberColumn(format="%.1f") for name in sums}
    formats["count"] = st.column_config.NumberColumn(format="%d")
    st.dataframe(pd.DataFrame(rows), hide_index=True, height=TABLE_HEIGHT, width="stretch", column_config=formats)


def _show_frequent(workspace: Workspace, history: Histories) -> None:
    st.caption("This model has no counters, so these are the most frequent items of the history, from the log.")
    has_time = workspace.log is not None and workspace.log.has_time
    rows = frequent_items(workspace, history, SHOWN_ROWS)
    shown = [{**row, "last": shown_time(row["last"]) if has_time else row["last"]} for row in rows]
    st.dataframe(pd.DataFrame(shown), hide_index=True, height=TABLE_HEIGHT, width="stretch")
