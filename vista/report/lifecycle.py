"""`vista model promote`, `rollback`, and `list`: a folder of models, aliases that services open, and an audit file.

    registry/models/NAME      copies of exported models
    registry/champion         symbolic link to one of them; `vista serve` and `vista refresh` take it as `model=`
    registry/challenger       the same, for a model that is compared with the champion
    registry/audit.jsonl      a line per change or refusal: who, when, what, and the figures of the gates

A link is replaced atomically. A model becomes the champion if it passes the gates: the validation metric, calibration,
agreement of what is served with the model in float32, and latency.
"""

from __future__ import annotations

import fcntl
import getpass
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from vista.arrays import Floats
from vista.config import EvaluateConfig, ModelListConfig, ModelPromoteConfig, ModelRollbackConfig, RefreshOptions
from vista.config.checks import Alias, Architecture, Codec, ScoringBackend
from vista.device import cpu_settings
from vista.errors import ConfigError, PromotionError
from vista.evaluation.comparison import Comparison, PerUserMetrics
from vista.evaluation.evaluate import EvaluationReport, evaluate_scorer
from vista.evaluation.metrics import log_losses, mean_and_error
from vista.evaluation.protocol import calibrated
from vista.files import make_folders, read_limited, replaced_folder, sync
from vista.log.event_log import EventLog
from vista.log.splits import split_until, visible_counts
from vista.model.saved_model import ModelDescription
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.report.report_data import Latency
from vista.scorer import Scorer
from vista.text_table import text_table

MODELS, AUDIT_FILE = "models", "audit.jsonl"
MAX_AUDIT_BYTES = 64 << 20
ERRORS = 2.0
"""Standard errors by which a model may be behind the champion, or its predictions off, by chance."""
CALIBRATION_SLACK = 0.1
"""Relative difference between predicted and observed labels that is allowed in any case."""
PARITY_LIMIT = 0.05
"""Root mean square difference of served scores, divided by the standard deviation of a user's scores."""
LATENCY_SLACK = 1.25
"""Allowed median latency, divided by the champion's."""
LATENCY_ROUNDS = 3
NUM_USERS, NUM_CANDIDATES = 32, 200
METRIC = "ndcg@10"


@dataclass(frozen=True, slots=True)
class Gate:
    """A condition for a promotion."""

    name: str
    value: str
    limit: str
    passed: bool


@dataclass(frozen=True, slots=True)
class Promotion:
    """A change of an alias."""

    alias: str
    model: str
    before: str | None
    """What the alias named before; None if it is new."""
    gates: list[Gate]

    def __str__(self) -> str:
        head = f"{self.alias}: {self.model}" + (f" (was {self.before})" if self.before else "")
        return f"{head}\n{_table(self.gates)}" if self.gates else head


@dataclass(frozen=True, slots=True)
class ModelTable:
    """The models of a registry."""

    models: list[dict[str, Any]]
    """Name, aliases, checksum, and the last line of the audit about each."""

    def __str__(self) -> str:
        if not self.models:
            return "no models yet; `vista model promote model=… alias=challenger` adds one"
        rows = [[one["name"], ", ".join(one["aliases"]), one["checksum"], one["last"]] for one in self.models]
        return text_table(["model", "alias", "checksum", "last change"], rows)


def _table(gates: list[Gate]) -> str:
    rows = [[gate.name, gate.value, gate.limit, "passed" if gate.passed else "failed"] for gate in gates]
    return text_table(["gate", "value", "limit", ""], rows)


def promote(config: ModelPromoteConfig) -> Promotion:
    """Point an alias to a model, which is copied into the registry first.

    Raises:
        PromotionError: a gate failed, which the audit file says, or another process changed the alias.
        CheckpointError: the model cannot be read, or is not a vista model.
        ConfigError: no model or no data is named, a name is taken, or the registry cannot be written.
    """
    registry, log = Path(config.registry), None
    if config.alias is Alias.champion and not config.force:
        if config.data is None:
            raise ConfigError("data: name the EventLog on which the gates are measured, or set force=true")
        log = EventLog.open(config.data)
    with _locked(registry):
        name = _registered(registry, config)
        before = _target(registry, config.alias)
    gates: list[Gate] = []
    if before == name:
        return Promotion(config.alias.value, name, before, gates)
    if log is not None:  # Not under the lock: this takes long, and a rollback must not wait for it.
        champion = None if before is None else registry / MODELS / before
        with cpu_settings(config.num_threads):
            gates = measured_gates(registry / MODELS / name, champion, log, config.max_latency_ms)
    failed = [gate.name for gate in gates if not gate.passed]
    what = "refuse" if failed else "force" if config.force else "promote"
    with _locked(registry):
        current = _target(registry, config.alias)
        if current != before:
            raise PromotionError(
                f"{config.alias.value} was {before or 'not set'} and became {current or 'not set'} during this "
                "promotion; promote again"
            )
        _audit(registry, what, config.alias, name, before, gates)
        if not failed:
            _point(registry, config.alias, name)
    if failed:
        raise PromotionError(
            f"{name} does not become the champion, because these gates failed: {', '.join(failed)}\n"
            f"{_table(gates)}\ntrain a better model, or set force=true"
        )
    return Promotion(config.alias.value, name, before, gates)


