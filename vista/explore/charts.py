"""The page's charts, with one color per meaning on all tabs."""

from __future__ import annotations

from typing import Any

import altair as alt
import pandas as pd

from vista.explore.user_page import OTHER, Timeline
from vista.log.histories import DAY_MS
from vista.scorer.explanation import PARTS

SUMMARY, TAIL, COUNTERS, NEUTRAL = "#2f6fb0", "#e2803a", "#3f9b73", "#9aa0a8"
PART_COLORS = dict(
    zip(PARTS, (COUNTERS, "#c2587a", "#e3a3b5", "#5aa9b8", "#a08d2f", "#d3c36b", TAIL, SUMMARY, "#b3bac3"), strict=True)
)
KIND_COLORS = ("#2f6fb0", "#74a9d8", "#3f9b73", "#e2803a", "#8766b5", "#c9a227")
UP, DOWN = "#3f9b73", "#c8553d"
GRID, TEXT, FONT = "#eceef1", "#3c4450", "Source Sans, Source Sans Pro, sans-serif"
BAR_HEIGHT = 24
MAX_LABEL_PX = 260
NAME: dict[str, Any] = {"color": TEXT, "limit": 110}
"""How the name of an item is written next to a line."""


def timeline_chart(line: Timeline, *, has_time: bool) -> Any:
    """Events over time by kind; a line marks where the tail begins."""
    frame = pd.DataFrame(line.rows)
    kind: Any = "temporal" if has_time else "quantitative"
    colors = [KIND_COLORS[place] if name != OTHER else NEUTRAL for place, name in enumerate(line.kinds)]
    title = None if has_time else "position in the log"
    many_months = has_time and frame["time"].max() - frame["time"].min() > 180 * DAY_MS
    axis = alt.Axis(format="%b %Y", labelOverlap=True) if many_months else alt.Axis()
    bars = (
        alt.Chart(frame)
        .mark_bar(stroke="white", strokeWidth=0.5)
        .encode(
            x=alt.X("time", type=kind, title=title, axis=axis),
            x2="end",
            y=alt.Y("below:Q", title="events"),
            y2="above",
            color=_color("kind", line.kinds, colors, line.kind_name),
            tooltip=[
                alt.Tooltip("time", type=kind, title="from"),
                alt.Tooltip("kind:N", title=line.kind_name),
                alt.Tooltip("events:Q"),
            ],
        )
    )
    if line.tail_from is None:
        return _styled(bars, 260)
    mark = pd.DataFrame([{"time": line.tail_from, "text": "tail"}])
    rule = alt.Chart(mark).mark_rule(color=TAIL, strokeWidth=2).encode(x=alt.X("time", type=kind))
    label = (
        alt.Chart(mark)
        .mark_text(color=TAIL, align="right", dx=-6, y=8, fontWeight="bold")
        .encode(x=alt.X("time", type=kind), text="text")
    )
    return _styled(bars + rule + label, 260)


def parts_chart(rows: list[dict[str, Any]], parts: list[str], value_name: str) -> Any:
    """What raises ranked items above the average item, as stacked bars, the best item on top."""
    long = [
        {"item": f"{row['rank']}. {row['item']}", "part": part, "share": row[part], "order": place}
        for row in rows
        for place, part in enumerate(parts)
    ]
    order = [f"{row['rank']}. {row['item']}" for row in rows]
    chart = (
        alt.Chart(pd.DataFrame(long))
        .mark_bar(height={"band": 0.72})
        .encode(
            y=alt.Y("item:N", sort=order, title=None, axis=_item_labels()),
            x=alt.X("share:Q", title=f"contribution to {value_name}", axis=alt.Axis(tickCount=10)),
            color=_color("part", parts, [PART_COLORS[part] for part in parts], None),
            order=alt.Order("order:Q"),
            tooltip=["item:N", "part:N", alt.Tooltip("share:Q", format="+.3f")],
        )
    )
    return _styled(chart, BAR_HEIGHT * len(rows) + 96)


def tail_chart(rows: list[dict[str, Any]]) -> Any:
    """Shares of the tail's events, the newest event first."""
    chart = (
        alt.Chart(pd.DataFrame(rows))
        .mark_bar(color=TAIL)
        .encode(
            x=alt.X("age:O", title="event of the tail, 1 is the newest", axis=_flat_labels("parity")),
            y=alt.Y("share:Q", title="share", scale=alt.Scale(nice=5)),
            tooltip=["age:O", "item:N", alt.Tooltip("share:Q", format="+.4f")],
        )
    )
    return _styled(chart, 270)


