"""A Kafka server that refuses every password: it answers ApiVersions, SaslHandshake, and SaslAuthenticate."""

from __future__ import annotations

import socketserver
import ssl
import struct
import threading
from pathlib import Path
from types import TracebackType

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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
