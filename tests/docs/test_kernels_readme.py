"""The code of kernels/README.md runs as it is, and computes what it says."""

from __future__ import annotations

from typing import Any

import torch

from tests.docs.page import steps_of
from tests.docs.run_page import ROOT


def test_kernels_readme_and_its_code() -> None:
    page = ROOT / "kernels" / "README.md"
    assert "MEASURED" not in page.read_text()
    (step,) = steps_of(page)
    names: dict[str, Any] = {}
    exec(compile(step.code, str(page), "exec"), names)
    k, v, time = (names[name][:5] for name in ("k", "v", "time"))
    weight = torch.exp(-(40 - time)[:, None] / names["tau"]).float()
    weight[3] = 0
    z, n = names["accumulate_state"](k, v, torch.tensor([0, 5]), weight=weight)
    torch.testing.assert_close(names["forgot"], (z, n), rtol=1e-4, atol=1e-4)
    assert names["out"].shape == (1, 4, 500, 16)
