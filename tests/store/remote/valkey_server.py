"""A Valkey server on loopback for one test, and a TCP proxy in front of it that can misbehave."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.required_program import required

PROGRAM = shutil.which("valkey-server") or shutil.which("redis-server")


def require_server() -> str:
    """The server's program, as `required`."""
    return required(PROGRAM, "valkey-server or redis-server", "valkey-server")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ValkeyServer:
    """A server process; its files lie in `folder`, so that a restart finds what it had saved."""

    def __init__(self, folder: Path, *options: str) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.options, self.port = folder, options, free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        command = [require_server(), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        command += ["--save", "", "--daemonize", "no", "--logfile", "log", *self.options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with socket.create_connection(("127.0.0.1", self.port), 1):
                    return
            except OSError:
                time.sleep(0.02)
        pytest.fail(f"the server does not start: {(self.folder / 'log').read_text()}")

    def url(self, name: str = "mine", *, user: str = "", options: str = "") -> str:
        return f"redis://{user}127.0.0.1:{self.port}/{name}{options}"

    def client(self) -> Any:
        """A client without vista; close it at the end."""
        import redis

        return redis.Redis(port=self.port, protocol=2)

    def command(self, *words: str | bytes | int) -> object:
        """Reply to one command, without vista."""
        with self.client() as client:
            return client.execute_command(*words)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(20)


class Proxy:
    """Passes bytes on to a server, and can cut a reply after some bytes, or hold it back."""

    def __init__(self, port: int) -> None:
        self.server_port = port
        self.cuts: list[tuple[int, int]] = []
        """Of each coming cut: how many replies pass first, and how many bytes of the next one."""
        self.silent = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def url(self, name: str = "mine", options: str = "") -> str:
        return f"redis://127.0.0.1:{self.port}/{name}{options}"

    def close(self) -> None:
        for each in [self._listener, *self._open]:
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self.server_port))
            except OSError:  # The server is gone, and a writer's thread that renews its lock asks for it.
                client.close()
                continue
            self._open += [client, server]
            threading.Thread(target=self._pass, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._pass, args=(server, client, True), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, is_reply: bool) -> None:
        try:
            while data := source.recv(1 << 16):
                if is_reply and self.silent:
                    continue
                if is_reply and self.cuts:
                    replies, size = self.cuts.pop(0)
                    if not replies:
                        target.sendall(data[:size])
                        break
                    self.cuts.insert(0, (replies - 1, size))
                target.sendall(data)
        except OSError:
            pass  # The other side is gone, as it may be.
        for end in (source, target):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
