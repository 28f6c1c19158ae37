"""The page of a report: what it says, that it needs no network, and what it refuses."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Served, made_once, small_config
from tests.required_program import require_chromium
from vista import progress_bar
from vista.cli.main import main
from vista.config import EvaluateConfig, ReportConfig
from vista.config.checks import Architecture, Split, Target
from vista.errors import ConfigError, SummarizerMismatchError
from vista.evaluation.evaluate import evaluate_scorer
from vista.log.event_log import EventLog
from vista.report import report_data
from vista.report.report import WrittenReport, write_report
from vista.report.report_data import Latency
from vista.scorer import Scorer
from vista.training.trainer import train, train_model


@dataclass(frozen=True)
class Reported:
    """A report and what it is about."""

    served: Served
    without_summary: Path
    """Run folder of the other model."""
    report: WrittenReport
    page: str


@pytest.fixture(scope="session")
def without_summary(served_tasks: Served, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of the model of `served_tasks` with K = 0."""
    config = served_tasks.config

    def make(folder: Path) -> None:
        smaller = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, num_seeds=0),
            optim=dataclasses.replace(config.optim, reconstruction_weight=0.0, epochs=1),
            run_dir=str(folder / "k0"),
        )
        train(smaller, served_tasks.log)

    return made_once(tmp_path_factory, "without-summary", make) / "k0"


@pytest.fixture(scope="session")
def reported(served_tasks: Served, without_summary: Path, tmp_path_factory: pytest.TempPathFactory) -> Reported:
    """The report about `served_tasks`, next to the model without a summary."""
    out = tmp_path_factory.mktemp("report") / "report.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_data, "REQUESTS_PER_ROUND", 5)  # not 30, which take seconds
        report = write_report(
            ReportConfig(
                run=served_tasks.config.run_dir,
                others=[str(without_summary)],
                store=str(served_tasks.test_store),
                out=str(out),
                num_threads=1,
            )
        )
    return Reported(served_tasks, without_summary, report, out.read_text())


LATENCY = Latency([12], 10, [1e-3], [2e-3], 3, False, (0.5, 0.5), 2, 1)
"""Of no machine; to measure it takes seconds."""
RESOURCE_OF_A_PAGE = 101845102
"""Chromium's traffic annotation `blink_resource_loader`: a request of a page, not of the browser itself."""


PROGRESS = ("ranking", "impressions", "baselines", "earlier events", "pooled vectors", "intervals", "sections")


VOID = {"meta", "link", "br", "img"}


SECTIONS = [
    "Quality",
    "Quality by age of the deciding event",
    "Calibration",
    "Popularity and exposure",
    "Latency",
    "What was trained",
    "Training",
    "What was not measured",
]


