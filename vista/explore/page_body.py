"""The page below its title: what is in service, the choice of a user, and the tabs."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import streamlit as st

from vista.config import ExploreConfig
from vista.errors import VistaError, without_password
from vista.explore.page_cache import SCORERS, user_search, workspace_of
from vista.explore.tabs import show_comparison, show_ranking, show_results, show_store, show_user, show_what_if
from vista.explore.user_page import Freshness, store_freshness
from vista.explore.workspace import Places, UserSearch, Workspace, escaped, record_of

logger = logging.getLogger(__name__)
SHOWN_MATCHES = 8
STATUS_EVERY_S = 10
Tab = Callable[[Workspace, "int | str | None"], None]
TABS: dict[str, Tab] = {
    "User": show_user,
    "Ranking": show_ranking,
    "What if": show_what_if,
    "Compare": show_comparison,
    "Store": show_store,
    "Results": show_results,
}


def show_page(config: ExploreConfig) -> None:
    """Draw the page for a configuration."""
    try:
        places = Places.of(config)
    except VistaError as error:
        st.error(escaped(error))
        return
    with SCORERS.lending():
        workspace = workspace_of(places)
        if "names" in workspace.problems:
            st.warning(
                f"Items are shown by their ids. {escaped(workspace.problems['names'])}", icon=":material/warning:"
            )
        show_status(places, drawn=workspace.scorer.store.generation if workspace.scorer else None)
        with st.sidebar:
            user = choose_user(workspace)
        tabs = st.tabs(list(TABS), key="tab", bind="query-params")
        for tab, (name, show) in zip(tabs, TABS.items(), strict=True):
            if tab.open:
                with tab:
                    try:
                        show(workspace, user)
                    except VistaError as error:
                        st.error(escaped(error), icon=":material/error:")
                    except (ValueError, TypeError) as error:  # as of `Scorer.rank`; the log has the traceback
                        logger.exception("the tab %s of user %r could not be drawn", name, user)
                        st.error(escaped(error), icon=":material/error:")


@st.fragment(run_every=STATUS_EVERY_S)
def show_status(places: Places, drawn: int | None) -> None:
    """Show the generation in service and whether it is fresh; rerun every few seconds. `drawn`: the generation that the
    page shows; None if the model or the store could not be opened."""
    with SCORERS.lending():
        workspace = workspace_of(places)
        if workspace.scorer is None:
            hint = " Run `make demo` first, or name a model and its store." if places.is_demo else ""
            st.error(f"{escaped(workspace.problems['model'])}{hint}", icon=":material/error:")
            return
        manifest = workspace.scorer.manifest
        if manifest.generation != drawn:
            st.rerun()
        fresh = store_freshness(manifest, workspace.log)
        color = {Freshness.fresh: "green", Freshness.partial: "blue", Freshness.behind: "orange"}.get(
            fresh.state, "gray"
        )
        badges = [
            f":blue-badge[:material/database: generation {manifest.generation} is served]",
            f":{color}-badge[:material/schedule: {fresh.state.value}]",
            f":gray-badge[:material/group: {manifest.count:,} users]",
        ]
        st.markdown(" ".join(badges), help=fresh.reason)
        st.caption(f"model `{places.model}`  ·  store `{without_password(places.store)}`")


def choose_user(workspace: Workspace) -> int | str | None:
    """The search for a user in the sidebar; returns the one that is shown."""
    search = user_search(workspace)
    if "user" not in st.session_state:
        linked = search.exact(st.query_params.get("user", ""))
        st.session_state.user = search.heavy_user(np.random.default_rng(0)) if linked is None else linked
    st.text_input(
        "Find a user",
        key="search",
        placeholder="id or first characters",
        icon=":material/search:",
        on_change=_take_exact,
        args=(search, workspace.places),
    )
    if text := st.session_state.get("search", ""):
        show_matches(search, text)
    st.button(
        "A random heavy user",
        icon=":material/casino:",
        on_click=lambda: _set_user(search.heavy_user(np.random.default_rng())),
        width="stretch",
    )
    user: int | str | None = st.session_state.user
    if user is None:
        st.info("There are no users to show yet.")
        return None
    st.query_params["user"] = str(user)
    st.markdown(f"#### User {escaped(user)}")
    st.caption(f"of {len(search):,} users")
    return user


def show_matches(search: UserSearch, text: str) -> None:
    """Buttons of the users whose id begins with the text."""
    found = search.matches(text, SHOWN_MATCHES + 1)
    for user in found[:SHOWN_MATCHES]:
        st.button(escaped(user), key=f"user-{user}", on_click=_set_user, args=(user,), type="tertiary")
    if not found:
        st.caption(f"No user's id begins with “{escaped(text)}”.")
    elif len(found) > SHOWN_MATCHES:
        st.caption("… and more: type more characters.")


def _take_exact(search: UserSearch, places: Places) -> None:
    """Show the user at once if the text is the id of one, in the log or in the store."""
    user = search.exact(st.session_state.search)
    if user is None:
        return
    is_known = bool((search.users.rows([user]) >= 0).any())
    if not is_known:
        try:
            with SCORERS.lending():
                scorer = workspace_of(places).scorer
                is_known = scorer is not None and bool(record_of(scorer, user).found[0])
        except VistaError as error:
            st.error(escaped(error), icon=":material/error:")
    if is_known:
        st.session_state.user = user


def _set_user(user: int | str | None) -> None:
    st.session_state.user = user
    st.session_state.search = ""
