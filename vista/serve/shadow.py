"""Shadow scoring: a challenger answers copies of live requests in a process of its own, and both answers are logged.

The worker offers a copy of each answered request after its answer was sent, without waiting: if the process is busy, or
has died, the copy is dropped. The process has the lowest priority, and nothing that it does reaches a client.

A line of `shadow_file` is a JSON object:

    at, endpoint, users      when it was compared, score or rank, and the users of the request
    champion, challenger     model_checksum and generation, and the scores, or the items of a ranking; at most 100
    difference, correlation  of score: the mean absolute difference of all scores, and their correlation
    overlap                  of rank: the share of the champion's items that the challenger lists too
    error                    why the challenger has no answer
    not_compared             "adapter", if the champion answered with one: adapters belong to its model
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from vista.config import ServeConfig
from vista.config.checks import from_dict, to_dict
from vista.device import cpu_settings
from vista.errors import VistaError, log_to_stderr
from vista.scorer.serving_source import adapter_files
from vista.serve.scoring_service import MSGPACK, OF_REQUESTS, ScoringService
from vista.serve.served_models import open_warm_scorer

logger = logging.getLogger(__name__)
ENDPOINTS = ("score", "rank")
MAX_MESSAGE = 128 << 10
"""Bytes of a request and its answer; larger ones are not compared."""
BUFFER_BYTES = 1 << 20
MOST_FILE_BYTES = 256 << 20
"""Then the file becomes <file>.1, and a new one begins."""
MOST_SHOWN = 100
RANK_S = 60.0
STOP_S = 5.0


class ShadowProcess:
    """The process of a worker, and how to offer it requests.

    Args:
        config: of the service, with a shadow model.
        on_offer: called with "sent" or "dropped" for each request.
    """

    def __init__(self, config: ServeConfig, on_offer: Callable[[str], None]) -> None:
        self._on_offer, self._broken = on_offer, False
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
            command = [sys.executable, "-m", __name__, str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        # Not as an argument, which other accounts could read: a store's URL may have a password.
        self._socket.send(json.dumps(to_dict(config)).encode())
        self._socket.setblocking(False)

    def offer(self, endpoint: str, body: bytes, media_type: str, answer: bytes) -> None:
        """Send a request and its answer, or drop them; returns at once."""
        outcome = "dropped"
        if len(body) + len(answer) <= MAX_MESSAGE:
            try:
                self._socket.send(msgspec.msgpack.encode((endpoint, body, media_type, answer)))
                outcome = "sent"
            except ConnectionError as error:
                if not self._broken:
                    logger.warning("the process of the shadow model has ended (%s); requests are not compared", error)
                self._broken = True
            except OSError:  # The buffer is full.
                pass
        self._on_offer(outcome)

    def close(self) -> None:
        """End the process."""
        self._socket.close()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def compared(
    service: ScoringService, endpoint: str, body: bytes, media_type: str, answer: bytes, *, adapted: bool = False
) -> dict[str, Any]:
    """A line about a request: the champion's answer next to that of the challenger's service. `adapted`: whether the
    champion answers all requests with an adapter."""
    line: dict[str, Any] = {"at": datetime.now(UTC).isoformat(timespec="milliseconds"), "endpoint": endpoint}
    champion, asked = _decoded(answer, media_type), _decoded(body, media_type)
    line |= {"users": asked.get("users", [asked.get("user")])[:MOST_SHOWN]}
    if adapted or asked.get("adapter") is not None:
        return line | {"champion": _shown(champion), "not_compared": "adapter"}
    try:
        if endpoint == "rank":
            own = service.rank(body, media_type, RANK_S)
        else:
            own = service.scored(service.checked(body, media_type), media_type)
    except OF_REQUESTS as error:
        return line | {"champion": _shown(champion), "error": f"{type(error).__name__}: {error}"}
    challenger = _decoded(own.body, media_type)
    line |= {"champion": _shown(champion), "challenger": _shown(challenger)}
    if endpoint == "rank":
        items = champion["items"]
        return line | {"overlap": len(set(items) & set(challenger["items"])) / max(len(items), 1)}
    a, b = _flat(champion["scores"]), _flat(challenger["scores"])
    known = np.isfinite(a) & np.isfinite(b)
    if known.any():
        line["difference"] = float(np.abs(a - b)[known].mean())
        if a[known].std() and b[known].std():
            line["correlation"] = float(np.corrcoef(a[known], b[known])[0, 1])
    return line


def _decoded(content: bytes, media_type: str) -> Any:
    return msgspec.msgpack.decode(content) if media_type == MSGPACK else msgspec.json.decode(content)


def _flat(scores: Any) -> NDArray[np.float64]:
    """Scores of an answer in a row: the bytes of float32 numbers, or lists, with NaN for null."""
    if isinstance(scores, bytes):
        return np.frombuffer(scores, "<f4").astype(np.float64)
    rows = scores if scores and isinstance(scores[0], list) else [scores]
    return np.array([np.nan if score is None else score for row in rows for score in row], np.float64)


def _shown(answer: dict[str, Any]) -> dict[str, Any]:
    shown = {name: answer.get(name) for name in ("model_checksum", "generation")}
    if "items" in answer:
        shown["items"] = answer["items"][:MOST_SHOWN]
    scores = _flat(answer["scores"])[:MOST_SHOWN]
    return shown | {"scores": [None if np.isnan(score) else round(score, 6) for score in scores.tolist()]}


def run(listening: socket.socket, config: ServeConfig) -> None:
    """Compare requests until the worker ends; a challenger that cannot be opened is tried again every `reload_s`."""
    assert config.shadow_model is not None and config.shadow_store is not None
    model, store = config.shadow_model, config.shadow_store
    own = replace(config, model=model, store=store, index=None, adapter=None, shadow_model=None, shadow_store=None)
    service, tried, path = None, -own.reload_s, Path(config.shadow_file)
    adapted = None in adapter_files(config.adapter)
    while message := listening.recv(2 * MAX_MESSAGE):
        try:
            if service is None and time.monotonic() - tried >= own.reload_s:
                tried = time.monotonic()
                try:
                    service = ScoringService(open_warm_scorer(own), own)
                    logger.info("shadow model %s is compared with the answers of the service", model)
                except VistaError as error:
                    logger.warning("shadow model %s cannot be opened: %s", model, error)
            if service is not None:
                copy = msgspec.msgpack.decode(message, type=tuple[str, bytes, str, bytes])
                _append(path, compared(service, *copy, adapted=adapted))
        except Exception:  # Of one request; the next one may succeed.
            logger.exception("a request was not compared with shadow model %s", model)
    if service is not None:
        service.scorer.close()


def _append(path: Path, line: dict[str, Any]) -> None:
    try:
        with path.open("ab", buffering=0) as file:  # Workers share it, so each line is one write.
            file.write(msgspec.json.encode(line) + b"\n")
            if os.fstat(file.fileno()).st_size > MOST_FILE_BYTES:
                fcntl.flock(file, fcntl.LOCK_EX)
                if path.exists() and path.stat().st_size > MOST_FILE_BYTES:  # Another worker did not replace it yet.
                    path.replace(f"{path}.1")
    except OSError as error:
        logger.warning("%s: cannot be written (%s)", path, error)


def main() -> None:
    """The process: its argument is the descriptor of the socket, whose first message is the service's configuration."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The worker ends it.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.nice(19)
    log_to_stderr(logging.INFO)
    with socket.socket(fileno=int(sys.argv[1])) as listening, cpu_settings(1):
        run(listening, from_dict(ServeConfig, json.loads(listening.recv(2 * MAX_MESSAGE))))


if __name__ == "__main__":
    main()
