"""Exports score what the scorer does, without vista, and are written atomically."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import draw_counter_weights, made_once, small_config
from tests.counters.counter_histories import category
from tests.required_program import require_compiler
from tests.scorer.test_adapters import write_adapter
from vista.cli.main import main
from vista.config import DataConfig, ModelConfig
from vista.config.checks import Architecture, ExportFormat, Precision, TargetAttentionKind
from vista.errors import ExportError, MissingDependencyError
from vista.export.export import compare, export, scorer_outputs
from vista.export.serving_graph import Arrays, ServingGraph, graph_inputs
from vista.export.trial_requests import trial_requests, write_trial_store
from vista.log.event_log import EventLog
from vista.log.histories import NUM_GAPS, gap_bucket
from vista.log.vocabulary import Vocabulary
from vista.model.baselines.sequence_models import HSTU
from vista.model.features import FeatureSpec, HashedVocabulary, RowFeatureReader, Schema
from vista.model.item_projections import ItemProjections
from vista.model.vista_model import VistaModel
from vista.scorer.serving_snapshot import ServingSnapshot
from vista.scorer.serving_source import ServingSource
from vista.training.log_schema import schema_of

COLUMNS = [
    FeatureSpec("device", "category", 3),
    FeatureSpec("dwell", "number", 4, [0.0, 1.0, 2.0], 0.5, 1.5),
    FeatureSpec("page", "category", 5, hashed=True),
]


def drawn_model(
    kind: TargetAttentionKind = TargetAttentionKind.pointwise,
    *,
    num_seeds: int = 3,
    counters: bool = True,
    features: bool = True,
    tasks: Sequence[str] = ("click", "buy"),
    has_retrieval: bool = True,
    has_time: bool = True,
    num_layers: int = 2,
    categories: bool = False,
    pooled_dim: int = 7,
    residual_task: str | None = None,
) -> VistaModel:
    """A model in eval mode. No weight that training starts at 0 is 0."""
    config = ModelConfig(
        dim=16,
        num_heads=2,
        num_seeds=num_seeds,
        num_layers=1,
        num_target_layers=num_layers,
        tail_len=6,
        target_attention=kind,
        counter_keys=(
            ["item", "brand", "brand*month", "previous*item", "brand*weekday", "brand*action"]
            if categories
            else ["item"]
        )
        if counters
        else [],
        num_counters=10,
        pooled_dim=pooled_dim,
    )
    columns = COLUMNS if features else []
    brands, table = category("brand", np.arange(100) % 8 - 1) if categories else ([], None)
    schema = Schema(
        ["view", "like"],
        has_time,
        None,
        list(tasks),
        has_retrieval,
        item_features=brands,
        event_features=columns,
        num_tail_features=len(columns),
        request_features=columns,
        user_features=columns,
        residual_task=residual_task,
    )
    torch.manual_seed(0)
    model = VistaModel(config, schema, Vocabulary.from_ids(np.arange(100) * 7), DataConfig()).eval()
    if features:
        values = {"device": Vocabulary.from_ids(["phone", "tablet", "tv"]), "dwell": None, "page": HashedVocabulary(5)}
        model.event_features = model.request_features = model.user_features = RowFeatureReader(columns, values)
    model.set_item_features(table)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.3)
    draw_counter_weights(model)
    return model


Kind = TargetAttentionKind
MODELS: dict[str, dict[str, Any]] = {
    "pointwise": {},
    "softmax": {"kind": Kind.softmax, "num_layers": 1},
    "only next, without a summary": {"tasks": (), "num_seeds": 0, "features": False},
    "only tasks, without pooled vectors": {"has_retrieval": False, "pooled_dim": 0},
    "products": {"categories": True},
    "only tasks, with labels in pooled vectors": {"has_retrieval": False, "residual_task": "like"},
    "little": {"counters": False, "features": False, "has_time": False, "num_seeds": 0, "pooled_dim": 0},
}


def snapshot_of(model: VistaModel, folder: Path, adapter: Path | None = None) -> ServingSnapshot:
    write_trial_store(model, folder / "store")
    return ServingSource(model, folder / "store", "cpu", None, Precision.float32, adapter=adapter).open()


def eager(graph: ServingGraph) -> Any:
    def run(arrays: Arrays) -> Arrays:
        outputs = graph(*(torch.from_numpy(arrays[name]) for name in graph.names))
        return {name: output.numpy() for name, output in zip(graph.outputs, outputs, strict=True)}

    return run


@pytest.mark.parametrize("name", MODELS)
def test_a_graph_scores_as_the_scorer_does(tmp_path: Path, name: str) -> None:
    model, adapter = drawn_model(**MODELS[name]), None
    if name in ("pointwise", "softmax"):
        write_adapter(model, adapter := tmp_path / "x.adapter", np.random.default_rng(0))
    snapshot = snapshot_of(model, tmp_path, adapter)
    graph = ServingGraph(model.with_adapter(snapshot.adapter(None)), snapshot.items)
    compared, example = compare(eager(graph), snapshot, 150, 1e-4)
    snapshot.store.close()
    assert set(compared.max_difference) == ({"logits"} if model.schema.tasks else set()) | (
        {"next"} if model.has_retrieval else set()
    )
    for output in compared.max_difference:
        assert np.std(example[output]) > 1e-3


def test_trial_requests_differ_in_everything_that_a_model_reads(tmp_path: Path) -> None:
    """A comparison means nothing if no request has a counted candidate, a new event, or an unknown user."""
    model = drawn_model()
    snapshot = snapshot_of(model, tmp_path)
    trials = list(trial_requests(snapshot, 150))
    arrays = [trial.arrays for trial in trials]
    assert sum(len(one["candidates"]) for one in arrays) == 150
    counters = [trial.request.counters for trial in trials]
    counted = [
        len(one.find(slice(0, len(trial.rows)), trial.rows, slice(0, trial.rows.shape[1]))[0])
        for one, trial in zip(counters, trials, strict=True)
        if one is not None
    ]
    assert sum(counted) > 100
    for name in ("found", "tail_is_new", "request.device", "user.device", "tail.device", "now", "candidates"):
        assert len(np.unique(np.concatenate([one[name].ravel() for one in arrays]))) > 1, name
    assert {one["candidates"].shape[1] for one in arrays} >= {1, 2, 17, 100}
    snapshot.store.close()


def test_a_difference_is_an_error(tmp_path: Path) -> None:
    model = drawn_model(features=False, counters=False)
    snapshot = snapshot_of(model, tmp_path)
    graph = ServingGraph(model, snapshot.items)
    run = eager(graph)
    for wrong in (1e-3, np.nan):

        def changed(arrays: Arrays, wrong: float = wrong) -> Arrays:
            outputs = run(arrays)
            outputs["logits"][-1, -1, -1] += wrong
            return outputs

        with pytest.raises(ExportError, match=r"logits of the export differ by up to .* from the scorer's"):
            compare(changed, snapshot, 10, 1e-4)
    snapshot.store.close()


def test_the_graph_leaves_its_model_alone(tmp_path: Path) -> None:
    model = drawn_model(kind=Kind.softmax)
    before = {name: (own.clone(), own.requires_grad) for name, own in model.named_parameters()}
    snapshot = snapshot_of(model, tmp_path)
    ServingGraph(model, snapshot.items)
    for name, own in model.named_parameters():
        assert torch.equal(own, before[name][0])
        assert own.requires_grad == before[name][1]
    snapshot.store.close()


def test_gaps_have_the_buckets_of_training() -> None:
    model = drawn_model(features=False, counters=False)
    graph = ServingGraph(model, ItemProjections.of(model))
    edges = 1000 * (2 ** np.arange(34) - 1)
    gaps = np.unique(np.concatenate([edges - 1, edges, edges + 1, edges + 500, [-5, 0, 999, 10**14]]))
    np.testing.assert_array_equal(graph._bucket(torch.from_numpy(gaps)).numpy(), gap_bucket(gaps))
    assert graph._bucket(torch.tensor([2**62])).item() == NUM_GAPS - 1


def test_inputs_that_a_model_does_not_read_are_left_out() -> None:
    names = [one.name for one in graph_inputs(drawn_model(**MODELS["little"]))]
    assert names == ["candidates", "found", "tail_lengths", "tail_items", "tail_actions"]


BLOCKER = """
import runpy, sys

