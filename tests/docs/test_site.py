"""The documentation site: what breaks its build, and the build of this repository's own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from docs.build_site import PAGES_ELSEWHERE, ROOT, SiteError, build, pages_of_nav
from docs.check_links import check_site, check_sources
from docs.generate_reference import reference_pages

pytest.importorskip("zensical", reason="the extra `docs` is not installed")


NOTEBOOK = [
    {"cell_type": "markdown", "source": ["# One\n", "\n", "[first](../guides/first.md), [this one](one.ipynb)"]},
    {
        "cell_type": "code",
        "source": ["print('links[0](none.ipynb)')"],
        "outputs": [
            {"output_type": "stream", "name": "stdout", "text": ["printed\n", "[0](none.ipynb)\n"]},
            {"output_type": "execute_result", "data": {"text/plain": ["a result"]}},
        ],
    },
]


def write(root: Path, pages: dict[str, str]) -> None:
    for name, text in pages.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with a small site, whose settings are this repository's."""
    settings, _ = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")
    _, extensions = (ROOT / "mkdocs.yml").read_text().split("\nmarkdown_extensions:\n")
    pages = ("guides/first.md", "reference/made.md", "notebooks/one.md")
    nav = "nav:\n  - index.md\n  - Guides:\n" + "".join(f"      - {page}\n" for page in pages)
    write(
        tmp_path,
        {
            "mkdocs.yml": f"{settings}\n{nav}\nmarkdown_extensions:\n{extensions}",
            "README.md": "# Top\n\n[docs](docs/index.md#a--b), [conf](conf)\n",
            "conf/small.yaml": "dim: 8\n",
            "kernels/README.md": "# Kernels\n\n## Measured\n\n[top](../docs/index.md), [code](kernel.py)\n",
            "kernels/kernel.py": "",
            "docs/figure.svg": "<svg xmlns='http://www.w3.org/2000/svg'/>",
            "docs/index.md": "# Home\n\n## A & `B`\n\n[first](guides/first.md#the_end), ![figure](figure.svg) "
            "[notebook](notebooks/one.ipynb) [rows](results/rows.md) ![chart](results/chart.png)\n",
            "docs/notebooks/one.ipynb": json.dumps({"cells": NOTEBOOK}),
            "docs/guides/first.md": "# First\n\n[home](../index.md#a--b) [made](../reference/made.md#part)\n"
            "[small][s] [kernels](../../kernels/README.md#measured) [away](https://example.org)\n\n"
            "[s]: ../../conf/small.yaml\n\n"
            "```python no-run: needs a GPU\nnames[name](no_link)\n```\n\n`names[name](no_link)`\n\n## The_end\n",
            "docs/results/rows.md": "# Rows\n",
            "docs/results/chart.png": "",
            "docs/build.py": "",
            "docs/site.css": "",
        },
    )
    return tmp_path


GENERATED = {"reference/made.md": "# Made\n\n## Part\n\n[first](../guides/first.md)\n"}


def test_a_site_without_broken_links_is_built(root: Path) -> None:
    site = build(root, GENERATED)
    first = (site / "guides" / "first.html").read_text()
    assert 'href="../repository/conf/small.yaml.txt"' in first
    assert 'href="../explanation/kernels.html#measured"' in first
    assert (site / "repository" / "conf" / "small.yaml.txt").read_text() == "dim: 8\n"
    assert 'href="../repository/kernels/kernel.py.txt"' in (site / "explanation" / "kernels.html").read_text()
    home = (site / "index.html").read_text()
    assert 'href="repository/docs/results/rows.md.txt"' in home and 'src="repository/docs/results/chart.png"' in home
    assert not (site / "results").exists()
    assert "no-run" not in first and "language-python" in first
    assert not list(site.rglob("*.py"))
    assert 'href="notebooks/one.html"' in (site / "index.html").read_text()
    notebook = (site / "notebooks" / "one.html").read_text()
    assert 'href="../guides/first.html"' in notebook and 'href="one.ipynb"' in notebook and "none.ipynb" in notebook
    assert "printed\n[0](none.ipynb)\na result\n" in re.sub(r"<[^>]+>", "", notebook)
    assert (site / "notebooks" / "one.ipynb").is_file()
    for name in ("guides/first.html", "figure.svg", "reference/made.html"):
        (site / name).unlink()
    missing = "\n".join(check_site(site, pages_of_nav(root)))
    for problem in (
        "index.html: guides/first.html#the_end does not exist",
        "index.html: figure.svg does not exist",
        "reference/made.md: the site has no such page, or it has no title",
    ):
        assert problem in missing


