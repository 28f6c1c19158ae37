"""Finds links that lead nowhere: in the Markdown sources of the repository, and in the HTML of the built site."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

SOURCES = ("*.md", "kernels/*.md", "docs/**/*.md")
"""Markdown files whose links are checked, as patterns below the root of the repository."""

_FENCE = re.compile(r"^ *(`{3,}|~{3,})")
LINK = re.compile(
    r"(?P<code>`+[^`]+`+)"
    r"|(?P<before>\]\(<?)(?P<target>[^)\s>]+)"
    r"|(?P<define>^ {0,3}\[[^\]]+\]: *<?)(?P<defined>[^\s>]+)"
    r"|(?P<attribute>\b(?:src|href)=\")(?P<value>[^\"]+)"
)
"""A Markdown link, a link definition, or the attribute of an HTML tag; inline code is matched to be passed over."""


def lines_outside_code(text: str) -> Iterator[tuple[int, str]]:
    """Index and text of the lines that are not part of a fenced block."""
    fence = ""
    for index, line in enumerate(text.splitlines()):
        mark = _FENCE.match(line)
        if mark and (not fence or mark[1].startswith(fence)):
            fence = "" if fence else mark[1]
        elif not fence:
            yield index, line


def target_of(link: re.Match[str]) -> str | None:
    """Where a match of LINK leads; None where it is inline code or leads out of the repository."""
    target = link["target"] or link["defined"] or link["value"]
    return None if target is None or urlsplit(target).scheme else str(target)


def anchors_of(page: Path) -> frozenset[str]:
    """Anchors that GitHub and the site make of a Markdown page's headings, and those that the page names itself."""
    anchors = set()
    for _, line in lines_outside_code(page.read_text(encoding="utf-8")):
        anchors.update(re.findall(r"<[^>]+ (?:id|name)=\"([^\"]+)\"", line))
        heading = re.match(r"#{1,6} +(.*?)(?: +\{#(\S+)\})?$", line)
        if heading:
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1])
            anchors.add(heading[2] or re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-"))
    return frozenset(anchors)


def check_sources(root: Path, generated: Collection[str] = ()) -> list[str]:
    """Links of Markdown sources that lead to no file, or to no heading of a Markdown file.

    Args:
        root: folder of the repository.
        generated: pages of the site that are not files of docs/, by their path below docs/. Only pages of the site can
            link to them.

    Returns:
        One line per broken link, which names page, line and target.
    """
    problems = []
    for page in sorted({path for pattern in SOURCES for path in root.glob(pattern)}):
        name = page.relative_to(root).as_posix()
        on_site = name.startswith(("docs/", "kernels/"))
        for index, line in lines_outside_code(page.read_text(encoding="utf-8")):
            for target in filter(None, map(target_of, LINK.finditer(line))):
                problem = _problem(root, page, target, generated, on_site=on_site)
                if problem:
                    problems.append(f"{name}:{index + 1}: {target} {problem}")
    return problems


def _problem(root: Path, page: Path, target: str, generated: Collection[str], *, on_site: bool) -> str | None:
    parts = urlsplit(target)
    path = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if not path.is_relative_to(root.resolve()):
        return "leads out of the repository"
    if path.relative_to(root.resolve()).as_posix() in {f"docs/{name}" for name in generated}:
        # Its anchors are checked in the built site.
        return None if on_site else "exists on the site only; link to docs/index.md"
    if not path.exists():
        return "does not exist"
    if path.is_dir() and on_site:
        return "is a folder; link to a file, which the site can show"
    if parts.fragment and path.suffix == ".md" and parts.fragment not in anchors_of(path):
        return "has no such heading"
    return None


class _Html(HTMLParser):
    """Anchors and links of one HTML page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        """What a browser fetches to show the page."""
        self.has_title = False
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value is not None}
        self.anchors.update(values[name] for name in ("id", "name") if name in values)
        self.has_title |= tag == "h1"
        if "href" in values:
            (self.loaded if tag == "link" else self.links).append(values["href"])
        if "src" in values:
            self.loaded.append(values["src"])


def check_site(site: Path, pages: Sequence[str]) -> list[str]:
    """Pages that were not made, links that lead nowhere, and files that a page would load from another host.

    Args:
        site: folder of the built site.
        pages: Markdown pages that it must have, by their path below docs/.

    Returns:
        One line per problem.
    """
    # The error page is shown at any address, so its links begin with a slash.
    html = {path.resolve(): _Html(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}
    problems = []
    for name in pages:
        made = html.get((site / name).with_suffix(".html").resolve())
        if made is None or not made.has_title:
            problems.append(f"{name}: the site has no such page, or it has no title")
    for path, page in html.items():
        name = path.relative_to(site.resolve()).as_posix()
        problems += [f"{name}: loads {url}" for url in page.loaded if urlsplit(url).netloc]
        for url in [*page.links, *page.loaded]:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                problems.append(f"{name}: {url} does not exist")
            elif parts.fragment and target in html and unquote(parts.fragment) not in html[target].anchors:
                problems.append(f"{name}: {url} has no such anchor")
    return problems
