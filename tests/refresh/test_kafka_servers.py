"""Servers and settings that a watch of topics cannot use: each is a typed error without the password."""

from __future__ import annotations

import logging
import shutil
import socket
import socketserver
import ssl
import struct
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tests.refresh.kafka_clusters import MockKafka
from tests.refresh.streams import TOPIC
from vista.cli.serving_commands import run_watch
from vista.config.log_config import StreamConfig
from vista.errors import ConfigError, StreamError, StreamOffsetError
from vista.refresh.watch import Watch

pytestmark = pytest.mark.parametrize("kafka", [MockKafka], indirect=True)  # whose address these tests replace
_API_VERSIONS, _HANDSHAKE, _AUTHENTICATE = 18, 17, 36
_SUPPORTED = ((0, 0, 7), (1, 0, 11), (3, 0, 8), (_HANDSHAKE, 1, 1), (_API_VERSIONS, 0, 0), (_AUTHENTICATE, 0, 0))
"""(key, least version, newest version) of each request."""
_AUTHENTICATION_FAILED = 58


class SaslServer:
    """Serves on a loopback port, over TLS if it has a certificate. Use it in a `with` block."""

    def __init__(self, certificate: Path | None = None, key: Path | None = None) -> None:
        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Connection)
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate, key)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self.servers = f"127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> SaslServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Connection(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        while len(size := self.rfile.read(4)) == 4:
            request = self.rfile.read(struct.unpack(">i", size)[0])
            key, version, correlation = struct.unpack(">hhi", request[:8])
            if key == _API_VERSIONS:  # version 0, or an error from which the client takes up version 0
                error = 0 if version == 0 else 35
                body = struct.pack(">hi", error, len(_SUPPORTED)) + b"".join(
                    struct.pack(">hhh", *api) for api in _SUPPORTED
                )
            elif key == _HANDSHAKE:
                body = struct.pack(">hih", 0, 1, 5) + b"PLAIN"
            else:
                text = b"Invalid username or password"
                body = struct.pack(">hh", _AUTHENTICATION_FAILED, len(text)) + text + struct.pack(">i", 0)
            self.wfile.write(struct.pack(">ii", 4 + len(body), correlation) + body)
            if key == _AUTHENTICATE:
                return


PASSWORD = "s3cret"
CLIENT = f"""# The shop's user.
security.protocol=sasl_plaintext
sasl.mechanism=PLAIN

sasl.username=vista
sasl.password = {PASSWORD}
"""


@pytest.fixture(params=["nothing", "password"])
def unreachable(request):
    """A server that cannot serve, and what the error says."""
    if request.param == "nothing":
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        yield f"127.0.0.1:{port}", "Connection refused"
    else:
        with SaslServer() as broker:
            yield broker.servers, "Invalid username or password"


def test_servers_that_cannot_be_used(tmp_path, streamed, unreachable, caplog):
    servers, reason = unreachable
    client = tmp_path / "client.properties"
    client.write_text(CLIENT)
    streamed.source = f"kafka://{servers}/{TOPIC}"
    streamed.stream = StreamConfig(max_s=2.0, client_file=str(client) if "password" in reason else None)
    with caplog.at_level(logging.DEBUG), pytest.raises(StreamError, match=reason) as failure:
        run_watch(streamed)
    assert not isinstance(failure.value, StreamOffsetError) and "stream.client_file" in str(failure.value)
    assert PASSWORD not in str(failure.value) + caplog.text + repr(streamed)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("unknown certificate", "certificate verify failed"),
        pytest.param("known certificate", "Invalid username or password", marks=pytest.mark.nightly),
    ],
)
def test_tls(tmp_path, streamed, case, reason):
    """The password arrives over TLS, but not at a server whose certificate is unknown."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    certificate, key, client = tmp_path / "certificate", tmp_path / "key", tmp_path / "client.properties"
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=vista".split()  # noqa: SIM905
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run(["openssl", *words, *names], check=True, capture_output=True)
    streamed.stream = StreamConfig(max_s=2.0, client_file=str(client))
    unverified = CLIENT.replace("sasl_plaintext", "sasl_ssl")
    verified = f"{unverified}ssl.ca.location={certificate}\n"
    client.write_text(unverified if case == "unknown certificate" else verified)
    with SaslServer(certificate, key) as broker:
        streamed.source = f"kafka://{broker.servers}/{TOPIC}"
        with pytest.raises(StreamError, match=reason) as failure:
            run_watch(streamed)
    assert PASSWORD not in str(failure.value)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"source": "localhost:9092/a"}, "does not begin with kafka://"),
        ({"source": "kafka://localhost/a"}, "'localhost' is not a server with its port"),
        ({"source": "kafka://localhost:9092"}, "'' cannot be the name of a topic"),
        ({"source": "kafka://localhost:9092/a,a"}, "names a topic twice"),
        ({"source": "kafka://me:s3cret@localhost:9092/a"}, "put sasl.username and sasl.password into"),
        ({"lines": "security.protocol"}, "line 1: is not of the form name=value"),
        ({"lines": "enable.auto.commit=true"}, "leave enable.auto.commit out: the log holds the offsets"),
        ({"lines": "no.such.setting=s3cret"}, 'No such configuration property: "no.such.setting"'),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_used(tmp_path, streamed, changes, problem):
    if "lines" in changes:
        client = tmp_path / "client.properties"
        if (text := changes.pop("lines")) is not None:
            client.write_text(text)
        changes = {"stream": StreamConfig(client_file=str(client))}
    with pytest.raises(ConfigError) as failure:
        Watch(replace(streamed, **changes))
    assert problem in str(failure.value)
    assert PASSWORD not in str(failure.value)


def test_a_folder_and_a_source_exclude_each_other(tmp_path, streamed):
    with pytest.raises(ConfigError, match=r"source: folder=.* is set too"):
        replace(streamed, folder=str(tmp_path))
