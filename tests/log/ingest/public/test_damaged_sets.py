"""Damaged files of public data sets: refused with an error that names a file, or taken."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.log.conftest import PARSER
from tests.log.ingest.public.samples import SAMPLES
from tests.log.ingest.source_mutations import mutated
from vista.config import PrepareConfig, SourceConfig
from vista.config.choices import OnBadRows
from vista.errors import DataError
from vista.log.event_log import EventLog
from vista.log.ingest.prepare import prepare

KINDS = {
    "complete-journey": "complete-journey",
    "amazon-reviews-2023": "amazon-reviews-2023",
    "kuairand": "kuairand",
    "yambda": "yambda",
    "microvideo": "longctr",
    "t-ecd": "t-ecd",
}
"""By the name of the sample."""
MUTATIONS = 24


@pytest.mark.parametrize("name", KINDS)
def test_damage_is_refused_or_taken(tmp_path: Path, name: str) -> None:
    folder, log, chance, counts = tmp_path / "files", tmp_path / "log", random.Random(name), Counter[str]()
    folder.mkdir()
    SAMPLES[name](folder)
    read = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    events = SourceConfig(kind=KINDS[name], paths=[str(folder)])
    for number in range(MUTATIONS):
        file = chance.choice(read)
        whole = file.read_bytes()
        file.write_bytes(mutated(whole, chance))
        bad_rows = OnBadRows.error if number % 2 else OnBadRows.quarantine
        try:
            settings = PrepareConfig(out=str(log), events=events, on_bad_rows=bad_rows, progress=False)
            prepare(settings, parser=PARSER)
            counts["taken"] += 1
            assert EventLog.open(log).num_events > 0
        except DataError as error:
            counts["refused"] += 1
            assert str(error).startswith(str(folder)) and "\n" not in str(error) and not log.exists()
        file.write_bytes(whole)
        shutil.rmtree(log, ignore_errors=True)
    assert counts["refused"] > 2
