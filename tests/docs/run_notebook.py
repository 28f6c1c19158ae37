"""Runs the notebooks of docs/, compares their outputs with the stored ones, and stores new ones.

A notebook stores what its cells print and the plain text of their results. As in pages with `within 20 %`, decimal
numbers may differ by a fifth. Times, speeds, and percentages are not compared, and neither are the outputs of cells
with the tag `varies`, which depend on the processor.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import nbclient
import nbformat

from tests.docs.page import matches
from tests.docs.run_page import TIME_LIMIT_S, environment

TOLERANCE = 0.2
VARIES = "varies"
_MEASURED = re.compile(r"\d[\d,.]*(?= s\b|%|M? (?:users|events)/s)")


class NotebookFailed(AssertionError):
    """The output of a cell is not the stored one."""


def read_notebook(notebook: Path) -> nbformat.NotebookNode:
    """Read a notebook in the format of docs/."""
    node: nbformat.NotebookNode = nbformat.read(notebook, as_version=4)  # type: ignore[no-untyped-call]
    return node


def executed(notebook: Path, folder: Path) -> nbformat.NotebookNode:
    """Run a notebook with a kernel in `folder`, and return it with the new outputs; the file is left as it is.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    node = read_notebook(notebook)
    resources = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(
        node, timeout=TIME_LIMIT_S, startup_timeout=300, iopub_timeout=60, kernel_name="python3", resources=resources
    )
    client.execute(env=environment())
    for cell in node.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = list(filter(None, map(_plain, cell.outputs)))
    return node


def _plain(output: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    """What a page shows of an output: stdout, or a result's plain text."""
    if output.output_type == "stream":
        return output if output.name == "stdout" else None
    output.data = {"text/plain": output.data["text/plain"]}
    if "execution_count" in output:
        output.execution_count = None
    return output


def lines_of(cell: nbformat.NotebookNode) -> list[str]:
    """The stored lines of a code cell's outputs."""
    texts = [output.text if "text" in output else output.data["text/plain"] for output in cell.outputs]
    return [line for text in texts for line in text.splitlines()]


def changed_cells(stored: nbformat.NotebookNode, new: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """The new cells whose output is not the stored one, or for cells that vary, those without a stored output."""
    changed = []
    for old, cell in zip(stored.cells, new.cells, strict=True):
        if cell.cell_type != "code":
            continue
        shown, printed = ([_MEASURED.sub("#", line) for line in lines_of(each)] for each in (old, cell))
        varies = VARIES in cell.metadata.get("tags", ())
        if bool(shown) != bool(printed) or not (varies or matches(shown, printed, TOLERANCE)):
            changed.append(cell)
    return changed


def check_notebook(notebook: Path, folder: Path) -> None:
    """Run a notebook and compare its outputs with the stored ones.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
        NotebookFailed: an output is not the stored one.
    """
    for cell in changed_cells(read_notebook(notebook), executed(notebook, folder)):
        printed = "\n".join(lines_of(cell))
        raise NotebookFailed(f"{notebook}, cell {cell.id}: the output is not the stored one but\n{printed}")


def update_notebook(notebook: Path) -> bool:
    """Run a notebook in a temporary folder, store all outputs if one has changed, and return whether one has.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised; the notebook is then left as it was.
    """
    with tempfile.TemporaryDirectory() as folder:
        new = executed(notebook, Path(folder))
    changed = bool(changed_cells(read_notebook(notebook), new))
    if changed:
        nbformat.write(new, notebook)  # type: ignore[no-untyped-call]
    return changed