blocked = sys.argv[1].split(",")

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Blocker())
script, sys.argv = sys.argv[2], sys.argv[2:]
runpy.run_path(script, run_name="__main__")
"""
"""Runs a program in a process where some packages cannot be imported: blocked names, the program, its arguments."""


ALL_SHAPES = """
import sys
from pathlib import Path
import numpy as np
import onnxruntime

folder = Path(sys.argv[1])
session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
for path in sorted(Path(sys.argv[2]).glob("*.npz")):
    arrays = np.load(path)
    given = {name: array for name, array in arrays.items() if not name.startswith("output:")}
    outputs = dict(zip([one.name for one in session.get_outputs()], session.run(None, given)))
    for name, expected in arrays.items():
        if name.startswith("output:"):
            difference = np.abs(outputs[name.removeprefix("output:")] - expected).max()
            assert difference <= 1e-4, (path, name, difference)
print("ok")
"""


pytestmark = pytest.mark.timeout(900)  # an export takes ten seconds of one idle core, in a fixture


LITTLE = {"features": False, "has_time": False, "num_seeds": 0, "pooled_dim": 0}
"""Changes of a model that takes half of the time to export: it reads candidates, and items and actions of tails."""


@pytest.fixture(
    scope="module",
    params=["little", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("plain", "counters"))],
)
def reads(request: pytest.FixtureRequest) -> str:
    """What the exported model reads: little, all but counters, or everything."""
    return str(request.param)


@pytest.fixture(scope="module")
def folder(reads: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `model`, and a store of its summaries."""

    def make(folder: Path) -> None:
        changes: dict[str, Any] = LITTLE if reads == "little" else {}
        made = drawn_model(kind=TargetAttentionKind.softmax, num_layers=1, counters=reads == "counters", **changes)
        made.save_pretrained(folder / "model")
        write_trial_store(made, folder / "store", seed=1)

    return made_once(tmp_path_factory, f"export-{reads}", make)


