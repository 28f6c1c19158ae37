"""The command line: every file in conf/ composes, errors are one line, help is complete, any directory works."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import shlex
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.faults.nursery import Nursery, Say
from vista import config
from vista.cli.command_table import COMMANDS
from vista.cli.main import main
from vista.config.checks import OnBadRows, Split
from vista.config.composition import (
    ConfigKeys,
    command_name,
    compose_config,
    conf_dir,
    group_dir,
    groups_of,
    options_of,
    to_yaml,
)
from vista.errors import ConfigError, DataError
from vista.installation import __version__
from vista.log.vocabulary import ids_of_words

REPOSITORY = Path(__file__).parents[2]
NAMES = sorted(COMMANDS)
EXPERIMENTS = sorted(options_of("experiment"))


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in another directory with this checkout, whether installed or not."""
    path = os.pathsep.join(str(REPOSITORY / folder) for folder in (".", "kernels"))
    return subprocess.run(command, cwd=cwd, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)


@cache
def composed(schema: type, *words: str) -> Any:
    """A configuration, which takes a tenth of a second to compose; tests must not change it."""
    return compose_config(schema, list(words))


@pytest.mark.parametrize("word", ["--version", "-V", "version"])
def test_the_version(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word]) == 0
    assert capsys.readouterr().out == f"vista {__version__}\n"


def refusal(capsys: pytest.CaptureFixture[str], *words: str, code: int = 2) -> str:
    """The line with which the command line refuses."""
    assert main(words) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed.err
    return printed.err


def stub(
    monkeypatch: pytest.MonkeyPatch, error: BaseException | None, report: object = None, name: str = "train"
) -> None:
    def act(settings: Any) -> object:
        if error is not None:
            raise error
        return report

    monkeypatch.setitem(COMMANDS, name, dataclasses.replace(COMMANDS[name], run=act))


@pytest.mark.parametrize("name", NAMES)
def test_without_words_conf_gives_the_dataclass_defaults(name: str) -> None:
    schema = COMMANDS[name].schema
    assert compose_config(schema) == schema()


def test_every_command_has_its_schema_and_file() -> None:
    assert {name: command_name(command.schema) for name, command in COMMANDS.items()} == {n: n for n in NAMES}
    with_groups = {name for name in NAMES if groups_of(name)}
    assert {path.stem for path in conf_dir().glob("*.yaml")} == with_groups == {"plan", "prepare", "train"}
    groups = [*groups_of("train"), *groups_of("prepare")]
    assert {path for path in conf_dir().iterdir() if path.is_dir()} == set(map(group_dir, groups))


@pytest.mark.parametrize("word", [f"{g}={o}" for g in groups_of("train") for o in options_of(g)])
def test_every_option_composes_and_is_described(word: str) -> None:
    group, _, option = word.partition("=")
    assert isinstance(composed(config.TrainConfig, word), config.TrainConfig)
    assert len(options_of(group)[option]) > 10


@pytest.mark.parametrize("name", sorted(options_of("set")))
def test_every_data_set_is_prepared_where_its_experiment_reads_it(name: str) -> None:
    prepared = compose_config(config.PrepareConfig, [f"set={name}"])
    assert prepared.out == composed(config.TrainConfig, f"experiment={name}").data.path
    assert len(options_of("set")[name]) > 10


def test_every_experiment_has_its_own_folders() -> None:
    experiments = [composed(config.TrainConfig, f"experiment={name}") for name in EXPERIMENTS]
    for folders, default in (
        ([one.run_dir for one in experiments], config.TrainConfig().run_dir),
        ([one.data.path for one in experiments], config.DataConfig().path),
    ):
        assert len({*folders, default}) == len(EXPERIMENTS) + 1


def test_words_override_an_experiment() -> None:
    assert composed(config.TrainConfig, "experiment=simulation").model.dim != 24
    assert compose_config(config.TrainConfig, ["model.dim=24", "experiment=simulation"]).model.dim == 24


def test_simulation_experiment_splits_where_the_simulation_does() -> None:
    from vista.log.splits import parse_time
    from vista.simulation.streams import split_times

    data = composed(config.TrainConfig, "experiment=simulation").data
    times = [parse_time(text) for text in (data.validation_from, data.test_from) if text]
    assert times == list(split_times(config.SimulateConfig()))


def test_option_of_a_group_and_value_below_it() -> None:
    one = compose_config(config.TrainConfig, ["model.dim=128", "model.kind=paper", "optim=quick"])
    assert one == compose_config(config.TrainConfig, ["model={dim: 128, kind: paper}", "optim=quick"])
    assert (one.model.dim, one.model.num_seeds, one.optim.epochs) == (128, 128, 2)


