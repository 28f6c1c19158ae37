"""The plot of quality against minutes draws the curves of result files, or says which table to run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.experiments import plot_minutes
from scripts.experiments.minutes_rectools import MODELS

pytestmark = pytest.mark.research
TABLE = "newcomer-ml-latest-small"


def line(model: str, **values: Any) -> str:
    fields = {"table": TABLE, "data": "ml-latest-small", "model": model, "seed": 1, "config": {}, "command": "c"}
    return json.dumps({**fields, "commit": "c", "hardware": {}, "seconds": 1.0, "metrics": {"ndcg@10": 0.1}, **values})


def test_curves_become_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--results", str(tmp_path), "--out", str(tmp_path / "minutes.png")]
    (tmp_path / f"{TABLE}.jsonl").write_text(line("popularity") + "\n")
    assert plot_minutes.main(words) == 1
    assert "has a curve; run scripts.experiments.reproduce ml-1m-20min or newcomer-cj or " in capsys.readouterr().err
    (tmp_path / f"{TABLE}.jsonl").write_text("{}\n")
    assert plot_minutes.main(words) == 1 and "line 1: result: missing keys" in capsys.readouterr().err
    curves = [line("vista", curve=[[60, 0.1], [120, 0.2]]), line("hstu", curve=[[60, 0.05]]), line("popularity")]
    curves += [line(f"RecTools {model}", curve=[[60, 0.1]]) for model in MODELS]
    (tmp_path / f"{TABLE}.jsonl").write_text("\n".join(curves) + "\n")
    assert plot_minutes.main(words) == 0
    assert (tmp_path / "minutes.png").read_bytes().startswith(b"\x89PNG")


def test_the_results_of_this_repository_can_be_drawn(tmp_path: Path) -> None:
    assert plot_minutes.main(["--out", str(tmp_path / "minutes.png")]) == 0
