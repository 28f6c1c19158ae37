"""Readers: MovieLens in each format, on small samples and on the real data sets in VISTA_DATA_DIR."""

import gzip
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tests.conftest import real_set
from tests.log.conftest import run
from vista.config import SimulateConfig
from vista.errors import DataError
from vista.log.event_log import EventLog
from vista.log.ingest.sources import detect_kind

ROWS = [(3, 50, 4.0, 978300760), (1, 1193, 5.0, 978300275), (3, 7, 1.0, 978300019), (1, 661, 3.0, 978300275)]


def ratings_dat(folder: Path) -> Path:
    (folder / "ratings.dat").write_text("".join(f"{u}::{i}::{r:.0f}::{t}\n" for u, i, r, t in ROWS))
    return folder / "ratings.dat"


def ratings_csv(folder: Path) -> Path:
    lines = "".join(f"{u},{i},{r},{t}\r\n" for u, i, r, t in ROWS)
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\r\n" + lines, newline="")
    return folder / "ratings.csv"


def u_data(folder: Path) -> Path:
    (folder / "u.data").write_text("".join(f"{u}\t{i}\t{r:.0f}\t{t}\n" for u, i, r, t in ROWS))
    return folder / "u.data"


def npz(folder: Path) -> Path:
    user, item, rating, time = (np.array(column) for column in zip(*ROWS, strict=True))
    user_raw, user_row = np.unique(user, return_inverse=True)
    item_raw, item_row = np.unique(item, return_inverse=True)
    np.savez(
        folder / "events.npz",
        user=user_row,
        item=item_row,
        user_raw=user_raw,
        item_raw=item_raw,
        time=time,
        rating=rating,
    )
    return folder / "events.npz"


def load(paths: list[Path], kind: str, out: Path) -> EventLog:
    run(out, paths, kind=kind, timestamp=None, time_unit=None)
    return EventLog.open(out)


FORMS = {"ml-1m": ratings_dat, "ml-latest-small": ratings_csv, "ml-100k": u_data, "npz": npz}


@pytest.mark.parametrize("kind", FORMS)
def test_every_format_gives_the_same_log(tmp_path: Path, kind: str) -> None:
    file = FORMS[kind](tmp_path)
    log = load([file], kind, tmp_path / "log")
    assert load([tmp_path], "auto", tmp_path / "found").sources_digest(1) == log.sources_digest(1)
    assert (log.num_users, log.num_items, log.num_events) == (2, 4, 4)
    assert log.users.ids([0, 1]).tolist() == [1, 3]
    assert log.items.ids(log[1].item).tolist() == [1193, 661]
    assert log.items.ids(log[3].item).tolist() == [7, 50]
    assert log[3].timestamp.tolist() == [978300019000, 978300760000]
    assert log[1].rating is not None
    assert log[1].rating.tolist() == [5.0, 3.0]
    assert log.actions == ["event"]


def test_kinds_are_recognized(tmp_path: Path) -> None:
    for kind, write in FORMS.items():
        folder = tmp_path / kind
        folder.mkdir()
        assert detect_kind(write(folder)) == kind
        assert detect_kind(folder) == kind
    (tmp_path / "mine.csv").write_text("user,item\n1,2\n")
    assert detect_kind(tmp_path / "mine.csv") == "table"
    with pytest.raises(DataError, match="has the files of none of ml-1m, ml-latest-small, ml-100k, npz"):
        detect_kind(tmp_path)
    (tmp_path / "events.parquet").touch()  # not enough for a simulation or for Complete Journey
    with pytest.raises(DataError, match=r"has the files of none of .*; name the kind, or to read a table of your own"):
        detect_kind(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        detect_kind(tmp_path / "absent")


@pytest.mark.parametrize(
    ("kind", "name", "text", "message"),
    [
        (
            "ml-1m",
            "ratings.dat",
            "1::2::3::4\n1::2::x::4\n",
            r"ratings\.dat: row 2, column 'rating': 'x' is not a number",
        ),
        ("ml-100k", "u.data", "1\t2\t3\t4\na\t2\t3\t4\n", r"u\.data: row 2, column 'user': 'a' is not an integer id"),
        ("npz", "events.npz", "no archive", r"events\.npz: not a valid \.npz archive"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, kind: str, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        load([tmp_path / name], kind, tmp_path / "log")
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"user": [0]}, r"array 'item' is missing, the file has: user"),
        ({"user": [0, 1], "item": [0]}, r"the arrays differ in length \({'user': 2, 'item': 1}\)"),
        (
            {"user": [0, 1], "item": [0, 5], "item_raw": [9]},
            r"row 2, column 'item': 5 is not an index into item_raw \(1 ids\)",
        ),
        ({"user": [0.5], "item": [0], "user_raw": [9]}, r"array 'user' has type float64 and cannot index user_raw"),
    ],
)
def test_bad_arrays_are_named(tmp_path: Path, arrays: dict, message: str) -> None:
    np.savez(tmp_path / "events.npz", **arrays)
    with pytest.raises(DataError, match=r"events\.npz: " + message):
        load([tmp_path], "npz", tmp_path / "log")


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    """Cut short, or with a byte of its compressed arrays changed."""
    path = tmp_path / "events.npz"
    np.savez_compressed(path, user=np.arange(1000) // 9, item=np.arange(1000) % 37)
    whole = path.read_bytes()
    middle = bytearray(whole)
    middle[len(whole) // 4] ^= 0xFF
    for damaged in (whole[: int(len(whole) * 0.95)], bytes(middle)):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"events\.npz: not a valid \.npz archive"):
            load([tmp_path], "npz", tmp_path / "log")


def test_npz_without_times_keeps_its_order(tmp_path: Path) -> None:
    np.savez(tmp_path / "events.npz", user=[0, 0, 1, 1], item=[3, 1, 2, 2], user_raw=[10, 20], item_raw=[5, 6, 7, 8])
    log = load([tmp_path], "auto", tmp_path / "log")
    assert not log.has_time
    assert log.items.ids(log[10].item).tolist() == [8, 6]


def test_tables_in_every_format(tmp_path: Path) -> None:
    """CSV with a byte order mark and quotes, gzip, TSV, another separator, and Parquet give the same log."""
    header, rows = ("who", "what", "more"), [("ann", "a,b", 1), ("bob", "c", 2)]
    text = "".join(f'{u},"{i}",{m}\n' for u, i, m in rows)
    (tmp_path / "a.csv").write_text("\ufeff" + ",".join(header) + "\n" + text, encoding="utf-8")
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress((",".join(header) + "\n" + text).encode()))
    (tmp_path / "c.tsv").write_text("\n".join("\t".join(map(str, row)) for row in (header, *rows)))
    (tmp_path / "d.txt").write_text("\n".join("|".join(map(str, row)) for row in (header, *rows)))
    pl.DataFrame(rows, schema=header, orient="row").write_parquet(tmp_path / "e.parquet")
    for name, separator in (("a.csv", ","), ("b.csv.gz", ","), ("c.tsv", ","), ("d.txt", "|"), ("e.parquet", ",")):
        columns = {"user": "who", "item": "what", "timestamp": None, "time_unit": None}
        run(tmp_path / f"log-{name}", [tmp_path / name], separator=separator, **columns)
        log = EventLog.open(tmp_path / f"log-{name}")
        assert log.users.ids([0, 1]).tolist() == ["ann", "bob"]
        assert log.items.ids(log["ann"].item).tolist() == ["a,b"]