def roll_back(config: ModelRollbackConfig) -> Promotion:
    """Point an alias to the model that it named before the current one. Raises PromotionError if there is no earlier
    model."""
    registry = Path(config.registry)
    with _locked(registry):
        current, earlier = _target(registry, config.alias), None
        for line in reversed(audit_lines(registry)):
            if (
                line["alias"] == config.alias.value
                and line["model"] == current
                and line["what"] in ("promote", "force")
            ):
                earlier = line["before"]
                break
        if current is None or earlier is None or not (registry / MODELS / earlier).is_dir():
            raise PromotionError(f"registry={registry}: {config.alias.value} has no earlier model to go back to")
        _audit(registry, "rollback", config.alias, earlier, current, [])
        _point(registry, config.alias, earlier)
    return Promotion(config.alias.value, earlier, current, [])


def list_models(config: ModelListConfig) -> ModelTable:
    """All models of a registry, by name."""
    registry = Path(config.registry)
    last = {line["model"]: f"{line['at']} {line['what']} by {line['who']}" for line in audit_lines(registry)}
    aliases = {alias: _target(registry, alias) for alias in Alias}
    models = []
    for path in sorted((registry / MODELS).glob("*/")):
        models.append(
            {
                "name": path.name,
                "aliases": [alias.value for alias, name in aliases.items() if name == path.name],
                "checksum": ModelDescription.read(path).checksum,
                "last": last.get(path.name, ""),
            }
        )
    return ModelTable(models)


def audit_lines(registry: Path) -> list[dict[str, Any]]:
    """The lines of the audit file, oldest first, without a last one that was not written whole. Raises ConfigError if
    it is damaged."""
    path = registry / AUDIT_FILE
    try:
        *lines, rest = read_limited(path, MAX_AUDIT_BYTES).split(b"\n")
        return [json.loads(line) for line in [*lines, *([rest] if _whole(rest) else [])]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); restore it, or move it away") from error


