"""The page of a report: sections of text, tables, and charts in one HTML file without scripts or other resources.

Charts are inline SVG, whose text and colors come from the style sheet of the page.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby

from vista.evaluation.comparison import Estimate

# The policy forbids loading anything, so a page cannot depend on a network by mistake.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{verdict}
{intro}
<nav><ol>{contents}</ol></nav>
{sections}
</main>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --muted: #5b6570; --line: #d5dae0; --back: #ffffff; --soft: #f4f6f8;
  --c0: #0072b2; --c1: #d55e00; --c2: #00875f; --c3: #b35a95; --c4: #8a6d00; --c5: #3b8fc4; --c6: #6b7480; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8ec; --muted: #9aa5b1; --line: #3a424b; --back: #15191e;
  --soft: #1e242b; --c0: #56b4e9; --c1: #f08a4b; --c2: #2fbf93; --c3: #d993c0; --c4: #d9b948; --c5: #8fd0f5;
  --c6: #a5afba; } }
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 1rem 0 .5rem; }
h2 { font-size: 1.2rem; margin: 1.6rem 0 .3rem; padding-top: .6rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .2rem; }
p { margin: .4rem 0 .8rem; overflow-wrap: anywhere; }
p.finding { font-weight: 600; }
.verdict { background: var(--soft); border-left: 4px solid var(--c0); padding: .5rem 1rem; margin: 1rem 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 0 2rem; }
nav ol { padding-left: 1.4rem; columns: 3 14rem; }
a { color: var(--c0); }
.note, figcaption, caption { color: var(--muted); font-size: .85rem; text-align: left; }
.table { overflow-x: auto; margin: .6rem 0 1rem; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem .2rem 0; text-align: right; border-bottom: 1px solid var(--line); }
td { white-space: nowrap; }
th { vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: min(13rem, 40vw); }
table.text th, table.text td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
tr.own td { font-weight: 600; background: var(--soft); }
figure { margin: .8rem 0; }
figure svg { width: 100%; max-width: 29rem; height: auto; display: block; }
svg text { font: 13px system-ui, sans-serif; fill: var(--text); }
@media (min-width: 40rem) { svg text { font-size: 11px; } }
svg .axis { stroke: var(--line); fill: none; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1rem; padding: 0; margin: .2rem 0;
  font-size: .85rem; }
.legend span { display: inline-block; width: .8rem; height: .8rem; border-radius: 50%; margin-right: .35rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft); padding: .7rem; font-size: .8rem; }
details { margin: .6rem 0; }
summary { cursor: pointer; }
"""

