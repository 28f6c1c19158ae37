"""The tab "Ranking": the best items for the user, and why they are the best."""

from __future__ import annotations

import time

import pandas as pd
import streamlit as st

from vista.explore.charts import parts_chart, tail_chart, token_chart
from vista.explore.explained_ranking import explained_ranking, request_time
from vista.explore.explore_workspace import Workspace, record_of
from vista.explore.markdown_text import escaped
from vista.explore.page_cache import scorer_for
from vista.scorer import Scorer

TOP_K = (5, 10, 20)
LATER, NOW = "an hour after the newest event", "now"


def show_ranking(workspace: Workspace, user: int | str | None) -> None:
    """Draw the tab."""
    if workspace.scorer is None or user is None:
        st.info("A ranking needs a model, its store, and a user.")
        return
    options = st.columns([2, 2, 3, 2], vertical_alignment="bottom")
    with options[0]:
        scorer = chosen_task(workspace, "ranking-task")
    top_k = options[1].segmented_control("Items", TOP_K, default=10, required=True, key="top-k") or 10
    when = options[2].selectbox("Time of the request", (LATER, NOW), key="when")
    exclude_tail = options[3].toggle(
        "Hide the tail's items",
        key="exclude-tail",
        help="Leave out the items of the tail. Scores do not change.",
    )
    current = time.time_ns() // 1_000_000 if when == NOW else None
    now = request_time(user, scorer, current=current)
    with st.spinner("Ranking the catalog …"):
        ranking = explained_ranking(workspace, scorer, user, top_k=top_k, now=now, exclude_tail=exclude_tail)
    if ranking is None:
        st.info("No item has a score: the catalog is empty, or all items were left out.")
        return
    if not record_of(scorer, user).found[0]:
        st.warning(
            f"User {escaped(user)} has no record, so this is the ranking of an empty history.",
            icon=":material/person_off:",
        )
    names = [f"{place + 1}. {name}" for place, name in enumerate(ranking.names)]
    place = st.selectbox(
        "Explain", range(len(names)), format_func=lambda place: names[place], key=f"explain-{user}-{top_k}", width=420
    )
    st.info(ranking.reason(place), icon=":material/lightbulb:")
    value_name = "the log-odds" if ranking.is_probability else "the score"
    st.markdown("#### What the scores consist of")
    if ranking.is_probability:
        st.caption(
            "The log-odds of a probability p is log(p / (1 − p)): 0 for 50 %, +2 for 88 %, and −2 for 12 %. A positive "
            "part raises the probability, and a negative part lowers it."
        )
    st.altair_chart(parts_chart(ranking.rows(), list(ranking.parts), value_name), width="stretch")
    left, right = st.columns(2, gap="large")
    with left:
        st.markdown(f"#### Summary tokens of rank {place + 1}")
        if tokens := ranking.tokens(place):
            st.altair_chart(token_chart(tokens), width="stretch")
        else:
            st.caption("This model has no summary.")
    with right:
        st.markdown(f"#### Tail events of rank {place + 1}")
        if events := ranking.tail_events(place):
            st.altair_chart(tail_chart(events), width="stretch")
        else:
            st.caption("This user has no tail.")
    st.caption("The shares add up to the explained value. They do not show what the score would be without a part.")
    with st.expander("All numbers"):
        formats = {part: st.column_config.NumberColumn(format="%+.3f") for part in ranking.parts}
        st.dataframe(
            pd.DataFrame(ranking.rows()), hide_index=True, width="stretch",
            column_config=formats | {"score": st.column_config.NumberColumn(format="%.4f")},
        )  # fmt: skip


def chosen_task(workspace: Workspace, key: str) -> Scorer:
    """The choice of a task, and the scorer of that task."""
    assert workspace.scorer is not None
    tasks = workspace.scorer.tasks
    task = st.selectbox("Task", tasks, key=key, help="A labeled task, or `next` for the retrieval head.")
    return scorer_for(workspace.places, task=task)
