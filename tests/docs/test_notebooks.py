"""The notebooks of docs/ run from the first cell to the last."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.run_page import ROOT, TIME_LIMIT_S, environment

nbformat = pytest.importorskip("nbformat", reason="the extra `docs` is not installed")
nbclient = pytest.importorskip("nbclient", reason="the extra `docs` is not installed")

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def execute(notebook: Path, folder: Path) -> None:
    """Run a notebook with a kernel in `folder`.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    client = nbclient.NotebookClient(
        nbformat.read(notebook, as_version=4),
        timeout=TIME_LIMIT_S,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=environment())


@pytest.mark.docs
@pytest.mark.timeout(TIME_LIMIT_S + 60)
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook: Path, tmp_path: Path) -> None:
    execute(notebook, tmp_path)


@pytest.mark.docs
def test_a_notebook_that_raises_fails(tmp_path: Path) -> None:
    cells = ["import vista", "from pathlib import Path\nPath('made').touch()", "1 / 0", "Path('not reached').touch()"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbformat.write(notebook, tmp_path / "raises.ipynb")
    (tmp_path / "folder").mkdir()
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="ZeroDivisionError"):
        execute(tmp_path / "raises.ipynb", tmp_path / "folder")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["made"]
