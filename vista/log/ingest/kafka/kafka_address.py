"""The address of topics: kafka://server:port,server:port/topic,topic."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vista.errors import ConfigError, shown

SCHEME = "kafka://"
_FORM = "kafka://server:port/topic, with commas between several servers or topics"
_SERVER = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}")
_TOPIC = re.compile(r"[A-Za-z0-9._-]{1,249}")


@dataclass(frozen=True, slots=True)
class KafkaAddress:
    """Servers to begin with, as the client takes them ("a:9092,b:9092"), and distinct topics."""

    servers: str
    topics: tuple[str, ...]

    @classmethod
    def parse(cls, source: str) -> KafkaAddress:
        """Parse the setting `source`.

        Raises:
            ConfigError: it has another form, or holds a password, which the message does not repeat.
        """
        if not source.startswith(SCHEME):
            raise ConfigError(f"source: {shown(source)} does not begin with {SCHEME}; write {_FORM}")
        if "@" in source:
            raise ConfigError(
                "source: has a user name or a password; put sasl.username and sasl.password into stream.client_file"
            )
        servers, _, topics = source.removeprefix(SCHEME).partition("/")
        for server in servers.split(","):
            if not _SERVER.fullmatch(server) or int(server.rpartition(":")[2]) > 65_535:
                raise ConfigError(f"source: {shown(server)} is not a server with its port; write {_FORM}")
        names = topics.split(",")
        for topic in names:
            if not _TOPIC.fullmatch(topic):
                raise ConfigError(f"source: {shown(topic)} cannot be the name of a topic; write {_FORM}")
        if len(set(names)) < len(names):
            raise ConfigError("source: names a topic twice; name each topic once")
        return cls(servers, tuple(names))

    def __str__(self) -> str:
        return f"{SCHEME}{self.servers}/{','.join(self.topics)}"