@pytest.fixture(scope="module")
def model(folder: Path) -> VistaModel:
    return VistaModel.from_pretrained(folder / "model")


@pytest.fixture(scope="module")
def exported(reads: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX export of `model`, made by the command."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")

    def make(out: Path) -> None:
        assert main(["export", f"model={folder / 'model'}", f"store={folder / 'store'}", f"out={out / 'onnx'}"]) == 0

    return made_once(tmp_path_factory, f"exported-{reads}", make) / "onnx"


def run_blocked(script: Path, *arguments: object, blocked: str) -> subprocess.CompletedProcess[str]:
    """Run a program in isolated mode (-I), in which no path of the checkout is searched."""
    command = [sys.executable, "-I", "-c", BLOCKER, blocked, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/")


@pytest.mark.nightly
def test_the_example_runs_without_vista_and_torch(exported: Path) -> None:
    done = run_blocked(exported / "example.py", blocked="vista,vista_kernels,torch,onnx")
    assert done.returncode == 0, done.stderr
    assert [line.split(" [")[0] for line in done.stdout.splitlines()] == ["logits", "probabilities", "next"]


def test_any_number_of_users_candidates_events_and_keys(exported: Path, folder: Path, tmp_path: Path) -> None:
    """Also one user without events and keys, in a process without vista and torch."""
    snapshot = ServingSource(folder / "model", folder / "store", "cpu", None, Precision.float32).open()
    shapes = set()
    for number, trial in enumerate(trial_requests(snapshot, 150, seed=8)):
        expected = {f"output:{name}": values for name, values in scorer_outputs(snapshot, trial).items()}
        shapes.add((*trial.arrays["candidates"].shape, *trial.arrays["tail_items"].shape[1:]))
        np.savez(tmp_path / f"{number}.npz", **trial.arrays, **expected)  # type: ignore[arg-type]
    graph = ServingGraph(snapshot.model, snapshot.items)
    snapshot.store.close()
    cut = {name: array[:1] for name, array in trial.arrays.items()} | {"tail_lengths": np.zeros(1, np.int64)}
    cut |= {name: cut[name][:, :0] for name in cut if name.startswith(("tail", "counter")) and cut[name].ndim > 1}
    shapes.add((*cut["candidates"].shape, *cut["tail_items"].shape[1:]))
    outputs = graph(*(torch.from_numpy(cut[name]) for name in graph.names))
    expected = {f"output:{name}": own.numpy() for name, own in zip(graph.outputs, outputs, strict=True)}
    np.savez(tmp_path / "empty.npz", **cut, **expected)  # type: ignore[arg-type]
    arrays = {name: array.copy() for name, array in trial.arrays.items()}
    arrays["candidates"][:, 0] = arrays["tail_items"][:, 0] = 0
    outputs = graph(*(torch.from_numpy(arrays[name]) for name in graph.names))
    expected = {f"output:{name}": own.detach().numpy() for name, own in zip(graph.outputs, outputs, strict=True)}
    arrays["candidates"][:, 0] = arrays["tail_items"][:, 0] = -1
    np.savez(tmp_path / "unknown.npz", **arrays, **expected)  # type: ignore[arg-type]
    assert {users for users, *_ in shapes} >= {1, 2, 7}
    assert {candidates for _, candidates, _ in shapes} >= {1, 2, 17}
    assert len({events for *_, events in shapes}) > 1
    (tmp_path / "all.py").write_text(ALL_SHAPES)
    done = run_blocked(tmp_path / "all.py", exported, tmp_path, blocked="vista,vista_kernels,torch,onnx")
    assert done.stdout == "ok\n", done.stderr


def test_the_manifest_says_what_the_inputs_are(exported: Path, model: VistaModel, reads: str) -> None:
    manifest = json.loads((exported / "export.json").read_text())
    example = np.load(exported / "example.npz")
    for place, one in enumerate(manifest["inputs"]):
        array = example[f"input_{place}"]
        assert (array.dtype.name, array.ndim) == (one["dtype"], len(one["shape"])), one
        assert all(
            length == size for length, size in zip(one["shape"], array.shape, strict=True) if type(length) is int
        )
    values = {one["name"]: one for one in manifest["inputs"]}
    if reads != "little":
        assert json.loads((exported / values["request.device"]["values"]).read_text()) == ["phone", "tablet", "tv"]
        assert values["request.page"]["hashed"] == 5
    assert json.loads((exported / "items.json").read_text()) == model.items.ids(np.arange(100)).tolist()
    assert manifest["tasks"] == ["click", "buy"]
    assert manifest["summarizer_id"] == model.summarizer_id().hex()
    assert manifest["compared"]["num_requests"] == 1000
    assert set(manifest["compared"]["max_difference"]) == {"logits", "next"}
    assert all(difference <= 1e-4 for difference in manifest["compared"]["max_difference"].values())


def test_the_graph_names_its_axes(exported: Path) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(exported / "model.onnx", providers=["CPUExecutionProvider"])
    manifest = json.loads((exported / "export.json").read_text())
    shapes = {one.name: one.shape for one in session.get_inputs()}
    assert shapes == {one["name"]: one["shape"] for one in manifest["inputs"]}


def test_a_damaged_file_is_noticed(exported: Path, tmp_path: Path) -> None:
    name = "model.onnx.data"
    copy = shutil.copytree(exported, tmp_path / "copy")
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    done = run_blocked(copy / "example.py", blocked="vista,torch")
    assert (done.returncode, done.stderr.strip()) == (1, f"{name}: damaged; copy the export again")


def written(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_export_that_differs_or_cannot_be_written_leaves_the_earlier_one(
    exported: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph itself is run, not an export of it, and its outputs are changed."""
    before = written(exported)
    failures: list[OSError] = []

    def write(graph: ServingGraph, _: Any, partial: Path) -> Any:
        (partial / "model.onnx").write_bytes(b"other")
        if failures:
            raise failures.pop()
        run = eager(graph)
        return lambda arrays: {name: output + 0.01 for name, output in run(arrays).items()}

    monkeypatch.setattr("vista.export.export.write_onnx", write)
    words = ["export", f"model={folder / 'model'}", f"store={folder / 'store'}", f"out={exported}"]
    assert main(words) == 1
    assert "but at most 0.0001 is allowed (max_difference); nothing was written" in capsys.readouterr().err
    failures.append(OSError(errno.ENOSPC, "No space left on device"))
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "the export could not be written" in said and "free space" in said
    assert written(exported) == before
    assert [path.name for path in exported.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("kind", ExportFormat)
def test_a_folder_with_something_else_is_not_replaced(folder: Path, model: VistaModel, kind: ExportFormat) -> None:
    for out, message in ((folder / "model", "holds something other than an export"), (folder / "f", "is a file")):
        (folder / "f").write_text("")
        with pytest.raises(ExportError, match=message):
            export(folder / "model", out, kind)


def test_a_baseline_is_refused_by_name(tmp_path: Path, event_log: EventLog) -> None:
    options = {"model__architecture": Architecture.hstu, "model__history_limit": 20}
    config = small_config(event_log, tmp_path / "run", **options)
    HSTU(config.model, schema_of(event_log, config), event_log.items, config.data).save_pretrained(tmp_path / "model")
    with pytest.raises(ExportError, match=r"is a baseline \(hstu\), which reads raw histories"):
        export(tmp_path / "model", tmp_path / "out", ExportFormat.onnx)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, model: VistaModel, folder: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"pip install .*\[onnx\]'"):
        export(folder / "model", folder / "none", ExportFormat.onnx)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, model: VistaModel, folder: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ExportError, match=r"needs a C\+\+ compiler"):
        export(folder / "model", folder / "none", ExportFormat.aotinductor, store=str(folder / "store"))
    assert not (folder / "none").exists()


@pytest.mark.research
@pytest.mark.parametrize("kind", TargetAttentionKind)
def test_aotinductor_scores_without_vista(tmp_path: Path, kind: TargetAttentionKind) -> None:
    """Compiles for about a minute."""
    require_compiler()
    drawn_model(kind=kind, num_layers=1).save_pretrained(tmp_path / "model")
    report = export(tmp_path / "model", tmp_path / "out", ExportFormat.aotinductor, num_requests=100)
    assert max(report.compared.max_difference.values()) <= 1e-4
    done = run_blocked(tmp_path / "out" / "example.py", blocked="vista,vista_kernels")
    assert done.returncode == 0, done.stderr
    assert [line.split(" [")[0] for line in done.stdout.splitlines()] == ["logits", "probabilities", "next"]


@pytest.mark.research
@pytest.mark.parametrize(
    "changes",
    [
        {"kind": TargetAttentionKind.pointwise, "num_layers": 2},
        {"kind": TargetAttentionKind.softmax},
        {"num_seeds": 0, "categories": True},
        {"tasks": (), "features": False},
        {"has_retrieval": False, "counters": False},
        {"counters": False, "features": False, "has_time": False, "num_seeds": 0},
    ],
)
def test_every_kind_of_model_as_onnx(tmp_path: Path, changes: dict[str, Any]) -> None:
    drawn_model(**changes).save_pretrained(tmp_path / "model")
    report = export(tmp_path / "model", tmp_path / "out", ExportFormat.onnx)
    assert report.compared.num_requests == 1000
    assert max(report.compared.max_difference.values()) <= 1e-4
    done = run_blocked(tmp_path / "out" / "example.py", blocked="vista,vista_kernels,torch,onnx")
    assert done.returncode == 0, done.stderr
