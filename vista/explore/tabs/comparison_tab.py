"""The tab "Compare": two models, two stores, or two generations."""

from __future__ import annotations

from typing import Any

import pandas as pd
import streamlit as st

from vista.explore.charts import overlap_chart
from vista.explore.explore_workspace import Workspace
from vista.explore.markdown_text import escaped
from vista.explore.page_cache import other_scorer, overlap_of_users, scorer_for, user_search
from vista.explore.ranking_comparison import common_task, compare_rankings, earlier_generations
from vista.scorer import Scorer

TOP_K = 10
LISTED = 200
"""Ranks that are looked up in the other list."""
NUM_USERS = 40


def show_comparison(workspace: Workspace, user: int | str | None) -> None:
    """Draw the tab."""
    if workspace.scorer is None or user is None:
        st.info("A comparison needs a model, its store, and a user.")
        return
    chosen = choose_other(workspace, workspace.scorer)
    if chosen is None:
        st.info(
            "There is nothing to compare yet. Name a second model or store with other_model=... and other_store=..., "
            "or refresh the store, which keeps its previous generation."
        )
        return
    key, a, b = chosen
    left, right = st.columns([5, 4], gap="large")
    with left:
        st.markdown(f"#### User {escaped(user)}")
        compared = compare_rankings(workspace, a, b, user, top_k=TOP_K, listed=LISTED)
        for name, has in (("A", compared.a_has_record), ("B", compared.b_has_record)):
            if not has:
                st.warning(f"User {escaped(user)} has no record in store {name}.", icon=":material/person_off:")
        st.markdown(f"**{compared.shared} of {TOP_K}** best items are in both lists.")
        of_a, of_b = compared.num_events
        if of_a != of_b:
            st.caption(f"The record of this user covers {of_a:,} events in A and {of_b:,} in B.")
        rows = [
            {
                "rank": row["rank"],
                "A": row["A"],
                "rank in B": str(row["A in B"] or f"> {LISTED}"),
                "B": row["B"],
                "rank in A": str(row["B in A"] or f"> {LISTED}"),
            }
            for row in compared.rows
        ]
        st.dataframe(pd.DataFrame(rows), hide_index=True, width="stretch", height=35 * (len(rows) + 1) + 3)
    with right:
        st.markdown("#### Many users")
        search = user_search(workspace)
        users = list(search.users.ids(search.sample(NUM_USERS)).tolist())
        with st.spinner(f"Ranking for {len(users)} users …"):
            overlap = overlap_of_users(key, a, b, users, TOP_K)
        one, two = st.columns(2)
        one.metric(f"Shared of the best {TOP_K}", f"{overlap.overlap.mean():.0%}")
        two.metric("Same first item", f"{overlap.same_first:.0%}")
        st.altair_chart(overlap_chart(overlap.overlap.tolist(), TOP_K), width="stretch")
        st.caption(
            f"{len(users)} random users. The time of each request is one hour after the user's newest event in the "
            "records of A and B."
        )


def choose_other(workspace: Workspace, scorer: Scorer) -> tuple[tuple[Any, ...], Scorer, Scorer] | None:
    """The choice of B; returns a name for the pair, and both scorers, of one task; None without a choice."""
    places, choices = workspace.places, dict[str, int | None]()
    if places.other_model is not None or places.other_store is not None:
        model = f"model {places.other_model}, " if places.other_model is not None else ""
        choices[f"{model}store {places.other_store or places.store}"] = None
    choices |= {f"generation {number} of the same store": number for number in earlier_generations(scorer)}
    if not choices:
        return None
    served = f"{places.model}, generation {scorer.store.generation}"
    left, right = st.columns([5, 4], gap="large")
    left.selectbox("A", [f"{served} (in service)"], key="served")
    name = right.selectbox("B", list(choices), key="other")
    number = choices[name]
    first = scorer_for(places, generation=number) if number is not None else other_scorer(places)
    task = common_task(scorer, first)
    other = scorer_for(places, task=task, generation=number) if number is not None else other_scorer(places, task=task)
    return (str(places.model), places.store, name), scorer_for(places, task=task), other
