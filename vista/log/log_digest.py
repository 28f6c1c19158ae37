"""A digest of an event log, by which runs and ranks check that they read the same one."""

from __future__ import annotations

import hashlib
import json

from vista.log.event_log import EventLog


def log_digest(log: EventLog) -> str:
    """12 hex digits of the log's manifests, which hold checksums of all files."""
    manifests = json.dumps(log.manifests, sort_keys=True, default=str).encode()
    return hashlib.sha256(manifests).hexdigest()[:12]
