"""The paired comparison: by hand, against scipy, and its refusals."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from vista.cli.run_commands import run_compare
from vista.config import CompareConfig
from vista.errors import ConfigError
from vista.evaluation.comparison import Comparison, PerUserMetrics, per_user_path

QUESTION = {"target": "window", "split": "test", "horizon": ["50 events"], "cases": ["abc"]}


def run_of(question: dict[str, object] | None = None, **values: list[float]) -> PerUserMetrics:
    arrays = {name: np.array(value, np.float64) for name, value in values.items()}
    return PerUserMetrics(np.arange(len(next(iter(arrays.values())))), arrays, question or QUESTION)


def test_by_hand() -> None:
    """Four users, of whom one has no label; with two differences of 1 and one of 2, one sign of four is as extreme."""
    a = run_of(hits=[1, 0, np.nan, 2], other=[0, 0, 0, 0])
    b = run_of(hits=[2, 2, np.nan, 3], more=[1, 1, 1, 1])
    (row,) = Comparison.of([a], [b]).differences.values()
    assert (row.num_users, row.mean_a, row.difference) == (3, 1, pytest.approx(4 / 3))
    assert row.mean_b == pytest.approx(7 / 3)
    assert row.standard_error == pytest.approx(np.std([1, 2, 1], ddof=1) / np.sqrt(3))
    assert row.interval == pytest.approx((4 / 3 - 1.959964 / 3, 4 / 3 + 1.959964 / 3))
    assert row.p == pytest.approx(2 / 8, abs=0.02)


def test_p_agrees_with_scipy() -> None:
    from scipy.stats import permutation_test

    rng = np.random.default_rng(1)
    base = rng.random(60)
    for shift in (0.0, 0.03):
        other = base + rng.normal(shift, 0.1, 60)
        (row,) = Comparison.of([run_of(x=base.tolist())], [run_of(x=other.tolist())]).differences.values()
        expected = permutation_test(
            (other, base), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=9_999, rng=2
        )
        assert row.p == pytest.approx(expected.pvalue, abs=0.02)


def test_equal_models_do_not_differ() -> None:
    run = run_of(x=[0.1, 0.7, 0.3])
    (row,) = Comparison.of([run], [run]).differences.values()
    assert (row.difference, row.standard_error, row.p) == (0, 0, 1)


def test_seeds_are_averaged_per_user() -> None:
    a = [run_of(x=[0, 1]), run_of(x=[1, 1])]
    (row,) = Comparison.of(a, [run_of(x=[1, 3])]).differences.values()
    assert (row.mean_a, row.difference) == (0.75, 1.25)
    assert row.standard_error == pytest.approx(np.std([0.5, 2], ddof=1) / np.sqrt(2))


@pytest.mark.parametrize("signs_per_chunk", [1, 7])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, signs_per_chunk: int) -> None:
    a, b = run_of(x=[0, 1, 2], y=[1, 1, 1]), run_of(x=[1, 3, 2], y=[1, 1, 5])
    monkeypatch.setattr("vista.evaluation.comparison.NUM_FLIPS", 99)
    whole = Comparison.of([a], [b])
    monkeypatch.setattr("vista.evaluation.comparison.SIGNS_PER_CHUNK", signs_per_chunk)
    small = Comparison.of([a], [b])
    for name, row in whole.differences.items():
        assert small.differences[name].difference == row.difference
        assert small.differences[name].p == pytest.approx(row.p, abs=0.15)  # the generator draws other signs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cases": ["other"]}, "were evaluated on other users or labels; evaluate both on the same log"),
        ({"horizon": ["200 events"]}, r"horizon is \['50 events'\] in one evaluation and \['200 events'\] in another"),
        ({"split": "validation"}, "split is 'test' in one evaluation and 'validation' in another"),
        ({"target": "next"}, "target is 'window' in one"),
    ],
)
def test_other_questions_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Comparison.of([run_of(x=[1])], [run_of(QUESTION | changes, x=[1])])
    with pytest.raises(ConfigError, match=message):  # also between the seeds of one model
        Comparison.of([run_of(x=[1]), run_of(QUESTION | changes, x=[1])], [run_of(x=[1])])


def test_runs_without_a_common_metric_are_refused() -> None:
    with pytest.raises(ConfigError, match="no metric in common; evaluate both with the same top_k"):
        Comparison.of([run_of(x=[1])], [run_of(y=[1])])


class TestFiles:
    def test_ids_and_values_survive(self, tmp_path: Path) -> None:
        for users in (np.array([5, 9]), np.array(["anna", "b"], object)):
            run = PerUserMetrics(users, {"ndcg@10:new/50-events": np.array([0.5, np.nan])}, QUESTION)
            run.save(tmp_path / "metrics.json.npz")
            read = PerUserMetrics.load(tmp_path / "metrics.json.npz")
            assert read.users.tolist() == users.tolist() and read.question == QUESTION
            np.testing.assert_array_equal(read.values["ndcg@10:new/50-events"], [0.5, np.nan])

    def test_the_table(self, tmp_path: Path) -> None:
        for name, values in (("a", [0.0, 0.5, 0.5]), ("b", [0.5, 0.5, 1.0])):
            run_of(x=values).save(per_user_path(tmp_path / name))
        lines = str(run_compare(CompareConfig(a=[str(tmp_path / "a")], b=[str(tmp_path / "b")]))).splitlines()
        assert lines[0].split() == ["metric", "users", "a", "b", "b", "-", "a", "95", "%", "interval", "p"]
        assert lines[1].split()[:6] == ["x", "3", "0.3333", "0.6667", "+0.3333", "+0.0067"]

    @pytest.mark.parametrize("content", [b"", b"{}", b"PK\x03\x04 damaged", b"\x93NUMPY\x01\x00v\x00{}"])
    def test_a_damaged_file_is_refused(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(ConfigError, match=r"a\.npz: does not hold metrics per user .*run `vista evaluate` again"):
            PerUserMetrics.load(tmp_path / "a.npz")

    @pytest.mark.parametrize("compressed", [False, True])
    def test_a_flipped_bit_is_refused_or_harmless(self, tmp_path: Path, compressed: bool) -> None:
        run_of(x=[0.0, 0.5, 1.0]).save(tmp_path / "a.npz")
        if compressed:
            with np.load(tmp_path / "a.npz") as arrays:
                np.savez_compressed(tmp_path / "a.npz", **arrays)
        content = (tmp_path / "a.npz").read_bytes()
        refused = 0
        bits = range(0, 8 * len(content), 37)
        for bit in bits:
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            (tmp_path / "a.npz").write_bytes(flipped)
            try:
                read = PerUserMetrics.load(tmp_path / "a.npz")
            except ConfigError:
                refused += 1
            else:
                assert read.values["x"].tolist() == [0.0, 0.5, 1.0]
        assert refused > 0.5 * len(bits)

    def test_damage_that_the_checksums_of_single_members_miss_is_refused(self, tmp_path: Path) -> None:
        run_of(recall=[0.0, 0.5, 1.0]).save(tmp_path / "a.npz")
        content = (tmp_path / "a.npz").read_bytes()
        entry = content.rindex(b"names.npy") - 46  # in the directory: checksum and sizes at 16
        empty = content[: entry + 16] + bytes(12) + content[entry + 28 :]
        shorter = content.replace(b"'<U6'", b"'<U2'")
        assert shorter != content
        for damaged in (empty, shorter):
            (tmp_path / "a.npz").write_bytes(damaged)
            with pytest.raises(ConfigError, match="does not hold metrics per user"):
                PerUserMetrics.load(tmp_path / "a.npz")

    def test_other_arrays_are_refused(self, tmp_path: Path) -> None:
        good = {"users": np.arange(2), "names": np.array(["x"]), "values": np.zeros((1, 2)), "question": np.array("{}")}
        for wrong in (
            {"values": np.zeros((1, 3))},
            {"values": np.zeros((1, 2), int)},
            {"names": np.array([["x"]])},
            {"users": np.zeros((2, 2))},
            {"question": np.array("[]")},
        ):
            np.savez(tmp_path / "a.npz", **(good | wrong))
            with pytest.raises(ConfigError, match="does not hold metrics per user"):
                PerUserMetrics.load(tmp_path / "a.npz")
        np.savez(tmp_path / "a.npz", users=np.arange(2))
        with pytest.raises(ConfigError, match="does not hold metrics per user"):
            PerUserMetrics.load(tmp_path / "a.npz")

    def test_a_small_file_cannot_take_much_memory(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("values.npy", bytes(1000))
            archive.getinfo("values.npy").file_size = 1 << 40  # what the directory of the archive says
        with pytest.raises(ConfigError, match=r"a\.npz: .*its arrays hold 1,099,511,627,776 bytes, but at most"):
            PerUserMetrics.load(tmp_path / "a.npz")

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"gone\.json\.npz: cannot be read .*run `vista evaluate` with `out`"):
            run_compare(CompareConfig(a=[str(tmp_path / "gone.json")], b=["x"]))
