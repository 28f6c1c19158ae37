"""The C++ library against a float64 oracle, and what it promises: independent candidates, checked arguments."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.scoring_oracle import NUM_GAPS, NUM_ITEMS, drawn_plan, drawn_request, oracle
from tests.required_program import require_compiler, require_library
from tests.store.test_record_decoder import cases, mutated
from vista.store import record_reading
from vista.store.record_reading import StoredRecord, checked_records
from vista_kernels.cpp_backend import build as building
from vista_kernels.cpp_backend.answering import CounterScale, RecordScoring
from vista_kernels.cpp_backend.build import LIBRARY, BuildError, build
from vista_kernels.cpp_backend.library import LibraryError, ScoringModel, load

TOLERANCE = 2e-5
"""Absolute, of values near 1 after at most three layers: about 300 float32 roundings of 6e-8 each, as torch has too."""
BFLOAT16_TOLERANCE = 0.1
"""The same where factors are rounded to bfloat16, by 2e-3 each; the mean of all differences is 20 times smaller."""
EVERYTHING = {"logits": True, "scores": True, "user_vectors": True}


@st.composite
def plans(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `drawn_plan`. 4, 8 and 12 values per head need vectors of other widths. Outputs have at least 16
    values, because the norm of a few values that are nearly equal amplifies rounding."""
    head_dim = draw(st.sampled_from([4, 8, 12, 16]))
    return {
        "softmax": draw(st.booleans()),
        "heads": -(-16 // head_dim) + draw(st.integers(0, 2)),
        "head_dim": head_dim,
        "seeds": draw(st.sampled_from([0, 1, 7, 8, 9])),
        "tail": draw(st.sampled_from([1, 2, 7, 8, 13])),
        "num_layers": draw(st.integers(1, 3)),
        "tasks": draw(st.integers(0, 3)),
        "columns": draw(st.sampled_from([0, 0, 5, 23])),
        "space": draw(st.sampled_from([0, 1, 8, 19])),
        "recent": draw(st.sampled_from([0, 1, 8])),
    }


@st.composite
def requests(draw: st.DrawFn, tail: int) -> dict[str, Any]:
    """Arguments of `drawn_request`."""
    num_users = draw(st.integers(1, 4))
    catalog = draw(st.booleans())
    most = NUM_ITEMS if catalog else 110
    return {
        "lengths": draw(st.lists(st.integers(0, most), min_size=num_users, max_size=num_users)),
        "num_events": draw(st.lists(st.integers(0, tail), min_size=num_users, max_size=num_users)),
        "shared": draw(st.booleans()),
        "catalog": catalog,
        "projected": draw(st.booleans()),
        "features": draw(st.booleans()),
        "whole_events": draw(st.booleans()),
    }


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, built from the sources as they are."""
    sources = [path for path in building.SOURCES.iterdir() if path.suffix in (".cpp", ".h")]
    if LIBRARY.is_file() and LIBRARY.stat().st_mtime > max(path.stat().st_mtime for path in sources):
        return LIBRARY
    require_compiler()
    return build(tmp_path_factory.mktemp("library") / "libvista_scoring.so")


@pytest.mark.parametrize(("lanes", "bfloat16"), [(4, False), (8, False), (16, False), (16, True)])
@settings(max_examples=30)
@given(data=st.data())
def test_it_equals_the_oracle(data: st.DataObject, library: Path, lanes: int, bfloat16: bool) -> None:
    chosen = data.draw(plans())
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    plan = drawn_plan(rng, **chosen)
    if chosen["head_dim"] % lanes:
        with pytest.raises(LibraryError, match="no code for heads of"):
            ScoringModel(plan, lanes=lanes, library=library)
        return
    try:
        model = ScoringModel(plan, lanes=lanes, bfloat16=bfloat16, library=library)
    except LibraryError:
        pytest.skip(f"this processor has no vectors of {lanes} floats")
    tolerance = BFLOAT16_TOLERANCE if model.in_bfloat16 else TOLERANCE
    request = drawn_request(rng, plan, **data.draw(requests(chosen["tail"])))
    wanted = EVERYTHING | {"logits": chosen["tasks"] > 0, "probabilities": data.draw(st.booleans())}
    made = model.score(request, **wanted, threads=data.draw(st.integers(1, 3)))
    logits, scores, users = oracle(plan, request)
    np.testing.assert_allclose(made.user_vectors, users, atol=tolerance)
    np.testing.assert_allclose(made.scores, scores, atol=5 * tolerance)  # are divided by a temperature of 0.2
    if wanted["logits"]:
        expected = 1 / (1 + np.exp(-logits)) if wanted["probabilities"] else logits
        np.testing.assert_allclose(made.logits, expected, atol=tolerance)


def test_products_in_bfloat16_are_near_and_float32_answers_without_them(library: Path) -> None:
    shape = {"heads": 2, "head_dim": 16, "seeds": 7, "tail": 9, "num_layers": 2, "tasks": 2}
    options = {"shared": True, "catalog": False, "projected": False, "features": False, "whole_events": False}
    for softmax in (True, False):
        rng = np.random.default_rng(2)
        plan = drawn_plan(rng, softmax=softmax, **shape, columns=0, space=0, recent=0)
        request = drawn_request(rng, plan, lengths=[500], num_events=[9], **options)
        narrow, plain = (ScoringModel(plan, lanes=8, bfloat16=asked, library=library) for asked in (True, False))
        assert not narrow.in_bfloat16
        exact = plain.score(request, logits=True).logits
        np.testing.assert_array_equal(narrow.score(request, logits=True).logits, exact)
        model = ScoringModel(plan, bfloat16=True, library=library)
        if model.in_bfloat16:
            error = model.score(request, logits=True).logits - oracle(plan, request)[0]
            assert 1e-4 < np.sqrt((error**2).mean()) < BFLOAT16_TOLERANCE / 20


def test_a_pair_does_not_depend_on_the_others(library: Path) -> None:
    """Bit for bit, whatever else is in the call, and however many threads compute it."""
    for softmax, bfloat16 in product((True, False), (False, True)):
        rng = np.random.default_rng(5)
        shape = {"heads": 2, "head_dim": 16, "seeds": 7, "tail": 9, "num_layers": 2, "tasks": 2}
        plan = drawn_plan(rng, softmax=softmax, **shape, columns=5, space=19, recent=8)
        lengths, num_events = [500, 97, 0, 48, 1], [9, 0, 3, 4, 9]
        options = {"shared": False, "catalog": False, "projected": True, "features": False, "whole_events": False}
        request = drawn_request(rng, plan, lengths=lengths, num_events=num_events, **options)
        model = ScoringModel(plan, bfloat16=bfloat16, library=library)
        whole = model.score(request, **EVERYTHING)
        threads = model.score(request, **EVERYTHING, threads=4)
        for name in ("logits", "scores", "user_vectors"):
            np.testing.assert_array_equal(getattr(threads, name), getattr(whole, name))
        assert request.counted is not None and request.counted_next is not None
        events = request.events
        for user in range(len(lengths)):
            first, stop = request.offsets[user : user + 2].tolist()
            pairs = np.sort(rng.permutation(np.arange(first, stop))[: (stop - first) // 3])
            one = slice(user, user + 1)

            def kept(counted: Any, pairs: Any = pairs) -> dict[str, Any]:
                mine = np.isin(counted.pairs, pairs)
                return {"pairs": np.searchsorted(pairs, counted.pairs[mine]), "codes": counted.codes[mine]}

            alone = dataclasses.replace(
                request,
                summary=request.summary[one],
                events=dataclasses.replace(
                    events,
                    valid=events.valid[one],
                    items=events.items[one],
                    actions=events.actions[one],
                    gaps=events.gaps[one],
                    added=None if events.added is None else events.added[one],
                ),
                offsets=np.array([0, len(pairs)]),
                rows=request.rows[pairs],
                added=None if request.added is None else request.added[one],
                pooled=request.pooled[one],
                recent=dataclasses.replace(request.recent, rows=request.recent.rows[one]),
                counted=dataclasses.replace(request.counted, **kept(request.counted)),
                counted_next=dataclasses.replace(
                    request.counted_next,
                    **kept(request.counted_next),
                    event_counts=request.counted_next.event_counts[one],
                ),
            )
            made = model.score(alone, **EVERYTHING)
            np.testing.assert_array_equal(made.logits, whole.logits[pairs])
            np.testing.assert_array_equal(made.scores, whole.scores[pairs])
            np.testing.assert_array_equal(made.user_vectors, whole.user_vectors[one])


@pytest.fixture(scope="module")
def small(library: Path) -> tuple[ScoringModel, Any]:
    rng = np.random.default_rng(1)
    shape = {"heads": 2, "head_dim": 4, "seeds": 3, "tail": 5, "num_layers": 2, "tasks": 1}
    plan = drawn_plan(rng, softmax=False, **shape, columns=5, space=4, recent=3)
    options = {"shared": False, "catalog": False, "projected": True, "features": True, "whole_events": False}
    request = drawn_request(rng, plan, lengths=[4, 9], num_events=[5, 2], **options)
    return ScoringModel(plan, library=library), request


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("summary", lambda a: a[:, :-1], r"summary: must be a contiguous float32 array of shape \(2, 3, 8\)"),
        ("summary", lambda a: a.astype(np.float64), "summary: .* got float64"),
        ("added", lambda a: np.zeros((2, 8), np.float32), "added: must be"),
        ("offsets", lambda a: a[::-1].copy(), "offsets: must rise from 0"),
        ("rows", lambda a: a[:-1], r"rows: must be .* shape \(13,\)"),
        ("rows", lambda a: a.astype(np.int32), "rows: .* got int32"),
        ("rows", lambda a: np.where(a == a[3], NUM_ITEMS, a), "rows: lie outside"),
        ("rows", lambda a: a - NUM_ITEMS, "rows: lie outside"),
        ("candidates", lambda a: a[:, :-1], "candidates: must be a contiguous"),
        ("candidates", lambda a: np.zeros((9, 7), np.float32), "candidates: must have 8 or 40 columns"),
        ("candidates", lambda a: None, "candidates: is missing"),
        ("retrieval", lambda a: np.zeros((9, 9), np.float32), r"retrieval: must be .* shape \('\*', 17\)"),
        ("retrieval", lambda a: a[:1], "rows: lie outside"),
        ("pooled", lambda a: None, "pooled: is missing"),
        ("pooled", lambda a: a[:, :, :-1], r"pooled: must be .* shape \(2, 2, 4\)"),
        ("reads.space", lambda a: a[:1], "rows: lie outside"),
        ("reads.statistics", lambda a: a[:, :2].copy(), r"reads.statistics: must be .* shape \('\*', 3\)"),
        ("reads.rates", lambda a: a[:1], "rows: lie outside"),
        ("recent", lambda a: None, "recent: is missing"),
        ("recent.rows", lambda a: a + NUM_ITEMS, "recent: lie outside"),
        ("recent.items", lambda a: a.astype(np.int64), "recent.items: .* got int64"),
        ("events.items", lambda a: a + NUM_ITEMS, "items, actions, gaps, recent: lie outside"),
        ("events.gaps", lambda a: a - 9, "items, actions, gaps, recent: lie outside"),
        ("events.valid", lambda a: a.astype(np.uint8), "valid: .* got uint8"),
        ("events.vectors", lambda a: None, "vectors: is missing"),
        ("features.first", lambda a: a + 90, "features: entries lie outside"),
        ("features.entries", lambda a: a - 9, "features: entries lie outside"),
        ("features.table", lambda a: np.zeros((9, 8), np.float32), "features: must have 40 columns"),
        ("counted.pairs", lambda a: a[::-1].copy(), "counted: pairs must ascend"),
        ("counted.codes", lambda a: a + np.uint8(64), "counted: .* codes lie below 64"),
        ("counted_next.pairs", lambda a: a + 90, "counted: pairs must ascend"),
    ],
)
def test_wrong_arguments_are_named(small: Any, field: str, change: Any, message: str) -> None:
    model, request = small
    part, _, name = field.rpartition(".")
    held = getattr(request, part) if part else request
    wrong = dataclasses.replace(held, **{name: change(getattr(held, name))})
    if part:
        wrong = dataclasses.replace(request, **{part: wrong})
    with pytest.raises(ValueError, match=message):
        model.score(wrong, **EVERYTHING)
    model.score(request, **EVERYTHING)


def test_a_wrong_weight_is_named(library: Path, small: Any) -> None:
    plan = small[0]._plan
    layers = [{**plan.layers[0], "out": plan.layers[0]["out"][:, :-1]}, *plan.layers[1:]]
    with pytest.raises(ValueError, match=r"layers\[0\].out: must be a contiguous float32 array of shape \(8, 8\)"):
        ScoringModel(dataclasses.replace(plan, layers=layers), library=library)
    with pytest.raises(ValueError, match="heads: 3 do not divide 8"):
        ScoringModel(dataclasses.replace(plan, heads=3), library=library)


def test_a_missing_or_foreign_library_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LibraryError, match=r"was not built; .* `python -m vista_kernels.cpp_backend.build`"):
        load(tmp_path / "none.so")
    (tmp_path / "text.so").write_text("text")
    with pytest.raises(LibraryError, match="cannot be loaded"):
        load(tmp_path / "text.so")


def test_a_build_without_a_compiler_or_for_an_unknown_machine_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building.platform, "machine", lambda: "s390x")
    with pytest.raises(BuildError, match="no native code for linux on s390x; there is some for x86_64, aarch64"):
        build(tmp_path / "library.so")
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match="no C\\+\\+ compiler"):
        build(tmp_path / "library.so")
    monkeypatch.undo()
    require_compiler()
    with pytest.raises(BuildError, match=r"the C\+\+ compiler failed:\n.*--no-such-flag"):
        build(tmp_path / "library.so", ["--no-such-flag"])
    assert list(tmp_path.iterdir()) == []


def answer_mutated_records(library: Path, count: int) -> list[bool]:
    """Score from `count` damaged records of each kind; returns whether each was accepted. Those that are must be
    accepted by vista's reader as well."""
    rng, accepted = np.random.default_rng(3), []
    for spec, held, keys in cases().values():
        if (decoder := record_reading.record_decoder(spec)) is None:
            continue
        layout, scale = spec.counters, None
        columns = 0 if layout is None else layout.spec.num_fields * layout.spec.num_columns
        if layout is not None:
            size = layout.spec.num_columns
            levels, of_each = np.arange(64.0)[:, None].repeat(size, 1), np.ones(size)
            genres = (np.arange(NUM_ITEMS) % 3).astype(np.int32)
            days = layout.spec.half_lives[: len(layout.spec.days)]
            others = [genres] * (layout.spec.num_fields - 1)
            scale = CounterScale(levels, of_each, of_each, days, layout.spec.has_time, (10.0, 5.0), others)
        shape = {"heads": 1, "head_dim": spec.dim, "seeds": spec.num_tokens, "tail": 3, "num_layers": 2, "tasks": 1}
        plan = drawn_plan(rng, softmax=True, **shape, columns=columns, space=0, recent=2)
        model = ScoringModel(plan, library=library)
        options = {"shared": True, "catalog": False, "projected": True, "features": True, "whole_events": False}
        drawn = drawn_request(rng, plan, lengths=[9], num_events=[3], **options)
        assert drawn.recent is not None and drawn.events.vectors is not None and drawn.rows is not None
        scoring = RecordScoring(
            model,
            decoder,
            vectors=drawn.events.vectors,
            candidates=drawn.candidates,
            retrieval=drawn.retrieval,
            reads=drawn.reads,
            followers=(drawn.recent.items, drawn.recent.weights),
            times=None,
            weights=rng.random((len(drawn.events.vectors), 4), np.float32),
            num_gaps=NUM_GAPS,
            num_pooled=32,
            counters=scale,
        )
        for index in rng.integers(0, len(held), count).tolist():
            value = held[index] if rng.random() < 0.1 else mutated(held[index], rng)
            stored, now = StoredRecord(value, keys[index], spec), int(rng.choice([-(1 << 62), 0, 1 << 41]))
            given = *stored.digests(), now, drawn.rows, drawn.features, None
            made = scoring.score(value, *given, logits=True, scores=True, threads=1)
            accepted.append(made is not None)
            if made is not None:
                checked_records([value], [keys[index]], spec)
    return accepted


def test_scores_come_only_from_records_that_vista_accepts(library: Path) -> None:
    require_library()
    assert 0.05 < np.mean(answer_mutated_records(library, 200)) < 0.95


RANDOM_CASES = """
import sys
import numpy as np
from pathlib import Path
from tests.kernels.scoring_oracle import drawn_plan, drawn_request, oracle
from vista_kernels.cpp_backend.library import LibraryError, ScoringModel

num_scored = 0
for seed in range(int(sys.argv[2])):
    rng = np.random.default_rng(seed)
    pick = lambda *values: int(rng.choice(values))
    plan = drawn_plan(
        rng, softmax=bool(rng.integers(2)), heads=pick(1, 2, 3), head_dim=pick(4, 8, 12, 16), seeds=pick(0, 1, 7, 8, 9),
        tail=pick(1, 2, 7, 8, 13), num_layers=pick(1, 2, 3), tasks=pick(1, 2, 3), columns=pick(0, 5, 23),
        space=pick(0, 1, 8, 19), recent=pick(0, 1, 8),
    )
    num_users = pick(1, 2, 5)
    request = drawn_request(
        rng, plan, lengths=rng.integers(0, 120, num_users).tolist(),
        num_events=rng.integers(0, plan.tail + 1, num_users).tolist(), catalog=False,
        **{name: bool(rng.integers(2)) for name in ("shared", "projected", "features", "whole_events")},
    )
    for lanes, bfloat16 in ((4, False), (8, False), (16, False), (16, True)):
        try:
            model = ScoringModel(plan, lanes=lanes, bfloat16=bfloat16, library=Path(sys.argv[1]))
        except LibraryError:
            continue
        num_scored += 1
        made = model.score(request, logits=True, scores=True, user_vectors=True, threads=2)
        expected = oracle(plan, request)
        for ours, theirs in zip((made.logits, made.scores, made.user_vectors), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=0.5 if model.in_bfloat16 else 1e-4)
assert num_scored >= int(sys.argv[2])
print("fine")
"""


MUTATED_RECORDS = """
import sys
import numpy as np
from pathlib import Path
from vista_kernels.cpp_backend import records
from vista_kernels.cpp_backend.library import load

records.load = lambda: load(Path(sys.argv[1]))
from tests.store.test_record_decoder import cases, mutated
from vista.store import record_reading

rng, accepted = np.random.default_rng(0), []
for spec, held, keys in cases().values():
    if spec.key is None:
        decoder = record_reading.record_decoder(spec)
        for index in rng.integers(0, len(held), int(sys.argv[2])):
            values = [held[0], mutated(held[index], rng)]
            accepted.append(record_reading._decoded(decoder, values, [keys[0], keys[index]], spec) is not None)
assert 0.05 < np.mean(accepted) < 0.95

from tests.kernels.test_cpp_backend import answer_mutated_records

assert 0.05 < np.mean(answer_mutated_records(Path(sys.argv[1]), int(sys.argv[2]))) < 0.95
print("fine")
"""


@pytest.mark.nightly
@pytest.mark.parametrize("flags", ["address,undefined", "thread"])
def test_no_access_out_of_bounds_no_race_and_nothing_unset_is_read(tmp_path: Path, flags: str) -> None:
    """Compiled to stop at any of these; memory that the library allocates holds NaN before it is written."""
    require_compiler()
    extra = [f"-fsanitize={flags}", "-fno-sanitize-recover=all", "-O1", "-g", "-DVISTA_POISON"]
    library = build(tmp_path / "library.so", extra)
    runtime = {"address,undefined": "libasan.so", "thread": "libtsan.so"}[flags]
    found = subprocess.run(["g++", f"-print-file-name={runtime}"], capture_output=True, text=True, check=True)
    environment = os.environ | {
        "LD_PRELOAD": found.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",  # so that the ends of arrays and bytes are known
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OPENBLAS_NUM_THREADS": "1",
    }
    scripts = [(RANDOM_CASES, 40)]
    if flags != "thread":  # one thread decodes records; and pyarrow, which that script imports, crashes under it
        scripts.append((MUTATED_RECORDS, 300))
    for script, count in scripts:
        command = [sys.executable, "-c", script, str(library), str(count)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        assert done.returncode == 0 and done.stdout == "fine\n", done.stderr[-3000:]
