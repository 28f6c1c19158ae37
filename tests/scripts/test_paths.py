"""The counts of the files that a call passes through."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.paths import BARS, files_of_jobs


@pytest.mark.research
def test_each_job_passes_through_its_command(tmp_path: Path) -> None:
    files = files_of_jobs(tmp_path)
    assert files.keys() == BARS.keys()
    assert files["warm score"] < files["HTTP score"]
    assert min(map(len, files.values())) >= 5
    parts = {job: {part for name in names for part in Path(name).parts} for job, names in files.items()}
    assert "vista_kernels" in parts["train"] and "log" in parts["ingest"] and "store" in parts["refresh"]