def _whole(line: bytes) -> bool:
    """Whether a line without a line break, the last one, is not the start of one whose writing was interrupted."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


@contextmanager
def _locked(registry: Path) -> Iterator[None]:
    """One change at a time."""
    with ExitStack() as stack:
        try:
            make_folders(registry / MODELS)
            fcntl.flock(stack.enter_context((registry / AUDIT_FILE).open("a")), fcntl.LOCK_EX)
        except OSError as error:
            raise ConfigError(f"registry={registry}: cannot be written ({error}); correct its permissions") from error
        yield


def _registered(registry: Path, config: ModelPromoteConfig) -> str:
    """Name in the registry of the model to promote."""
    if config.model is None:
        name = _target(registry, Alias.challenger)
        if name is None or config.alias is Alias.challenger:
            raise ConfigError("model: name the folder of an exported model; there is no challenger to promote")
        return name
    source = Path(config.model).resolve()
    description = ModelDescription.read(source)
    description.require(Architecture.vista, source, "a registry")
    description.check_files(source, *description.files)
    name = config.name or (source.parent.name if source.name == "best" else source.name)
    folder = registry / MODELS / name
    if folder.exists():
        if ModelDescription.read(folder).checksum != description.checksum:
            raise ConfigError(f"name={name}: names another model of {registry}; set name=… to another one")
        return name
    with replaced_folder(folder) as partial:
        shutil.copytree(source, partial, dirs_exist_ok=True)
    return name


def _target(registry: Path, alias: Alias) -> str | None:
    try:
        return Path(os.readlink(registry / alias.value)).name
    except FileNotFoundError:
        return None


def _point(registry: Path, alias: Alias, name: str) -> None:
    new = registry / f".{alias.value}.new"
    new.unlink(missing_ok=True)
    new.symlink_to(Path(MODELS, name))
    new.replace(registry / alias.value)
    sync(registry)


def _audit(registry: Path, what: str, alias: Alias, name: str, before: str | None, gates: list[Gate]) -> None:
    line = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "who": f"{getpass.getuser()}@{socket.gethostname()}",
        "what": what,
        "alias": alias.value,
        "model": name,
        "before": before,
        "gates": [asdict(gate) for gate in gates],
    }
    with (registry / AUDIT_FILE).open("rb+") as file:
        content = file.read()
        rest = content[content.rfind(b"\n") + 1 :]
        if rest and not _whole(rest):  # Its change was not made: an alias is switched after its line.
            file.seek(len(content) - len(rest))
            file.truncate()
        file.write((b"\n" if _whole(rest) else b"") + json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


# The gates. Champion and candidate answer the validation labels of the candidate's split, on which neither was trained.


def measured_gates(
    candidate: Path, champion: Path | None, log: EventLog, max_latency_ms: float | None = None
) -> list[Gate]:
    """Measure all gates.

    Args:
        champion: None if there is none yet; the candidate is then compared with fixed limits alone.
        max_latency_ms: of a request for 200 candidates, median; None compares with the champion.

    Raises:
        CheckpointError: a model cannot be read.
        ConfigError: the champion was trained on the labels, or there are none.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vista-gates-")))
        models = [VistaModel.from_pretrained(path) for path in (candidate, champion) if path is not None]
        if champion is not None:
            _require_unseen(models, log)
            models[1].data = models[0].data
        reports, scorers = list[EvaluationReport](), list[Scorer]()
        asked = EvaluateConfig(split="validation", top_k=[10])
        until = split_until(models[0].data, "validation")
        for place, model in enumerate(models):
            store = folder / f"store-{place}"
            refresh(model, log, store, until=until, options=RefreshOptions(verify_log=False))
            scorers.append(stack.enter_context(Scorer.open(model, store)))
            reports.append(evaluate_scorer(scorers[-1], log, asked))
        exact = folder / "exact"
        refresh(models[0], log, exact, until=until, options=RefreshOptions(verify_log=False, codec=Codec.float32))
        reference = stack.enter_context(Scorer.open(models[0], exact, backend=ScoringBackend.torch))
        return [
            _metric_gate(_comparable(reports)),
            *_calibration_gates(reports[0]),
            _parity_gate(scorers[0], reference, log),
            _latency_gate(scorers, log, max_latency_ms),
        ]


def _require_unseen(models: list[VistaModel], log: EventLog) -> None:
    """Raise ConfigError if the champion was trained on events that the candidate's validation asks for."""
    own, theirs = (visible_counts(log, split_until(model.data, "train")) for model in models)
    if (theirs > own).any():
        raise ConfigError(
            "data: the champion was trained on validation labels of the new model, so they cannot be compared; train "
            "the new model with a data split that holds out later labels"
        )


def _comparable(reports: list[EvaluationReport]) -> list[EvaluationReport]:
    """The reports with probabilities that know equally well who looked.

    A model with `optim.examined_tasks` predicts what users do who look. Times the probability of a look, its scores say
    more about a label than those of a model without. So if one of the models has none, both are multiplied, once
    calibrated for this: the comparison is about what each knows of users and items.
    """
    cases, looks = reports[0].impressions, [report.looks for report in reports]
    if cases is None or looks[0] is None or looks[-1] is None or np.array_equal(looks[0], looks[-1]):
        return reports
    shared, found = np.minimum(looks[0], looks[-1]), []
    for report, own in zip(reports, looks, strict=True):
        assert report.probabilities is not None and own is not None
        found.append(replace(report, probabilities=calibrated(cases, report.probabilities / own, shared)[0] * shared))
    return found


def _metric_gate(reports: list[EvaluationReport]) -> Gate:
    losses = [_log_losses(report) for report in reports]
    if losses[0] is not None and all(loss is not None for loss in losses):
        tasks = reports[0].impressions
        assert tasks is not None
        name, sign = f"log loss of {tasks.tasks[0]}", -1.0
        values = [loss for loss in losses if loss is not None]
        if len(values) == 1:
            mean, error = mean_and_error(values[0])
        else:
            mean, error = mean_and_error(values[0] - values[1])
    else:
        name, sign = METRIC, 1.0
        ranked = [_ranked(report) for report in reports]
        if len(ranked) == 1:
            mean, error = mean_and_error(ranked[0].values[METRIC])
        else:
            difference = Comparison.of([ranked[1]], [ranked[0]]).differences[METRIC]
            mean, error = difference.difference, difference.standard_error
    if len(reports) == 1:
        return Gate(name, f"{mean:.4f} ± {error:.4f}", "no champion yet", True)
    worst = f"not {'above' if sign < 0 else 'below'} {-sign * ERRORS * error:+.4f}"
    return Gate(f"{name} against the champion", f"{mean:+.4f} ± {error:.4f}", worst, sign * mean >= -ERRORS * error)


