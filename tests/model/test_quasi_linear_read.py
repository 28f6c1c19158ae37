"""Query tokens are the targets of the quasi-linear attention operator over a history's tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vista.config import ModelConfig
from vista.config.choices import Activation, Normalization, TargetAttentionKind
from vista.model.layers import split_heads
from vista.model.quasi_linear_read import QuasiLinearRead, state_rows
from vista_kernels import accumulate_state, reference
from vista_kernels.qla_tokens import QlaTokens

HEADS, WIDTH, LAYERS = 2, 6, 3
DIM = HEADS * WIDTH
LENGTHS, QUERIES = [0, 1, 7, 40], 5
SETTINGS = [
    {"activation": Activation.silu},
    {"activation": Activation.relu, "normalization_alpha": 0.5},
    {"activation": Activation.identity, "normalization": Normalization.none},
]


def config(**options: object) -> ModelConfig:
    return ModelConfig(
        dim=DIM,
        num_heads=HEADS,
        num_layers=LAYERS,
        target_attention=TargetAttentionKind.quasi_linear,
        dropout=0.0,
        **options,  # type: ignore[arg-type]
    )


def made_read(settings: ModelConfig) -> QuasiLinearRead:
    torch.manual_seed(0)
    read = QuasiLinearRead(settings)
    for parameter in read.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return read.double()


def history_tokens() -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [L, T, H, D] of packed histories, and their offsets."""
    torch.manual_seed(1)
    key, value = torch.randn(2, LAYERS, sum(LENGTHS), HEADS, WIDTH).double()
    return key, value, torch.tensor([0, *LENGTHS]).cumsum(0)


def rows_of_a_record(settings: ModelConfig, key: Tensor, value: Tensor, offsets: Tensor) -> Tensor:
    """[N, L * D, M]."""
    phi = settings.activation.value
    sums = [accumulate_state(k, v, offsets, activation=phi) for k, v in zip(key, value, strict=True)]
    return state_rows(settings, torch.stack([z for z, _ in sums], 1), sums[0][1])


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_queries_are_the_targets_of_the_operator(options: dict[str, object]) -> None:
    """Read from the rows of a record, every layer equals the float64 reference over history and queries together."""
    settings = config(**options)
    read, (key, value, offsets) = made_read(settings), history_tokens()
    rows = rows_of_a_record(settings, key, value, offsets)
    assert rows.shape == (len(LENGTHS), settings.num_state_rows, DIM)
    matrices = rows.reshape(len(LENGTHS), LAYERS, HEADS, WIDTH, WIDTH)
    x = torch.randn(len(LENGTHS), QUERIES, DIM).double()
    own_query, gate, own_key, own_value = read.projections(read.norm(x)).chunk(4, -1)
    for layer in range(LAYERS):
        read_tokens = []
        for user, (start, stop) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
            of_history = key[layer, start:stop], value[layer, start:stop]
            k, v = (
                torch.cat([tokens, split_heads(own[user], HEADS)])
                for tokens, own in zip(of_history, (own_key, own_value), strict=True)
            )
            q = torch.cat([torch.zeros_like(of_history[0]), split_heads(own_query[user], HEADS)])
            tokens = QlaTokens(
                q,
                k,
                v,
                torch.tensor([0, len(q)]),
                torch.tensor([QUERIES]),
                None,
                settings.normalization.value,
                settings.normalization_alpha,
                settings.activation.value,
                settings.activation.value,
            )
            read_tokens.append(reference.quasi_linear_attention(tokens)[-QUERIES:])
        expected = read.output(x, torch.stack(read_tokens), gate)
        torch.testing.assert_close(read(x, matrices[:, layer]), expected, atol=1e-12, rtol=1e-10)


def test_gradients() -> None:
    """Of the queries, and through the rows of a record of the history's keys and values."""
    settings = config()
    read, (key, value, _) = made_read(settings), history_tokens()
    key, value = key[:1, :3].contiguous(), value[:1, :3].contiguous()
    settings.num_layers, offsets = 1, torch.tensor([0, 0, 3])

    def run(x: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = rows_of_a_record(settings, key, value, offsets)
        return read(x, rows.reshape(-1, HEADS, WIDTH, WIDTH))

    inputs = torch.randn(2, 2, DIM).double(), key, value
    assert torch.autograd.gradcheck(run, tuple(each.requires_grad_() for each in inputs))


@torch.no_grad()
def test_without_history_a_query_reads_only_itself() -> None:
    settings = config()
    read = made_read(settings)
    x, nothing = torch.randn(1, 4, DIM).double(), torch.zeros(1, HEADS, WIDTH, WIDTH).double()
    outputs = read(x, nothing)
    for query in range(4):
        torch.testing.assert_close(outputs[:, query : query + 1], read(x[:, query : query + 1], nothing))
    assert not torch.allclose(outputs, x, atol=1e-2)
