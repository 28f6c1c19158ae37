"""The README's code runs as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import ratings_folder
from vista.cli.main import main

README = Path(__file__).resolve().parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), flags=re.M | re.S)


def test_python_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The notebook block first: it makes the run and the store that the first screen's block opens."""
    monkeypatch.chdir(tmp_path)
    serving, notebook = blocks("python")
    for block in (notebook, serving):
        exec(compile(block, str(README), "exec"), {})


def test_kernels_readme_and_its_code() -> None:
    text = (README.parent / "kernels" / "README.md").read_text()
    assert "MEASURED" not in text
    (block,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)
    names: dict[str, Any] = {}
    exec(compile(block, "kernels/README.md", "exec"), names)
    k, v, time = (names[name][:5] for name in ("k", "v", "time"))
    weight = torch.exp(-(40 - time)[:, None] / names["tau"]).float()
    weight[3] = 0
    z, n = names["accumulate_state"](k, v, torch.tensor([0, 5]), weight=weight)
    torch.testing.assert_close(names["forgot"], (z, n), rtol=1e-4, atol=1e-4)
    assert names["out"].shape == (1, 4, 500, 16)


def commands_of(document: Path, after: str) -> list[str]:
    """The lines of the first block of commands after some words of a document."""
    block = re.search(r"```\n(.*?)```", document.read_text().split(after)[1], flags=re.S)
    assert block is not None
    return block.group(1).strip().splitlines()


def run(command: str) -> None:
    """A line of the documents; training is cut short, and simulations are small."""
    words = shlex.split(command, comments=True)
    assert words[0] == "vista"
    short = words[1] == "train" and "--help" not in words
    extra = ["optim.epochs=1", "progress=false", "num_threads=1"] if short else []
    extra += ["num_users=24", "events_per_user=200"] if words[1] == "simulate" else []
    assert main([*words[1:], *extra]) == 0


def test_three_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a small ratings.dat of ml-1m's form."""
    monkeypatch.chdir(tmp_path)
    ratings_folder(Path("path/to/ml-1m"))
    section = README.read_text().split("## Three uses")[1].split("\n## ")[0]
    commands = [line for block in re.findall(r"```\n(.*?)```", section, flags=re.S) for line in block.splitlines()]
    assert len(commands) == 8
    for command in commands:
        run(command)
    printed = capsys.readouterr().out
    assert "ndcg@10" in printed and "user 1:" in printed and "user 2:" in printed


def test_second_task_over_the_same_summaries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    document = README.parent / "docs" / "simulation.md"
    for command in commands_of(document, "## A second task over the same summaries"):
        run(command)
    printed = capsys.readouterr().out
    assert printed.count(" auc/like ") == 2 and printed.count(" auc/click ") == 1


def test_own_csv_in_five_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name, start in (("clicks.csv", 0), ("tomorrow.csv", 100_000)):
        rows = [f"{100 + i % 7},{rng.integers(1, 30)},{1_700_000_000 + start + i}" for i in range(400)]
        Path(name).write_text("customer,product,time\n" + "\n".join(rows) + "\n")
    commands = commands_of(README, "## Your own Parquet or CSV in five lines")
    assert len(commands) == 5
    for command in commands:
        run(command)
    assert "user 101:" in capsys.readouterr().out


def test_own_impressions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    rows = [f"{100 + i % 7},{rng.integers(1, 30)},{1_700_000_000 + 600 * i}" for i in range(600)]
    Path("clicks.csv").write_text("customer,product,time\n" + "\n".join(rows) + "\n")
    shown = [f"{row},{rng.choice(['0', '1', ''])}" for row in rows]
    Path("shown.csv").write_text("customer,product,time,click\n" + "\n".join(shown) + "\n")
    commands = commands_of(README, "**Impressions**")
    assert len(commands) == 4
    comparison = commands_of(README, "### Is it worth it for you?")
    assert len(comparison) == 5
    for command in commands + comparison:
        run(command)
    assert capsys.readouterr().out.count(" auc/click ") == 3


def anchors(path: Path) -> set[str]:
    """What GitHub makes of a document's headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    """Files and headings, of all documents but the tables, which have no links."""
    root, broken = README.parent, []
    documents = [
        README,
        root / "kernels" / "README.md",
        *(root / "docs").glob("*.md"),
        *(root / "docs").glob("*/README.md"),
    ]
    for document in documents:
        for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
            if "://" in target:
                continue
            name, _, anchor = target.partition("#")
            path = document.parent / name if name else document
            if not path.exists() or (anchor and anchor not in anchors(path)):
                broken.append(f"{document.relative_to(root)}: {target}")
    assert not broken
    assert len(documents) > 9


def test_nothing_is_left_to_fill_in() -> None:
    assert not re.search("TODO|PLACEHOLDER", README.read_text())
