"""Genres of the MovieLens sets, on small samples of the public forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import real_set
from tests.log.feature_tables import features_of, user_features_of
from tests.log.ingest.set_logs import events_of, load, load_real
from vista.errors import DataError

RATINGS = {
    "ml-1m": ("ratings.dat", "1::1::5::978300760\n1::260::4::978300761\n2::9::3::978300762\n"),
    "ml-100k": ("u.data", "1\t1\t5\t978300760\n1\t260\t4\t978300761\n2\t9\t3\t978300762\n"),
    "ml-latest-small": (
        "ratings.csv",
        "userId,movieId,rating,timestamp\r\n1,1,5.0,978300760\r\n1,260,4.0,978300761\r\n2,9,3.5,978300762\r\n",
    ),
}
MOVIES = {
    "ml-1m": (
        "movies.dat",
        "1::Toy Story (1995)::Animation|Children's\n260::Star Wars: Épisode IV (1977)::Sci-Fi\n"
        "999::Never rated (1999)::War\n",
    ),
    "ml-100k": (
        "u.item",
        "1|Toy Story (1995)|01-Jan-1995||http://us.imdb.com/M/title-exact?Toy%20Story%20(1995)|"
        "0|0|0|1|1|0|0|0|0|0|0|0|0|0|0|0|0|0|0\n"
        "260|Épisode IV (1977)|01-Jan-1977||http://x|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|1|0|0|0\n"
        "9|unknown||||1|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0\n",
    ),
    "ml-latest-small": (
        "movies.csv",
        'movieId,title,genres\r\n1,Toy Story (1995),Animation|Children\'s\r\n260,"Épisode, IV (1977)",Sci-Fi\r\n'
        "9,Café (2000),(no genres listed)\r\n",
    ),
}
USERS = {
    "ml-1m": ("users.dat", "1::F::1::10::48067\n2::M::56::16::70072\n9::M::25::15::55117-2401\n"),
    "ml-100k": ("u.user", "1|24|F|technician|85711\n2|53|M|other|V3N4P\n9|23|M|writer|32067\n"),
    "recbole": (
        "ml-100k.user",
        "user_id:token\tage:float\tgender:token\ttags:token_seq\n1\t24\tF\ta b\n2\t53\tM\t\n9\t23\tM\tc\n",
    ),
}


def write(folder: Path, kind: str) -> Path:
    """The files of a set; those with genres in Latin-1, but movies.csv in UTF-8."""
    folder.mkdir()
    (name, ratings), (items, movies) = RATINGS[kind], MOVIES[kind]
    (folder / name).write_text(ratings, newline="")
    (folder / items).write_text(movies, newline="", encoding="utf-8" if items == "movies.csv" else "latin-1")
    return folder


@pytest.mark.parametrize("kind", RATINGS)
def test_genres(tmp_path: Path, kind: str) -> None:
    log = load(write(tmp_path / "set", kind))
    assert events_of(log)[1] == (1, 260, 978300761000, "event")
    assert features_of(log) == {"genres": {1: ["Animation", "Children's"], 260: ["Sci-Fi"]}}


@pytest.mark.parametrize("kind", RATINGS)
def test_without_the_file_of_movies_there_are_no_features(tmp_path: Path, kind: str) -> None:
    folder = write(tmp_path / "set", kind)
    (folder / MOVIES[kind][0]).unlink()
    assert load(folder, kind).item_features is None


@pytest.mark.parametrize(
    ("kind", "movies", "message"),
    [
        ("ml-1m", "1,Toy Story,War\n", r"movies\.dat: line 1 has 1 columns separated by '::', but movies.dat of .* 3"),
        ("ml-100k", "1|Toy Story|War\n", r"u\.item: line 1 has 3 columns separated by '\|', but u\.item of .* 24"),
        ("ml-latest-small", "movieId,title\n1,x\n", r"column 'genres' is missing, the file has: movieId, title"),
    ],
)
def test_other_columns(tmp_path: Path, kind: str, movies: str, message: str) -> None:
    folder = write(tmp_path / "set", kind)
    (folder / MOVIES[kind][0]).write_text(movies)
    with pytest.raises(DataError, match=message + r".*; get the set from https://grouplens\.org/datasets/movielens"):
        load(folder, kind)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("ml-1m", {"gender": {1: "F", 2: "M"}, "age": {1: "1", 2: "56"}, "occupation": {1: "10", 2: "16"}}),
        ("ml-100k", {"gender": {1: "F", 2: "M"}, "occupation": {1: "technician", 2: "other"}, "age": {1: 24, 2: 53}}),
        ("recbole", {"age": {1: 24, 2: 53}, "gender": {1: "F", 2: "M"}}),
    ],
)
def test_users(tmp_path: Path, kind: str, expected: Any) -> None:
    if kind == "recbole":
        folder = tmp_path / "set"
        folder.mkdir()
        header = "user_id:token\titem_id:token\ttimestamp:float\n"
        (folder / "ml-100k.inter").write_text(f"{header}1\t1\t978300760\n2\t9\t978300762\n")
    else:
        folder = write(tmp_path / "set", kind)
    name, users = USERS[kind]
    (folder / name).write_text(users)
    assert user_features_of(load(folder)) == expected


@pytest.mark.parametrize(
    ("kind", "name", "users", "message"),
    [
        ("ml-1m", "users.dat", "1,F,1\n", r"users\.dat: line 1 has 1 columns separated by '::', but users.dat of .* 5"),
        ("ml-100k", "u.user", "1|24|F\n", r"u\.user: line 1 has 3 columns separated by '\|', but u\.user of .* 5"),
        ("ml-100k", "u.user", "1|x|F|other|1\n", r"u\.user: row 1, column 'age': 'x' is not a number"),
    ],
)
def test_a_bad_file_of_users(tmp_path: Path, kind: str, name: str, users: str, message: str) -> None:
    folder = write(tmp_path / "set", kind)
    (folder / name).write_text(users)
    with pytest.raises(DataError, match=message):
        load(folder)


@pytest.mark.data
def test_the_real_users(tmp_path: Path) -> None:
    """The ratings of the first half, with all users."""
    folder = tmp_path / "ml-1m"
    folder.mkdir()
    (folder / "ratings.dat").symlink_to(real_set("ml-1m-half") / "ratings.dat")
    for name in ("users.dat", "movies.dat"):
        (folder / name).symlink_to(real_set("ml-1m") / name)
    for log, columns in (
        (load(folder), ["gender", "age", "occupation"]),
        (load_real("ml-100k", tmp_path / "ml-100k-log"), ["age", "gender", "occupation", "zip_code"]),
    ):
        found = user_features_of(log)
        assert list(found) == columns
        assert {len(of_column) for of_column in found.values()} == {log.num_users}


@pytest.mark.data
def test_the_real_set(tmp_path: Path) -> None:
    features = load_real("ml-latest-small", tmp_path / "log").item_features
    assert features is not None and features.described() == ["genres: category of 19 values, 100% of items"]