def test_data_and_model_name_folders() -> None:
    one = compose_config(config.RefreshConfig, ["model=runs/x/best", "data=data/x"])
    assert (one.model, one.data) == ("runs/x/best", "data/x")
    trained = compose_config(config.TrainConfig, ["data=data/x", "data.split=share"]).data
    assert (trained.path, trained.split, trained.validation_share, trained.test_share) == (
        "data/x",
        Split.share,
        0.1,
        0.1,
    )


def test_optional_section_appears_with_its_first_key() -> None:
    one = compose_config(config.PrepareConfig, ["impressions.paths=[a.csv,b.csv]", "events={user: uid}"])
    assert one.impressions == config.ImpressionsConfig(paths=["a.csv", "b.csv"])
    assert one.events == config.SourceConfig(user="uid")


@pytest.mark.parametrize(
    ("schema", "word", "expected"),
    [
        (config.TrainConfig, "data.split=leave-last-out", Split.leave_last_out),
        (config.PrepareConfig, "on_bad_rows=raise", OnBadRows.error),
    ],
)
def test_enum_spellings_that_are_not_python_names(schema: type, word: str, expected: object) -> None:
    value: Any = compose_config(schema, [word])
    for part in word.partition("=")[0].split("."):
        value = getattr(value, part)
    assert value is expected


def test_within_an_initialized_hydra() -> None:
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        assert compose_config(config.TrainConfig) == config.TrainConfig()
        assert compose("plan").model.mixing == "separable"


@settings(max_examples=6, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="$\\?"), min_size=1),
    seeds=st.integers(0, 9),
)
def test_printed_configuration_reads_back(tmp_path_factory: pytest.TempPathFactory, text: str, seeds: int) -> None:
    file = tmp_path_factory.mktemp("cfg") / "config.yaml"
    written = config.TrainConfig(run_dir=text, model=config.ModelConfig(num_seeds=seeds, decay_horizons=[1e-7]))
    file.write_text(to_yaml(written), encoding="utf-8")
    assert compose_config(config.TrainConfig, config_file=file) == written


def test_an_absent_section_reads_back(tmp_path: Path) -> None:
    written = compose_config(config.PrepareConfig, ["out=x", "events.paths=[a.csv]", "events.user=cust"])
    assert written.impressions is None
    (tmp_path / "mine.yaml").write_text(to_yaml(written), encoding="utf-8")
    assert compose_config(config.PrepareConfig, config_file=tmp_path / "mine.yaml") == written
    shown = compose_config(
        config.PrepareConfig, ["impressions.user=cust"], config_file=tmp_path / "mine.yaml"
    ).impressions
    assert shown is not None and shown.user == "cust"


def test_words_override_the_file_and_the_file_overrides_its_experiment(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("experiment: ml-1m\nmodel: {num_seeds: 9, dim: 32}\n")
    one = compose_config(config.TrainConfig, ["model.dim=16"], config_file=file)
    assert (one.run_dir, one.model.num_seeds, one.model.dim) == ("runs/ml-1m", 9, 16)


@pytest.mark.parametrize(
    ("content", "part"), [("model: [1", "invalid YAML"), ("model: {num_seed: 3}", "did you mean model.num_seeds")]
)
def test_bad_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, part: str) -> None:
    (tmp_path / "bad.yaml").write_text(content)
    assert part in refusal(capsys, "train", "--config", str(tmp_path / "bad.yaml"))


