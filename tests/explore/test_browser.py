"""Every tab in real headless Chromium, and five questions that a new user answers from the page alone."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from scripts import demo
from scripts.benchmarks.explore_visit import SIZE, TABS, ExploreVisit, exploring, open_every_tab, visiting
from tests.benchmark_process import run_benchmark
from tests.conftest import Served
from tests.required_program import require_chromium
from vista.refresh import refresh
from vista.training.trainer import train

pytestmark = [pytest.mark.browser, pytest.mark.timeout(1800)]
PNG = b"\x89PNG"
MOST_BYTES = 400_000


@pytest.fixture(scope="module")
def visit(served_tasks: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ExploreVisit]:
    """A visit of a page of three tasks, with a second store and an earlier generation to compare with."""
    for package in ("streamlit", "playwright"):
        if find_spec(package) is None:
            assert "CI" not in os.environ, f"{package} is missing; `make test-browser` installs it"
            pytest.skip(f"{package} is not installed; `make test-browser` installs it")
    require_chromium()
    folder = tmp_path_factory.mktemp("explored")
    shutil.copytree(served_tasks.store, folder / "store")
    refresh(served_tasks.model, served_tasks.log, folder / "store")  # generation 2
    words = [f"model={served_tasks.model_dir}", f"store={folder / 'store'}", f"other_store={served_tasks.test_store}"]
    with exploring(*words, f"data={served_tasks.log.path}") as url, visiting(url) as opened:
        opened.open()
        opened.wait_for_tabs()
        yield opened


def test_every_tab_is_opened_clicked_and_drawn(visit: ExploreVisit, tmp_path: Path) -> None:
    texts: dict[str, str] = {}

    def keep(name: str, text: str) -> None:
        texts[name] = text
        visit.screenshot(tmp_path / f"{name}.png")
        content = (tmp_path / f"{name}.png").read_bytes()
        assert content.startswith(PNG) and 10_000 < len(content) < MOST_BYTES

    open_every_tab(visit, keep)
    assert list(texts) == list(TABS)
    for name, words in {
        "User": ("History", "Tail"),
        "Ranking": ("What raises the best items", "Tail events of rank 1", "All numbers"),
        "What if": ("Added:", "Ranks"),
        "Compare": ("best items are in both lists", "Same first item"),
        "Store": ("Generations", "no problem found"),
        "Results": ("Does the summary help?", "with the longest histories"),
    }.items():
        assert all(word in texts[name] for word in words), texts[name]


def test_why_was_this_item_ranked_first_for_this_user(visit: ExploreVisit) -> None:
    text = visit.open_tab("Ranking")
    assert re.search(r"has rank 1 and log-odds of .* compared with the average item: .* \(\+\d+\.\d\d\)", text), text


def test_is_the_store_fresh(visit: ExploreVisit) -> None:
    text = visit.open_tab("Store")
    assert re.search(r"Fresh\. The last refresh started .* ago, and it covers every segment of the log", text), text


def test_does_the_summary_help_heavy_users(visit: ExploreVisit) -> None:
    visit.open_tab("Results")
    text = visit.click("Measure")
    assert re.search(r"longest histories \(.* events\), the summary changes the AUC of \w+ from 0\.", text), text


def test_which_generation_is_served(visit: ExploreVisit) -> None:
    assert "generation 2 is served" in visit.text()


def test_what_would_change_if_the_user_did_something(visit: ExploreVisit) -> None:
    visit.open_tab("What if")
    text = visit.click("Add event")
    assert re.search(r"of the best 10 items (is|are) new|best 10 items stays the same", text), text


def test_a_user_is_found_by_the_beginning_of_the_id(visit: ExploreVisit) -> None:
    visit.open_tab("User")
    assert "User 7" in visit.find_user("7") and "user=7" in visit.page.url
    assert "No user's id begins with" in visit.find_user("no such user")
    visit.find_user("")
    assert "User " in visit.click("A random heavy user")


def test_a_link_leads_to_the_same_user_and_tab(visit: ExploreVisit) -> None:
    visit.open("?user=5&tab=Store")
    visit.wait_for_tabs()
    text = visit.text()
    assert "User 5" in text and "Generations" in text


def test_two_models_and_two_generations_are_compared(visit: ExploreVisit, served_tasks: Served, tmp_path: Path) -> None:
    shutil.copytree(served_tasks.store, tmp_path / "store")
    refresh(served_tasks.model, served_tasks.log, tmp_path / "store")  # generation 2
    config = dataclasses.replace(served_tasks.config, seed=served_tasks.config.seed + 1, run_dir=str(tmp_path / "run"))
    refresh(train(config, served_tasks.log), served_tasks.log, tmp_path / "other")
    words = [f"model={served_tasks.model_dir}", f"store={tmp_path / 'store'}", f"data={served_tasks.log.path}"]
    words += [f"other_model={tmp_path / 'run' / 'best'}", f"other_store={tmp_path / 'other'}"]
    with exploring(*words) as url, visit.elsewhere(url) as opened:
        opened.open()
        opened.wait_for_tabs()
        assert "best items are in both lists" in opened.open_tab("Compare")
        text = opened.choose("B", "generation 1 of the same store")
        assert "10 of 10 best items are in both lists" in text, text


def test_the_benchmark_opens_every_tab(visit: ExploreVisit, tmp_path: Path) -> None:
    # In a process of its own: Playwright runs once per thread, and `visit` has it.
    done = run_benchmark("explore", tmp_path / "out.jsonl")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    cases = [row["case"].removesuffix(" (quick)") for row in rows]
    assert [f"2,000 users: tab {name}" for name in TABS] == [case for case in cases if ": tab " in case]
    assert {"2,000 users: request to title, first visit", "2,000 users: request to tabs"} < {*cases}
    assert all(row["value"] > 0 for row in rows)


def test_the_report_of_the_demo_is_short(visit: ExploreVisit, tmp_path: Path) -> None:
    """The demo's report at its full sizes is 1 % higher; both have the same sections."""
    words = ["optim.epochs=1", "optim.warmup_steps=2", "model.dim=16", "num_threads=1", "data.tokens_per_batch=400"]
    sizes = demo.DemoSizes(num_users=24, events_per_user=200, history_lengths=(10, 100), num_candidates=20)
    report = demo.run(None, tmp_path, words, sizes)
    page = visit.page.context.new_page()
    page.goto(f"file://{report.path}")
    height = page.evaluate("document.documentElement.scrollHeight")
    page.close()
    assert SIZE["height"] < height <= 5_900, f"{height} pixels high"
