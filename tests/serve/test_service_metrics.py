"""The numbers of several workers as one page."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import vista

pytest.importorskip("prometheus_client", reason="the extra `serve` is not installed")

WORKER = """
from vista.serve.service_metrics import ServiceMetrics
metrics = ServiceMetrics()
metrics.users.labels("default", "hit").inc(3)
print(metrics.page().decode())
"""


def test_files_without_content_are_left_out(tmp_path: Path) -> None:
    """As of workers that have just started, or that were killed then."""
    pages = []
    for place in range(2):
        for kind in ("counter", "histogram", "gauge_livesum"):
            (tmp_path / f"{kind}_{place}.db").touch()
        root = Path(vista.__file__).parents[1]
        path = os.pathsep.join([str(root), str(root / "kernels")])
        environment = {**os.environ, "PYTHONPATH": path, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", WORKER], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        pages.append(done.stdout)
    assert 'vista_users_total{model="default",outcome="hit"} 3.0' in pages[0]
    assert 'vista_users_total{model="default",outcome="hit"} 6.0' in pages[1]