def _ranked(report: EvaluationReport) -> PerUserMetrics:
    if report.per_user is None:
        raise ConfigError("data: has no validation labels to measure the model on")
    return report.per_user


def _log_losses(report: EvaluationReport) -> Floats | None:
    """Mean log loss of the first task per user, float64 [users]; None without labels."""
    cases, answers = report.impressions, report.probabilities
    if cases is None or answers is None or not cases.tasks:
        return None
    known = cases.mask[:, 0]
    loss = log_losses(cases.label[known, 0], answers[known, 0])
    _, owner = np.unique(cases.user[known], return_inverse=True)
    return None if not len(loss) else np.bincount(owner, loss) / np.bincount(owner)


def _calibration_gates(report: EvaluationReport) -> Iterator[Gate]:
    cases, answers = report.impressions, report.probabilities
    if cases is None or answers is None:
        return
    for place, task in enumerate(cases.tasks):
        known = cases.mask[:, place]
        p, observed = answers[known, place].astype(np.float64), float(cases.label[known, place].sum())
        if not observed:
            continue
        ratio, error = p.sum() / observed, float(np.sqrt((p * (1 - p)).sum())) / observed
        slack = max(ERRORS * error, CALIBRATION_SLACK)
        limit = f"1 ± {slack:.2f}"
        yield Gate(f"predicted / observed {task}", f"{ratio:.3f} ± {error:.3f}", limit, bool(abs(ratio - 1) <= slack))


def _sampled(scorer: Scorer, log: EventLog) -> tuple[list[Any], Any, int]:
    """Ids of users with records and of items, and the time of the newest event."""
    rng = np.random.default_rng(0)
    ids = log.users.ids(rng.permutation(log.num_users)[: 4 * NUM_USERS]).tolist()
    found = scorer.store.get_many(ids).found
    users = [user for user, has in zip(ids, found.tolist(), strict=True) if has][:NUM_USERS]
    items = scorer.model.items
    rows = rng.permutation(len(items))[:NUM_CANDIDATES]
    newest = log.time_range()
    return users, scorer.encode(items.ids(rows[items.has_ids(rows)])), 0 if newest is None else newest[1] + 1


def _parity_gate(served: Scorer, reference: Scorer, log: EventLog) -> Gate:
    users, candidates, now = _sampled(served, log)
    worst = 0.0
    if users:
        got = served.predict(users, candidates, now=now)
        expected = reference.predict(users, candidates, now=now)
        for task, values in expected.items():
            spread = float(np.sqrt(values.astype(np.float64).var(axis=1).mean()))
            difference = float(np.sqrt(((got[task].astype(np.float64) - values) ** 2).mean()))
            worst = max(worst, difference / max(spread, 1e-12) if np.isfinite(difference) else np.inf)
    return Gate("served against float32", f"{worst:.4f}", f"at most {PARITY_LIMIT}", worst <= PARITY_LIMIT)


def _latency_gate(scorers: list[Scorer], log: EventLog, max_latency_ms: float | None) -> Gate:
    asked = [_sampled(scorer, log) for scorer in scorers]
    if not all(users for users, _, _ in asked):
        raise ConfigError("data: no user has events before the validation labels")
    medians = [np.inf] * len(scorers)
    for _ in range(LATENCY_ROUNDS):  # In turns, so that a disturbance affects all models.
        for place, (scorer, (users, candidates, now)) in enumerate(zip(scorers, asked, strict=True)):
            measured = Latency.measure(scorer, users[:5], [0] * len(users[:5]), candidates, now)
            medians[place] = min(medians[place], 1000 * float(np.median(measured.median_s)))
    limit = max_latency_ms
    if limit is None and len(medians) > 1:
        limit = LATENCY_SLACK * medians[1]
    name, value = f"median ms for {NUM_CANDIDATES} candidates", f"{medians[0]:.2f}"
    return Gate(
        name, value, "no limit" if limit is None else f"at most {limit:.2f}", limit is None or medians[0] <= limit
    )
