"""URLs of remote stores: what they name, and that nothing prints their credentials."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from vista.errors import ConfigError
from vista.store.remote.store_url import StoreUrl


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("redis://host/mine", StoreUrl("host", "mine")),
        ("redis://host:7000/2/mine", StoreUrl("host", "mine", 7000, 2)),
        ("rediss://me:a%40b@host/my-store.1", StoreUrl("host", "my-store.1", user="me", password="a@b", tls=True)),
        ("redis://:secret@[::1]:7/mine?timeout_s=0.5", StoreUrl("::1", "mine", 7, password="secret", timeout_s=0.5)),
        ("redis://host/mine?cache=/a/b&cache_mb=5", StoreUrl("host", "mine", cache="/a/b", cache_mb=5)),
        (Path("redis://host/mine"), StoreUrl("host", "mine")),
    ],
)  # fmt: skip
def test_urls(text, expected):
    url = StoreUrl.parse(text)
    assert StoreUrl.matches(text) and url == expected == StoreUrl.parse(url) == pickle.loads(pickle.dumps(url))
    for shown in (str(url), repr(url)):
        assert "secret" not in shown and "a@b" not in shown
    assert StoreUrl.parse(str(url)).name == url.name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("redis://host", "its path must end in the store's name"),
        ("redis://secret@host/0", "its path must end in the store's name"),
        ("redis://host/a{b}", "its path must end in the store's name"),
        ("redis://host/x/mine", "only the number of a database"),
        ("redis://host/1/2/mine", "only the number of a database"),
        ("redis://:1/mine", "it names no host"),
        ("redis://:secret@host:port/mine", "cannot be read"),
        ("redis://:secret@host/mine?ttl=1", "its only options are timeout_s"),
        ("redis://host/mine?timeout_s=0", "timeout_s must be a positive number"),
        ("redis://host/mine?timeout_s=nan", "timeout_s must be a positive number"),
        ("redis://host/mine?secret", "cannot be read"),
        ("redis://host/mine?ttl_days=0", "ttl_days must be a positive number of days"),
        ("redis://host/mine?ttl_days=40000", "ttl_days must be a positive number of days"),
        ("redis://host/mine?cache_mb=-1", "cache_mb must be a positive number"),
    ],
)
def test_other_urls_are_refused(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        StoreUrl.parse(text)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("text", ["stores/mine", "/srv/redis", "redis", "http://host/mine"])
def test_folders_are_not_urls(text):
    assert not StoreUrl.matches(text) and not StoreUrl.matches(Path(text))