def test_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{tmp_path}/none.yaml: No such file" in refusal(capsys, "train", "--config", f"{tmp_path}/none.yaml")


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (
            "train model.num_sed=3",
            ["unknown key 'model.num_sed'", "did you mean model.num_seeds", "vista train --help"],
        ),
        ("train learning_rate=1", ["unknown key 'learning_rate'", "did you mean optim.learning_rate"]),
        ("train experimnt=ml-1m", ["unknown key 'experimnt'", "did you mean experiment?"]),
        ("train model.dim=wide", ["model.dim: expected int, got wide"]),
        ("train resume=perhaps", ["resume: expected bool, got perhaps"]),
        ("train model.decay_horizons=3", ["expected [float, ...]", "model.decay_horizons=[3]"]),
        ("train model.mixing=seperable", ["expected bidirectional|separable", "did you mean separable?"]),
        ("train data.split=last", ["data.split: expected leave-last-out|time|share, got last"]),
        ("train experiment=ml-1n", ["experiment: no option 'ml-1n'", "did you mean ml-1m", *EXPERIMENTS]),
        ("train model.num_heads=5", ["model.num_heads: must divide model.dim=64, got 5"]),
        ("train data.split=time", ["data.validation_from: is required"]),
        ("train model=sasrec", ["model: is a group of keys, not a key; set model.kind, model."]),
        ("train model.kind=sasrek", ["model.kind: no option 'sasrek'", "did you mean sasrec?"]),
        ("train model={kind: sasrec, dim: wide}", ["model.dim: expected int, got wide"]),
        ("train data=[a]", ["data: is a group of keys, not a key; set data.path"]),
        ("evaluate horizon_events=50", ["write a list as horizon_events=[50]"]),
        ("train run_dir=a(b", ["cannot read 'run_dir=a(b'", "run_dir='a(b'"]),
        ("train model.dim", ["cannot read 'model.dim'", "write it as key=value"]),
        ("train model.dim=32,64", ["cannot read 'model.dim=32,64'", "only vista sweep takes several values"]),
        ("refresh store='redis://u:hun ter2@h/mine", ["cannot read 'store=…'", "store='URL'"]),
        ("train ~model.dim", ["cannot read '~model.dim'", "cannot be deleted"]),
        ("train run_dir=${nothing}", ["run_dir: ", "'nothing' not found"]),
        ("train --model.dim=3", ["--model.dim=3", "written without dashes: model.dim=3"]),
        ("prepare events=clicks.csv", ["events: is a group of keys", "events.paths"]),
        ("trian", ["unknown command 'trian'", "did you mean train?", *NAMES]),
        ("rank", ["unknown command 'rank'", "did you mean score?"]),
    ],
)
def test_one_line_names_the_key_and_the_remedy(capsys: pytest.CaptureFixture[str], line: str, parts: list[str]) -> None:
    command, _, word = line.partition(" ")
    printed = refusal(capsys, *([command, word] if word else [command]))
    for part in parts:
        assert part in printed
    assert "hun" not in printed and "ter2" not in printed


def test_a_value_with_special_characters_in_quotes() -> None:
    assert compose_config(config.TrainConfig, ["run_dir='a(b=c'"]).run_dir == "a(b=c"


@pytest.mark.parametrize(
    "url", ["redis://host:1/2/mine?timeout_s=30", "rediss://:p{,=}w@h/m", "kafka://a:1,b:2/clicks,views"]
)
def test_urls_need_no_quotes(url: str) -> None:
    assert compose_config(config.WatchConfig, [f"store={url}"]).store == url
    assert compose_config(config.WatchConfig, [f"source='{url}'", "folder=null"]).source == url


def test_nothing_runs_when_the_configuration_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stub(monkeypatch, AssertionError("ran"))
    refusal(capsys, "train", "model.dim=wide")


def test_report_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stub(monkeypatch, None, report="12 users", name="prepare")
    assert main(["prepare"]) == 0
    assert capsys.readouterr().out == "12 users\n"


def test_typed_error_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stub(monkeypatch, DataError("clicks.csv: row 3,\n  column item: 'x'"))
    assert refusal(capsys, "train", code=1) == "error: clicks.csv: row 3, column item: 'x'\n"


def test_error_of_a_file_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stub(monkeypatch, OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300))
    line = refusal(capsys, "train", code=1)
    assert line.startswith("error: xxx") and line.endswith("File name too long; check the path and the disk\n")


@pytest.mark.parametrize(("name", "resumes"), [("train", True), ("refresh", True), ("prepare", False)])
def test_interrupt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, resumes: bool
) -> None:
    stub(monkeypatch, KeyboardInterrupt(), name=name)
    assert main([name]) == 130
    line = capsys.readouterr().err
    assert line.startswith("interrupted") and line.count("\n") == 1 and ("resume" in line) is resumes


def test_unexpected_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, RuntimeError("bug"))
    with pytest.raises(RuntimeError):
        main(["train"])


@pytest.mark.parametrize("name", NAMES)
def test_lists_every_key_with_type_and_default(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main([*name.split(), "--help", "all"]) == 0
    text = capsys.readouterr().out
    for key in ConfigKeys.of(COMMANDS[name].schema).keys.values():
        if not key.name.startswith("impressions."):
            assert re.search(rf"^  {re.escape(key.name)}=\S*\s+{re.escape(key.type_text.split()[0])}", text, re.M)
    for group in groups_of(name):
        assert all(f"{group}={option} " in text for option in options_of(group))
    assert COMMANDS[name].summary in text


def test_shows_docstrings_also_of_enums_and_nested_fields(capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "--help", "all"])
    text = " ".join(capsys.readouterr().out.split())
    assert "model.num_seeds=16 int. Number of summary tokens K per user." in text
    assert "model.mixing=separable bidirectional|separable. How the tokens of stage 1 mix" in text
    assert "data.split=leave-last-out leave-last-out|time|share. Which labels are test labels" in text


