"""The table of all commands of `vista`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from vista import config


@dataclass(frozen=True, slots=True)
class Command:
    """A command: its config, the function that runs it, a one-line summary, and examples."""

    schema: type
    run: Callable[[Any], object]
    """Called with the config. Returns a report to print, or None."""
    summary: str
    examples: tuple[str, ...]
    resumes: bool = False
    """Whether rerunning the command after an interruption resumes where it stopped."""
    rest: str | None = None
    """The key that takes all words of keys that the config lacks; None refuses such words."""
    positional: str = ""
    """The key of a word without =, or of all such words if it is a list; empty if all words need keys."""
    first: tuple[str, ...] = ()
    """The keys that its help shows, if these are not all."""


def _handler(module: str, function: str) -> Callable[[Any], object]:
    """A function of a module in vista, which is imported when the command runs, so that help stays fast."""
    return lambda settings: getattr(import_module(f"vista.{module}"), function)(settings)


COMMANDS: dict[str, Command] = {
    "simulate": Command(
        config.SimulateConfig,
        _handler("simulation.simulate", "simulate"),
        "Simulate a log of long histories with labeled impressions, as source files for prepare.",
        (
            "vista simulate out=data/simulated",
            "vista simulate out=data/large num_users=2000 events_per_user=20000",
            "vista simulate seed=2 impressions_per_user=500",
            "vista simulate world=returns out=data/returns num_users=100 reference=true",
        ),
    ),
    "simulate online": Command(
        config.SimulateOnlineConfig,
        _handler("evaluation.online", "simulate_online"),
        "Let a trained model and simple policies choose what simulated users see: clicks and regret per round.",
        (
            "vista simulate online source=data/simulated model=runs/simulation/best",
            "vista simulate online source=data/simulated policy=[popular,oracle] new_users=0.2 satiation=2",
        ),
    ),
    "prepare": Command(
        config.PrepareConfig,
        _handler("cli.store_commands", "run_prepare"),
        "Convert source tables (Parquet, CSV, MovieLens, ...) into an EventLog, or append them to one.",
        (
            "vista prepare clicks.csv out=data/mine",
            "vista prepare out=data/ml-1m events.kind=auto events.paths=[path/to/ml-1m]",
            "vista prepare set=kuairand events.paths=[path/to/KuaiRand-27K/data]",
            "vista prepare out=data/mine events.paths=[clicks.csv] events.user=customer events.item=product "
            "events.timestamp=time events.time_unit=s",
            "vista prepare out=data/mine events.paths=[new.csv] append=true on_bad_rows=quarantine --config mine.yaml",
            "vista prepare clicks.csv out=data/mine impressions.from_events.again_days=30",
            "vista prepare out=data/mine items.paths=[items.csv] append=true items.categories=[brand] "
            "items.numbers=[price]",
        ),
        positional="files",
        first=(
            *("out", "files", "append", "on_bad_rows", "events.kind", "events.paths", "events.user", "events.item"),
            *("events.timestamp", "events.time_unit", "events.time_format", "events.action", "events.rating"),
            *("events.separator", "events.categories", "events.numbers", "impressions.paths", "impressions.labels"),
            *("impressions.from_events.again_days", "impressions.from_events.min_rating", "items.paths"),
            *("items.item", "items.categories", "items.numbers", "items.vectors", "users.paths", "users.user"),
            *("users.categories", "users.numbers", "filter.actions", "filter.min_item_events"),
            "filter.min_user_events",
        ),
    ),
    "train": Command(
        config.TrainConfig,
        _handler("cli.run_commands", "run_train"),
        "Train a model on an EventLog and export the best one to <run_dir>/best.",
        (
            "vista train data.path=data/mine run_dir=runs/mine",
            "vista train experiment=ml-1m model.num_seeds=32",
            "vista train model.kind=bidirectional optim=quick optim.learning_rate=1e-3 --cfg",
        ),
        resumes=True,
        first=(
            *("data.path", "run_dir", "init_from", "base", "store", "resume", "seed", "device", "num_threads"),
            *("data.split", "data.validation_from", "data.test_from", "data.exclude_seen", "data.min_item_events"),
            *("data.tokens_per_batch", "data.num_negatives", "data.windows_per_chunk"),
            *("model.dim", "model.num_heads", "model.num_seeds", "model.num_layers", "model.num_target_layers"),
            *("model.tail_len", "model.history_limit", "model.dropout", "model.counter_keys"),
            *("optim.learning_rate", "optim.epochs", "optim.minutes", "optim.tasks", "optim.next_weight"),
            *("optim.window_weight", "optim.patience", "optim.validation_users"),
        ),
    ),
    "adapt": Command(
        config.AdaptConfig,
        _handler("cli.run_commands", "run_adapt"),
        "Train an adapter of a few kilobytes that fits a model to another surface, country, or task.",
        ("vista adapt base=runs/mine/best store=stores/mine data=data/de out=adapters/de.adapter",),
    ),
    "sweep": Command(
        config.SweepConfig,
        _handler("cli.run_commands", "run_sweep"),
        "Train over several seeds and settings, and print a table of the results.",
        (
            "vista sweep data.path=data/mine folder=runs/dims seed=1,2,3 model.dim=64,128",
            "vista sweep data.path=data/mine folder=runs/rates trials=20 "
            "'optim.learning_rate=tag(log,interval(1e-4,1e-2))' seed=1,2",
        ),
        resumes=True,
        rest="train",
    ),
    "runs": Command(
        config.RunsConfig,
        _handler("cli.run_commands", "run_runs"),
        "List training runs with their state, best validation metric, and test metrics.",
        ("vista runs folder=runs", "vista runs folder=runs/dims sort=newest", "vista runs metric=hr@10 out=runs.json"),
    ),
    "runs compare": Command(
        config.RunsCompareConfig,
        _handler("cli.run_commands", "run_runs_compare"),
        "Show the settings in which training runs differ, and their metrics side by side.",
        ("vista runs compare runs=[runs/first,runs/second]",),
    ),
    "refresh": Command(
        config.RefreshConfig,
        _handler("cli.serving_commands", "run_refresh"),
        "Write users' summaries into the store: all of them, or what is new.",
        (
            "vista refresh data=data/mine model=runs/mine/best store=stores/mine",
            "vista refresh data=data/mine model=runs/mine/best store=stores/mine incremental=true",
            "vista refresh data=data/ml-1m model=runs/ml-1m/best store=stores/ml-1m until=leave-last-out",
            "vista refresh store=stores/exact codec=float32",
            "vista refresh data=data/mine model=runs/mine/best store=stores/sharded shard=0/4",
            "vista refresh data=data/mine model=runs/mine/best store=stores/mine ray.num_actors=8",
        ),
        resumes=True,
    ),
    "watch": Command(
        config.WatchConfig,
        _handler("cli.serving_commands", "run_watch"),
        "Append files or Kafka messages as they arrive, and keep the store up to date.",
        (
            "vista watch folder=incoming data=data/mine model=runs/mine/best store=stores/mine events.timestamp=time "
            "events.time_unit=s",
            "vista watch source=kafka://broker:9092/clicks data=data/mine model=runs/mine/best store=stores/mine "
            "events.timestamp=time events.time_unit=s",
            "vista watch data=data/mine model=runs/mine/best store=stores/mine once=true",
        ),
        resumes=True,
        first=(
            *("data", "model", "store", "folder", "source", "settle_s", "poll_s", "once", "report_file"),
            *("on_bad_rows", "events.user", "events.item", "events.timestamp", "events.time_unit"),
            *("events.time_format", "events.action", "events.rating", "stream.client_file", "stream.start"),
            *("stream.max_messages", "device", "num_threads"),
        ),
    ),
    "evaluate": Command(
        config.EvaluateConfig,
        _handler("evaluation.evaluate", "evaluate"),
        "Measure quality as served, with summaries from the store and scores from the scorer.",
        (
            "vista evaluate data=data/ml-1m model=runs/ml-1m/best store=stores/ml-1m",
            "vista evaluate split=validation top_k=[10,100]",
            "vista evaluate target=window horizon_events=[50] out=metrics.json",
        ),
    ),
    "compare": Command(
        config.CompareConfig,
        _handler("evaluation.comparison", "compare"),
        "Compare two evaluated models, user by user, with a paired test.",
        (
            "vista compare a=[vista.json] b=[hstu.json]",
            "vista compare a=[vista-1.json,vista-2.json] b=[hstu-1.json,hstu-2.json]",
        ),
    ),
    "report": Command(
        config.ReportConfig,
        _handler("report.report", "write_report"),
        "Write one HTML page about a training run: curves, quality compared with baselines and other runs, latency.",
        (
            "vista report run=runs/mine",
            "vista report run=runs/mine others=[runs/no-summary,runs/hstu] store=stores/mine-test out=report.html",
            "vista report run=runs/mine target=window horizon_events=200 top_k=50",
        ),
    ),
    "score": Command(
        config.ScoreConfig,
        _handler("cli.serving_commands", "run_score"),
        "Score candidates for users, rank the whole catalog, or retrieve from it.",
        (
            "vista score model=runs/ml-1m/best store=stores/ml-1m users=[1,2] top_k=20",
            "vista score users=[1] candidates=[1193,661,914]",
            "vista score users=[1] request=[device:phone,hour:14]",
            "vista score users=[1] retrieve=true index=runs/vista/best.index",
            "vista score users=[nobody] on_missing=raise",
        ),
    ),
    "serve": Command(
        config.ServeConfig,
        _handler("cli.serving_commands", "run_serve"),
        "Answer requests over HTTP: score, predict, rank, retrieve, explain.",
        (
            "vista serve model=runs/mine/best store=stores/mine",
            "vista serve model=runs/mine/best store=stores/mine host=0.0.0.0 port=8000 workers=4 token_file=token",
            "vista serve model=runs/mine/best store=stores/mine index=runs/mine/best.index",
            "vista serve model=runs/mine/best store=stores/mine on_missing=nan deadline_s=0.2 max_waiting=16",
            "vista serve models=models.yaml workers=4",
        ),
    ),
    "explore": Command(
        config.ExploreConfig,
        _handler("explore.explore_server", "run_page"),
        "Show users, rankings with explanations, and the store in a browser.",
        (
            "vista explore",
            "vista explore model=runs/mine/best store=stores/mine data=data/mine",
            "vista explore model=runs/mine/best store=stores/mine other_model=runs/new/best other_store=stores/new",
            "vista explore port=8600",
        ),
    ),
    "index": Command(
        config.IndexConfig,
        _handler("cli.item_commands", "run_index"),
        "Index a model's item vectors, so that a scorer retrieves candidates from a large catalog.",
        ("vista index model=runs/mine/best", "vista index model=runs/mine/best kind=hnsw out=indexes/mine"),
    ),
    "export": Command(
        config.ExportConfig,
        _handler("cli.run_commands", "run_export"),
        "Export stage 2 with its tables as ONNX or AOTInductor, and compare it with the scorer.",
        (
            "vista export model=runs/mine/best out=exports/mine store=stores/mine",
            "vista export model=runs/mine/best out=exports/mine format=aotinductor",
        ),
    ),
    "plan": Command(
        config.PlanConfig,
        _handler("cli.run_commands", "run_plan"),
        "Estimate the cores, machines, disk, memory, and network that a deployment needs.",
        (
            "vista plan users=1e6 events_per_day=5e7 requests_per_s=1000",
            "vista plan users=1e9 events_per_day=5e10 requests_per_s=1e5 model.dim=256 model.num_seeds=128",
            "vista plan users=1e8 events_per_day=5e9 remote_store=true out=plan.json",
        ),
        first=(
            *("users", "events_per_day", "history_events", "requests_per_s", "candidates", "items", "codec", "state"),
            *("refresh_every_s", "remote_store", "replicas", "out", "machine.cores"),
            *("machine.memory_gb", "machine.disk_tb", "model.dim", "model.num_seeds", "model.num_layers"),
            *("model.num_target_layers", "model.tail_len", "model.counter_keys", "model.mixing"),
        ),
    ),
    "doctor": Command(
        config.DoctorConfig,
        _handler("cli.run_commands", "run_doctor"),
        "Check this machine, a model, a store, and a log: what is broken or slow, and how to fix it.",
        (
            "vista doctor",
            "vista doctor model=runs/mine/best store=stores/mine data=data/mine",
            "vista doctor out=doctor.json",
        ),
    ),
    "monitor": Command(
        config.MonitorConfig,
        _handler("report.monitor", "monitor"),
        "Compare the newest window of a log, its store, and its scores with the training data: what is due.",
        (
            "vista monitor data=data/mine model=runs/mine/best store=stores/mine",
            "vista monitor data=data/mine model=runs/mine/best now=2024-12-01 out=null metrics_file=monitor.prom",
        ),
    ),
    "completion": Command(
        config.CompletionConfig,
        _handler("cli.completion", "run_completion"),
        "Print a script that lets a shell complete commands, keys, and values.",
        ("vista completion bash", "vista completion zsh", "vista completion fish"),
        positional="shell",
    ),
    "model promote": Command(
        config.ModelPromoteConfig,
        _handler("report.lifecycle", "promote"),
        "Copy a model into a registry as the challenger, or as the champion if it passes all gates.",
        ("vista model promote model=runs/february/best alias=challenger", "vista model promote data=data/mine"),
    ),
    "model rollback": Command(
        config.ModelRollbackConfig,
        _handler("report.lifecycle", "roll_back"),
        "Point the alias back to the previous model.",
        ("vista model rollback",),
    ),
    "model list": Command(
        config.ModelListConfig,
        _handler("report.lifecycle", "list_models"),
        "List the models of a registry with their aliases and their last change.",
        ("vista model list",),
    ),
    "items add": Command(
        config.ItemsAddConfig,
        _handler("cli.item_commands", "run_items_add"),
        "Let a trained model rank new items by their features, without training.",
        ("vista items add model=runs/mine/best items.paths=[new.parquet] items.item=product",),
    ),
    "items embed": Command(
        config.ItemsEmbedConfig,
        _handler("cli.item_commands", "run_items_embed"),
        "Encode the texts of items as vectors, without a network, as a table that prepare reads.",
        (
            "vista items embed items.paths=[products.parquet] items.item=product columns=[title,brand]",
            "vista items embed kind=ml-1m items.paths=[path/to/ml-1m] out=titles.parquet",
        ),
    ),
    "items tokenize": Command(
        config.ItemsTokenizeConfig,
        _handler("cli.item_commands", "run_items_tokenize"),
        "Cluster the vectors of items into semantic ids, as a table that prepare reads.",
        (
            "vista items tokenize vectors=vectors.parquet item=product column=text",
            "vista items tokenize vectors=runs/mine/best item=product levels=2 codes=64",
        ),
    ),
    "store erase": Command(
        config.StoreEraseConfig,
        _handler("cli.store_commands", "run_store_erase"),
        "Erase users: readers miss them at once, and no later refresh brings them back.",
        ("vista store erase store=stores/mine users=[101] data=data/mine",),
    ),
    "log forget": Command(
        config.LogForgetConfig,
        _handler("cli.store_commands", "run_log_forget"),
        "Delete the events that a file names from an EventLog. If any is missing, nothing is deleted.",
        (
            "vista log forget data=data/mine events=deletions.csv time_unit=s",
            "vista log forget data=data/mine events=deletions.parquet",
        ),
    ),
    "log erase": Command(
        config.LogEraseConfig,
        _handler("cli.store_commands", "run_log_erase"),
        "Delete all events and impressions of the given users from an EventLog.",
        ("vista log erase data=data/mine users=[101,102]",),
    ),
    "log compact": Command(
        config.LogCompactConfig,
        _handler("cli.store_commands", "run_log_compact"),
        "Merge the segments of an EventLog into one and remove deleted data from the disk.",
        ("vista log compact data=data/mine",),
    ),
    "log verify": Command(
        config.LogVerifyConfig,
        _handler("cli.store_commands", "run_log_verify"),
        "Check every byte of an EventLog. Damaged files are listed, with exit code 1.",
        ("vista log verify data=data/mine",),
    ),
    "log stats": Command(
        config.LogStatsConfig,
        _handler("cli.store_commands", "run_log_stats"),
        "Print what an EventLog contains: segments, users, events, deletions, bytes, times.",
        ("vista log stats data=data/mine",),
    ),
    "store stats": Command(
        config.StoreStatsConfig,
        _handler("cli.store_commands", "run_store_stats"),
        "Print what a store contains: generations, the one in service, records, bytes, age, readers.",
        ("vista store stats store=stores/mine",),
    ),
    "store verify": Command(
        config.StoreVerifyConfig,
        _handler("cli.store_commands", "run_store_verify"),
        "Check the files and every record of a store. Problems are printed, with exit code 1.",
        ("vista store verify store=stores/mine",),
    ),
    "store get": Command(
        config.StoreGetConfig,
        _handler("cli.store_commands", "run_store_get"),
        "Print one user's record: the events it covers, its tail, and the norms of its summary.",
        ("vista store get store=stores/mine user=42 model=runs/mine/best",),
    ),
    "store rollback": Command(
        config.StoreRollbackConfig,
        _handler("cli.store_commands", "run_store_rollback"),
        "Verify an earlier generation and serve it again.",
        ("vista store rollback store=stores/mine", "vista store rollback store=stores/mine to=7"),
    ),
    "store compact": Command(
        config.StoreCompactConfig,
        _handler("cli.store_commands", "run_store_compact"),
        "Rewrite the served generation without removed data, and delete older generations.",
        ("vista store compact store=stores/mine",),
    ),
    "store copy": Command(
        config.StoreCopyConfig,
        _handler("cli.store_commands", "run_store_copy"),
        "Copy a generation to the store of a serving host, verify it there, and serve it.",
        (
            "vista store copy store=stores/mine to=/srv/stores/mine",
            "vista store copy store=stores/mine to=/srv/stores/mine publish=false",
        ),
        resumes=True,
    ),
    "store merge": Command(
        config.StoreMergeConfig,
        _handler("cli.store_commands", "run_store_merge"),
        "Combine stores of one model, from the logs of several machines or from shards, into one store.",
        (
            "vista store merge parts=[stores/a,stores/b] data=[data/a,data/b] model=runs/mine/best store=stores/all",
            "vista store merge parts=[stores/sharded] data=[data/mine] model=runs/mine/best store=stores/mine",
        ),
        resumes=True,
    ),
    "store export": Command(
        config.StoreExportConfig,
        _handler("cli.store_commands", "run_store_export"),
        "Export the served generation to a Parquet file, as readable columns and exact records.",
        ("vista store export store=stores/mine out=summaries.parquet",),
    ),
    "store import": Command(
        config.StoreImportConfig,
        _handler("cli.store_commands", "run_store_import"),
        "Import an exported Parquet file as a new generation of a store, and serve it.",
        ("vista store import file=summaries.parquet store=stores/other",),
    ),
}
"""By name, which is one word or two. Two-word commands with the same first word form a group."""
