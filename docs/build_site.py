"""Builds the documentation site into build/site and refuses broken links: `python -m docs.build_site`, or `make docs`.

The pages are put together in build/docs: those of docs/, the generated reference, the notebooks, and kernels/README.md.
Design notes, result rows, and the research log stay in the repository. Files of the repository that a page links to
become part of the site.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

from docs.check_links import LINK, check_site, check_sources, lines_outside_code, target_of
from docs.notebook_pages import NOTEBOOKS, notebook_pages, page_of_notebook

ROOT = Path(__file__).resolve().parent.parent
PAGES_ELSEWHERE = {"kernels/README.md": "explanation/kernels.md"}
"""Pages of the site that are not in docs/, and their path there."""
NOT_ON_SITE = ("design/", "results/", "research-log.md")
"""What the site leaves out, below docs/."""
FILES = "repository"
"""Folder of the site with the files of the repository that pages link to. All but images end in .txt, so that a browser
shows them."""


class SiteError(Exception):
    """The site could not be built, or one of its links is broken."""


class _NavLoader(yaml.SafeLoader):  # type: ignore[misc]
    """Reads mkdocs.yml without calling the functions that it names."""


_NavLoader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)


def pages_of_nav(root: Path) -> list[str]:
    """Markdown pages that mkdocs.yml lists, by their path below docs/."""

    def pages(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for inner in entry.values() if isinstance(entry, dict) else entry:
                yield from pages(inner)

    config = yaml.load((root / "mkdocs.yml").read_text(encoding="utf-8"), _NavLoader)
    return list(pages(config["nav"]))


def stage(root: Path, generated: Mapping[str, str]) -> None:
    """Put the site's pages together in build/docs."""
    staged = root / "build" / "docs"
    shutil.rmtree(staged, ignore_errors=True)
    left_out = [name.rstrip("/") for name in NOT_ON_SITE]
    ignored = shutil.ignore_patterns("*.py", "__pycache__", ".ipynb_checkpoints", *left_out)
    shutil.copytree(root / "docs", staged, ignore=ignored)
    sources = {path: path.relative_to(root / "docs").as_posix() for path in (root / "docs").rglob("*.md")}
    sources = {path: name for path, name in sources.items() if not name.startswith(NOT_ON_SITE)}
    sources |= {root / source: name for source, name in PAGES_ELSEWHERE.items()}
    texts = {name: _staged_text(root, path, name) for path, name in sources.items()}
    for name, text in {**texts, **generated}.items():
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        (staged / name).write_text(text, encoding="utf-8")


def _staged_text(root: Path, page: Path, name: str) -> str:
    """A page as the site needs it: links to where their targets are there, no words for the page tester."""
    text = page.read_text(encoding="utf-8")
    lines = re.sub(r"^( *```\w+) .*$", r"\1", text, flags=re.M).splitlines()
    for index, line in lines_outside_code(text):
        lines[index] = LINK.sub(lambda link: _staged_link(root, page, name, link), line)
    return "".join(f"{line}\n" for line in lines)


def _staged_link(root: Path, page: Path, name: str, link: re.Match[str]) -> str:
    target = target_of(link)
    parts = urlsplit(target or "")
    path = (page.parent / unquote(parts.path)).resolve()
    if not parts.path or not path.is_relative_to(root.resolve()) or path.is_dir():
        return link[0]
    source = path.relative_to(root.resolve()).as_posix()
    if source.startswith("docs/") and not source.removeprefix("docs/").startswith(NOT_ON_SITE):
        there = source.removeprefix("docs/")
        if there.startswith(f"{NOTEBOOKS}/"):
            there = page_of_notebook(there)
    elif source in PAGES_ELSEWHERE:
        there = PAGES_ELSEWHERE[source]
    elif not path.exists():
        return link[0]
    else:
        there = f"{FILES}/{source}" if path.suffix == ".png" else f"{FILES}/{source}.txt"
        copy = root / "build" / "docs" / there
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    moved = os.path.relpath(there, Path(name).parent)
    if parts.fragment and there.endswith(".md"):
        moved += f"#{parts.fragment}"
    before = link["before"] or link["define"] or link["attribute"]
    return f"{before}{moved}"


def build(root: Path, generated: Mapping[str, str]) -> Path:
    """Build the site and check it.

    Args:
        root: folder of the repository, with mkdocs.yml and docs/.
        generated: text of the reference pages, which are not in docs/, by their path below it.

    Returns:
        The folder of the site, build/site.

    Raises:
        SiteError: with one line per problem: a broken link or anchor, a page of the nav that is missing, a name of the
            Python API that was not found, or a docstring that was not understood.
    """
    site = root / "build" / "site"
    generated = {**generated, **notebook_pages(root)}
    if broken := check_sources(root, {*generated, *PAGES_ELSEWHERE.values()}):
        raise SiteError("\n".join(broken))
    stage(root, generated)
    shutil.rmtree(site, ignore_errors=True)
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict", "-f", str(root / "mkdocs.yml")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    output = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)  # colors
    if done.returncode != 0:
        raise SiteError(output)
    problems = [line for line in output.splitlines() if line.startswith(("griffe:", "mkdocstrings:"))]
    if problems := [*problems, *check_site(site, pages_of_nav(root))]:
        raise SiteError("\n".join(problems))
    return site


def main() -> int:
    """Build the site of this repository; exit code 1, and the problems on stderr, where it has broken links."""
    from docs.generate_reference import reference_pages

    try:
        site = build(ROOT, reference_pages())
    except SiteError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{site / 'index.html'}: {len(pages_of_nav(ROOT))} pages, no broken links")
    return 0


if __name__ == "__main__":
    sys.exit(main())
