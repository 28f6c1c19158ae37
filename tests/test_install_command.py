"""Error messages name a command that installs an extra, wherever vista came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vista import install_command as module
from vista.install_command import install_command

CHECKOUT = Path(__file__).parents[1]


def test_in_a_checkout() -> None:
    assert install_command("serve") == f"pip install -e '{CHECKOUT}[serve]'"
    assert install_command() == f"pip install -e {CHECKOUT}"
    assert install_command("torchrec").endswith("[torchrec]' && pip install --no-deps torchrec==1.8.0")


@pytest.mark.parametrize(
    ("record", "command"),
    [
        pytest.param(
            {"url": "file:///home/me/vista", "dir_info": {}},
            "pip install 'vista-recsys[serve] @ file:///home/me/vista'",
            id="folder",
        ),
        pytest.param(
            {"url": "https://example.org/vista.git", "vcs_info": {"vcs": "git", "commit_id": "0a1b"}},
            "pip install 'vista-recsys[serve] @ git+https://example.org/vista.git@0a1b'",
            id="repository",
        ),
        pytest.param(None, "pip install 'vista-recsys[serve]'", id="index"),
    ],
)
def test_in_an_installed_package(
    record: dict[str, Any] | None, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = tmp_path / "vista_recsys-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vista-recsys\nVersion: 0.1.0\n")
    if record is not None:
        (metadata / "direct_url.json").write_text(json.dumps(record))
    monkeypatch.setattr(module, "_FOLDER", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert install_command("serve") == command
