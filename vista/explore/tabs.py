"""The tabs of the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from vista.errors import VistaError, without_password
from vista.explore.charts import (
    benefit_chart,
    coverage_chart,
    overlap_chart,
    parts_chart,
    slope_chart,
    tail_chart,
    timeline_chart,
)
from vista.explore.page_cache import measured_benefit, other_scorer, overlap_of_users, scorer_for, user_search
from vista.explore.rankings import (
    common_task,
    compare_rankings,
    earlier_generations,
    explained_ranking,
    request_time,
    what_if,
)
from vista.explore.user_page import (
    Freshness,
    RecordSample,
    UserFacts,
    frequent_items,
    generation_rows,
    history_of,
    record_sample,
    shown_time,
    store_freshness,
    timeline,
    user_facts,
)
from vista.explore.workspace import Workspace, escaped, ids_with_prefix, record_of
from vista.log.histories import Histories
from vista.log.inspection import LogStats
from vista.scorer import Scorer
from vista.scorer.explanation import about
from vista.store.admin import verify_store
from vista.store.layout import stores_in
from vista.store.record_encoding import read_key

SHOWN_ROWS = 40
TABLE_HEIGHT = 318
RANKING_TOP_K = (5, 10, 20)
COMPARED_TOP_K = 10
LISTED = 200
"""Ranks that are looked up in the other list."""
NUM_USERS = 40
WHAT_IF_TOP_K = 10
MAX_LISTED = 2_000
"""Items of a catalog that are handed to the browser to choose from; of a larger one, those that match a text."""
MAX_EVENTS = 32


def show_user(workspace: Workspace, user: int | str | None) -> None:
    """Draw the history, the record, the tail, and the counters."""
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
    left, right = st.columns([4, 7], gap="large")
    with left:
        st.markdown("#### Tail")
        st.caption(f"The newest {len(facts.tail)} events, which the record stores unchanged. Newest first.")
        _show_tail(facts, has_time=scorer.model.schema.has_time)
    with right:
        if facts.counters or history is None:
            st.markdown("#### Counters")
            _show_counters(facts)
        else:
            st.markdown("#### Most frequent items")
            _show_frequent(workspace, history)


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
    missing = facts.num_missing
    lacks = f"The log has {missing:,} newer events that the record does not cover." if missing else None
    cells = [
        ("Events in the log", "–" if facts.num_events is None else f"{facts.num_events:,}", None),
        ("Events in the record", f"{facts.num_covered:,}", lacks),
        ("Summary", f"{tokens} x {dim}", f"{tokens} tokens of {dim} numbers"),
        ("Newest event", shown_time(facts.newest_at)[:10], None),
        ("Record written", shown_time(facts.created_at)[:10], None),
    ]
    for column, (label, value, note) in zip(st.columns(len(cells)), cells, strict=True):
        column.metric(label, value, help=note)


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
        field = st.selectbox("Field", fields, key="counters") or field
    st.caption(
        "Approximate numbers of events, and how long before the user's newest event the last one was. In columns with "
        "~, an event counts 1/e after so many days, or so many newer events."
    )
    rows = [dict(row) for row in facts.counters[field][:SHOWN_ROWS]]
    for row in rows:
        if "seconds since the last" in row:
            row["last"] = about(row.pop("seconds since the last"))
    sums = [name for row in rows[:1] for name in row if name.startswith("~")]
    formats = {name: st.column_config.NumberColumn(format="%.1f") for name in sums}
    formats["count"] = st.column_config.NumberColumn(format="%d")
    st.dataframe(pd.DataFrame(rows), hide_index=True, height=TABLE_HEIGHT, width="stretch", column_config=formats)


def _show_frequent(workspace: Workspace, history: Histories) -> None:
    st.caption("This model has no counters, so these are the most frequent items of the history, from the log.")
    has_time = workspace.log is not None and workspace.log.has_time
    rows = frequent_items(workspace, history, SHOWN_ROWS)
    shown = [{**row, "last": shown_time(row["last"]) if has_time else row["last"]} for row in rows]
    st.dataframe(pd.DataFrame(shown), hide_index=True, height=TABLE_HEIGHT, width="stretch")


NO_ATTENTION = "This is the model of epoch 0: its scores read neither the tail nor the summary by attention."


def show_ranking(workspace: Workspace, user: int | str | None) -> None:
    """Draw the best items for the user, and why they are the best."""
    if workspace.scorer is None or user is None:
        st.info("A ranking needs a model, its store, and a user.")
        return
    options = st.columns([2, 2, 2], vertical_alignment="bottom")
    with options[0]:
        scorer = chosen_task(workspace, "ranking-task")
    top_k = options[1].segmented_control("Items", RANKING_TOP_K, default=10, required=True, key="top-k") or 10
    exclude_tail = options[2].toggle(
        "Hide the tail's items", key="exclude-tail", help="Leave out the items of the tail. Scores do not change."
    )
    now = request_time(user, scorer)
    if now is not None:
        st.caption(f"Request time: {shown_time(now)} (UTC), now or 30 days after the newest event, if that is earlier.")
    with st.spinner("Ranking the catalog …"):
        ranking = explained_ranking(workspace, scorer, user, top_k=top_k, now=now, exclude_tail=exclude_tail)
    if ranking is None:
        st.info("No item has a score: the catalog is empty, or all items were left out.")
        return
    if not record_of(scorer, user).found[0]:
        text = f"User {escaped(user)} has no record, so this is the ranking for a new user: by the items alone."
        st.warning(text, icon=":material/person_off:")
    names = [f"{place + 1}. {name}" for place, name in enumerate(ranking.names)]
    place = st.selectbox(
        "Explain", range(len(names)), format_func=lambda place: names[place], key=f"explain-{user}-{top_k}", width=420
    )
    st.info(ranking.reason(place), icon=":material/lightbulb:")
    value_name = "the log-odds" if ranking.is_probability else "the score"
    st.markdown("#### What raises the best items above the average item")
    parts = [part for part, shares in ranking.explanation.shares.items() if np.any(shares)]
    st.altair_chart(parts_chart(ranking.rows(), parts, value_name), width="stretch")
    of_probability = " (0 for a probability of 50 %, +2 for 88 %, and −2 for 12 %)" if ranking.is_probability else ""
    st.caption(
        f"The contributions of an item add up to {value_name}{of_probability} minus the mean over the catalog, "
        f"{ranking.explanation.mean:.2f}. They say what the model adds, not what it would lose without a part."
    )
    if not scorer.model.reads_attention:
        st.caption(NO_ATTENTION)
    elif events := ranking.tail_events(place):
        st.markdown(f"#### Tail events of rank {place + 1}")
        st.altair_chart(tail_chart(events), width="stretch")
    with st.expander("All numbers"):
        formats = {part: st.column_config.NumberColumn(format="%+.3f") for part in ranking.explanation.shares}
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


def show_comparison(workspace: Workspace, user: int | str | None) -> None:
    """Draw two models, two stores, or two generations."""
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
    when = " Requests come now, or 30 days after a user's newest event in A and B, if that is earlier."
    st.caption(f"Ranked by `{a.task}`.{when * a.model.schema.has_time}")
    left, right = st.columns([5, 4], gap="large")
    with left:
        st.markdown(f"#### User {escaped(user)}")
        compared = compare_rankings(workspace, a, b, user, top_k=COMPARED_TOP_K, listed=LISTED)
        for name, has in (("A", compared.a_has_record), ("B", compared.b_has_record)):
            if not has:
                st.warning(f"User {escaped(user)} has no record in store {name}.", icon=":material/person_off:")
        st.markdown(f"**{compared.shared} of {COMPARED_TOP_K}** best items are in both lists.")
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
            overlap = overlap_of_users(key, a, b, users, COMPARED_TOP_K)
        one, two = st.columns(2)
        one.metric(f"Shared of the best {COMPARED_TOP_K}", f"{overlap.overlap.mean():.0%}")
        two.metric("Same first item", f"{overlap.same_first:.0%}")
        st.altair_chart(overlap_chart(overlap.overlap.tolist(), COMPARED_TOP_K), width="stretch")
        st.caption(f"{len(users)} random users.")


def choose_other(workspace: Workspace, scorer: Scorer) -> tuple[tuple[Any, ...], Scorer, Scorer] | None:
    """The choice of B; returns a name for the pair, and both scorers, of one task; None without a choice."""
    places, choices = workspace.places, dict[str, int | None]()
    if places.other_model is not None or places.other_store is not None:
        model = f"model {places.other_model}, " if places.other_model is not None else ""
        choices[f"{model}store {without_password(places.other_store or places.store)}"] = None
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


def show_what_if(workspace: Workspace, user: int | str | None) -> None:
    """Draw the ranking after events that the user could add."""
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
        changed = what_if(workspace, scorer, user, events, now=request_time(user, scorer), top_k=WHAT_IF_TOP_K)
    st.info(changed.summary(WHAT_IF_TOP_K), icon=":material/lightbulb:")
    left, right = st.columns([3, 4], gap="large")
    with left:
        st.markdown("#### Ranks")
        st.altair_chart(slope_chart(changed.rows, WHAT_IF_TOP_K), width="stretch")
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


def show_results(workspace: Workspace, user: int | str | None) -> None:
    """Draw whether the summary helps."""
    st.markdown("#### Does the summary help?")
    st.caption(
        "Compares the quality on held-out events with the stored summaries to that with the summary of an empty "
        "history, by number of events. Needs a store that ends before the test labels: `store` or `other_store`."
    )
    places, log = workspace.places, workspace.log
    if workspace.scorer is None or log is None:
        st.info("This needs a model, its store, and the log.")
        return
    stores = [places.store]
    if places.other_store is not None and places.other_model is None:
        stores.insert(0, places.other_store)
    if not st.button("Measure", icon=":material/query_stats:", type="primary") and "benefit" not in st.session_state:
        return
    st.session_state.benefit = True
    refused: list[str] = []
    for store in stores:
        try:
            with st.spinner("Measuring with and without summaries …"):
                benefit = measured_benefit(places, store, log)
        except VistaError as error:
            refused.append(str(error))
            continue
        reads = workspace.scorer.model.reads_attention
        answer = benefit.answer() if reads else f"{NO_ATTENTION} So without summaries, they are the same."
        st.info(answer, icon=":material/lightbulb:")
        rows, table = benefit.table(), st.container()
        if not reads:
            rows = [{"group": row["group"], "users": row["users"], benefit.metric: row["with"]} for row in rows]
        elif measured := [row for row in rows if np.isfinite(row["gain"])]:
            chart, table = st.columns(2, gap="large")
            chart.altair_chart(benefit_chart(measured, benefit.metric), width="stretch")
        formats = {name: st.column_config.NumberColumn(format="%.3f") for name in list(rows[0])[2:]}
        table.dataframe(pd.DataFrame(rows), hide_index=True, width="stretch", column_config=formats)
        trained = "The model was trained with summaries; one trained without may do better. ± is half of the 95 % "
        of_store = (
            f"Store `{without_password(store)}`, which ends before the test labels. Users without labels are left out. "
        )
        table.caption(of_store + (trained + "interval of the gain.") * reads)
        return
    for message in refused:
        st.warning(escaped(message), icon=":material/warning:")


def show_store(workspace: Workspace, user: int | str | None) -> None:
    """Draw the generations, what the records lack, and a verification; it works without a model, too."""
    rows, problems = generation_rows(workspace.places.store)
    sample = None
    if workspace.scorer is not None:
        sample = _show_health(workspace, workspace.scorer)
    for problem in problems:
        st.error(escaped(problem), icon=":material/error:")
    st.markdown("#### Generations")
    st.dataframe(pd.DataFrame(rows), hide_index=True, width="stretch")
    st.caption(
        "Bytes per user are those of the database pages that records take. Files also hold free pages, and states for "
        "incremental refreshes. Vectors are the summary's tokens, and one more in a model with pooled vectors."
    )
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
        ("Behind the log", _share(sample.behind, sample.num_users), f"{of_sample}: records that lack events"),
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
