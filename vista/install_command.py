"""The command that installs vista with an extra, for error messages."""

from __future__ import annotations

import json
import shlex
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

DISTRIBUTION = "vista-recsys"
_FOLDER = Path(__file__).resolve().parents[1]
_NEXT_COMMAND = {"torchrec": " && pip install --no-deps torchrec==1.8.0"}


def install_command(extra: str = "") -> str:
    """Shell command that installs this vista again, with an extra if one is given. It works in any folder.

    vista is not on a package index, so the command names where this installation came from: the checkout that it runs
    in, or what pip recorded (https://packaging.python.org/specifications/direct-url/).
    """
    extras = f"[{extra}]" if extra else ""
    if (_FOLDER / "pyproject.toml").is_file():
        command = f"pip install -e {shlex.quote(f'{_FOLDER}{extras}')}"
    else:
        origin = _origin()
        command = f"pip install {shlex.quote(DISTRIBUTION + extras + (f' @ {origin}' if origin else ''))}"
    return command + _NEXT_COMMAND.get(extra, "")


def _origin() -> str:
    """URL of the folder, archive, or repository that vista was installed from; "" if pip recorded none."""
    try:
        record = json.loads(distribution(DISTRIBUTION).read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        return ""
    url = str(record.get("url", ""))
    if "vcs_info" in record:
        return f"{record['vcs_info']['vcs']}+{url}@{record['vcs_info']['commit_id']}"
    return url
