"""Rotations: orthogonal, and without effect on what a network computes."""

import pytest
import torch
from torch import nn

from qtool.quant.rotation import mean_keeping_rotation, rotate_heads, rotate_stream, rotation


@pytest.mark.parametrize("width", [1, 2, 48, 192])
def test_rotation_is_orthogonal_and_the_same_every_time(width):
    turn = rotation(width)
    assert torch.allclose(turn @ turn.T, torch.eye(width, dtype=torch.float64), atol=1e-12)
    assert torch.equal(turn, rotation(width))


@pytest.mark.parametrize("width", [2, 3, 48, 192])
def test_layer_norm_commutes_with_a_rotation_that_keeps_the_mean(width):
    turn = mean_keeping_rotation(width)
    assert torch.allclose(turn @ turn.T, torch.eye(width, dtype=torch.float64), atol=1e-12)
    x = torch.randn(5, width, dtype=torch.float64)
    before = nn.functional.layer_norm(x, (width,)) @ turn.T
    assert torch.allclose(nn.functional.layer_norm(x @ turn.T, (width,)), before, atol=1e-10)


def test_an_outlier_channel_is_spread_over_all():
    x = torch.zeros(1, 192, dtype=torch.float64)
    x[0, 7] = 100.0
    assert float((x @ mean_keeping_rotation(192).T).abs().max()) < 35.0


class _Stream(nn.Module):
    """Two writers, an embedding, and readers of one and of two positions."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6, bias=False), nn.Linear(8, 6)
        self.scale = nn.Module()
        self.scale.gamma = nn.Parameter(torch.randn(6))
        self.embedding = nn.Parameter(torch.randn(1, 2, 6))
        self.norm, self.reader = nn.LayerNorm(6), nn.Linear(6, 8, bias=False)
        self.last_norm, self.last = nn.LayerNorm(12), nn.Linear(12, 3)
        for norm in (self.norm, self.last_norm):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def forward(self, x):
        x = self.first(x) + self.embedding
        x = x + self.second(self.reader(self.norm(x)).relu()) * self.scale.gamma
        return self.last(self.last_norm(x.flatten(1)))


def test_a_rotated_stream_computes_the_same():
    torch.manual_seed(0)
    network, x = _Stream().requires_grad_(False), torch.randn(5, 2, 4)
    expected = network(x)
    before = network.first.weight.clone()
    rotate_stream(
        mean_keeping_rotation(6),
        writers=[(network.first, None), (network.second, network.scale)],
        embeddings=[network.embedding],
        readers=[(network.norm, [network.reader]), (network.last_norm, [network.last])],
    )
    assert torch.allclose(network(x), expected, atol=1e-5)
    assert not torch.allclose(network.first.weight, before, atol=0.1)
    assert torch.equal(network.norm.weight, torch.ones(6))
    assert torch.equal(network.scale.gamma, torch.ones(6))
    assert network.reader.bias is not None


@pytest.mark.parametrize("bias", [True, False])
def test_queries_and_keys_turn_alike(bias):
    torch.manual_seed(0)
    qkv, x = nn.Linear(12, 36, bias=bias).requires_grad_(False), torch.randn(7, 12)
    query, key, value = (part.unflatten(1, (3, 4)) for part in qkv(x).chunk(3, dim=1))
    rotate_heads(qkv, 3)
    turned_query, turned_key, same = (p.unflatten(1, (3, 4)) for p in qkv(x).chunk(3, dim=1))
    assert torch.equal(value, same)
    assert not torch.allclose(query, turned_query, atol=0.1)
    scores = torch.einsum("ihd,jhd->hij", query, key)
    assert torch.allclose(torch.einsum("ihd,jhd->hij", turned_query, turned_key), scores, atol=1e-5)
