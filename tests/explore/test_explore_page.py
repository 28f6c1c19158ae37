"""The page without a browser: every tab draws, and bad input gives a message instead of a traceback."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Served, draw_counter_weights, serve, sign_model, small_config, small_frame, untrained
from vista.config import ExploreConfig, SourceColumns
from vista.log.event_log import EventLog
from vista.refresh import refresh

PAGE = Path(__file__).parents[2] / "vista" / "explore" / "page.py"
TABS = ("User", "Ranking", "What if", "Compare", "Store", "Results")
Draw = Callable[..., Any]


@pytest.fixture(autouse=True, scope="module")
def testing() -> Any:
    """Streamlit's simulation of a page; slow to import."""
    return pytest.importorskip("streamlit.testing.v1", reason="the extra `explore` is not installed")


@pytest.fixture
def draw(testing: Any, monkeypatch: pytest.MonkeyPatch) -> Draw:
    """Draw the page for some places, with a tab and a user; returns Streamlit's picture of it."""

    def run(tab: str, user: object = 104, **places: object) -> Any:
        config = ExploreConfig(**{name: str(value) for name, value in places.items()})
        monkeypatch.setattr(sys, "argv", [str(PAGE), json.dumps(dataclasses.asdict(config))])
        page = testing.AppTest.from_file(str(PAGE), default_timeout=200)
        page.query_params["tab"] = tab
        page.query_params["user"] = str(user)
        page.run()
        assert not page.exception, page.exception
        return page

    return run


def texts(page: Any) -> str:
    """What the page says, without tables and charts."""
    return plain(markdown(page))


def markdown(page: Any) -> str:
    kinds = ("title", "markdown", "caption", "error", "warning", "info", "success")
    return "\n".join(str(element.value) for kind in kinds for element in getattr(page, kind))


def plain(text: str) -> str:
    """A Markdown text without its escapes."""
    return re.sub(r"\\([^\w\s]|_)", r"\1", text)


def of(served: Served, **changes: object) -> dict[str, object]:
    return {"model": served.model_dir, "store": served.store, "data": served.log.path} | changes


@pytest.mark.parametrize("tab", TABS)
def test_every_tab_draws(draw: Draw, served: Served, tab: str) -> None:
    page = draw(tab, **of(served, other_store=served.test_store))
    said = texts(page)
    assert "User 104" in said and "generation 1 is served" in said and not page.error
    expected = {
        "User": "events, which the record stores unchanged",
        "Ranking": "has rank 1",
        "What if": "after one more event",
        "Compare": "of 10** best items",
        "Store": "covers every segment",
        "Results": "Does the summary help?",
    }
    assert expected[tab] in said


def test_events_are_added_and_removed(draw: Draw, served: Served) -> None:
    page = draw("What if", **of(served))
    add = next(button for button in page.button if button.label == "Add event")
    add.click().run()
    assert "Added:" in texts(page) and not page.exception
    next(button for button in page.button if button.label == "Remove all").click().run()
    assert "Added:" not in texts(page)


def test_the_summary_is_measured_on_the_store_before_the_labels(draw: Draw, served: Served) -> None:
    page = draw("Results", **of(served, other_store=served.test_store))
    next(button for button in page.button if button.label == "Measure").click().run(timeout=200)
    assert "longest histories" in texts(page)
    page = draw("Results", **of(served))
    next(button for button in page.button if button.label == "Measure").click().run(timeout=200)
    assert "its records cover them" in texts(page)


def test_counters_are_drawn(draw: Draw, served: Served, tmp_path: Path) -> None:
    model = untrained(served.log, model__counter_keys=["item"])
    draw_counter_weights(model)
    model.save_pretrained(tmp_path / "model")
    refresh(model, served.log, tmp_path / "store")
    places = of(served, model=tmp_path / "model", store=tmp_path / "store")
    page = draw("User", **places)
    assert "#### Counters" in texts(page) and "This model has no counters" not in texts(page) and not page.error
    tables = [table.value for table in page.dataframe if "count" in table.value]
    assert tables and tables[0]["count"].iloc[0] >= 1 and "last" in tables[0]
    page = draw("Ranking", **places)
    assert "has rank 1" in texts(page) and any("counters" in table.value for table in page.dataframe)


def test_users_are_found_by_the_beginning_of_their_id(draw: Draw, served: Served) -> None:
    page = draw("Store", **of(served))
    page.text_input(key="search").set_value("11").run()
    assert "User 104" in texts(page)
    assert [button.label for button in page.button if button.label.startswith("11")] == [*map(str, range(110, 116))]
    page.button(key="user-112").click().run()
    assert "User 112" in texts(page)
    page.text_input(key="search").set_value("101").run()
    assert "User 101" in texts(page)
    page.text_input(key="search").set_value("nobody").run()
    assert "No user's id begins with" in texts(page) and "User 101" in texts(page)