def test_a_folder_of_tables(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(3):
        pl.DataFrame({"user": [1], "item": [number]}).write_parquet(folder / f"{2 - number}.parquet")
    log = load([folder], "table", tmp_path / "log")
    assert log.items.ids(log[1].item).tolist() == [2, 1, 0]
    with pytest.raises(DataError, match=r"has no ratings\.dat, which events\.kind=ml-1m reads"):
        load([folder], "ml-1m", tmp_path / "other")


@pytest.mark.parametrize("kind", ["simulated", "auto"])
def test_a_simulation_includes_its_impressions(tmp_path: Path, kind: str) -> None:
    from vista.simulation.simulate import simulate

    simulate(SimulateConfig(out=str(tmp_path / "sim"), num_users=5, events_per_user=60, impressions_per_user=20))
    log = load([tmp_path / "sim"], kind, tmp_path / "log")
    raw = pl.read_parquet(tmp_path / "sim" / "events.parquet")
    shown = pl.read_parquet(tmp_path / "sim" / "impressions.parquet")
    assert log.num_events == raw.height
    assert set(log.actions) == set(raw["action"])
    seen = log.impressions
    assert seen is not None
    assert seen.tasks == ["click", "like", "long_view"]
    assert seen.num_impressions == shown.height
    assert seen.probability is not None
    for user in raw["user"].unique():
        mine = raw.filter(pl.col("user") == user)
        assert log.items.ids(log[user].item).tolist() == mine["item"].to_list()
        assert log[user].timestamp.tolist() == mine["timestamp"].to_list()
        row = int(log.users.rows([user])[0])
        here = slice(int(seen.offsets[row]), int(seen.offsets[row + 1]))
        want = shown.filter(pl.col("user") == user)
        assert log.items.ids(seen.item[here]).tolist() == want["item"].to_list()
        for place, task in enumerate(seen.tasks):
            assert seen.label[here, place].tolist() == want[task].fill_null(0).to_list()
            assert seen.mask[here, place].tolist() == want[task].is_not_null().cast(int).to_list()
            np.testing.assert_array_equal(seen.probability[here, place], want[f"{task}_probability"].to_numpy())


REAL_SETS = {
    "ml-1m": (6040, 3706, 1_000_209, 2314, False, False),
    "ml-latest-small": (610, 9724, 100_836, 2698, True, True),
}


@pytest.mark.data
@pytest.mark.parametrize("name", REAL_SETS)
def test_real_data_sets_equal_their_arrays(tmp_path: Path, name: str) -> None:
    """The published counts, and the same events and times as events.npz, up to the order of equal times."""
    folder, (users, items, events, longest, has_time, has_rating) = real_set(name), REAL_SETS[name]
    log = load([folder], "auto", tmp_path / "log")
    assert (log.num_users, log.num_items, log.num_events) == (users, items, events)
    assert (log.lengths.max(), log.has_time, log.has_rating) == (longest, has_time, has_rating)
    with np.load(folder / "events.npz") as arrays:
        whole = log.gather(np.arange(log.num_users))
        assert whole.offsets.tolist() == arrays["offsets"].tolist()
        assert log.users.ids(np.arange(log.num_users)).tolist() == arrays["user_raw"].tolist()
        owner = np.repeat(np.arange(log.num_users), log.lengths)
        ours = log.items.ids(whole.item)
        theirs = arrays["item_raw"][arrays["item"]]
        if not log.has_time:
            assert np.array_equal(ours, theirs)
            return
        assert np.array_equal(whole.timestamp, arrays["time"] * 1000)
        assert whole.rating is not None
        ours_order = np.lexsort((ours, whole.timestamp, owner))
        theirs_order = np.lexsort((theirs, arrays["time"], owner))
        assert np.array_equal(ours[ours_order], theirs[theirs_order])
        assert np.array_equal(whole.rating[ours_order], arrays["rating"][theirs_order])
