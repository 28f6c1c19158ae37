"""Count the files of vista that a call passes through, and the size of the tree.

    python -m scripts.paths --list                  # the tables, and the files
    python -m scripts.paths model.counter_keys=[]   # the tables, with another model

Five jobs run on a small log in a temporary folder. A file counts if one of its functions is called, in this process or
in the parser process of an ingest. What runs during an import does not count, so each job is as in a warm process.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import dataclasses
import inspect
import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any, get_args, get_type_hints
from unittest.mock import patch

import vista
import vista_kernels
from vista.cli.main import main as vista_main

# The parser process imports this module too, so other parts of vista are imported where they are used.

REPOSITORY = Path(__file__).parents[1]
ROOTS = (Path(vista.__path__[0]), Path(vista_kernels.__path__[0]))
BARS = {"train": 55, "ingest": 30, "refresh": 32, "warm score": 14, "HTTP score": 18}
"""Most files of vista that each job should pass through."""
CHILD_VARIABLE = "VISTA_PATHS_FILE"
"""Names the file to which a child process appends the names of its files."""
TRAIN = ("device=cpu", "num_threads=1", "model.dim=16", "model.num_heads=2", "model.num_seeds=2", "optim.epochs=1")
USERS, CANDIDATES = [1, 2, 3], [0, 1, 2, 3, 4]


def install(files: set[str], on_file: Callable[[str], object] = str) -> None:
    """Collect the files of vista in which functions are called, in this thread and in those that start from now on."""
    prefixes = tuple(f"{root}{os.sep}" for root in ROOTS)

    def profile(frame: FrameType, event: str, _: object) -> None:
        name = frame.f_code.co_filename
        if event != "call" or name in files or not name.startswith(prefixes):
            return
        caller: FrameType | None = frame
        while caller is not None:  # Bodies of modules and classes have no optimized variables, unlike functions.
            code = caller.f_code
            if code.co_filename.startswith(prefixes) and not code.co_flags & inspect.CO_OPTIMIZED:
                return
            caller = caller.f_back
        files.add(name)
        on_file(name)

    threading.setprofile(profile)
    sys.setprofile(profile)


@contextmanager
def recording() -> Iterator[set[str]]:
    """The files in which this block calls functions."""
    files: set[str] = set()
    install(files)
    try:
        yield files
    finally:
        threading.setprofile(None)
        sys.setprofile(None)


def record_child() -> None:
    """Record this process, which will be killed, into the file that CHILD_VARIABLE names."""
    file = open(os.environ[CHILD_VARIABLE], "a", buffering=1, encoding="utf-8")  # noqa: SIM115, open until the end
    install(set(), lambda name: file.write(f"{name}\n"))


def run_command(*words: str) -> None:
    """Run `vista` in this process; its output goes to stderr."""
    with redirect_stdout(sys.stderr):
        if code := vista_main(words):
            raise SystemExit(code)


def files_of_jobs(folder: Path, overrides: Sequence[str] = ()) -> dict[str, set[str]]:
    """The files of each job of BARS; `overrides` are further arguments of `vista train`."""
    from vista import EventLog, Scorer, VistaModel
    from vista.refresh import refresh

    log, run, store, child = folder / "log", folder / "run", folder / "store", folder / "child.txt"
    pairs = [(user, step) for user in range(40) for step in range(50)]
    rows = [f"{user},{(7 * user + step * (1 + user % 3)) % 60},{1_600_000_000 + 90_000 * step}" for user, step in pairs]
    (folder / "events.csv").write_text("\n".join(["user,item,time", *rows]))
    (folder / "sitecustomize.py").write_text("from scripts.paths import record_child\n\nrecord_child()\n")
    source = [f"events.paths=[{folder / 'events.csv'}]", "events.timestamp=time", "events.time_unit=s"]
    path = os.pathsep.join([str(folder), *sys.path])
    with patch.dict(os.environ, {CHILD_VARIABLE: str(child), "PYTHONPATH": path}), recording() as ingest:
        run_command("prepare", f"out={log}", *source)
    ingest.update(child.read_text().splitlines())
    with recording() as train:
        run_command("train", f"data.path={log}", f"run_dir={run}", *TRAIN, *overrides)
    model, opened = VistaModel.from_pretrained(run / "best"), EventLog.open(log)
    with recording() as refreshed:
        refresh(model, opened, store)
    with Scorer.open(run / "best", store) as scorer:
        scorer.score(USERS, CANDIDATES)
        with recording() as scored:
            scorer.score(USERS, CANDIDATES)
    return dict(zip(BARS, [train, ingest, refreshed, scored, files_of_request(run / "best", store)], strict=True))


def files_of_request(model: Path, store: Path) -> set[str]:
    """The files of the second POST to /v1/score: `vista serve` runs its application, without uvicorn's network."""
    import uvicorn

    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/score", "query_string": b"", "headers": headers}
    called: list[set[str]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps({"users": USERS, "candidates": CANDIDATES}).encode()}

    async def post(app: Any) -> None:
        async def send(message: dict[str, Any]) -> None:
            if message.get("status", 200) != 200:
                raise SystemExit(f"/v1/score answered {message}")

        files.clear()
        await app(dict(scope), receive, send)
        called.append(set(files))

    async def serve(server: uvicorn.Server, sockets: object = None) -> None:
        for _ in range(2):
            await asyncio.create_task(post(server.config.app))  # in a task, so that only it resumes

    with patch.object(uvicorn.Server, "serve", serve), recording() as files:
        run_command("serve", f"model={model}", f"store={store}", "port=0", "device=cpu", "deadline_s=60")
    return called[1]


