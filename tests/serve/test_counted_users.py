"""What a request for a damaged or stale record, or with a wrong action, gets under each policy, and what is counted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conftest import ITEMS, START, USERS, Served
from tests.scorer.test_scorer_bad_input import damage_record
from tests.serve.running_service import RunningService, running
from vista.refresh import refresh

NOW = START + 200 * 86_400_000
ASKED = {"users": USERS, "candidates": ITEMS, "now": NOW}
POLICIES = ["empty", "nan", "raise"]


def counts(service: RunningService) -> dict[str, float]:
    """Users by outcome."""
    return {
        outcome: service.number(f'vista_users_total{{model="default",outcome="{outcome}"}}')
        for outcome in ("hit", "miss", "stale", "damaged")
    }


@pytest.mark.parametrize("policy", POLICIES)
def test_damaged_records_and_wrong_actions(served: Served, tmp_path: Path, policy: str) -> None:
    shutil.copytree(served.store, tmp_path / "store")
    damage_record(tmp_path / "store", USERS[1])
    with running(f"model={served.model_dir}", f"store={tmp_path / 'store'}", f"on_missing={policy}") as service:
        before = counts(service)
        events = [[{"item": ITEMS[0], "time": NOW - 1000, "action": "no-action"}]]
        status, answer = service.fetch("/v1/score", {**ASKED, "users": USERS[:1], "tail": events})
        assert status == 422 and "'no-action' is not one of this model's actions" in answer["error"]["message"]
        assert counts(service)["damaged"] == before["damaged"] == 0
        status, answer = service.fetch("/v1/score", ASKED)
        if policy == "nan":
            assert status == 200
            assert [row[0] is None for row in answer["scores"]] == [user == USERS[1] for user in USERS]
        else:
            assert (status, answer["error"]["type"]) == (500, "RecordError")
        after = counts(service)
        assert (after["damaged"], after["miss"], after["stale"]) == (1, before["miss"], 0)
        assert after["hit"] - before["hit"] == (len(USERS) - 1 if policy == "nan" else 0)
        assert service.fetch("/v1/score", {**ASKED, "users": USERS[:1]})[0] == 200


@pytest.mark.parametrize("policy", POLICIES)
def test_stale_records(served: Served, tmp_path: Path, policy: str) -> None:
    refresh(served.model, served.log, tmp_path / "store")
    words = (f"model={served.model_dir}", f"store={tmp_path / 'store'}", "max_age_s=0.001")
    with running(*words, f"on_missing={policy}") as service:
        before = counts(service)
        status, answer = service.fetch("/v1/score", ASKED)
        if policy == "raise":
            assert status == 404
        else:
            assert status == 200 and (answer["scores"][0][0] is None) == (policy == "nan")
        after = counts(service)
        assert after == {**before, "stale": before["stale"] + len(USERS)}
