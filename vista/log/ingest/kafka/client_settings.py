"""Settings of the Kafka client: those of a file, and those that exactly-once reading depends on."""

from __future__ import annotations

from pathlib import Path

from vista.errors import ConfigError, shown
from vista.files import read_limited

_MOST_BYTES = 1 << 20
_SECRET = ("password", "secret", "token", "key.pem", "oauthbearer.config")
"""Parts of the names of settings whose values are never shown."""
_OWN = {
    "bootstrap.servers": "name servers in source",
    "enable.auto.commit": "the log holds the offsets",
    "enable.auto.offset.store": "the log holds the offsets",
    "auto.offset.reset": "set stream.start or stream.reset_offsets",
    "enable.partition.eof": "the watch needs it",
}
"""Settings that a file must not change, and why."""


def read_client_file(path: str | None) -> dict[str, str]:
    """Read settings of the Kafka client: one `name=value` per line, with empty lines and # comments.

    Raises:
        ConfigError: the file cannot be read, a line has another form, or a setting belongs elsewhere. The message
            holds no value.
    """
    if path is None:
        return {}
    try:
        lines = read_limited(Path(path), _MOST_BYTES).decode().splitlines()
    except OSError as error:
        raise ConfigError(f"stream.client_file: {path}: cannot be read ({error.strerror}); check the path") from None
    except ValueError:
        raise ConfigError(f"stream.client_file: {path}: is not UTF-8 text; write it again") from None
    settings: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, equals, value = (part.strip() for part in line.partition("="))
        place = f"stream.client_file: {path}: line {number}"
        if not equals or not name:
            raise ConfigError(f"{place}: is not of the form name=value; write it again, as in security.protocol=SSL")
        if name in _OWN:
            raise ConfigError(f"{place}: leave {name} out: {_OWN[name]}")
        if name in settings:
            raise ConfigError(f"{place}: sets {shown(name)} again; keep one of the lines")
        settings[name] = value
    return settings


def without_secrets(text: str, settings: dict[str, str]) -> str:
    """A message of the client without the values of secret settings."""
    for name, value in settings.items():
        if value and any(part in name for part in _SECRET):
            text = text.replace(value, "***")
    return text