BROKEN_LINKS = [
    ("docs/index.md", "[x](guides/none.md)", "guides/none.md does not exist"),
    ("docs/index.md", "[x](guides/first.md#none)", "guides/first.md#none has no such heading"),
    ("docs/index.md", "[x](#none)", "#none has no such heading"),
    ("docs/index.md", "![x](none.svg)", "none.svg does not exist"),
    ("docs/index.md", '<img src="other.svg">', "other.svg does not exist"),
    ("docs/index.md", "[d]: none.md", "none.md does not exist"),
    ("docs/index.md", "[x](../conf/none.yaml)", "../conf/none.yaml does not exist"),
    ("docs/index.md", "[x](../conf)", "../conf is a folder"),
    ("docs/index.md", "[x](../../other.md)", "../../other.md leads out of the repository"),
    ("kernels/README.md", "[x](none.py)", "none.py does not exist"),
    ("README.md", "[x](docs/none.md)", "docs/none.md does not exist"),
    ("README.md", "[x](docs/index.md#none)", "docs/index.md#none has no such heading"),
    ("README.md", "[x](docs/reference/made.md)", "docs/reference/made.md exists on the site only"),
]


def test_broken_links_of_the_sources_break_the_build(root: Path) -> None:
    expected = []
    for page, link, problem in BROKEN_LINKS:
        text = (root / page).read_text()
        (root / page).write_text(f"{text}{link}\n")
        expected.append(f"{page}:{text.count(chr(10)) + 1}: {problem}")
    with pytest.raises(SiteError) as error:
        build(root, GENERATED)
    found = str(error.value).splitlines()
    assert len(found) == len(expected) and all(any(one in line for line in found) for one in expected), found


@pytest.mark.parametrize(
    ("links", "problems"),
    [
        (["[x](reference/made.md#none)"], ["](reference/made.md#none)"]),
        (["::: no.such.name"], ["Could not collect 'no.such.name'"]),
        (
            ['<img src="https://example.org/x.png">'],
            ["index.html: loads https://example.org/x.png", "none.md: the site has no such page"],
        ),
    ],
    ids=["a generated page", "a name of the API", "an image of another server, and a page that is missing"],
)
def test_broken_links_of_the_site_break_the_build(root: Path, links: list[str], problems: list[str]) -> None:
    (root / "docs" / "index.md").write_text("\n".join([(root / "docs" / "index.md").read_text(), *links, ""]))
    if len(problems) > 1:
        settings = (root / "mkdocs.yml").read_text()
        (root / "mkdocs.yml").write_text(settings.replace("nav:\n", "nav:\n  - none.md\n"))
    with pytest.raises(SiteError) as error:
        build(root, GENERATED)
    for problem in problems:
        assert problem in str(error.value)


def test_links_of_the_sources_lead_somewhere() -> None:
    assert check_sources(ROOT, {*reference_pages(), *PAGES_ELSEWHERE.values()}) == []


@pytest.mark.docs
def test_the_site_of_this_repository() -> None:
    pages = pages_of_nav(ROOT)
    assert len(pages) == len(set(pages)) > 20
    site = build(ROOT, reference_pages())
    assert "max_age_s" in (site / "reference" / "api.html").read_text()
