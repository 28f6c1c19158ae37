"""The tab "Results": whether the summary helps, and tables of results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import streamlit as st

from vista.config import ExploreConfig
from vista.errors import DataError, VistaError
from vista.explore.charts import benefit_chart, metric_chart
from vista.explore.explore_workspace import Workspace
from vista.explore.markdown_text import escaped
from vista.explore.page_cache import measured_benefit
from vista.explore.result_tables import read_table, result_files
from vista.runs.metric_order import better_values

MAX_MODELS = 30


def show_results(workspace: Workspace, user: int | str | None) -> None:
    """Draw the tab."""
    _show_benefit(workspace)
    _show_tables(workspace)


def _show_benefit(workspace: Workspace) -> None:
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
        st.info(benefit.answer(), icon=":material/lightbulb:")
        left, right = st.columns(2, gap="large")
        rows = benefit.table()
        if measured := [row for row in rows if np.isfinite(row["gain"])]:
            left.altair_chart(benefit_chart(measured, benefit.metric), width="stretch")
        formats = {name: st.column_config.NumberColumn(format="%.3f") for name in ("with", "without", "±")}
        formats["gain"] = st.column_config.NumberColumn(format="%+.3f")
        right.dataframe(pd.DataFrame(rows), hide_index=True, width="stretch", column_config=formats)
        right.caption(
            f"Store `{store}`. The model was trained with summaries; one trained without may do better. ± is half of "
            "the 95 % interval of the gain over users."
        )
        return
    for message in refused:
        st.warning(escaped(message), icon=":material/warning:")


def _show_tables(workspace: Workspace) -> None:
    st.markdown("#### Tables")
    folder = workspace.places.results
    files = result_files(folder)
    if not files:
        st.info(
            f"There are no result files in {escaped(folder)}. Write one with `vista evaluate out=...`, or name another "
            "folder with results=..."
        )
        return
    if folder == Path(ExploreConfig().results):
        st.caption("These are results of this repository's own experiments, not of your model.")
    left, right = st.columns(2)
    file = left.selectbox("Table", files, format_func=lambda path: path.stem, key="table", index=_first(files))
    try:
        table = read_table(file)
    except DataError as error:
        st.warning(escaped(error), icon=":material/warning:")
        return
    metric = right.selectbox("Metric", table.metrics, key=f"metric-{table.name}")
    values = table.values(metric)
    if len(values) > MAX_MODELS:
        which = "best" if better_values(metric) else "highest"
        st.caption(f"The {MAX_MODELS} {which} of {len(values)} rows; all are in the table below.")
    st.altair_chart(metric_chart(values[:MAX_MODELS], metric), width="stretch")
    columns = {name: st.column_config.NumberColumn(format="%.4f") for name in table.metrics}
    columns["model"] = st.column_config.TextColumn(width="medium", pinned=True)
    st.dataframe(pd.DataFrame(table.rows), hide_index=True, width="stretch", column_config=columns)


def _first(files: list[Path]) -> int:
    """The table of the simulation, which the demo resembles, if it is there."""
    names = [path.stem for path in files]
    return names.index("simulation") if "simulation" in names else 0