@pytest.mark.parametrize("name", [name for name in NAMES if COMMANDS[name].first])
def test_help_fits_two_screens(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*name.split(), "--help"]) == 0
    lines, first = capsys.readouterr().out.splitlines(), COMMANDS[name].first
    assert len(lines) <= 80
    for key in first:
        (line,) = (line for line in lines if line.startswith(f"  {key}="))
        assert len(line) <= 80
    assert f"more keys: vista {name} --help all" in "\n".join(lines)


def test_help_of_a_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "experiment=ml-1m", "--help", "optim"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Group optim:\n") and "\n  optim.epochs=null" in text and "\n  model." not in text
    assert main(["train", "--help", "experiment"]) == 0
    assert capsys.readouterr().out.startswith("Experiments (complete runs by name):\n")
    assert main(["train", "--help", "model.kind=hstu"]) == 0 and "--help all" in capsys.readouterr().out
    assert main(["train", "--help", "modell"]) == 2
    assert "error: --help 'modell': is not a part of this text; use one of all, model, " in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_examples_compose(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("")
    assert COMMANDS[name].examples
    for example in COMMANDS[name].examples:
        assert f"{example} ".startswith(f"vista {name} ")
        assert main([*shlex.split(example)[1:], "--cfg"]) == 0


def test_overview_and_its_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in COMMANDS)
    unwrapped = " ".join(text.split())
    assert all(command.summary in unwrapped for command in COMMANDS.values())
    lines = [line.split() for line in text.splitlines() if line.startswith("  vista ")]
    assert len(lines) == 5 and all(main([*words[1:], "--cfg"]) == 0 for words in lines)
    assert main([]) == 2


def test_a_group_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert (main(["log"]), main(["log", "--help"])) == (2, 0)
    text = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert text.count(f"\n  {name} ") == text.count(command.summary[:40]) == (2 if "log " in name else 0)


def test_resolved_config_is_printed_and_no_run_folder_appears(tmp_path: Path) -> None:
    words = (sys.executable, "-m", "vista.cli", "train", "--cfg", "experiment=ml-1m", "model.num_seeds=33")
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == to_yaml(compose_config(config.TrainConfig, ["experiment=ml-1m", "model.num_seeds=33"]))
    assert list(tmp_path.iterdir()) == []


