"""What a labeled task reads of a candidate's counters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vista.counters.counter_codes import MAX_CODE
from vista.model.candidate_counters import CandidateCounters

NUM_VALUES, WIDTH, NUM_TASKS = 4, 6, 2


@pytest.fixture
def counters() -> CandidateCounters:
    """With drawn weights."""
    torch.manual_seed(0)
    module = CandidateCounters(NUM_VALUES, WIDTH, NUM_TASKS).double()
    for weight in module.parameters():
        torch.nn.init.normal_(weight)
    return module.requires_grad_(False)


@pytest.fixture
def codes() -> Tensor:
    """uint8 [50, F + 1] of counted candidates."""
    return torch.randint(1, MAX_CODE + 1, (50, NUM_VALUES + 1), generator=torch.Generator().manual_seed(1)).byte()


def test_the_rows_of_codes_add_up_to_what_is_added(counters: CandidateCounters, codes: Tensor) -> None:
    rows = counters.of_each_code().view(NUM_VALUES, MAX_CODE + 1, WIDTH)
    sums = torch.stack([rows[column, codes[:, column].long()] for column in range(NUM_VALUES)]).sum(0)
    torch.testing.assert_close(sums, counters(codes))


def test_only_logits_depend_on_the_number_of_events(counters: CandidateCounters, codes: Tensor) -> None:
    other = codes.clone()
    other[:, -1] = MAX_CODE + 1 - other[:, -1]
    changed = other[:, -1] != codes[:, -1]
    assert torch.equal(counters(other), counters(codes))
    assert ((counters.logits(other) != counters.logits(codes)).any(1) == changed).all()


def test_candidates_without_counters_get_nothing(counters: CandidateCounters) -> None:
    codes = torch.zeros(3, NUM_VALUES + 1, dtype=torch.uint8)
    assert not counters(codes).any() and not counters.logits(codes).any()


def test_nothing_is_added_before_training(codes: Tensor) -> None:
    fresh = CandidateCounters(NUM_VALUES, WIDTH, NUM_TASKS)
    assert not fresh(codes).any() and not fresh.logits(codes).any()