class Page(HTMLParser):
    """The tags, the links, and the rows of the tables of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.rows: list[list[str]] = []
        self.unclosed: list[str] = []
        self._cell: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "srcset", "data", "action")]
        if tag not in VOID:
            self.unclosed.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self._cell = []

    def handle_endtag(self, tag: str) -> None:
        assert self.unclosed.pop() == tag
        if tag in ("td", "th") and self._cell is not None:
            self.rows[-1].append("".join(self._cell))
            self._cell = None

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell.append(data)


def titles(page: str) -> list[str]:
    return re.findall(r"<h2[^>]*>([^<]*)</h2>", page)


def requests_of(page: Path, picture: Path) -> list[str]:
    """The URLs that a page asks for in headless Chromium, which finds no host."""
    log = picture.with_suffix(".json")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    options += ["--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND", f"--screenshot={picture}"]
    options += [f"--user-data-dir={picture.with_suffix('')}", f"--log-net-log={log}", "--window-size=400,900"]
    done = subprocess.run([require_chromium(), *options, f"file://{page}"], capture_output=True, timeout=180)
    assert done.returncode == 0, done.stderr.decode()
    events = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    return [event["url"] for event in events if event.get("traffic_annotation") == RESOURCE_OF_A_PAGE]


def test_has_all_sections(reported: Reported) -> None:
    """Those for which twelve users are too few are listed as missing."""
    assert titles(reported.page) == SECTIONS
    assert "quality by history length, because fewer than two groups have 30 cases" in reported.page


def test_needs_no_network(reported: Reported) -> None:
    page = Page(reported.page)
    assert page.unclosed == []
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert not page.tags & {"script", "iframe", "object", "embed", "base", "form", "img"}
    assert "http:" not in reported.page and "https:" not in reported.page
    assert "url(" not in reported.page and "@import" not in reported.page
    assert "default-src 'none'" in reported.page


def test_the_figures_are_those_of_an_evaluation(reported: Reported) -> None:
    served = reported.served
    with Scorer.open(served.model_dir, served.test_store) as scorer:
        metrics = evaluate_scorer(scorer, served.log, EvaluateConfig(top_k=[10])).metrics
    rows = [row for row in Page(reported.page).rows if row and row[0] == "run" and len(row) > 4]
    assert rows[0][1].startswith(f"{metrics['auc/click']:.4f} ±")
    assert rows[0][4:] == [
        f"{metrics[f'{name}/click']:{form}}" for name, form in (("gauc", ".4f"), ("ne", ".4f"), ("calibration", ".3f"))
    ]
    assert any(row[1].startswith(f"{metrics['ndcg@10']:.4f}") for row in Page(reported.page).rows if row[0] == "run")


def test_names_the_other_run_and_the_baselines(reported: Reported) -> None:
    named = {row[0] for row in Page(reported.page).rows if row}
    assert {
        "run",
        "k0",
        "oracle",
        "item rate",
        "counter baseline",
        "pooled-vector baseline",
        "popularity",
        "item neighbors",
    } <= named
    assert "EASE" not in named and "vista evaluate baselines=trained" in reported.page
    assert re.search(r"AUC of click: run reaches 0\.\d{4}; \w+ .*, the best baseline \(", reported.page)


def test_shows_how_much_lists_follow_popularity(reported: Reported) -> None:
    finding = reported.report.findings["Popularity and exposure"]
    assert re.search(r"take \d+% of the places in lists of 10; \d+% of all items are in at least one list", finding)
    rows = [row for row in Page(reported.page).rows if len(row) == 6 and row[0].isdecimal()]
    shares = np.array([[float(row[2].rstrip("%")), float(row[3].rstrip("%"))] for row in rows[-10:]])
    assert len(shares) == 10
    np.testing.assert_allclose(shares.sum(0), 100, atol=1)


def test_opens_with_a_verdict(reported: Reported) -> None:
    better, added, fresh = reported.report.verdict
    assert re.match(
        r"Better than simple baselines\? AUC of click on test 0\.\d{4}: (ahead of|level with|behind) \w+", better
    )
    assert re.match(r"What does the summary add to the same model without one, k0\? AUC of click [+-]0\.\d{4}", added)
    assert re.match(r"Is it fresh\? The store is refreshed once, so half of the impressions come at most \d+ ev", fresh)
    page = html.unescape(re.sub(r"</?[bp]>", "", reported.page))
    assert page.index(better) < page.index(added) < page.index(fresh) < page.index("<h2")
    assert str(reported.report).endswith(" s") and all(
        line.split("?")[0] in str(reported.report) for line in (better, fresh)
    )


def test_the_latency_states_the_load(reported: Reported) -> None:
    assert re.search(r"load average of the machine \d+\.\d\d before and \d+\.\d\d after", reported.page)
    assert re.search(r"Medians over [3-9] rounds", reported.page)


@pytest.mark.nightly
def test_a_browser_without_a_network_shows_it(reported: Reported, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    assert requests_of(reported.report.path, picture) == []
    assert picture.stat().st_size > 10_000
    other = tmp_path / "other.html"
    other.write_text('<img src="https://fonts.googleapis.com/x.png">')
    assert requests_of(other, picture) == ["https://fonts.googleapis.com/x.png"], "the test would notice a request"


@pytest.mark.nightly
def test_next_items_of_a_log_with_times(served: Served, tmp_path: Path) -> None:
    report = write_report(report_config(served, tmp_path))
    page = report.path.read_text()
    assert "quality by age of the deciding event, because fewer than two groups have 30 cases" in page
    assert "calibration, because there are no labeled impressions" in page


@pytest.mark.nightly
def test_a_log_without_times(order_log: EventLog, tmp_path: Path) -> None:
    train_model(small_config(order_log, tmp_path / "run"), order_log)
    config = ReportConfig(run=str(tmp_path / "run"), baselines=False, num_threads=1)
    page = write_report(config).path.read_text()
    assert "quality by user activity, because the log has no times" in page
    assert "baselines, because baselines=false" in page


def test_a_model_that_reads_raw_histories(impression_log: EventLog, served_tasks: Served, tmp_path: Path) -> None:
    data = served_tasks.config.data
    config = small_config(impression_log, tmp_path / "din", model__architecture=Architecture.din)
    config.model.history_limit, config.data, config.optim.next_weight = 20, data, 0.0
    train_model(config, impression_log)
    page = write_report(ReportConfig(run=str(tmp_path / "din"), num_threads=1)).path.read_text()
    assert "latency, because the model reads raw histories" in page and "AUC of click: din reaches" in page


@pytest.mark.nightly
def test_windows(served_tasks: Served, tmp_path: Path) -> None:
    config = report_config(served_tasks, tmp_path)
    config.target, config.horizon_events, config.top_k = Target.window, 5, 5
    page = write_report(config).path.read_text()
    assert "precision@5 of the next 5 events: run reaches" in page and "pooled-vector baseline" in page
    assert "quality by the age of the deciding event, because a window has several labels" in page
    assert "calibration, because there are no labeled impressions" in page


def report_config(served: Served, folder: Path) -> ReportConfig:
    return ReportConfig(
        run=served.config.run_dir, store=str(served.test_store), out=str(folder / "r.html"), num_threads=1
    )


def run_copy(served: Served, folder: Path) -> Path:
    return Path(shutil.copytree(served.config.run_dir, folder / "copy"))


def test_a_run_without_a_model_yet(served: Served, tmp_path: Path) -> None:
    run = run_copy(served, tmp_path)
    shutil.rmtree(run / "best")
    with pytest.raises(ConfigError, match=r"copy: has no exported model \(best/\) yet.*rerun its `vista train`"):
        write_report(ReportConfig(run=str(run)))
    assert not (run / "report.html").exists()


@pytest.mark.nightly
def test_a_line_that_a_killed_run_has_cut_off(served: Served, tmp_path: Path) -> None:
    run = run_copy(served, tmp_path)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    last = max(index for index, line in enumerate(lines) if "validation" in line)
    (run / "metrics.jsonl").write_text("\n".join([*lines[:last], lines[last][:30]]))
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(facts | {"state": "running", "ended": None}))
    config = ReportConfig(run=str(run), store=str(served.test_store), baselines=False, num_threads=1)
    page = write_report(config, latency=LATENCY).path.read_text()
    assert "The run is stopped (its process was killed): 1 of 2 epochs are done" in page


def test_metrics_that_cannot_be_read(served: Served, tmp_path: Path) -> None:
    run = run_copy(served, tmp_path)
    (run / "metrics.jsonl").write_text("{")
    config = ReportConfig(run=str(run), store=str(served.test_store), baselines=False, num_threads=1)
    page = write_report(config, latency=LATENCY).path.read_text()
    assert "half written (line 1 of metrics.jsonl " in page
    assert ", and how many epochs are done is unknown. All figures" in page
    assert "epochs are done." not in page
    assert "training curves, because line 1 of metrics.jsonl cannot be read" in page


def test_settings_of_another_version(served: Served, tmp_path: Path) -> None:
    run = run_copy(served, tmp_path)
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + "\nnew_key: 1\n")
    with pytest.raises(ConfigError, match=r"copy: its config.yaml cannot be read \(unknown key 'new_key'"):
        write_report(ReportConfig(run=str(run)))


def test_a_store_of_another_model(served: Served, served_tasks: Served, tmp_path: Path) -> None:
    config = ReportConfig(run=served.config.run_dir, store=str(served_tasks.test_store), out=str(tmp_path / "r.html"))
    with pytest.raises(SummarizerMismatchError):
        write_report(config)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_a_run(served: Served, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a run folder \(no config.yaml\)"):
        write_report(ReportConfig(run=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"is an exported model; name its run folder, such as .*run"):
        write_report(ReportConfig(run=str(served.model_dir)))


@pytest.mark.nightly
def test_another_run_with_another_split(served_tasks: Served, tmp_path: Path) -> None:
    config = small_config(served_tasks.log, tmp_path / "other", data__split=Split.leave_last_out)
    train_model(config, served_tasks.log)
    asked = ReportConfig(
        run=served_tasks.config.run_dir,
        others=[str(tmp_path / "other")],
        store=str(served_tasks.test_store),
        out=str(tmp_path / "r.html"),
        num_threads=1,
    )
    with pytest.raises(ConfigError, match=r"others: .*other was evaluated on other cases than .*run, because its data"):
        write_report(asked)


def test_a_run_that_is_named_twice() -> None:
    with pytest.raises(ConfigError, match="others: names a run twice"):
        ReportConfig(run="runs/a", others=["runs/a"])


@pytest.mark.nightly
def test_progress_is_shown(
    served_tasks: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each part that takes long on a large log: what is done, the rate, and the time left."""
    for name in ("PLAIN_DELAY_S", "LINE_SECONDS"):
        monkeypatch.setattr(progress_bar, name, 0.0)
    words = [f"run={served_tasks.config.run_dir}", f"store={served_tasks.test_store}", f"out={tmp_path / 'r.html'}"]
    assert main(["report", *words, "num_threads=1"]) == 0
    out, err = capsys.readouterr()
    assert f"{tmp_path / 'r.html'}: " in out and "Better than simple baselines? AUC of click on test 0." in out
    for part in PROGRESS:
        assert re.search(rf"^{part}: \d+ of \d+ \w+ \(\d+%\), .+/\w+, \S+ left", err, re.M), (part, err)
    assert re.search(r"^latency: \d round, ", err, re.M)


def test_names_of_a_log_are_escaped(served: Served, tmp_path: Path) -> None:
    run = Path(shutil.copytree(served.config.run_dir, tmp_path / "a<b>&c"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[-1]["validation"]["<script>"] = 1.0
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = ReportConfig(run=str(run), store=str(served.test_store), baselines=False, num_threads=1)
    page = write_report(config, latency=LATENCY).path.read_text()
    assert "script" not in Page(page).tags and "a&lt;b&gt;&amp;c" in page