def test_names_and_ids_are_shown_as_they_are(draw: Draw, tmp_path: Path) -> None:
    """Not as styles, formulas, or images of other servers."""
    image = "![x](http://127.0.0.1:9/x.png)"
    users = np.array([image, "a]b", "$5 $6", "`u`"])[np.arange(80) // 20]
    named = {"user": users, "item": np.array(["M*A*S*H", "a]b", "$5 $6", ":red[x]", "_a_"])[np.arange(80) % 5]}
    log = EventLog.from_frame(named, tmp_path / "log", columns=SourceColumns(timestamp=None))
    served = serve(log, small_config(log, tmp_path / "run", optim__epochs=1), tmp_path)
    for tab in TABS:
        page = draw(tab, user=image, **of(served, other_store=served.test_store))
        assert f"User {image}" in texts(page) and "![x" not in markdown(page) and not page.error
    page = draw("What if", user="$5 $6", **of(served))
    for item in ("M*A*S*H", "a]b", ":red[x]"):
        page.selectbox(key="what-if-item").set_value(item)
        next(button for button in page.button if button.label == "Add event").click().run()
        assert f":orange-badge[{item}, " in texts(page) and f"badge[{item}" not in markdown(page)
    page.text_input(key="search").set_value("`").run()
    assert "\\`u\\`" in [button.label for button in page.button]
    page.text_input(key="search").set_value("*x*").run()
    assert "begins with “*x*”" in texts(page) and "*x*" not in markdown(page)


def test_an_error_that_quotes_an_id_is_shown_as_it_is(draw: Draw, served: Served, order_log: EventLog) -> None:
    image = "![x](http://127.0.0.1:9/x.png)"
    page = draw("Ranking", user=image, **of(served, data=order_log.path))
    assert f"user '{image}': the user ids of the store" in texts(page) and "![x" not in markdown(page)


def test_a_store_without_its_model(draw: Draw, served: Served, tmp_path: Path) -> None:
    places = of(served, model=tmp_path / "nowhere" / "best")
    page = draw("Store", **places)
    assert "nowhere/best" in plain(page.error[0].value) and "Generations" in texts(page)
    assert page.dataframe[0].value["state"].tolist() == ["served"]
    assert "needs a model" in texts(draw("Ranking", **places))


def test_a_model_without_its_store(draw: Draw, served: Served, tmp_path: Path) -> None:
    page = draw("Store", **of(served, store=tmp_path / "nowhere"))
    assert all("nowhere" in plain(error.value) for error in page.error) and len(page.error) == 2


def test_a_model_of_another_version(draw: Draw, served: Served, tmp_path: Path) -> None:
    shutil.copytree(served.model_dir, tmp_path / "best")
    sign_model(tmp_path / "best", lambda fields: fields.update(format_version=99))
    page = draw("User", **of(served, model=tmp_path / "best"))
    assert "99" in plain(page.error[0].value) and "version" in plain(page.error[0].value)


def test_an_exact_id_of_another_kind(draw: Draw, served: Served, order_log: EventLog) -> None:
    page = draw("Results", user="u104", **of(served, data=order_log.path))
    page.text_input(key="search").set_value("u105").run()
    assert "User u105" in texts(page) and not page.error and not page.exception
    page.text_input(key="search").set_value("nobody").run()
    assert "user 'nobody': the user ids of the store are of type int" in plain(page.error[0].value)
    assert "User u105" in texts(page) and not page.exception


def test_damaged_item_features(draw: Draw, served: Served, tmp_path: Path) -> None:
    from vista.explore import page_cache

    items = {"item": [*range(0, 400, 10)], "title": [f"Film {n}" for n in range(40)]}
    log = EventLog.from_frame(small_frame(), tmp_path / "log", time_unit="ms", items=items)
    assert "Film" in texts(draw("Ranking", **of(served, data=log.path)))
    (file,) = log.path.glob("*/features/0.values.ids.npy")
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    page_cache.st.cache_resource.clear()
    page = draw("Ranking", **of(served, data=log.path))
    assert "Items are shown by their ids." in plain(page.warning[0].value) and "has rank 1" in texts(page)
    assert "Film" not in texts(page) and not page.error


def test_an_argument_that_the_scorer_refuses(
    draw: Draw, served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from vista.explore import page_body

    monkeypatch.setitem(page_body.TABS, "Ranking", lambda workspace, user: workspace.scorer.rank(user, top_k=0))
    page = draw("Ranking", **of(served))
    assert [plain(error.value) for error in page.error] == ["top_k: must be at least 1, got 0"]
    assert "the tab Ranking of user 104 could not be drawn" in caplog.text


def test_no_demo_yet(draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = draw("User")
    assert "Run `make demo` first" in plain(page.error[0].value)


def test_no_log(draw: Draw, served: Served, tmp_path: Path) -> None:
    page = draw("User", **of(served, data=tmp_path / "no-log"))
    assert "no such folder" in plain(page.warning[0].value) and "User 104" in texts(page)


def test_nothing_to_compare(draw: Draw, served: Served) -> None:
    assert "There is nothing to compare yet" in texts(draw("Compare", **of(served)))
