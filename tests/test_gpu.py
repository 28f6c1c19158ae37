"""What must hold on a GPU: the operators agree with the oracle, and a model trains, refreshes and scores there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import small_config
from tests.kernels.test_operators import RAGGED, err
from vista.data.event_log import EventLog
from vista.refresh import refresh
from vista.scorer import Scorer
from vista.training.trainer import train
from vista_kernels import accumulate_state, causal_linear_attention, quasi_linear_attention, read_state

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use (`make test-gpu` runs these)"),
]


@pytest.mark.parametrize(
    "name", ["accumulate_state", "read_state", "quasi_linear_attention", "causal_linear_attention"]
)
def test_operators_on_the_gpu_agree_with_the_oracle(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(RAGGED), 2, 16, generator=generator, dtype=torch.float64) for _ in range(3))
    offsets = torch.tensor([0, *RAGGED]).cumsum(0)

    def run(device: str, dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
        a, b, c = (x.detach().clone().to(device, dtype).requires_grad_() for x in (q, k, v))
        at = offsets.to(device)
        if name == "accumulate_state":
            out = accumulate_state(b, c, at, backend=backend)[0]
        elif name == "read_state":
            z = c.new_ones(len(RAGGED), 2, 16, 16)
            out = read_state(a, z, z[:, :, 0, 0], at, backend=backend)
        elif name == "quasi_linear_attention":
            out = quasi_linear_attention(a, b, c, at, backend=backend)
        else:
            out = causal_linear_attention(a, b, c, at, backend=backend)[0]
        out.square().sum().backward()
        return [out.detach(), *(x.grad for x in (a, b, c) if x.grad is not None)]

    exact = run("cpu", torch.float64, "reference")
    for ours, truth in zip(run("cuda", torch.float32, "auto"), exact, strict=True):
        assert err(ours.cpu(), truth) <= 1e-4 * float(truth.abs().max())


def test_train_refresh_and_score_on_the_gpu(event_log: EventLog, tmp_path: Path) -> None:
    model = train(small_config(event_log, tmp_path / "run", device="cuda"), event_log)
    assert model.device.type == "cuda"
    refresh(model, event_log, tmp_path / "store")
    with (
        Scorer.open(tmp_path / "run" / "best", tmp_path / "store", device="cuda") as gpu,
        Scorer.open(tmp_path / "run" / "best", tmp_path / "store") as cpu,
    ):
        scores = gpu.score([100, 103], [0, 10, 390])
        np.testing.assert_allclose(scores, cpu.score([100, 103], [0, 10, 390]), atol=0.05)
