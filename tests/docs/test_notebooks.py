"""The notebooks of docs/ run from the first cell to the last, and their outputs are the stored ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.run_page import ROOT, TIME_LIMIT_S

nbformat = pytest.importorskip("nbformat", reason="the extra `docs` is not installed")
nbclient = pytest.importorskip("nbclient", reason="the extra `docs` is not installed")

from tests.docs.run_notebook import NotebookFailed, check_notebook, lines_of, update_notebook  # noqa: E402

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.docs
@pytest.mark.timeout(TIME_LIMIT_S + 60)
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_prints_what_it_shows(notebook: Path, tmp_path: Path) -> None:
    check_notebook(notebook, tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


def write(path: Path, *cells: str, tags: tuple[str, ...] = ()) -> Path:
    made = [nbformat.v4.new_code_cell(cell, metadata={"tags": list(tags)}) for cell in cells]
    nbformat.write(nbformat.v4.new_notebook(cells=made), path)
    return path


@pytest.mark.docs
def test_a_notebook_that_raises_fails(tmp_path: Path, folder: Path) -> None:
    cells = ["import vista", "from pathlib import Path\nPath('made').touch()", "1 / 0", "Path('not reached').touch()"]
    notebook = write(tmp_path / "raises.ipynb", *cells)
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="ZeroDivisionError"):
        check_notebook(notebook, folder)
    assert [path.name for path in folder.iterdir()] == ["made"]


@pytest.mark.docs
def test_stored_outputs_are_compared(tmp_path: Path, folder: Path) -> None:
    notebook = write(tmp_path / "prints.ipynb", "print('AUC 0.70 in 1.5 s: 3,000 users/s')\n'result'")
    with pytest.raises(NotebookFailed, match=r"(?s)not the stored one but\nAUC 0.70.*'result'"):
        check_notebook(notebook, folder)
    assert update_notebook(notebook) and not update_notebook(notebook)
    (cell,) = nbformat.read(notebook, as_version=4).cells
    assert lines_of(cell) == ["AUC 0.70 in 1.5 s: 3,000 users/s", "'result'"]
    for printed, same in (("AUC 0.75 in 9.5 s: 17 users/s", True), ("AUC 0.90 in 1.5 s: 3,000 users/s", False)):
        cell.source = f"print({printed!r})\n'result'"
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), notebook)
        if same:
            check_notebook(notebook, folder)
        else:
            with pytest.raises(NotebookFailed, match=r"AUC 0\.90"):
                check_notebook(notebook, folder)


@pytest.mark.docs
def test_a_cell_that_varies_needs_an_output_but_not_the_stored_one(tmp_path: Path, folder: Path) -> None:
    notebook = write(tmp_path / "varies.ipynb", "import time\nprint(time.time_ns())", tags=("varies",))
    with pytest.raises(NotebookFailed, match="not the stored one"):
        check_notebook(notebook, folder)
    assert update_notebook(notebook)
    check_notebook(notebook, folder)
