"""What training has kernels for: the same values and gradients as PyTorch's many passes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.engine import dispatch, training
from qtool.methods.spdfq import losses

pytest.importorskip("triton", reason="Triton is not installed here")


def with_gradients(function, *inputs):
    """A result, summed with different weights, and its gradients."""
    inputs = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    y = function(*inputs)
    weights = torch.linspace(-1.0, 2.0, y.numel(), device=y.device).view(y.shape).to(y.dtype)
    (y * weights).sum().backward()
    return [y.detach(), *(x.grad for x in inputs)]


def both(function, *inputs):
    """With kernels and without."""
    with dispatch.use_backend("triton"):
        assert training.has_kernels(inputs[0].device)
        fused = with_gradients(function, *inputs)
    with dispatch.use_backend("reference"):
        assert not training.has_kernels(inputs[0].device)
        return fused, with_gradients(function, *inputs)


@pytest.mark.parametrize("shape", [(1,), (37,), (3, 5, 7, 11), (2, 2500)])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("last", [False, True])
def test_counting_in_learnt_steps(shape, bits, last, device):
    generator = torch.Generator().manual_seed(bits)
    x, step = torch.randn(shape, generator=generator), torch.tensor(1.7 / 2**bits)
    x.view(-1)[0] = float(step) * 2.5  # between two levels
    if last and len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    fused, plain = both(
        lambda x, step: training.count_levels(x, step, 2**bits - 1), x.to(device), step.to(device)
    )
    assert fused[0].stride() == plain[0].stride()
    assert torch.equal(fused[0], plain[0])
    assert torch.equal(fused[1], plain[1])
    torch.testing.assert_close(fused[2], plain[2], rtol=1e-4, atol=1e-4)


def test_counting_keeps_half_precision(device):
    x = torch.linspace(-1, 5, 1001, device=device).bfloat16()
    step = torch.tensor(0.25, device=device)
    fused, plain = both(lambda x, step: training.count_levels(x, step, 15), x, step)
    assert fused[0].dtype == fused[1].dtype == torch.bfloat16
    assert torch.equal(fused[0], plain[0])
    assert torch.equal(fused[1], plain[1])
    torch.testing.assert_close(fused[2], plain[2], rtol=1e-2, atol=0.1)


def test_a_step_learns_the_same_every_time(device):
    x = torch.randn(9999, generator=torch.Generator().manual_seed(0)).to(device)
    step = torch.tensor(0.3, device=device)
    with dispatch.use_backend("triton"):
        runs = [
            with_gradients(lambda x, step: training.count_levels(x, step, 7), x, step)
            for _ in range(2)
        ]
    assert torch.equal(runs[0][2], runs[1][2])


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 3),
    count=st.integers(1, 4100),
    points=st.integers(1, 12),
    bandwidth=st.floats(0.01, 0.5),
    seed=st.integers(0, 99),
)
def test_sums_of_kernels(rows, count, points, bandwidth, seed):
    generator = torch.Generator().manual_seed(seed)
    values = 2 * torch.rand(rows, count, generator=generator) - 1
    places = torch.linspace(-1, 1, points)

    def plain(values):
        away = (values[:, :, None].double() - places.double()) / bandwidth
        return torch.exp(-0.5 * away.square()).sum(dim=1)

    with dispatch.use_backend("triton"):
        fused = with_gradients(
            lambda values: training.kernel_sums(values, places, bandwidth), values
        )
    expected = with_gradients(plain, values.double())
    torch.testing.assert_close(fused[0].double(), expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fused[1].double(), expected[1], rtol=1e-3, atol=1e-3 / bandwidth)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 49), (2, 5, 197)])
def test_distances_of_rows(shape, device):
    generator = torch.Generator().manual_seed(0)
    whole = torch.rand(*shape[:2], 3, shape[2] + 1, generator=generator).to(device)
    target = torch.rand(shape, generator=generator).to(device)
    x = whole[:, :, 1, 1:]  # what a class token sees: steps between rows, and a prefix

    def plain(x):
        away = x - target * x.detach().sum(dim=-1, keepdim=True)
        return away.square().sum(dim=-1)

    with dispatch.use_backend("triton"):
        view = whole.detach().clone().requires_grad_(True)
        found = training.row_distances(view[:, :, 1, 1:], target)
        (found * torch.linspace(1, 2, found.numel(), device=device).view_as(found)).sum().backward()
    other = whole.detach().clone().requires_grad_(True)
    expected = plain(other[:, :, 1, 1:])
    weights = torch.linspace(1, 2, expected.numel(), device=device).view_as(expected)
    (expected * weights).sum().backward()
    assert not x.is_contiguous() or shape == (1, 1, 1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(view.grad, other.grad)


def test_losses_of_synthesis_are_the_same(device):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(2, 50, 16, generator=generator).to(device)
    fused, plain = both(losses.patch_similarity_entropy, tokens)
    torch.testing.assert_close(fused[0], plain[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fused[1], plain[1], rtol=1e-2, atol=1e-4)
    attention = torch.randn(2, 3, 49, generator=generator).softmax(dim=-1).to(device)
    prior = torch.randn(2, 3, 49, generator=generator).softmax(dim=-1).to(device)
    fused, plain = both(lambda x: losses.alignment(x, prior), attention)
    torch.testing.assert_close(fused[0], plain[0])
    torch.testing.assert_close(fused[1], plain[1])


def test_a_cpu_takes_kernels_only_where_it_is_told_to():
    assert not training.has_kernels(torch.device("cpu"))
    with dispatch.use_backend("cpu"):
        assert not training.has_kernels(torch.device("cpu"))
    assert math.isfinite(float(training.count_levels(torch.ones(3), torch.tensor(0.5), 3).sum()))
