"""Whatever clients send, the answer is either right or an error that says what is wrong: never a status 500."""

from __future__ import annotations

import http.client
import json
import tracemalloc
from collections.abc import Iterator
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.conftest import START, Served, made_once, small_config
from tests.serve.conftest import models_file, save_other_stage_2
from tests.serve.running_service import TIMEOUT_S, RunningService, peak_bytes, resident_bytes, running
from vista.cli.item_commands import run_index
from vista.config import IndexConfig, SourceColumns
from vista.config.checks import Split
from vista.log.event_log import EventLog
from vista.refresh import refresh
from vista.scorer import Scorer, Tail
from vista.serve.http_protocol import has_few_values
from vista.training.trainer import train

TOKEN = "a-token-of-some-length"
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}
NOW = START + 10**9
NAMES = [f"u{number}" for number in range(12)]
SKUS = [f"sku-{number}" for number in range(20)]
STATUSES = (200, 400, 404, 413, 422)
"""404 is for a `model` that does not exist, and for unknown users and items."""
LENIENT = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))


def detailed_command(factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The command line of a service that uses what `save_detailed` makes."""
    folder = made_once(factory, "detailed", save_detailed)
    return tuple(f"{word}={folder / name}" for word, name in DETAILED.items())


DETAILED = {"model": "run/best", "store": "store", "index": "index", "token_file": "token"}


def save_detailed(folder: Path) -> None:
    """Save a log, model, store, index, and token in a folder. Ids are strings, and items, events, requests, and users
    have features."""
    rng, count = np.random.default_rng(0), 600
    events = {
        "user": rng.choice(NAMES, count),
        "item": rng.choice(SKUS, count),
        "timestamp": START + 1_000_000 * np.arange(count),
        "action": rng.choice(["view", "buy"], count),
        "surface": rng.choice(["app", "web"], count),
        "dwell": rng.exponential(10, count),
    }
    impressions = {
        **{name: events[name] for name in ("user", "timestamp")},
        "item": rng.choice(SKUS, count),
        "click": rng.integers(0, 2, count),
        "device": rng.choice(["phone", "tv"], count),
        "price": rng.lognormal(size=count),
    }
    log = EventLog.from_frame(
        events,
        folder / "log",
        time_unit="ms",
        columns=SourceColumns(action="action", labels=["click"]),
        impressions=impressions,
        items={"item": SKUS, "brand": rng.choice(["acme", "bolt"], len(SKUS))},
        users={"user": NAMES, "plan": rng.choice(["free", "paid"], len(NAMES)), "age": rng.uniform(18, 80, len(NAMES))},
        categories=["surface"],
        numbers=["dwell"],
        request_categories=["device"],
        request_numbers=["price"],
    )
    config = small_config(
        log,
        folder / "run",
        data__split=Split.time,
        data__validation_from=str(START + 400 * 1_000_000),
        data__test_from=str(START + 500 * 1_000_000),
        data__tokens_per_batch=256,
        model__counter_keys=["item"],
        optim__epochs=1,
    )
    refresh(train(config, log), log, folder / "store")
    run_index(IndexConfig(model=str(Path(config.run_dir) / "best"), out=str(folder / "index")))
    (folder / "token").write_text(TOKEN)


@pytest.fixture(scope="module")
def detailed_words(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The command line of `detailed`."""
    return detailed_command(tmp_path_factory)


@pytest.fixture(scope="module")
def detailed(detailed_words: tuple[str, ...]) -> Iterator[RunningService]:
    """The service of `save_detailed`."""
    with running(*detailed_words) as opened:
        features = opened.fetch("/v1/model", headers=AUTHORIZED)[1]
        assert features["request_features"] == ["device", "price"] and features["event_features"] == [
            "surface",
            "dwell",
        ]
        assert features["user_features"] == ["plan", "age"] and features["item_features"] == ["brand"]
        yield opened


@pytest.fixture(scope="module")
def refusing(detailed_words: tuple[str, ...]) -> Iterator[RunningService]:
    """The same service, which refuses unknown users and items."""
    with running(*detailed_words, "on_missing=raise") as opened:
        yield opened


@pytest.fixture(scope="module")
def variants(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A service that splits users between two models, and gives NaN to those whose data are impossible."""
    folder = tmp_path_factory.mktemp("variants")
    other = save_other_stage_2(served.model_dir, folder / "b")
    models = {"a": (served.model_dir, served.store), "b": (other, served.store)}
    path = models_file(folder, models, split={"a": 0.5, "b": 0.5})
    with running(f"models={path}", "on_missing=nan") as opened:
        yield opened


NUMBERS = st.sampled_from([0, -1, 1.5, 2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63) - 1, 2**64, 10**40, 1e308, -0.0])
ODD = NUMBERS | st.sampled_from([None, True, "", "\0", "\ud800", "a" * 501, float("nan"), float("inf"), b"\xff"])
VALUES: st.SearchStrategy[Any] = st.recursive(
    ODD | st.text(max_size=4) | st.integers() | st.floats() | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def or_odd(
    usual: st.SearchStrategy[Any], odd: st.SearchStrategy[Any] = VALUES, every: int = 16
) -> st.SearchStrategy[Any]:
    """Mostly the usual values, so that requests get beyond the checks of their types."""
    return st.integers(1, every).flatmap(lambda number: odd if number == every else usual)


USERS = or_odd(st.sampled_from([*NAMES, "nobody", "\0"]), ODD | st.sampled_from(["", "é" * 300]))
ITEMS = or_odd(st.sampled_from([*SKUS, "no-sku", "\0"]), ODD | st.just(""))


def features(*columns: tuple[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    """Features by name: of all, per user, or per candidate."""
    known = {name: or_odd(_shaped(values)) for name, values in columns}
    others = st.dictionaries(st.text(max_size=3), VALUES, max_size=2)
    return or_odd(st.fixed_dictionaries({}, optional=known), others)


def _shaped(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    row = st.lists(values, max_size=3)
    return values | row | st.lists(row, max_size=3)


DEVICE = st.sampled_from(["phone", "tv", "watch", None, True, 7])
PRICE = st.floats() | st.sampled_from([None, 3, 1e38, 1e39, -1.5, 10**400])
PLAN = st.sampled_from(["free", "paid", "gold", None])
OF_REQUEST = features(("device", DEVICE), ("price", PRICE), ("plan", PLAN), ("age", PRICE))
OF_EVENT = features(("surface", st.sampled_from(["app", "web", "car", None])), ("dwell", PRICE))
TIMES = or_odd(st.sampled_from([NOW, NOW - 1000, START]), NUMBERS | st.sampled_from([0, -1, 1_700_000_000]))
EVENTS = st.lists(
    st.fixed_dictionaries(
        {"item": ITEMS, "time": TIMES, "action": or_odd(st.sampled_from(["view", "buy"]))},
        optional={"features": OF_EVENT},
    ),
    max_size=3,
)
COUNTS = or_odd(st.integers(1, 30), st.integers() | NUMBERS)
FIELDS = {
    "users": or_odd(st.lists(USERS, max_size=3)),
    "user": USERS,
    "candidates": or_odd(st.lists(ITEMS, max_size=3)),
    "items": or_odd(st.lists(ITEMS, max_size=3)),
    "now": or_odd(TIMES),
    "request": OF_REQUEST,
    "top_k": COUNTS,
    "num_candidates": COUNTS,
    "exclude": or_odd(st.lists(ITEMS, max_size=3)),
    "exclude_tail": or_odd(st.booleans()),
    "within": or_odd(st.lists(ITEMS, max_size=30)),
    "where": or_odd(
        st.dictionaries(
            or_odd(st.just("brand"), st.just("color")), st.lists(or_odd(st.sampled_from(["acme", "bolt"]), ITEMS))
        )
    ),
    "tail": or_odd(EVENTS),
    "task": or_odd(st.sampled_from(["click", "next"])),
    "model": or_odd(st.sampled_from(["a", "b"])),
}
LISTS = {
    "candidates": or_odd(st.lists(ITEMS, max_size=3) | st.lists(st.lists(ITEMS, max_size=3), max_size=3)),
    "now": or_odd(TIMES | st.lists(TIMES, max_size=3)),
    "tail": or_odd(st.lists(EVENTS, max_size=3)),
}
"""Of several users."""
KNOWN = {
    "score": (("users", "candidates"), ("now", "request")),
    "predict": (("users", "candidates"), ("now", "request")),
    "rank": (("user",), ("candidates", "top_k", "exclude", "exclude_tail", "now", "request")),
    "retrieve": (
        ("users",),
        ("top_k", "num_candidates", "within", "where", "exclude", "exclude_tail", "now", "request"),
    ),
    "explain": (("user", "items"), ("candidates", "task", "now", "request")),
}


def bodies(name: str) -> st.SearchStrategy[tuple[str, Any]]:
    """Bodies for an endpoint, most of which have the fields that it knows."""
    needed, more = KNOWN[name]
    fields = {**FIELDS, **(LISTS if "users" in needed else {})}
    known = st.fixed_dictionaries(
        {field: fields[field] for field in needed},
        optional={field: fields[field] for field in ("tail", "model", *more)},
    )
    any_fields = st.dictionaries(st.sampled_from(sorted(FIELDS)) | st.text(max_size=4), VALUES, max_size=5)
    return st.tuples(st.just(name), or_odd(known, any_fields | VALUES))


def encoded(body: Any, *, packed: bool) -> bytes:
    """The body as MessagePack or JSON; JSON if MessagePack has no such number or text."""
    if packed:
        try:
            return msgspec.msgpack.encode(body)
        except (OverflowError, UnicodeEncodeError):
            pass
    return json.dumps(body, default=lambda value: value.decode("latin-1")).encode()


def require_error(status: int, answer: bytes) -> None:
    """An error has a message in JSON."""
    if status != 200:
        error = json.loads(answer)["error"]
        assert error["message"] and error["type"], answer


@LENIENT
@given(
    refuses=st.booleans(),
    asked=st.sampled_from(sorted(KNOWN)).flatmap(bodies),
    packed=st.booleans(),
    cut=or_odd(st.none(), st.integers(0, 40)),
)
@example(refuses=True, asked=("score", {"users": ["\ud800"], "candidates": ["sku-1"]}), packed=False, cut=None)
@example(refuses=True, asked=("rank", {"user": "", "candidates": []}), packed=False, cut=None)
@example(refuses=False, asked=("rank", {"user": "u1", "top_k": 2**63}), packed=False, cut=None)
@example(refuses=False, asked=("retrieve", {"users": ["u1"], "within": [[]]}), packed=True, cut=None)
@example(
    refuses=False,
    asked=("score", {"users": ["u1"], "candidates": ["sku-1"], "request": {"price": 10**400}}),
    packed=False,
    cut=None,
)
def test_bodies(
    detailed: RunningService,
    refusing: RunningService,
    refuses: bool,
    asked: tuple[str, Any],
    packed: bool,
    cut: int | None,
) -> None:
    name, body = asked
    sent = encoded(of_one_model(body), packed=packed)[:cut]
    kind = {"Content-Type": "application/msgpack"} if packed else {}
    asked_of = refusing if refuses else detailed
    status, _, answer = asked_of.send(f"/v1/{name}", sent, headers={**AUTHORIZED, **kind})
    assert status in STATUSES, (status, answer)
    require_error(status, answer)


@LENIENT
@given(asked=st.sampled_from(sorted(KNOWN)).flatmap(bodies), packed=st.booleans(), several=st.booleans())
@example(asked=("score", {"users": ["\ud800"], "candidates": [10]}), packed=False, several=True)
@example(asked=("rank", {"user": 2**70, "candidates": [10]}), packed=False, several=True)
@example(asked=("rank", {"user": 103, "model": 7}), packed=True, several=True)
def test_bodies_with_integer_ids(
    service: RunningService, variants: RunningService, asked: tuple[str, Any], packed: bool, several: bool
) -> None:
    """Texts where the log has integers, for a model without features of requests, or two of them."""
    name, body = asked
    body = _with_integers(body if several else of_one_model(body))
    kind = {"Content-Type": "application/msgpack"} if packed else {}
    asked_of = variants if several else service
    status, _, answer = asked_of.send(f"/v1/{name}", encoded(body, packed=packed), headers=kind)
    assert status in STATUSES, (status, answer)
    require_error(status, answer)


def of_one_model(body: Any) -> Any:
    """The body without the name of one of several models; odd values stay."""
    if isinstance(body, dict) and body.get("model") in ("a", "b"):
        return {field: value for field, value in body.items() if field != "model"}
    return body


def _with_integers(value: Any) -> Any:
    """The same with integers instead of most of the known ids, and with the actions of the other log."""
    if isinstance(value, dict):
        return {name: _with_integers(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_with_integers(one) for one in value]
    if value in ("view", "buy"):
        return "click" if value == "view" else "like"
    if isinstance(value, str) and value in NAMES[1:]:
        return 100 + NAMES.index(value)
    return 10 * SKUS.index(value) if isinstance(value, str) and value in SKUS[1:] else value


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_deep_and_long_values(detailed: RunningService, name: str) -> None:
    headers = {**AUTHORIZED, "Content-Type": "application/msgpack"}
    field = "users" if "users" in KNOWN[name][0] else "user"
    given = {"users": NAMES[:1], "user": NAMES[0], "candidates": SKUS[:2], "items": SKUS[:2]}
    good = {key: given[key] for key in (field, *KNOWN[name][0])}
    assert detailed.send(f"/v1/{name}", encoded(good, packed=True), headers=headers)[0] == 200
    key, depth = next(iter(good)), 200_000
    for sent in (
        b"\x81" + msgspec.msgpack.encode("request") + b"\x81\xa5price" + b"\x91" * depth,
        b"\x81" + msgspec.msgpack.encode(key) + b"\x91" * depth,
        b"\xdf\xff\xff\xff\xff",  # a map of 2^32 entries
        b"\xdd\xff\xff\xff\xff",  # an array of as many
        b"\xc6\xff\xff\xff\xff",  # as many bytes
        encoded({**good, "request": {"price": [[[1.0]]]}}, packed=True),
        encoded({**good, "request": {"x" * 100_000: 1}}, packed=True),
        encoded({**good, "request": {f"{number}": 1 for number in range(10_000)}}, packed=True),
        encoded({**good, "now": [NOW] * 100_000}, packed=True),
        encoded({**good, field: "u" * 1_000_000}, packed=True),
    ):
        status, _, answer = detailed.send(f"/v1/{name}", sent, headers=headers)
        assert status in STATUSES[1:], (sent[:100], status, answer)
        require_error(status, answer)
        assert len(answer) < 3000


def test_deep_and_long_values_in_json(detailed: RunningService) -> None:
    for sent in (
        b'{"request": {"price": ' + b"[" * 200_000,
        b'{"users": ' + b"[" * 200_000,
        b'{"users": %s}' % (b"9" * 10_000),
        b'{"now": 1e999999999}',
    ):
        status, _, answer = detailed.send("/v1/score", sent, headers=AUTHORIZED)
        assert status in STATUSES[1:], (sent[:100], status, answer)
        require_error(status, answer)
        assert len(answer) < 3000


BODY_BYTES = 4 << 20
"""`max_body_bytes` of the services."""
MAX_PEAK_BYTES = 4 * BODY_BYTES + 100e6
"""That a service may take in addition while it answers a request."""


def filled(name: str, place: str, element: Any, *, packed: bool) -> bytes:
    """A body of the largest size, for an endpoint.

    Args:
        name: of the endpoint.
        place: the list or, for elements that are pairs, the mapping to fill, such as "request.price".
        element: repeated, or called with the place of each.
        packed: whether the body is MessagePack.
    """
    encode = msgspec.msgpack.encode if packed else msgspec.json.encode
    needed = KNOWN[name][0]
    body: dict[str, Any] = {"user": NAMES[0]} if "user" in needed else {"users": NAMES[:1]}
    body |= {each: SKUS[:1] for each in ("candidates", "items") if each in needed}
    is_map = callable(element) and isinstance(element(0), tuple)
    colon, comma = (b"", b"") if packed else (b":", b",")
    parts, size = list[bytes](), 200
    while callable(element) and size < BODY_BYTES:
        parts.append(colon.join(map(encode, element(len(parts)))) if is_map else encode(element(len(parts))))
        size += len(parts[-1] + comma)
    parts = parts[:-1] or [encode(element)] * ((BODY_BYTES - 200) // len(encode(element) + comma))
    if packed:
        held = (b"\xdf" if is_map else b"\xdd") + len(parts).to_bytes(4, "big") + b"".join(parts)
    else:
        held = b"{%s}" % b",".join(parts) if is_map else b"[%s]" % b",".join(parts)
    top, _, inner = place.partition(".")
    filling = {inner: msgspec.Raw(held)} if inner else msgspec.Raw(held)
    of_users = top == "tail" and "users" in needed and element != []
    return encode({**body, top: [filling] if of_users else filling})


EVENT = {"item": SKUS[0], "time": NOW, "action": "view"}


def one_long(number: int) -> str:
    """The first of some 9,000 ids is long. An array of texts as wide as it takes 700 MB."""
    return "a" * (20_000 if number == 0 else 450)


LARGE = [
    ("score", "tail", lambda number: {**EVENT, "features": {f"name {number}": 1}}),
    ("score", "tail", {**EVENT, "features": {"surface": "app", "dwell": 1.5}}),
    ("score", "candidates", ["a"]),
    ("predict", "request", lambda number: (f"name {number}", 1)),
    ("rank", "exclude", lambda number: f"{number}"),
    ("retrieve", "where", lambda number: (f"name {number}", [])),
    ("explain", "request.price", []),
    ("score", "candidates", one_long),
    ("predict", "tail", lambda number: {**EVENT, "item": one_long(number)}),
]
"""Arguments of `filled`."""


@pytest.mark.parametrize(
    ("packed", "name", "place", "element"),
    [(packed, *case) for packed in (False, True) for number, case in enumerate(LARGE) if not packed or number % 3 == 0],
)
def test_memory_of_large_bodies(
    detailed: RunningService, name: str, place: str, element: Any, packed: bool, detailed_bytes: int
) -> None:
    body = filled(name, place, element, packed=packed)
    kind = {"Content-Type": "application/msgpack"} if packed else {}
    assert BODY_BYTES * 0.99 < len(body) <= BODY_BYTES
    resident_bytes(detailed)
    status, _, answer = detailed.send(f"/v1/{name}", body, headers={**AUTHORIZED, **kind})
    assert status in STATUSES, (status, answer)
    require_error(status, answer)
    assert peak_bytes(detailed) < detailed_bytes + MAX_PEAK_BYTES


@pytest.mark.parametrize(
    ("argument", "has_texts"),
    [("candidates", True), ("exclude", False), ("within", True), ("items", False), ("actions", True)],
)
def test_memory_of_one_long_text_in_python(
    detailed_words: tuple[str, ...], served: Served, index: Path, argument: str, has_texts: bool
) -> None:
    """For a model whose ids are texts, and for one whose ids are integers, which refuses texts."""
    model, store, items = (word.partition("=")[2] for word in detailed_words[:3])
    given: dict[str, Any] = {argument: [one_long(number) for number in range(9_000)]}
    if argument in ("items", "actions"):
        parts: dict[str, Any] = {"items": SKUS[:1] * 9_000, "actions": [0] * 9_000, **given}
        given = {"tail": Tail(**parts, times=[NOW] * 9_000, offsets=[0, 9_000])}
    sources = (model, store, items) if has_texts else (served.model_dir, served.store, index)
    with Scorer.open(*sources[:2], index=sources[2]) as scorer:
        call: Any = partial(scorer.rank, "u1" if has_texts else 100)
        if argument == "within":
            call = partial(scorer.retrieve, ["u1"] if has_texts else [100])
        is_good = has_texts and argument != "actions"
        call()
        tracemalloc.start()
        with nullcontext() if is_good else pytest.raises((TypeError, ValueError), match=r"integer|actions"):
            call(**given)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 20e6


@pytest.fixture(scope="module")
def detailed_bytes(detailed: RunningService) -> int:
    """Memory of the service before large bodies."""
    return resident_bytes(detailed)


@LENIENT
@given(value=VALUES | st.lists(VALUES) | st.binary(max_size=70_000))
@example(value={"a" * 31: [-1, 2**63, 1.5, -(2**40)], "a" * 32: "b" * 300, "c": ["d" * 70_000, b"e" * 70_000]})
@example(value=-(2**63) - 1)
@example(value=[*range(70_000)])
@example(value={str(number): {} for number in range(70_000)})
def test_values_are_counted_before_they_are_built(value: Any) -> None:
    """Exactly in MessagePack. In JSON, at least all but one."""
    count, packed, text = _num_values(value), encoded(value, packed=True), encoded(value, packed=False)
    for most in range(max(0, count - 2), count + 1):
        if packed != text:  # else MessagePack has no code for the value, such as an integer below -2^63
            assert has_few_values(packed, most, packed=True) == (most == count)
        assert most > count - 2 or not has_few_values(text, most, packed=False)


def _num_values(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + len(value) + sum(map(_num_values, value.values()))
    return 1 + sum(map(_num_values, value)) if isinstance(value, list) else 1


PATHS = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20)
METHODS = st.sampled_from(["GET", "GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "CONNECT"])
PREFIXES = ("/v1/users/", "/v1/", "/", "", "/v1/users?", "/healthz/", "/docs?", "/v1/score?", "http://x/v1/users/")


@LENIENT
@given(method=METHODS, path=PATHS, query=st.none() | PATHS)
@example(method="GET", path="../../etc/passwd", query=None)
@example(method="GET", path="%2e%2e%2f%00", query="%00=%ff")
@example(method="GET", path="%ff%fe", query=None)
@example(method="GET", path="9" * 600, query="9" * 9000)
@example(method="GET", path="u1", query="generation=1&generation=" + "9" * 5000)
def test_paths(service: RunningService, method: str, path: str, query: str | None) -> None:
    for prefix in PREFIXES:
        target = prefix + path if query is None else f"{prefix}{path}?{query}"
        status, answer = _sent(service, method, target)
        assert status < 500, (target, status, answer)
        if status >= 400 and method != "HEAD":
            require_error(status, answer)


def _sent(service: RunningService, method: str, target: str) -> tuple[int, bytes]:
    """Status and body of the answer to a target that is sent as it is."""
    with closing(http.client.HTTPConnection("127.0.0.1", service.port, timeout=TIMEOUT_S)) as connection:
        connection.putrequest(method, "x", skip_host=True, skip_accept_encoding=True)
        connection._buffer[0] = f"{method} {target} HTTP/1.1".encode()  # type: ignore[attr-defined]
        connection.putheader("Host", "localhost")
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.read()


@settings(LENIENT, max_examples=50)
@given(
    value=st.sampled_from([TOKEN, f"Bearer {TOKEN}", f"bearer  {TOKEN} ", f"Bearer {TOKEN[:-1]}", "Bearer"])
    | st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=30),
    name=st.sampled_from(["Authorization", "authorization", "Vista-Timeout-Ms", "Content-Type", "Accept", "Expect"]),
    authorized=st.booleans(),
)
def test_headers(detailed: RunningService, name: str, value: str, authorized: bool) -> None:
    headers = {**(AUTHORIZED if authorized else {}), name: value}
    body = {"users": NAMES[:1], "candidates": SKUS[:2]}
    status, _, answer = detailed.send("/v1/score", body, headers=headers)
    right = headers.get("Authorization", headers.get("authorization", "")).split()
    if name.lower() == "authorization" and authorized and name == "authorization":
        assert status in (400, 401)  # two headers of one name
    elif len(right) == 2 and right[0].lower() == "bearer" and right[1] == TOKEN:
        assert status in (200, 400, 408, 504), (headers, status, answer)  # another media type, or too little time
    else:
        assert status in (400, 401), (headers, status, answer)
    require_error(status, answer)
