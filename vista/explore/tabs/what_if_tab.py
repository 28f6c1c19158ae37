"""The tab "What if": the ranking after events that the user could add."""

from __future__ import annotations

from typing import Any

import pandas as pd
import streamlit as st

from vista.explore.charts import slope_chart
from vista.explore.explained_ranking import request_time
from vista.explore.explore_workspace import Workspace
from vista.explore.markdown_text import escaped
from vista.explore.tabs.ranking_tab import chosen_task
from vista.explore.user_search import ids_with_prefix
from vista.explore.what_if import what_if
from vista.scorer import Scorer

TOP_K = 10
MAX_LISTED = 2_000
"""Items of a catalog that are handed to the browser to choose from; of a larger one, those that match a text."""
MAX_EVENTS = 32


def show_what_if(workspace: Workspace, user: int | str | None) -> None:
    """Draw the tab."""
    if workspace.scorer is None or user is None:
        st.info("This needs a model, its store, and a user.")
        return
    st.markdown(
        f"How would the ranking of user **{escaped(user)}** change after one more event? Adding events here does not "
        "change the store."
    )
    task, choice, kind, button = st.columns([2, 4, 2, 2], vertical_alignment="bottom")
    with task:
        scorer = chosen_task(workspace, "what-if-task")
    with choice:
        item = choose_item(workspace, scorer)
    actions = scorer.model.schema.actions
    action = kind.selectbox("Action", actions, key="what-if-action") if actions else None
    events: list[tuple[Any, int]] = st.session_state.setdefault(f"events-{user}", [])
    code = actions.index(action) if action is not None else 0
    if button.button("Add event", type="primary", icon=":material/add:", width="stretch", disabled=item is None):
        events.append((item, code))
        del events[:-MAX_EVENTS]
    if not events:
        st.info("Choose an item and add the event to compare the rankings before and after.")
        return
    show_events(workspace, actions, events)
    with st.spinner("Ranking the catalog twice …"):
        changed = what_if(workspace, scorer, user, events, now=request_time(user, scorer), top_k=TOP_K)
    st.info(changed.summary(TOP_K), icon=":material/lightbulb:")
    left, right = st.columns([3, 4], gap="large")
    with left:
        st.markdown("#### Ranks")
        st.altair_chart(slope_chart(changed.rows, TOP_K), width="stretch")
    with right:
        st.markdown("#### Items")
        scores = {name: st.column_config.NumberColumn(format="%.4f") for name in ("score before", "score after")}
        rows = [{**row, "change": _arrow(row["change"])} for row in changed.rows]
        st.dataframe(
            pd.DataFrame(rows), hide_index=True, width="stretch", height=35 * (len(rows) + 1) + 3, column_config=scores
        )


def choose_item(workspace: Workspace, scorer: Scorer) -> Any:
    """The item of the event to add; None if none matches."""
    items = scorer.model.items
    if len(items) <= MAX_LISTED:
        ids = items.ids(range(len(items))).tolist()
        names = dict(zip(ids, workspace.names.of_ids(ids), strict=True))
        return st.selectbox("Item", ids, format_func=lambda item: names[item], key="what-if-item")
    text, matches = st.columns(2, vertical_alignment="bottom")
    typed = text.text_input("Item", placeholder="an id, or its first characters", key="what-if-text")
    found = ids_with_prefix(items, typed) if typed else items.ids(range(5)).tolist()
    names = dict(zip(found, workspace.names.of_ids(found), strict=True))
    return matches.selectbox("Matches", found, format_func=lambda item: names[item], key="what-if-match")


def show_events(workspace: Workspace, actions: list[str], events: list[tuple[Any, int]]) -> None:
    """The added events, and a button that removes them."""
    names = workspace.names.of_ids([item for item, _ in events])
    texts = [
        f":orange-badge[{escaped(name)}{f', {escaped(actions[code])}' if actions else ''}]"
        for name, (_, code) in zip(names, events, strict=True)
    ]
    left, right = st.columns([8, 2], vertical_alignment="center")
    left.markdown("Added: " + " ".join(texts))
    right.button("Remove all", on_click=events.clear, icon=":material/delete:", width="stretch")


def _arrow(change: int | None) -> str:
    if change is None:
        return "–"
    return "=" if change == 0 else f"▲ {change}" if change > 0 else f"▼ {-change}"
