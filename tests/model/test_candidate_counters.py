"""What a labeled task reads of a candidate's counters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vista.counters.counter_codes import MAX_CODE
from vista.counters.counter_spec import CounterSpec
from vista.model.candidate_counters import CandidateCounters

WIDTH, NUM_TASKS = 6, 2
ITEMS, CATEGORIES = CounterSpec(), CounterSpec(("item", "genre"), (64, 8))


@pytest.fixture(params=[ITEMS, CATEGORIES], ids=["items", "categories"])
def counters(request: pytest.FixtureRequest) -> CandidateCounters:
    """With drawn weights."""
    torch.manual_seed(0)
    module = CandidateCounters(request.param, WIDTH, NUM_TASKS).double()
    for weight in module.parameters():
        torch.nn.init.normal_(weight)
    return module.requires_grad_(False)


@pytest.fixture
def codes(counters: CandidateCounters) -> Tensor:
    """uint8 [50, G * F + 1] of candidates, counted in every field."""
    shape = 50, counters.num_values + 1
    return torch.randint(1, MAX_CODE + 1, shape, generator=torch.Generator().manual_seed(1)).byte()


def test_the_rows_of_codes_add_up_to_what_is_added(counters: CandidateCounters, codes: Tensor) -> None:
    """Also for candidates that only some fields count."""
    codes[:10, : counters.num_columns] = 0
    codes[10:20, -1 - counters.num_columns :] = 0
    rows = counters.of_each_code().view(-1, MAX_CODE + 1, WIDTH)
    sums = torch.stack([rows[column, codes[:, column].long()] for column in range(counters.num_values)]).sum(0)
    torch.testing.assert_close(sums, counters(codes))


def test_only_logits_depend_on_the_number_of_events(counters: CandidateCounters, codes: Tensor) -> None:
    other = codes.clone()
    other[:, -1] = MAX_CODE + 1 - other[:, -1]
    changed = other[:, -1] != codes[:, -1]
    assert torch.equal(counters(other), counters(codes))
    assert ((counters.logits(other) != counters.logits(codes)).any(1) == changed).all()


def test_candidates_without_counters_get_nothing(counters: CandidateCounters) -> None:
    codes = torch.zeros(3, counters.num_values + 1, dtype=torch.uint8)
    assert not counters(codes).any() and not counters.logits(codes).any()


def test_a_candidate_of_a_counted_category_gets_something() -> None:
    torch.manual_seed(1)
    module = CandidateCounters(CATEGORIES, WIDTH, NUM_TASKS)
    for weight in module.parameters():
        torch.nn.init.normal_(weight)
    codes = torch.zeros(1, module.num_values + 1, dtype=torch.uint8)
    codes[0, module.num_columns :] = 9
    assert module(codes).all() and module.logits(codes).all()


def test_nothing_is_added_before_training(counters: CandidateCounters, codes: Tensor) -> None:
    spec = ITEMS if counters.num_columns == counters.num_values else CATEGORIES
    fresh = CandidateCounters(spec, WIDTH, NUM_TASKS)
    assert not fresh(codes).any() and not fresh.logits(codes).any()
