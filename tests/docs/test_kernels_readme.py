"""The code of kernels/README.md runs as it is, and computes what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.docs.page import steps_of
from tests.docs.run_page import ROOT, check_page

PAGE = ROOT / "kernels" / "README.md"


def test_the_page_runs_and_prints_what_it_shows(tmp_path: Path) -> None:
    assert check_page(PAGE, tmp_path) == 1


def test_the_code_computes_what_the_page_says() -> None:
    (step,) = steps_of(PAGE)
    names: dict[str, Any] = {}
    exec(compile(step.code, str(PAGE), "exec"), names)
    k, v, time = (names[name][:5] for name in ("k", "v", "time"))
    weight = torch.exp(-(40 - time)[:, None] / names["tau"]).float()
    weight[3] = 0
    z, n = names["accumulate_state"](k, v, torch.tensor([0, 5]), weight=weight)
    torch.testing.assert_close(names["forgot"], (z, n), rtol=1e-4, atol=1e-4)
    assert names["out"].shape == (1, 4, 500, 16)