def slope_chart(rows: list[dict[str, Any]], top_k: int) -> Any:
    """Ranks before and after, one line with the item's name per item that is among the best before or after; items
    beyond the list are below."""
    last = top_k + 1
    points = []
    for row in [row for row in rows if min(row["before"] or last, row["after"] or last) <= top_k]:
        change = row["change"]
        moved = "same" if change == 0 else "up" if change is None or change > 0 else "down"
        if row["after"] is None:
            moved = "down"
        for when, rank in (("before", row["before"]), ("after", row["after"])):
            points.append({"item": row["item"], "when": when, "rank": min(rank or last, last), "moved": moved})
    lines = (
        alt.Chart(pd.DataFrame(points))
        .mark_line(point=alt.OverlayMarkDef(size=60, filled=True), strokeWidth=2.5)
        .encode(
            x=alt.X("when:N", sort=["before", "after"], title=None, axis=_flat_labels(orient="top")),
            y=alt.Y(
                "rank:Q",
                scale=alt.Scale(domain=[last + 0.3, 0.7], nice=False, zero=False),
                title="rank",
                axis=alt.Axis(
                    values=list(range(1, last + 1)), labelExpr=f"datum.value == {last} ? 'below' : datum.value"
                ),
            ),
            color=_color("moved", ["up", "same", "down"], [UP, NEUTRAL, DOWN], None),
            detail="item:N",
            tooltip=["item:N", "when:N", "rank:Q"],
        )
    )
    names = alt.Chart(pd.DataFrame([point for point in points if point["rank"] < last]))
    left = names.transform_filter("datum.when == 'before'").mark_text(align="right", dx=-10, **NAME)
    right = names.transform_filter("datum.when == 'after'").mark_text(align="left", dx=10, **NAME)
    texts = [side.encode(x=lines.encoding.x, y=lines.encoding.y, text="item:N") for side in (left, right)]
    return _styled(alt.layer(lines, *texts), 30 * last + 80)


def benefit_chart(rows: list[dict[str, Any]], metric: str) -> Any:
    """Quality with and without the summary: two points per group of users, joined by a line."""
    groups, sides = [row["group"] for row in rows], ["without the summary", "with it"]
    long = [
        {"group": row["group"], "summary": side, "value": row[key]}
        for row in rows
        for side, key in zip(sides, ("without", "with"), strict=True)
    ]
    group, scale = alt.Y("group:N", sort=groups, title=None, axis=_item_labels()), alt.Scale(zero=False, padding=24)
    lines = (
        alt.Chart(pd.DataFrame(rows))
        .mark_rule(color="#c5ccd4", strokeWidth=3)
        .encode(y=group, x=alt.X("without:Q", title=metric, scale=scale, axis=alt.Axis(tickCount=4)), x2="with")
    )
    points = (
        alt.Chart(pd.DataFrame(long))
        .mark_circle(size=150, opacity=1)
        .encode(
            y=group,
            x=alt.X("value:Q", scale=scale),
            color=_color("summary", sides, [NEUTRAL, SUMMARY], None),
            tooltip=["group:N", "summary:N", alt.Tooltip("value:Q", format=".4f")],
        )
    )
    return _styled(lines + points, 34 * len(rows) + 100)


def coverage_chart(rows: list[dict[str, Any]]) -> Any:
    """Events of the log against events of the record; points below the line are behind."""
    most = max((max(row["events"], row["covered"]) for row in rows), default=1)
    diagonal = pd.DataFrame([{"events": 0, "covered": 0}, {"events": most, "covered": most}])
    line = alt.Chart(diagonal).mark_line(color="#c5ccd4", strokeWidth=2).encode(x="events:Q", y="covered:Q")
    points = (
        alt.Chart(pd.DataFrame(rows))
        .mark_circle(size=36, color=SUMMARY, opacity=0.55)
        .encode(
            x=alt.X("events:Q", title="events in the log"),
            y=alt.Y("covered:Q", title="events in the record"),
            tooltip=["events:Q", "covered:Q"],
        )
    )
    return _styled(line + points, 260)


def overlap_chart(shares: list[float], top_k: int) -> Any:
    """How many users share how many of the best items."""
    rows = [{"shared": round(share * top_k), "users": 1} for share in shares]
    chart = (
        alt.Chart(pd.DataFrame(rows))
        .mark_bar(color=SUMMARY, cornerRadiusEnd=2)
        .encode(
            x=alt.X(
                "shared:O",
                title=f"shared items of the best {top_k}",
                scale=alt.Scale(domain=list(range(top_k + 1))),
                axis=_flat_labels(),
            ),
            y=alt.Y("sum(users):Q", title="users", axis=alt.Axis(tickMinStep=1)),
        )
    )
    return _styled(chart, 250)


def _color(field: str, names: list[str], colors: list[str], title: str | None) -> Any:
    legend = alt.Legend(orient="top", title=title, symbolType="square", labelLimit=MAX_LABEL_PX)
    return alt.Color(f"{field}:N", scale=alt.Scale(domain=names, range=colors), legend=legend)


def _flat_labels(overlap: Any = alt.Undefined, orient: Any = alt.Undefined) -> Any:
    return alt.Axis(labelAngle=0, labelOverlap=overlap, labelFlush=False, orient=orient)


def _item_labels() -> Any:
    return alt.Axis(
        labelLimit=MAX_LABEL_PX, labelOverlap=False, labelFlush=False, ticks=False, domain=False, labelPadding=8
    )


def _styled(chart: Any, height: int) -> Any:
    return (
        chart.properties(height=height, background="transparent")
        .configure_view(stroke=None)
        .configure_axis(
            gridColor=GRID, domainColor="#d5d9df", tickColor="#d5d9df", labelColor=TEXT, titleColor=TEXT,
            titleFontWeight="normal", labelFont=FONT, titleFont=FONT, labelFontSize=12, titleFontSize=12,
            labelFlush=False,
        )
        .configure_axisX(grid=False)
        .configure_legend(labelColor=TEXT, titleColor=TEXT, labelFont=FONT, titleFont=FONT, labelFontSize=12)
        .configure_title(color=TEXT, font=FONT)
    )  # fmt: skip
