"""Losses against numbers worked out by hand."""

import pytest
import torch

from qtool.methods.undem.losses import edge_loss, edge_strength, mean_of_kept, restoration_loss
from qtool.models import demoire


def test_a_flat_picture_has_no_edges():
    assert float(edge_strength(torch.full((1, 3, 5, 5), 0.7)).abs().max()) < 1e-6


def test_an_impulse_leaves_both_kernels():
    x = torch.zeros(1, 3, 5, 5)
    x[0, 1, 2, 2] = 1.0
    strength = edge_strength(x)[0, 0]
    # |k1| + |k2|, turned by 180 degrees: (2+0, 1+1, 0+2; 1+1, 0, 1+1; ...).
    expected = torch.tensor([[2.0, 2.0, 2.0], [2.0, 0.0, 2.0], [2.0, 2.0, 2.0]])
    torch.testing.assert_close(strength, expected)
    assert float(edge_loss(x, torch.zeros_like(x))) == pytest.approx(16 / (3 * 25))


def test_scales_are_summed_in_any_order():
    target = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    outputs = [target + 0.1, torch.nn.functional.avg_pool2d(target, 2) + 0.2]
    losses = restoration_loss(outputs, target, edge_weight=0.0)
    turned = restoration_loss(outputs[::-1], target, edge_weight=0.0)
    assert losses.shape == (2,)
    torch.testing.assert_close(losses, turned)
    assert float(losses[0]) == pytest.approx(0.3, abs=0.03)


def test_what_is_left_out_does_not_thin_the_mean():
    losses = torch.tensor([1.0, 5.0, 3.0])
    assert float(mean_of_kept(losses, torch.tensor([1.0, 0.0, 1.0]))) == 2.0


def test_leaving_a_picture_alone_costs_nothing_at_any_scale():
    picture = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    outputs = demoire.build("esdnet_s")(picture)
    assert len(outputs) == 3
    torch.testing.assert_close(
        restoration_loss(outputs, picture), torch.zeros(2), atol=1e-5, rtol=0
    )
