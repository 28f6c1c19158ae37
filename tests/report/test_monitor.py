"""`vista monitor`: healthy windows raise no alarm, each injected fault is found in one window, and what is due."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import small_config, untrained
from tests.store.conftest import damage_record
from vista.cli.main import main
from vista.config import MonitorConfig, SourceColumns
from vista.config.checks import OnMissing
from vista.errors import CheckpointError
from vista.evaluation.reference import (
    Reference,
    WindowNumber,
    WindowRows,
    arcsine,
    make_reference,
    scored_users,
    stability_index,
    student_quantile,
)
from vista.log.event_log import EventLog
from vista.log.histories import DAY_MS
from vista.model.saved_model import REFERENCE_FILE
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.report.monitor import Action, MonitorReport, Reading, counted, gauges, judged, monitor, read_monitor
from vista.scorer import Scorer
from vista.training.trainer import train

START = 1_760_054_400_000
"""A midnight."""
HOUR = DAY_MS // 24
USERS, ITEMS = 400, 300
TRAINED, HEALTHY = 30, 100
"""Days of the training data, and healthy days after them."""
YEAR_1971 = 31_536_000_000
NOW = START + (TRAINED + 8) * DAY_MS
"""End of the window in which faults occur."""


def days(first: int, last: int, seed: int = 0) -> dict[str, Any]:
    """Events of a shop on some days: users differ in activity, days of a week and hours of a day in traffic. A user
    comes for a session of several events, so that the rows of a window are not independent."""
    rng = np.random.default_rng([seed, first])
    active = np.exp(np.random.default_rng(1).normal(0, 1, USERS))
    traffic = np.array([1.0, 0.95, 0.95, 1.0, 1.1, 1.25, 1.2])
    day = np.repeat(np.arange(first, last), 250)
    day = day[rng.random(len(day)) < traffic[day % 7] / 1.3]
    user = rng.choice(USERS, len(day), p=active / active.sum())
    count = rng.geometric(1 / 6, len(day))
    begin = START + day * DAY_MS + ((8 + 14 * rng.beta(2, 2, len(day))) * HOUR).astype(np.int64)
    user, begin, visit = np.repeat(user, count), np.repeat(begin, count), np.repeat(np.arange(len(day)), count)
    place = np.arange(len(user)) - np.repeat(np.cumsum(count) - count, count)
    time = begin + place * 20_000 + rng.integers(1000, 20_000, len(user))
    item = rng.choice(ITEMS, len(user), p=1 / np.arange(1, ITEMS + 1) / (1 / np.arange(1, ITEMS + 1)).sum())
    device = rng.choice(["phone", "desktop", "tablet"], len(day), p=[0.6, 0.3, 0.1])[visit].astype(object)
    device[rng.random(len(user)) < 0.02] = None
    return {
        "user": 1000 + user,
        "item": 10 * item,
        "timestamp": time,
        "action": rng.choice(["view", "cart", "buy"], len(user), p=[0.8, 0.17, 0.03]),
        "device": device,
        "dwell": rng.lognormal(3, 1, len(user)).astype(np.float32),
        "price": (5 + item % 40 + rng.random(len(user))).astype(np.float32),
    }


def impressions(first: int, last: int) -> dict[str, Any]:
    """Two hundred impressions per day with a click in a tenth of them."""
    rng = np.random.default_rng([7, first])
    count = 200 * (last - first)
    return {
        "user": 1000 + rng.integers(0, USERS, count),
        "item": 10 * rng.integers(0, ITEMS, count),
        "timestamp": START + first * DAY_MS + rng.integers(0, (last - first) * DAY_MS, count),
        "click": (rng.random(count) < 0.1).astype(np.int64),
    }


def write(path: Path, frame: dict[str, Any], shown: dict[str, Any], *, append: bool = False) -> EventLog:
    return EventLog.from_frame(
        frame,
        path,
        time_unit="ms",
        impressions=shown,
        columns=SourceColumns(action="action", labels=["click"]),
        categories=["device"],
        numbers=["dwell", "price"],
        append=append,
    )


@dataclass(frozen=True)
class Shop:
    """A log of training days and seven healthy ones, a model, and the reference of the training days."""

    log: EventLog
    model: Path
    reference: Reference


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    folder = tmp_path_factory.mktemp("shop")
    log = write(folder / "log", days(0, TRAINED + 7), impressions(0, TRAINED + 7))
    untrained(log).save_pretrained(folder / "model")
    reference = make_reference(log, START + TRAINED * DAY_MS, log.items)
    assert reference is not None
    reference.write(folder / "model")
    return Shop(log, folder / "model", reference)


def test_healthy_windows_raise_no_alarm(shop: Shop, tmp_path: Path) -> None:
    last = TRAINED + 7 + HEALTHY
    log = write(tmp_path / "log", days(TRAINED, last, seed=1), impressions(TRAINED, last))
    older = EventLog.open(shop.log.path)
    items, found = older.items, list[Reading]()
    ends = [START + day * DAY_MS for day in range(TRAINED + 8, last + 1)]
    counts = [counted(WindowRows.read(log, end - DAY_MS, end), shop.reference, items) for end in ends]
    assert len(counts) == HEALTHY
    for one in counts:
        one.pop("new users")  # This log begins with its first window.
        found += [reading for reading in judged(shop.reference, [one]) if reading.is_alarm]
    assert not found, found


Frame = dict[str, Any]
Fault = Callable[[Frame, Frame], tuple[Frame, Frame]]


def changed(**columns: Callable[[Frame], Any]) -> Fault:
    return lambda events, shown: (events | {name: make(events) for name, make in columns.items()}, shown)


def kept(choose: Callable[[Frame], Any]) -> Fault:
    return lambda events, shown: ({name: column[choose(events)] for name, column in events.items()}, shown)


def shuffled_ids(events: Frame) -> Any:
    return 10 * np.random.default_rng(3).permutation(ITEMS)[events["item"] // 10]


def some_missing(events: Frame) -> Any:
    device = events["device"].copy()
    device[np.random.default_rng(4).random(len(device)) < 0.15] = None
    return device


FAULTS: dict[str, tuple[Fault, str]] = {
    "dwell in ms instead of s": (changed(dwell=lambda events: events["dwell"] * 1000), "event.dwell"),
    "times in s instead of ms": (changed(timestamp=lambda events: YEAR_1971 + events["timestamp"] // 1000), "early"),
    "columns swapped": (changed(dwell=lambda e: e["price"], price=lambda e: e["dwell"]), "event.price"),
    "source stopped": (kept(lambda events: np.arange(len(events["user"])) < 3), "events"),
    "one of several sources stopped": (kept(lambda events: events["device"] != "tablet"), "event.device"),
    "half of a day lost": (kept(lambda events: events["timestamp"] % DAY_MS < 15 * HOUR), "hour of the day"),
    "action disappears": (kept(lambda events: events["action"] != "buy"), "action buy"),
    "action renamed": (changed(action=lambda e: np.where(e["action"] == "buy", "order", e["action"])), "other actions"),
    "missing values": (changed(device=some_missing), "missing event.device"),
    "category recoded": (changed(device=lambda e: np.array([d and d.upper() for d in e["device"]])), "event.device"),
    "item ids permuted": (changed(item=shuffled_ids), "items"),
    "item ids of another system": (changed(item=lambda events: 7 + events["item"]), "unknown items"),
    "user ids of another system": (changed(user=lambda events: 90_000 + events["user"]), "new users"),
    "events delivered twice": (kept(lambda e: np.repeat(np.arange(len(e["user"])), 2)), "duplicates"),
    "clock shifted by 3 h": (changed(timestamp=lambda events: events["timestamp"] - 3 * HOUR), "hour of the day"),
    "clicks not joined": (lambda events, shown: (events, shown | {"click": 0 * shown["click"]}), "label click"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_in_one_window(shop: Shop, tmp_path: Path, name: str) -> None:
    fault, check = FAULTS[name]
    shutil.copytree(shop.log.path, tmp_path / "log")
    today = TRAINED + 7
    events, shown = fault(days(today, today + 1), impressions(today, today + 1))
    log = write(tmp_path / "log", events, shown, append=True)
    report = read_monitor(shop.reference, log, shop.model, NOW, None)
    assert {"early": "events before the training data"}.get(check, check) in {one.name for one in report.alarms}
    assert Action.source in report.due or check == "unknown items"


@pytest.mark.parametrize(("trained", "windows"), [(TRAINED, 28), (9, 8)])
def test_sources_that_stopped_are_found(shop: Shop, trained: int, windows: int) -> None:
    reference = make_reference(shop.log, START + trained * DAY_MS, shop.log.items)
    assert reference is not None
    assert {check.num_windows for check in reference.checks.values()} == {windows}
    report = read_monitor(reference, shop.log, shop.model, NOW + 30 * DAY_MS, None)  # It has 0 rows.
    assert {"events", "users", "impressions"} <= {one.name for one in report.alarms}
    healthy = counted(WindowRows.read(shop.log, NOW - 2 * DAY_MS, NOW - DAY_MS), reference, shop.log.items)
    only = healthy | {"impressions": WindowNumber("amount")}
    assert [one.name for one in judged(reference, [healthy, only]) if one.is_alarm] == ["impressions"]


def test_limits_use_the_windows_that_have_a_check(shop: Shop) -> None:
    check = shop.reference.checks["label click"]
    fewer = replace(check, num_windows=8)
    other = replace(shop.reference, checks=shop.reference.checks | {"label click": fewer})
    assert other.limit("label click", check.size) > 1.5 * shop.reference.limit("label click", check.size)


def test_a_backfill_raises_an_alarm_once(shop: Shop, tmp_path: Path) -> None:
    shutil.copytree(shop.log.path, tmp_path / "log")
    early = days(0, 3, seed=2)
    early["timestamp"] = early["timestamp"] - 4 * DAY_MS
    log = write(tmp_path / "log", early, impressions(0, 1), append=True)
    name, today = "events before the training data", TRAINED + 7
    assert name in {one.name for one in read_monitor(shop.reference, log, shop.model, NOW, None).alarms}
    log = write(tmp_path / "log", days(today, today + 1), impressions(today, today + 1), append=True)
    assert name not in {one.name for one in read_monitor(shop.reference, log, shop.model, NOW, None).alarms}


def test_one_event_in_the_future_is_an_alarm(shop: Shop) -> None:
    last = shop.log.time_range()
    assert last is not None
    report = read_monitor(shop.reference, shop.log, shop.model, last[1], None)
    assert "events in the future" in {one.name for one in report.alarms}
    report = read_monitor(shop.reference, shop.log, shop.model, last[1] + 1, None)
    assert "events in the future" not in {one.name for one in report.alarms}


def test_a_slow_change_asks_for_training(shop: Shop) -> None:
    healthy = counted(WindowRows.read(shop.log, NOW - 2 * DAY_MS, NOW - DAY_MS), shop.reference, shop.log.items)
    check = shop.reference.checks["label click"]
    limit = shop.reference.limit("label click", check.size)
    shares = [math.sin(check.mean + step * limit) ** 2 for step in np.linspace(0, 1.6, 8)]
    size = round(check.size)

    def with_share(share: float) -> Any:
        return healthy | {"label click": WindowNumber("share", round(share * size), size)}

    def due(windows: list[Any]) -> list[Action]:
        return [one.action for one in judged(shop.reference, windows) if one.is_alarm]

    assert due([with_share(share) for share in shares]) == [Action.retrain]
    assert due([with_share(share) for share in (shares[0],) * 7 + (shares[-1],)]) == [Action.source]


def test_limits_are_those_of_statistics(shop: Shop) -> None:
    # Tables of Student's t: one-sided 0.025 and 0.0005.
    assert student_quantile(0.025, 1) == pytest.approx(12.706, abs=1e-3)
    assert student_quantile(0.025, 10) == pytest.approx(2.228, abs=1e-3)
    assert student_quantile(0.0005, 27) == pytest.approx(3.690, abs=1e-3)
    assert stability_index(np.array([30, 70]), np.array([70, 30])) == pytest.approx(0.667, abs=0.01)
    assert arcsine(25, 100) == pytest.approx(math.asin(0.5), abs=0.01)
    for check in shop.reference.checks.values():
        assert math.isfinite(check.mean) and check.deviation >= 0
    name = "missing event.device"
    assert shop.reference.limit(name, 50) > shop.reference.limit(name, 5000)


@dataclass(frozen=True)
class Clicks:
    """A log whose clicks depend on the item, a model of them, and its store, by the end of the training data."""

    log: EventLog
    model: Path
    store: Path

    def report(self, end_day: int, log: EventLog | None = None, model: VistaModel | None = None) -> MonitorReport:
        scored = VistaModel.from_pretrained(self.model) if model is None else model
        reference, end = Reference.read(self.model), START + end_day * DAY_MS
        with Scorer.open(scored, self.store, on_missing=OnMissing.nan) as scorer:
            return read_monitor(reference, log or self.log, self.model, end, scorer, is_live=False)


def clicked(first: int, last: int, keep: float = 1.0) -> Frame:
    """Two thousand impressions per day, with a click in 30% of those of even items and in 10% of others; `keep`: share
    of clicks that arrive."""
    rng = np.random.default_rng([11, first])
    count = 2000 * (last - first)
    item = rng.integers(0, ITEMS, count)
    return {
        "user": 1000 + rng.integers(0, USERS, count),
        "item": 10 * item,
        "timestamp": START + first * DAY_MS + rng.integers(0, (last - first) * DAY_MS, count),
        "click": (rng.random(count) < np.where(item % 2, 0.1, 0.3) * keep).astype(np.int64),
    }


@pytest.fixture(scope="module")
def clicks(tmp_path_factory: pytest.TempPathFactory) -> Clicks:
    folder = tmp_path_factory.mktemp("clicks")
    last = TRAINED + 20
    events = {name: column[::5] for name, column in days(0, last).items()}
    log = write(folder / "log", events, clicked(0, last))
    config = small_config(log, folder / "run", optim__epochs=1, data__tokens_per_batch=2048, data__split="time")
    config.data.validation_from = str(START + (TRAINED - 4) * DAY_MS)
    config.data.test_from = str(START + TRAINED * DAY_MS)
    config.optim.next_weight = 0.0
    model = train(config, log)
    refresh(model, log, folder / "store", until=START + TRAINED * DAY_MS)
    return Clicks(log, folder / "run" / "best", folder / "store")


CALIBRATION = "predicted / observed click"


def test_predictions_are_compared_with_labels(clicks: Clicks, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for day in range(TRAINED + 1, TRAINED + 21, 5):
        (healthy,) = [one for one in clicks.report(day).readings if one.name == CALIBRATION]
        assert not healthy.is_alarm and healthy.error is not None
        assert healthy.value == pytest.approx(1, abs=4 * healthy.error) and 0.03 < healthy.error < 0.1

    shutil.copytree(clicks.log.path, tmp_path / "log")
    last = TRAINED + 20
    events = {name: column[::5] for name, column in days(last, last + 1).items()}
    fewer = write(tmp_path / "log", events, clicked(last, last + 1, keep=2 / 3), append=True)
    report = clicks.report(last + 1, fewer)
    (alarm,) = [one for one in report.alarms if one.name == CALIBRATION]
    assert 1.3 < alarm.value < 1.8 and alarm.action is Action.source, "only the last window has fewer clicks"
    assert re.search(rf"{CALIBRATION}: 1\.\d+ ± 0\.\d+", str(report))
    assert re.search(rf'vista_monitor_error{{check="{CALIBRATION}"}} 0\.\d+', gauges(report))

    model = VistaModel.from_pretrained(clicks.model)
    with model.calibrated(np.array([[1.0, 0.6]])):
        (alarm,) = [one for one in clicks.report(last, model=model).alarms if one.name == CALIBRATION]
    assert 1.4 < alarm.value < 2 and alarm.action is Action.retrain, "it was too high in the window before, too"

    events["action"] = np.where(events["action"] == "buy", "order", events["action"])
    renamed = write(tmp_path / "log", events, clicked(last, last + 1), append=True)
    report = clicks.report(last + 1, renamed)
    assert CALIBRATION not in {one.name for one in report.readings}
    assert "predictions are not compared with labels" in caplog.text and "'order'" in caplog.text


def test_page_gauges_and_records_of_a_trained_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    part = {name: column[::3] for name, column in days(0, TRAINED).items()}
    log = EventLog.from_frame(part, tmp_path / "log", time_unit="ms", numbers=["dwell"])
    config = small_config(log, tmp_path / "run", optim__epochs=1, data__tokens_per_batch=2048, data__split="time")
    config.data.validation_from = config.data.test_from = str(START + (TRAINED - 2) * DAY_MS)
    model, best = train(config, log), tmp_path / "run" / "best"
    refresh(model, log, tmp_path / "store", until=START + (TRAINED - 1) * DAY_MS)
    asked = [f"data={log.path}", f"model={best}", f"store={tmp_path / 'store'}", "metrics_file=monitor.prom"]
    assert (best / REFERENCE_FILE).stat().st_size < 30_000

    assert main(["monitor", *asked, f"now={START + TRAINED * DAY_MS}"]) == 0
    assert "nothing is due" in capsys.readouterr().out
    assert "<h1>Monitor</h1>" in Path("monitor.html").read_text()
    metrics = Path("monitor.prom").read_text()
    assert 'vista_monitor_due{action="vista refresh"} 0' in metrics
    assert 'check="mean score next"' in metrics
    assert all(re.fullmatch(r'#.*|\w+(\{\w+="[^"]*"\})? -?[\d.e+-]+', line) for line in metrics.splitlines())

    user = log.users.ids(scored_users(WindowRows.read(log, NOW - 9 * DAY_MS, NOW - 8 * DAY_MS))[:1]).tolist()[0]
    damage_record(tmp_path / "store", 1, user)
    assert main(["monitor", *asked, f"now={START + TRAINED * DAY_MS}"]) == 0
    assert "damaged records" in capsys.readouterr().out
    assert 'check="mean score next"' in Path("monitor.prom").read_text()

    refresh(model, log, tmp_path / "old", until=START + 3 * DAY_MS)
    report = monitor(
        MonitorConfig(data=str(log.path), model=str(best), store=str(tmp_path / "old"), now=str(NOW - 8 * DAY_MS))
    )
    assert isinstance(report, MonitorReport)
    assert Action.refresh in report.due

    (best / REFERENCE_FILE).write_text("{}")
    with pytest.raises(CheckpointError, match="train the model again"):
        Reference.read(best)
