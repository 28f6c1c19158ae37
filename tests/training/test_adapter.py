"""`vista adapt`: what it learns, what it leaves as it is, and what it refuses."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tests.conftest import Served, serve, tasks_config
from tests.training.test_downstream import past_of
from vista.cli.main import main
from vista.config import AdaptConfig, EvaluateConfig, PrepareConfig, SourceConfig
from vista.errors import ConfigError, LeakageError
from vista.evaluation.evaluate import evaluate
from vista.log.event_log import EventLog
from vista.log.ingest.prepare import prepare
from vista.refresh import refresh
from vista.scorer import Scorer
from vista.training.adapter import adapt

TASKS = ["click", "like", "long_view"]


@pytest.fixture(scope="module")
def base(impression_log: EventLog, tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("adapted-base")
    return serve(impression_log, tasks_config(impression_log, folder, optim__validate_every=0), folder)


@pytest.fixture(scope="module")
def surface(base: Served, tmp_path_factory: pytest.TempPathFactory) -> tuple[EventLog, Path]:
    """A log of the same events where nearly every impression is clicked, and a store from before its labels."""
    folder = tmp_path_factory.mktemp("surface")
    source = Path(base.log.path).parent / "source"
    shutil.copytree(source, folder / "source")
    shown = pl.read_parquet(source / "impressions.parquet")
    clicks = np.random.default_rng(0).random(len(shown)) < 0.95
    shown.with_columns(pl.Series("click", clicks.astype(np.int8))).write_parquet(folder / "source/impressions.parquet")
    prepare(
        PrepareConfig(out=str(folder / "log"), events=SourceConfig(kind="simulated", paths=[str(folder / "source")]))
    )
    log = EventLog.open(folder / "log")
    refresh(base.model, log, folder / "store", until=past_of(base))
    return log, folder / "store"


def config_of(base: Served, surface: tuple[EventLog, Path], out: Path) -> AdaptConfig:
    log, store = surface
    return AdaptConfig(
        base=str(base.model_dir), store=str(store), data=str(log.path), out=str(out), epochs=10, learning_rate=0.05
    )


def test_it_learns_the_surface_and_leaves_the_base_as_it_is(
    base: Served, surface: tuple[EventLog, Path], tmp_path: Path
) -> None:
    config = config_of(base, surface, tmp_path / "new" / "a.adapter")
    files = {path: path.read_bytes() for path in base.model_dir.iterdir()}
    report = adapt(config)
    assert files == {path: path.read_bytes() for path in base.model_dir.iterdir()}
    assert report.size_bytes == Path(config.out).stat().st_size < 4096
    assert report.adapted["ne/click"] < report.base["ne/click"] - 0.3
    users = list(range(1, 9))
    with Scorer.open(base.model_dir, surface[1], adapter={"a": config.out}) as scorer:
        items = scorer.served.items.ids(np.arange(20))
        assert scorer.score(users, items).mean() < 0.7 < 0.8 < scorer.score(users, items, adapter="a").mean()
    again = adapt(replace(config, out=str(tmp_path / "b.adapter")))
    assert (tmp_path / "b.adapter").read_bytes() == Path(config.out).read_bytes() and again.adapted == report.adapted


def test_position_bias_is_corrected_as_in_training(
    base: Served, surface: tuple[EventLog, Path], tmp_path: Path
) -> None:
    """Users look at half of the items that they are shown, and click nearly all of these."""
    source = shutil.copytree(Path(surface[0].path).parent / "source", tmp_path / "source")
    shown = pl.read_parquet(source / "impressions.parquet")
    clicks = shown["click"].to_numpy() * (np.random.default_rng(1).random(len(shown)) < 0.5)
    shown = shown.with_columns(pl.Series("click", clicks.astype(np.int8)), pl.lit(0.5).alias("propensity"))
    shown.write_parquet(source / "impressions.parquet")
    prepare(PrepareConfig(out=str(tmp_path / "log"), events=SourceConfig(kind="simulated", paths=[str(source)])))
    config = replace(config_of(base, surface, tmp_path / "naive.adapter"), data=str(tmp_path / "log"))
    adapt(config)
    adapt(replace(config, out=str(tmp_path / "corrected.adapter"), examined_tasks=["click"]))
    users = list(range(1, 9))
    with Scorer.open(base.model_dir, surface[1], adapter=tmp_path) as scorer:
        items = scorer.served.items.ids(np.arange(20))
        means = {name: scorer.score(users, items, adapter=name).mean() for name in ("naive", "corrected")}
    assert means["naive"] < 0.6 < 0.7 < means["corrected"]
    asked = EvaluateConfig(model=str(base.model_dir), store=str(base.test_store), data=str(tmp_path / "log"))
    for name in ("naive", "corrected"):
        found = evaluate(replace(asked, adapter=str(tmp_path / f"{name}.adapter"))).metrics
        assert found["calibration/click"] == pytest.approx(1, abs=0.15), "of labels as they were observed"


def test_the_command_and_the_evaluation_of_what_it_wrote(
    base: Served, surface: tuple[EventLog, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, store = surface
    out, at = tmp_path / "a.adapter", str(base.config.data.test_from)
    words = [
        f"base={base.model_dir}",
        f"store={store}",
        f"data={log.path}",
        f"out={out}",
        "epochs=5",
        "learning_rate=0.05",
    ]
    assert main(["adapt", *words, "ranks_items=true"]) == 0
    assert "ne/click" in capsys.readouterr().out
    refresh(base.model, log, tmp_path / "test", until=int(at))
    asked = EvaluateConfig(model=str(base.model_dir), store=str(tmp_path / "test"), data=str(log.path))
    plain, adapted = (evaluate(replace(asked, adapter=file)).metrics for file in (None, str(out)))
    assert adapted["ne/click"] < plain["ne/click"] - 0.1 and adapted["ndcg@10"] != plain["ndcg@10"]


def test_the_next_item_alone(base: Served, tmp_path: Path) -> None:
    """A base without labeled tasks learns from next items; its split gives the times."""
    log = base.log
    config = tasks_config(log, tmp_path, optim__task_weight=0.0)
    served = serve(log, config, tmp_path)
    assert served.model.schema.tasks == []
    refresh(served.model, log, tmp_path / "past", until=past_of(served))
    report = adapt(
        AdaptConfig(
            base=str(served.model_dir), store=str(tmp_path / "past"), data=str(log.path), out=str(tmp_path / "a")
        )
    )
    assert report.epochs > 0 and set(report.adapted) == {"ndcg@10", "hr@10"} <= set(report.base)


def test_what_it_refuses(base: Served, surface: tuple[EventLog, Path], tmp_path: Path) -> None:
    config = config_of(base, surface, tmp_path / "a")
    with pytest.raises(LeakageError, match="was refreshed with until="):
        adapt(replace(config, store=str(base.test_store)))
    with pytest.raises(LeakageError, match="was trained on events until"):
        adapt(replace(config, validation_from="2000-01-01"))
    source = Path(surface[0].path).parent / "source"
    shutil.copytree(source, tmp_path / "source")
    shown = pl.read_parquet(source / "impressions.parquet")
    shown.drop("like", "like_probability").write_parquet(tmp_path / "source/impressions.parquet")
    prepare(
        PrepareConfig(
            out=str(tmp_path / "log"), events=SourceConfig(kind="simulated", paths=[str(tmp_path / "source")])
        )
    )
    with pytest.raises(ConfigError, match="has no task 'like'"):
        adapt(replace(config, data=str(tmp_path / "log")))
    assert not (tmp_path / "a").exists()
