"""The tab "Training": curves of runs."""

from __future__ import annotations

from typing import Any

import pandas as pd
import streamlit as st

from vista.config.config_keys import value_text
from vista.explore.charts import curve_chart
from vista.explore.explore_workspace import Workspace
from vista.explore.markdown_text import escaped
from vista.explore.run_curves import RunCurves
from vista.runs.run_files import is_run

MAX_CURVES = 12
PER_ROW = 3


def show_training(workspace: Workspace, user: int | str | None) -> None:
    """Draw the tab."""
    runs: list[RunCurves] = []
    for folder in workspace.places.runs:
        if is_run(folder):
            runs.append(RunCurves.of(folder))
        else:
            st.warning(f"`{folder}` is not a run folder.", icon=":material/folder_off:")
    if not runs:
        st.info("There are no runs to show. Name run folders of `vista train` with runs=[...].")
        return
    formats = {"best": "%.4f", "steps": "localized", "seconds": "%.0f", "parameters": "localized"}
    columns = {name: st.column_config.NumberColumn(format=form) for name, form in formats.items()}
    rows = [_row(run) for run in runs]
    st.dataframe(pd.DataFrame(rows), hide_index=True, width="stretch", column_config=columns)
    for run in runs:
        for problem in run.problems:
            st.warning(f"`{run.summary.name}`: {escaped(problem)}.", icon=":material/warning:")
    chosen = runs
    if len(runs) > 1:
        names = [run.summary.name for run in runs]
        kept = st.multiselect("Runs", names, default=names[:6], key="runs")
        chosen = [run for run in runs if run.summary.name in kept]
    best = chosen[0].best_step if len(chosen) == 1 else None
    for title, kind in (("Validation", "validation"), ("Training", "training")):
        names = list(dict.fromkeys(name for run in chosen for name in run.names(kind)))
        if not names:
            continue
        st.markdown(f"#### {title}")
        if kind == "validation" and best is not None:
            st.caption(f"The dashed line marks step {best:,}, whose model is the best and was exported.")
        first = _default(names)
        if len(names) > len(first):
            first = st.multiselect("Curves", names, default=first, key=f"curves-{kind}", max_selections=MAX_CURVES)
        _show_curves(chosen, kind, first, best)
    _show_settings(chosen)


def _default(names: list[str]) -> list[str]:
    """The curves that are shown by default: well-known metrics if there are any, otherwise the first curves."""
    wanted = [name for name in names if name in ("loss", "ndcg@10", "hr@10", "next", "learning_rate")]
    wanted += [name for name in names if name.startswith(("auc/", "ne/")) or name == "gradient_norm"]
    return list(dict.fromkeys(wanted))[:6] or names[:6]


def _show_curves(runs: list[RunCurves], kind: str, names: list[str], best: int | None) -> None:
    for low in range(0, len(names), PER_ROW):
        for column, name in zip(st.columns(PER_ROW), names[low : low + PER_ROW], strict=False):
            if rows := [row for run in runs for row in run.curve(kind, name)]:
                column.altair_chart(curve_chart(rows, name, best if kind == "validation" else None), width="stretch")


def _row(run: RunCurves) -> dict[str, Any]:
    summary = run.summary
    return {
        "run": summary.name,
        "state": summary.state,
        "metric": summary.metric,
        "best": summary.best,
        "best epoch": summary.epoch,
        "epochs": run.epochs,
        "steps": run.last_step,
        "seconds": summary.seconds,
        "parameters": summary.parameters,
    }


def _show_settings(runs: list[RunCurves]) -> None:
    for run in runs:
        if run.summary.settings:
            with st.expander(f"Settings of {escaped(run.summary.name)}"):
                st.code("\n".join(f"{key}={value_text(value)}" for key, value in run.summary.settings.items()), None)
