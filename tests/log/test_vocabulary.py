"""Vocabularies: rows stay, look-ups agree with a dict, files round-trip."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vista.errors import LogFormatError
from vista.log.vocabulary import Vocabulary

INT_IDS = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=60)
DENSE_IDS = st.lists(st.integers(-5, 40), max_size=60)
TEXT_IDS = st.lists(st.text(min_size=1, max_size=6), max_size=60)


@settings(max_examples=30, deadline=None)
@given(st.one_of(st.tuples(INT_IDS, INT_IDS), st.tuples(DENSE_IDS, DENSE_IDS)))
def test_integer_rows_agree_with_a_dict(batches: tuple[list[int], list[int]]) -> None:
    _check_against_dict("int", batches)


@settings(max_examples=30, deadline=None)
@given(st.tuples(TEXT_IDS, TEXT_IDS))
def test_string_rows_agree_with_a_dict(batches: tuple[list[str], list[str]]) -> None:
    _check_against_dict("str", batches)


def _check_against_dict(kind: str, batches: tuple[list, list]) -> None:
    vocabulary = Vocabulary.empty(kind)
    expected: dict = {}
    for batch in batches:
        key = (lambda text: text.encode()) if kind == "str" else None
        for new in sorted(set(batch) - set(expected), key=key):
            expected[new] = len(expected)
        vocabulary = vocabulary.extended(batch)
    asked = [*batches[0], *batches[1], *([-77, 3, 2**62] if kind == "int" else ["", "nobody", "é"])]
    want = [expected.get(one, -1) for one in asked]
    assert vocabulary.rows(asked).tolist() == want  # many at once: table, dict or sorted order
    fresh = Vocabulary.concatenated([vocabulary.part(0)])
    assert [int(fresh.rows([one])[0]) for one in asked] == want  # one at a time: bisection
    assert vocabulary.ids(np.arange(len(vocabulary))).tolist() == list(expected)
    assert pickle.loads(pickle.dumps(vocabulary)).digest() == vocabulary.digest()


@settings(max_examples=40, deadline=None)
@given(ids=st.one_of(INT_IDS, DENSE_IDS, TEXT_IDS), more=st.data())
def test_rows_without_ids_are_unknown_and_keep_their_places(
    tmp_path_factory: pytest.TempPathFactory, ids: list, more: st.DataObject
) -> None:
    """Ids are removed twice; the result is saved, concatenated, cut, and extended by the same ids again."""
    kind = "str" if ids and isinstance(ids[0], str) else "int"
    vocabulary = Vocabulary.empty(kind).extended(ids)
    names = vocabulary.ids(np.arange(len(vocabulary))).tolist()
    blank: set[int] = set()
    for _ in range(2):
        gone = more.draw(st.sets(st.integers(0, len(names) - 1), max_size=5) if names else st.just(set()))
        vocabulary = vocabulary.without_ids(np.array(sorted(gone), np.int64))
        blank |= gone
    folder = tmp_path_factory.mktemp("vocabulary")
    vocabulary.save(folder, "users")
    cut = len(names) // 2
    halves = Vocabulary.concatenated([Vocabulary.empty(kind), vocabulary.part(0, cut), vocabulary.part(cut)])
    asked = [*names, *([0, 2**62] if kind == "int" else ["", "nobody"])]
    want = [row if row not in blank else -1 for row in range(len(names))]
    want += [names.index(name) if name in names and names.index(name) not in blank else -1 for name in asked[-2:]]
    for one in (vocabulary, Vocabulary.load(folder, "users"), halves, pickle.loads(pickle.dumps(vocabulary))):
        assert one.rows(asked).tolist() == want
        fresh = Vocabulary.concatenated([one.part(0)])
        assert [int(fresh.rows([name])[0]) for name in asked] == want
        assert (np.flatnonzero(~one.has_ids(np.arange(len(names)))).tolist(), one.num_blank) == (
            sorted(blank),
            len(blank),
        )
        kept = [row for row in range(len(names)) if row not in blank]
        assert one.ids(kept).tolist() == [names[row] for row in kept]
        assert one.digest() == vocabulary.digest()
    for row in blank:
        with pytest.raises(LookupError, match=f"the id of row {row} was removed"):
            vocabulary.ids([row])
    if kind == "str":
        assert vocabulary._data.tobytes() == b"".join(name.encode() for name in vocabulary.ids(kept))
    else:
        assert not vocabulary._data[sorted(blank)].any()
    grown = vocabulary.extended(names)
    assert len(grown) == len(names) + len(blank)
    rows = grown.rows(names)
    assert all((row >= len(names)) if old in blank else (row == old) for old, row in enumerate(rows.tolist()))


def test_digest_depends_on_kind_order_and_bounds() -> None:
    digests = {
        Vocabulary.from_ids(["ab", "c"]).digest(),
        Vocabulary.from_ids(["a", "bc"]).digest(),
        Vocabulary.from_ids([1, 2]).digest(),
        Vocabulary.from_ids([2]).extended([1]).digest(),
    }
    assert len(digests) == 4


def test_wrong_id_types_are_refused_with_a_remedy() -> None:
    with pytest.raises(TypeError, match=r"integer ids.*str.*'7'|integer ids.*<U1"):
        Vocabulary.from_ids([7]).rows(["7"])
    with pytest.raises(TypeError, match="integer ids"):
        Vocabulary.from_ids([7]).rows([7.0])
    with pytest.raises(TypeError, match=r"string ids.*int 7.*str\(i\)"):
        Vocabulary.from_ids(["7"]).rows([7])
    with pytest.raises(TypeError, match="does not fit into int64"):
        Vocabulary.from_ids([7]).rows([2**63])
    with pytest.raises(IndexError, match=r"outside \[0, 1\)"):
        Vocabulary.from_ids([7]).ids([1])


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    file = Vocabulary.from_ids(["a", "b"]).save(tmp_path, "items")[0]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(LogFormatError, match=r"items\.ids\.npy"):
        Vocabulary.load(tmp_path, "items")