_WIDTH, _HEIGHT = 480, 250
"""Of the view of a chart, so that text of 13 px stays readable on a screen of 400 px."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 22, 12, 46
_NUM_COLORS = 7
MAX_NAME = 32
"""Most characters of a line of a name in a chart."""


@dataclass(frozen=True, slots=True)
class PageSection:
    """A part of the page."""

    title: str
    finding: str
    """One sentence that says what the section shows."""
    body: list[str] = field(default_factory=list)
    """HTML below the sentence."""
    is_narrow: bool = False
    """Whether it fits next to another section."""


def render_page(title: str, verdict: Sequence[str], intro: Sequence[str], sections: Sequence[PageSection]) -> str:
    """The complete page.

    Args:
        verdict: sentences below the title.
        intro: HTML paragraphs above the table of contents.
    """
    contents, parts = [], []
    for number, section in enumerate(sections, 1):
        contents.append(f'<li><a href="#s{number}">{escape(section.title)}</a></li>')
        head = f'<h2 id="s{number}">{escape(section.title)}</h2>\n<p class="finding">{escape(section.finding)}</p>'
        parts.append("\n".join([f"<section>\n{head}", *section.body, "</section>"]))
    pages = [
        "\n".join(part for _, part in group) if not narrow else pair(*(part for _, part in group))
        for narrow, group in groupby(zip(sections, parts, strict=True), key=lambda each: each[0].is_narrow)
    ]
    return _PAGE.format(
        title=escape(title),
        verdict='<div class="verdict">' + "".join(map(_answer, verdict)) + "</div>",
        style=_STYLE,
        intro="\n".join(intro),
        contents="".join(contents),
        sections="\n".join(pages),
    )


def _answer(line: str) -> str:
    """A paragraph that begins with a question."""
    question, mark, answer = line.partition("?")
    return f"<p><b>{escape(question + mark)}</b>{escape(answer)}</p>"


def paragraph(text: str, kind: str = "note") -> str:
    """A paragraph of plain text; kind: its class in the style sheet."""
    return f'<p class="{kind}">{escape(text)}</p>'


def heading(text: str) -> str:
    """A heading within a section."""
    return f"<h3>{escape(text)}</h3>"


def table(
    head: Sequence[str], rows: Iterable[Sequence[object]], *, own: str | None = None, is_text: bool = False
) -> str:
    """A table; the first column names the row.

    Args:
        head: heads of the columns.
        rows: their cells.
        own: name of the row that is emphasized.
        is_text: whether cells hold text, which wraps, instead of numbers.
    """
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
    lines = [f"<thead><tr>{lines[0]}</tr></thead>"]
    for row in rows:
        mark = ' class="own"' if own is not None and str(row[0]) == own else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>")
    return f'<div class="table"><table{" class=text" * is_text}>' + "\n".join(lines) + "</table></div>"


def preformatted(text: str) -> str:
    """Text as it is."""
    return f"<pre>{escape(text)}</pre>"


def folded(title: str, *body: str) -> str:
    """HTML that opens on a click."""
    return f"<details><summary>{escape(title)}</summary>{''.join(body)}</details>"


def pair(*charts: str) -> str:
    """Charts or sections next to each other where the screen is wide enough."""
    return f'<div class="pair">{"".join(charts)}</div>'


@dataclass(frozen=True, slots=True)
class Series:
    """A line of a chart."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    """As many as x; NaN leaves a gap."""
    interval: Sequence[tuple[float, float]] | None = None
    """Ends of an error bar for each point."""
    color: int = 0
    """Number of a color of the page."""
    dashed: bool = False
    has_points: bool = True


@dataclass(frozen=True, slots=True)
class _Axis:
    """A scale from values to coordinates."""

    low: float
    high: float
    begin: float
    end: float
    is_log: bool = False

    def at(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.is_log else (self.low, self.high)
        value = math.log(value) if self.is_log else value
        return self.begin + (value - low) / (high - low) * (self.end - self.begin)

    def ticks(self) -> list[float]:
        """Round numbers within the axis."""
        if self.is_log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            values = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
            inside = [value for value in values if self.low <= value <= self.high]
            return inside if len(inside) < 6 else [value for value in inside if f"{value:e}"[0] == "1"]
        rough = (self.high - self.low) / 5
        step = 10.0 ** math.floor(math.log10(rough))
        step *= next(factor for factor in (1, 2, 5, 10) if factor * step >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [step * n for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    x_names: Sequence[str] | None = None,
    log_x: bool = False,
    from_zero: bool = False,
) -> str:
    """A chart of lines, with a legend above.

    Args:
        series: at least one point in all.
        x_label, y_label: what the axes show, with units.
        x_names: names of the values 0, 1, … of x, instead of numbers.
        log_x: a logarithmic scale; x must be positive.
        from_zero: let the vertical axis begin at 0.
    """
    shown = [(x, y) for each in series for x, y in zip(each.x, each.y, strict=True) if math.isfinite(y)]
    if not shown:
        return ""
    ends = [y for each in series for pair in each.interval or () for y in pair if math.isfinite(y)]
    x_values, y_values = [x for x, _ in shown], [y for _, y in shown] + ends
    x_low, x_high = _range(x_values, log_x, 0.0) if x_names is None else (-0.5, len(x_names) - 0.5)
    y_low, y_high = _range([0.0, *y_values] if from_zero else y_values, False, 0.06)
    x_axis = _Axis(x_low, x_high, _LEFT, _WIDTH - _RIGHT, log_x)
    y_axis = _Axis(0.0 if from_zero else y_low, y_high, _HEIGHT - _BOTTOM, _TOP)
    parts = _y_lines(y_axis)
    if x_names is None:
        for tick in x_axis.ticks():
            parts.append(_text(x_axis.at(tick), _HEIGHT - _BOTTOM + 18, f"{tick:,.6g}", "middle"))
    else:
        for index, name in enumerate(x_names):
            parts.append(_text(x_axis.at(index), _HEIGHT - _BOTTOM + 18, name, "middle"))
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, x_label, "middle"))
    for index, each in enumerate(series):
        # Error bars of several lines at the same x would cover each other.
        shift = 0.0 if each.interval is None else (index - (len(series) - 1) / 2) * 5
        parts += _line(each, x_axis, y_axis, shift)
    return _figure(series, parts, y_label, _HEIGHT)


def interval_chart(rows: Sequence[tuple[str, Estimate]], *, own: str, x_label: str) -> str:
    """A point and its interval per row, one below the other; the row named `own` has another color."""
    rows = [(name, each) for name, each in rows if math.isfinite(each.value)]
    if not rows:
        return ""
    lines = [textwrap.wrap(name, MAX_NAME) for name, _ in rows]
    left, step = 16 + 7 * max(len(line) for each in lines for line in each), 26
    height = _TOP + step * len(rows) + _BOTTOM // 2
    low, high = _range(
        [end for _, each in rows for end in (each.value, *each.ends()) if math.isfinite(end)], False, 0.06
    )
    axis = _Axis(low, high, left, _WIDTH - _RIGHT)
    parts, bottom = [], height - _BOTTOM // 2
    for tick in axis.ticks():
        x = axis.at(tick)
        parts.append(f'<path class="axis" d="M{x:.1f} {_TOP}V{bottom}"/>')
        parts.append(_text(x, bottom + 18, f"{tick:,.6g}", "middle"))
    for index, (name, each) in enumerate(rows):
        y, color = _TOP + step * (index + 0.5), 0 if name == own else 6
        for place, line in enumerate(lines[index]):
            parts.append(_text(left - 10, y + 4 + 12 * (place - (len(lines[index]) - 1) / 2), line, "end"))
        low, high = (axis.at(end) if math.isfinite(end) else axis.at(each.value) for end in each.ends())
        parts.append(f'<path d="M{low:.1f} {y:.1f}H{high:.1f}" stroke="var(--c{color})" stroke-width="2"/>')
        parts.append(f'<circle cx="{axis.at(each.value):.1f}" cy="{y:.1f}" r="4.5" fill="var(--c{color})"/>')
    return _figure([], parts, x_label, height)


def _range(values: Sequence[float], is_log: bool, margin: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    if is_log:
        grow = (high / low) ** margin if high > low else 1.5
        return low / grow, high * grow
    grow = (high - low) * margin if high > low else abs(high) * 0.1 or 1.0
    return low - grow, high + grow


def _y_lines(axis: _Axis) -> list[str]:
    parts = []
    for tick in axis.ticks():
        y = axis.at(tick)
        parts.append(f'<path class="axis" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(_text(_LEFT - 8, y + 4, f"{tick:,.6g}", "end"))
    return parts


def _line(series: Series, x_axis: _Axis, y_axis: _Axis, shift: float) -> list[str]:
    color = f"var(--c{series.color % _NUM_COLORS})"
    commands, parts, pen_up = [], [], True
    for index, (x, y) in enumerate(zip(series.x, series.y, strict=True)):
        if not math.isfinite(y):
            pen_up = True
            continue
        place = f"{x_axis.at(x) + shift:.1f} {y_axis.at(y):.1f}"
        commands.append(("M" if pen_up else "L") + place)
        pen_up = False
        if series.has_points:
            left, top = place.split()
            parts.append(f'<circle cx="{left}" cy="{top}" r="3.5" fill="{color}"/>')
        if series.interval is not None and all(map(math.isfinite, series.interval[index])):
            low, high = (f"{y_axis.at(end):.1f}" for end in series.interval[index])
            parts.append(f'<path d="M{place.split()[0]} {low}V{high}" stroke="{color}" stroke-width="1.5"/>')
    dash = ' stroke-dasharray="5 4"' if series.dashed else ""
    return [f'<path d="{"".join(commands)}" fill="none" stroke="{color}" stroke-width="2"{dash}/>', *parts]


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _figure(series: Sequence[Series], parts: Sequence[str], label: str, height: float) -> str:
    entries = "".join(
        f'<li><span style="background:var(--c{each.color % _NUM_COLORS})"></span>{escape(each.name)}</li>'
        for each in series
    )
    legend = f'<ul class="legend">{entries}</ul>' if entries else ""
    title = f"<figcaption>{escape(label)}</figcaption>"
    svg = f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
    return f"<figure>{title}{legend}{svg}</figure>"