def test_a_closed_pipe_gives_no_traceback(tmp_path: Path) -> None:
    command = f"{shlex.quote(sys.executable)} -m vista.cli train --help | true; echo ${{PIPESTATUS[0]}}"
    done = run("bash", "-c", command, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("141\n", "")


def test_a_missing_conf_folder_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("vista.config.composition.__file__", str(tmp_path / "vista" / "composition.py"))
    with pytest.raises(ConfigError, match="install vista again: pip install"):
        conf_dir()


def test_an_id_stays_as_it_is_written(tmp_path: Path) -> None:
    # Hydra and YAML would read most of these as another number or a truth value, so as another user.
    words = ["1_000", "+5", "-0", "1e5", "true", "012", "nan", "1:30", "0x1F", "u_2", "42"]
    ids, listed = [*words, "a,b", "42"], ", ".join([*words, "'a,b'", "42"])
    assert compose_config(config.StoreEraseConfig, [f"users=[{listed}]", "store=s"]).users == ids
    (tmp_path / "ids.yaml").write_text(f"store: s\nusers: [{listed}]\n")
    assert compose_config(config.StoreEraseConfig, config_file=tmp_path / "ids.yaml").users == ids
    for word in words:
        assert compose_config(config.StoreGetConfig, [f"user={word}", "store=s"]).user == word
        (tmp_path / "id.yaml").write_text(f"store: s\nuser: {word}\n")
        assert compose_config(config.StoreGetConfig, config_file=tmp_path / "id.yaml").user == word
    (tmp_path / "columns.yaml").write_text(f"out: o\nevents: {{paths: [{listed}], user: 1_000}}\n")
    events = compose_config(config.PrepareConfig, config_file=tmp_path / "columns.yaml").events
    assert (events.paths, events.user) == (ids, "1_000")


@pytest.mark.parametrize("word", ["1_000", "+5", "012", "٣", ""])
def test_an_integer_id_has_one_spelling(word: str) -> None:
    assert ids_of_words(["-42", "0", "101"], "users", "int") == [-42, 0, 101]
    with pytest.raises(ConfigError, match="users: ids must be integers, as in the log, got "):
        ids_of_words([word], "users", "int")


@pytest.mark.parametrize(
    ("schema", "words", "key"),
    [
        (config.PrepareConfig, ["out=o", "events={paths:[x.csv],user:1_000}"], "events.user: 1000"),
        (config.StoreEraseConfig, ["store=s", "users=[int(5),1]"], "users: 5"),
    ],
)
def test_a_number_whose_text_is_unknown_is_refused(schema: type, words: list[str], key: str) -> None:
    with pytest.raises(ConfigError, match=f"{re.escape(key)} was read as a number .*; put text in quotes"):
        compose_config(schema, words)


def test_config_files_of_all_kinds(tmp_path: Path) -> None:
    file = tmp_path / "prepare.yaml"
    file.write_text("out: o\nevents: {item: title, <<: {user: 0, timestamp: t}, paths: [a, 1_0]}\n")
    events = compose_config(config.PrepareConfig, config_file=file).events
    assert (events.item, events.user, events.timestamp, events.paths) == ("title", "0", "t", ["a", "1_0"])
    for text in ("null", "", "# nothing\n"):
        file.write_text(text)
        assert compose_config(config.TrainConfig, config_file=file) == compose_config(config.TrainConfig)
    file.write_text("store=s")
    with pytest.raises(ConfigError, match="key"):
        compose_config(config.StoreGetConfig, config_file=file)


IN_A_COMMAND = """
    from vista.cli import command_table
    object.__setattr__(command_table.COMMANDS["plan"], "run", lambda _: fail())
    main(["plan"])
"""
IN_THE_PAGE = """
    import streamlit
    from streamlit.testing.v1 import AppTest
    from vista.explore import explore_server

    class App:
        def __init__(self, *arguments, **options):
            pass

        def run(self, config):
            try:
                fail()
            except ValueError:
                explore_server.logger.exception("the tab of %s could not be drawn", URL)
            for name in config:
                streamlit.config.set_option(name, config[name])
            streamlit.fail = fail
            (shown,) = AppTest.from_string("import streamlit; streamlit.fail()").run().exception
            print(shown.proto, file=sys.stderr)

    streamlit.App, explore_server.SLOW_IMPORTS = App, ()
    main(["explore", "port=0"])
"""
IN_A_THREAD = """
    from vista.errors import log_to_stderr

    log_to_stderr(0)
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
"""
IN_THE_SERVICE = """
    from vista.config import ServeConfig
    from vista.serve import worker, worker_pool
    from vista.serve.http_protocol import answer_of

    def run_worker(*arguments, **options):
        try:
            fail()
        except ValueError as error:
            assert "hunter2" not in answer_of(error, ()).message
        raise kind(f"{URL} cannot be read")

    worker_pool._stop_with_parent = lambda: None
    worker.run_worker = run_worker
    for kind in (StoreError, RuntimeError):
        with contextlib.suppress(SystemExit):
            worker_pool._work(ServeConfig(), None, "127.0.0.1", 0, None, False)
"""


def run_program(say: Say, code: str, errors: str) -> None:
    """Run a program in this process, and write its errors to a file, the last one as an interpreter does."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    try:
        exec(code, {})
    except Exception:
        sys.excepthook(*sys.exc_info())


@pytest.mark.parametrize("process", [IN_A_COMMAND, IN_THE_PAGE, IN_A_THREAD, IN_THE_SERVICE])
def test_tracebacks_hold_no_passwords(process: str, nursery: Nursery, tmp_path: Path) -> None:
    """Neither their errors, such as those of other packages, nor the lines of the log around them."""
    common = """
    import contextlib, sys, threading
    from vista.cli.main import main
    from vista.errors import StoreError

    URL = "redis://me:hunter2@host/mine"

    def fail():
        try:
            raise OSError(f"no answer from {URL}")
        except OSError as error:
            raise ValueError(f"{URL} does not answer, write to you@there") from error
    """
    nursery.start(run_program, textwrap.dedent(common) + textwrap.dedent(process), tmp_path / "errors").end()
    said = (tmp_path / "errors").read_text()
    assert "OSError: no answer from redis://me@host/mine" in said, said
    assert "ValueError: redis://me@host/mine does not answer" in said
    assert "Traceback" in said and "in fail" in said and "hunter2" not in said
