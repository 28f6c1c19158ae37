"""The page of a report: sections of text, tables, and charts in one HTML file without scripts or other resources."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

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
main { max-width: 46rem; margin: 0 auto; padding: 1rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 1rem 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .3rem; padding-top: .6rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .2rem; }
p { margin: .4rem 0 .8rem; overflow-wrap: anywhere; }
p.finding { font-weight: 600; }
nav ol { padding-left: 1.4rem; columns: 2 14rem; }
a { color: var(--c0); }
.note, figcaption, caption { color: var(--muted); font-size: .85rem; text-align: left; }
.table { overflow-x: auto; margin: .6rem 0 1rem; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem .2rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 7rem; }
table.text th, table.text td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
tr.own td { font-weight: 600; background: var(--soft); }
figure { margin: .8rem 0; }
figure svg { width: 100%; max-width: 40rem; height: auto; display: block; }
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


@dataclass(frozen=True, slots=True)
class PageSection:
    """A part of the page."""

    title: str
    finding: str
    """One sentence that says what the section shows."""
    body: list[str] = field(default_factory=list)
    """HTML below the sentence."""


def render_page(title: str, intro: Sequence[str], sections: Sequence[PageSection]) -> str:
    """The complete page.

    Args:
        intro: HTML paragraphs above the table of contents.
    """
    contents, parts = [], []
    for number, section in enumerate(sections, 1):
        contents.append(f'<li><a href="#s{number}">{escape(section.title)}</a></li>')
        head = f'<h2 id="s{number}">{escape(section.title)}</h2>\n<p class="finding">{escape(section.finding)}</p>'
        parts.append("\n".join([f"<section>\n{head}", *section.body, "</section>"]))
    return _PAGE.format(
        title=escape(title),
        style=_STYLE,
        intro="\n".join(intro),
        contents="".join(contents),
        sections="\n".join(parts),
    )


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


def folded(title: str, text: str) -> str:
    """Preformatted text that opens on a click."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"
