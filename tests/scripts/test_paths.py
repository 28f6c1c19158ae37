"""The counts of the files that a call passes through."""

from __future__ import annotations

from pathlib import Path

import pytest

import vista.text_table
from scripts.paths import BARS, code_lines, files_of_jobs, recording, sizes_of_tree


def test_only_functions_that_are_called_count() -> None:
    """Neither a class that is imported nor the function of a library counts."""
    source = compile(
        "class Body: fitted = fitted('a')\n", str(Path(vista.__file__).parent / "body.py"), "exec", dont_inherit=True
    )
    with recording() as files:
        exec(source, {"fitted": vista.text_table.fitted})
        Path("x").is_absolute()
    assert not files
    with recording() as files:
        vista.text_table.fitted("a")
    assert files == {vista.text_table.__file__}


def test_lines_of_code_and_imports() -> None:
    assert code_lines('"""Two\nlines."""\n\n# comment\nfrom a import (\n    b,\n)\n\nx = 1\n') == (4, 3)


def test_sizes_of_this_tree() -> None:
    sizes = sizes_of_tree()
    assert 100 < int(sizes["files of vista"].replace(",", "")) < 1000
    assert 200 < int(sizes["configuration keys"]) < 600


@pytest.mark.research
def test_each_job_passes_through_its_command(tmp_path: Path) -> None:
    files = files_of_jobs(tmp_path)
    assert files.keys() == BARS.keys()
    assert files["warm score"] < files["HTTP score"]
    assert min(map(len, files.values())) >= 5
    parts = {job: {part for name in names for part in Path(name).parts} for job, names in files.items()}
    assert "vista_kernels" in parts["train"] and "log" in parts["ingest"] and "store" in parts["refresh"]
