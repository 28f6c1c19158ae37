"""Makes a page of the site of every notebook: its text, code, and stored outputs, and a link to download it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docs.check_links import LINK, lines_outside_code

NOTEBOOKS = "notebooks"
"""Folder of the notebooks below docs/, and of their pages in the site."""


def page_of_notebook(name: str) -> str:
    """Path of a notebook's page, by the path of the notebook; both are below docs/."""
    return name.removesuffix(".ipynb") + ".md"


def notebook_pages(root: Path) -> dict[str, str]:
    """Markdown of every notebook, by its path below docs/."""
    paths = sorted((root / "docs" / NOTEBOOKS).glob("*.ipynb"))
    return {page_of_notebook(f"{NOTEBOOKS}/{path.name}"): "\n".join(_page(path)) for path in paths}


def _page(notebook: Path) -> Iterator[str]:
    for number, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"]):
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            yield f"```python\n{text}\n```\n"
            if output := "".join(map(_output_text, cell["outputs"])):
                yield f"````text\n{output}````\n"
            continue
        lines = text.splitlines()
        for index, line in lines_outside_code(text):
            lines[index] = LINK.sub(lambda link: link[0].replace(".ipynb", ".md"), line)
        yield "\n".join(lines) + "\n"
        if number == 0:
            yield f"[Download this notebook]({notebook.name}), and run it with Jupyter.\n"


def _output_text(output: dict[str, Any]) -> str:
    """What the cell printed, or the plain text of its result, which ends in a newline."""
    text = "".join(output["text"] if "text" in output else output["data"]["text/plain"])
    return text if text.endswith("\n") else f"{text}\n"