def code_lines(text: str) -> tuple[int, int]:
    """Lines of code, without blank lines, comments, and docstrings, and how many of them are imports."""
    lines = {number for number, line in enumerate(text.splitlines(), 1) if line.strip() and line.strip()[0] != "#"}
    imports: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports.update(range(node.lineno, (node.end_lineno or 0) + 1))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, (node.end_lineno or 0) + 1))
    return len(lines), len(lines & imports)


def sizes_of_tree() -> dict[str, str]:
    """The size of the tree. Keys are the fields that the configs define, so that one that several inherit counts once,
    and the names that a user can write, which several commands may share; sections do not count."""
    from vista.cli.command_table import COMMANDS
    from vista.config import checks, log_config, model_config, serve_config, store_config, train_config
    from vista.config.composition import ConfigKeys

    folders = {name: sorted((REPOSITORY / name).rglob("*.py")) for name in ("vista", "tests", "scripts")}
    texts = {name: [path.read_text(encoding="utf-8") for path in paths] for name, paths in folders.items()}
    lines = {name: [text.count("\n") for text in of_folder] for name, of_folder in texts.items()}
    short = [path for path, num in zip(folders["vista"], lines["vista"], strict=True) if num < 80]
    modules = (checks, log_config, model_config, serve_config, store_config, train_config)
    schemas = {
        schema
        for module in modules
        for name, schema in vars(module).items()
        if dataclasses.is_dataclass(schema) and not name.startswith("_")
    }
    fields = [(schema, field.name) for schema in schemas for field in dataclasses.fields(schema)]
    hints = [get_type_hints(schema)[name] for schema, name in fields if name in schema.__annotations__]
    num_keys = sum(not any(map(dataclasses.is_dataclass, (hint, *get_args(hint)))) for hint in hints)
    names = {name for command in COMMANDS.values() for name in ConfigKeys.of(command.schema).keys}
    code, imports = map(sum, zip(*map(code_lines, texts["vista"]), strict=True))
    return {
        "files of vista": f"{len(folders['vista']):,}",
        **{f"lines of {name}": f"{sum(of_folder):,}" for name, of_folder in lines.items()},
        "modules of vista under 80 lines": f"{sum(path.name != '__init__.py' for path in short):,}",
        "imports, of lines of code of vista": f"{imports / code:.1%}",
        "configuration keys": f"{num_keys:,}",
        "distinct names of keys": f"{len(names):,}",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="also list the files of each job")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="arguments of `vista train`")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="vista-paths-") as folder:
        files = files_of_jobs(Path(folder), options.overrides)
    print(f"{'job':<12}{'files of vista':>16}{'of vista_kernels':>18}{'bar':>6}")
    for job, names in files.items():
        nums = [sum(Path(name).is_relative_to(root) for name in names) for root in ROOTS]
        print(f"{job:<12}{nums[0]:>16}{nums[1]:>18}{BARS[job]:>6}")
    print()
    print(*(f"{counted:<40}{size:>12}" for counted, size in sizes_of_tree().items()), sep="\n")
    for job, names in files.items() if options.list else ():
        print(f"\n{job}", *(os.path.relpath(name, REPOSITORY) for name in sorted(names)), sep="\n    ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
